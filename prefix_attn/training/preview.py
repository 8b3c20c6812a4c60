"""What a training would see and take, before it runs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from prefix_attn.hf.attach.infix import IGNORED
from prefix_attn.training.examples import Example
from prefix_attn.training.memory import longest_rows, training_memory
from prefix_attn.training.positions import check_rows
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.tokens import Encoder, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3
Parts = list[tuple[str, bool]]  # pieces of a row's text, and whether they are trained


class Preview(NamedTuple):
    """Counts over all rows, with nothing cut."""

    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    cut: int  # rows that are longer than max_length
    max_length: int
    memory: int  # bytes at the peak, by ``training_memory``
    shown: list[Parts]  # the first rows


def preview(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    settings: TrainingSettings,
    *,
    prompt: Prompt,
    skip_bad_rows: bool = False,
    bf16: bool = False,
) -> Preview:
    """Count the tokens of ``examples`` and estimate the memory that training on them takes. Nothing is written.

    Raises:
        ValueError: as ``Encoder`` and its ``rows``.
    """
    how: dict[str, bool] = {"gradient_checkpointing": settings.gradient_checkpointing, "bf16": bf16}
    if settings.max_length is not None:
        check_rows(model, settings.max_length)
    limit = settings.max_length or longest_rows(model, settings.batch_size, **how)[0]
    seq2seq = bool(model.config.is_encoder_decoder)
    encoder = Encoder(tokenizer, sys.maxsize, encoder_decoder=seq2seq, prompt=prompt)
    count = tokens = trained = longest = cut = 0
    shown: list[Parts] = []
    for row in encoder.rows(examples, skip_bad_rows=skip_bad_rows):
        sides = (row["input_ids"], row["labels"]) if seq2seq else (row["input_ids"],)
        length = max(map(len, sides))
        count, tokens, longest = count + 1, tokens + sum(map(len, sides)), max(longest, length)
        trained += sum(label != IGNORED for label in row["labels"])
        cut += length > limit
        if len(shown) < SHOWN:
            shown.append(_parts(tokenizer, row, seq2seq))
    peak = training_memory(model, **how).total(settings.batch_size, min(longest, limit))
    max_length = settings.max_length or min(longest, limit)
    return Preview(count, tokens, trained, longest, cut, max_length, peak, shown)


def _parts(tokenizer: PreTrainedTokenizerBase, row: Row, seq2seq: bool) -> Parts:
    if seq2seq:
        return [(tokenizer.decode(row["input_ids"]), False), (tokenizer.decode(row["labels"]), True)]
    pairs = zip(row["input_ids"], row["labels"])
    groups = itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [(tokenizer.decode([token for token, _ in group]), trained) for trained, group in groups]
