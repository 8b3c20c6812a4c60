"""Turn examples into rows of tokens, and rows into padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefix_attn.hf.attach.infix import IGNORED
from prefix_attn.training.data import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The space after the arrow is part of the target's first token, " The". Models have learnt words with a leading space,
# and a space by itself is rare. On E2E this is worth 0.2 nats per token without any training.
PROMPT = "{source}\n=>"

Row = dict[str, list[int]]  # input_ids, and labels where there is something to predict
Batch = dict[str, Tensor]  # padded rows with their attention_mask


def prompt_ids(tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
    """Tokens of the prompt. Training and generation must both use these."""
    return tokenizer(PROMPT.format(source=source), add_special_tokens=False)["input_ids"]


def source_ids(tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
    """Tokens of an encoder's input: only the source, with the special tokens that the tokenizer adds.

    Raises:
        NotImplementedError: the tokenizer adds a language token, and the data do not name a language.
    """
    if hasattr(tokenizer, "tgt_lang"):
        name = type(tokenizer).__name__
        raise NotImplementedError(f"{name} begins or ends texts with a language, which the data do not name")
    return tokenizer(source, verbose=False)["input_ids"]


def shortened(source: list[int], length: int, tail: int = 1) -> list[int]:
    """Cut ``source`` to ``length`` tokens. Keep its last ``tail``: a special token, or the end of the prompt."""
    return source if len(source) <= length else source[: length - tail] + source[len(source) - tail :]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    max_length: int = 96,
    *,
    encoder_decoder: bool = False,
) -> tuple[list[Row], int]:
    """Make one row of tokens for each reference. Only the target and the end of the text have a loss.

    The text of a row is the prompt, a space and the target. If it is too long, the end of the source is cut, never the
    target: a model that never sees the end does not learn to stop. For an encoder-decoder, ``input_ids`` is the source
    and ``labels`` the target, each of at most ``max_length`` tokens.

    Returns:
        The rows (``input_ids`` and ``labels``), and how many were cut.

    Raises:
        ValueError: a target does not fit even without its source.
        NotImplementedError: see ``source_ids``.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token)")
    rows = _encoder_decoder_rows if encoder_decoder else _causal_rows
    return rows(tokenizer, examples, max_length)


def _encoder_decoder_rows(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], max_length: int
) -> tuple[list[Row], int]:
    rows, cut, end = [], 0, tokenizer.eos_token_id
    for example in examples:
        source = source_ids(tokenizer, example.source)
        kept = shortened(source, max_length)
        for reference in example.references:
            target = tokenizer(text_target=reference, verbose=False)["input_ids"]
            if target[-1:] != [end]:  # not all tokenizers add it
                target = [*target, end]
            if len(target) > max_length:
                raise ValueError(
                    f"max_length={max_length} is too short for the target {reference!r}: needs {len(target)}"
                )
            cut += len(kept) < len(source)
            rows.append({"input_ids": kept, "labels": target})
    return rows, cut


def _causal_rows(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], max_length: int
) -> tuple[list[Row], int]:
    tail = len(prompt_ids(tokenizer, ""))
    rows, cut = [], 0
    for example in examples:
        prompt = prompt_ids(tokenizer, example.source)
        for reference in example.references:
            target = tokenizer(f" {reference}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            room = max_length - len(target) - tail
            if room < 0:
                needed = len(target) + tail
                raise ValueError(f"max_length={max_length} is too short for the target {reference!r}: needs {needed}")
            kept = shortened(prompt, room + tail, tail)
            cut += len(kept) < len(prompt)
            rows.append({"input_ids": kept + target, "labels": [IGNORED] * len(kept) + target})
    return rows, cut


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """One batch of ``rows``, padded on the right. It has labels if the rows have them."""

    def padded(values: list[list[int]], fill: int) -> Tensor:
        width = max(len(value) for value in values)
        return torch.tensor([value + [fill] * (width - len(value)) for value in values])

    ids = [row["input_ids"] for row in rows]
    batch = {"input_ids": padded(ids, pad_id), "attention_mask": padded([[1] * len(row) for row in ids], 0)}
    if "labels" in rows[0]:
        batch["labels"] = padded([row["labels"] for row in rows], IGNORED)
    return batch


def batches(rows: Sequence[Row], size: int, pad_id: int) -> list[Batch]:
    """All ``rows`` in their order, ``size`` per batch."""
    return [collate(rows[i : i + size], pad_id) for i in range(0, len(rows), size)]


@dataclass(frozen=True)
class Collator:
    """``collate`` as a Trainer's ``data_collator``."""

    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """One batch of ``rows``."""
        return collate(rows, self.pad_id)
