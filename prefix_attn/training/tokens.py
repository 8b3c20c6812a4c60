"""Rows of tokens: what a model trains on, of the examples that ``data`` reads."""

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

# The space after the arrow belongs to the target's first token, " The": such words are what models have learnt, a space
# by itself is rare. Without any training that is worth 0.2 nats a token on E2E.
PROMPT = "{source}\n=>"

Row = dict[str, list[int]]  # input_ids, and labels where there is something to predict
Batch = dict[str, Tensor]  # padded rows with their attention_mask


def prompt_ids(tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
    """Tokens of the prompt; training and generation must both use these."""
    return tokenizer(PROMPT.format(source=source), add_special_tokens=False)["input_ids"]


def source_ids(tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
    """Tokens of an encoder's input: the source alone, with the special tokens that the tokenizer puts around a text.

    Raises:
        NotImplementedError: these name a language, which nothing here says.
    """
    if hasattr(tokenizer, "tgt_lang"):
        name = type(tokenizer).__name__
        raise NotImplementedError(f"{name} begins or ends texts with a language, which the data do not name")
    return tokenizer(source, verbose=False)["input_ids"]


def shortened(source: list[int], length: int, tail: int = 1) -> list[int]:
    """At most ``length`` tokens; the last ``tail``, a special one or the end of the prompt's frame, stay."""
    return source if len(source) <= length else source[: length - tail] + source[len(source) - tail :]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    max_length: int = 96,
    *,
    encoder_decoder: bool = False,
) -> tuple[list[Row], int]:
    """Rows of tokens, one for each reference, with loss on the target and the end of the text alone.

    The text of a row is the prompt, a space and the target. One that is too long loses the end of its source, never of
    its target: a model that does not see the end does not learn to stop. For an encoder-decoder the source is
    ``input_ids`` and the target ``labels``, each of at most ``max_length`` tokens.

    Returns:
        The rows (``input_ids`` and ``labels``), and how many were cut.

    Raises:
        ValueError: a target does not fit even without its source. NotImplementedError: as ``source_ids``.
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
