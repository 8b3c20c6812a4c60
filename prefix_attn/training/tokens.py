"""Turn examples into rows of tokens, and rows into padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefix_attn.hf.attach.infix import IGNORED
from prefix_attn.training.chat import Chat, TooLong
from prefix_attn.training.examples import BadRows, Example, Message
from prefix_attn.training.prompts import Prompt, plain_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT = Prompt()

Row = dict[str, list[int]]  # input_ids, and labels where there is something to predict
Batch = dict[str, Tensor]  # padded rows with their attention_mask


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, source: str | Sequence[Message], prompt: Prompt = DEFAULT
) -> list[int]:
    """Tokens of the prompt. Training and generation must both use these.

    Raises:
        ValueError: ``source`` is a conversation and ``prompt`` is no chat, or the tokenizer has no chat template.
    """
    if prompt.is_chat:
        chat = Chat(tokenizer, prompt)
        return chat.prompt_ids(chat.messages(source))[0]
    if not isinstance(source, str):
        raise ValueError(f"a conversation needs --template chat, got {prompt.template!r}")
    return prompt.ids(tokenizer, source)


def source_ids(tokenizer: PreTrainedTokenizerBase, source: str, *, special_tokens: bool = False) -> list[int]:
    """Tokens of an encoder's input: only the source, with the special tokens that the tokenizer adds.

    Raises:
        NotImplementedError: the tokenizer adds a language token, and the data do not name a language.
    """
    if hasattr(tokenizer, "tgt_lang"):
        name = type(tokenizer).__name__
        raise NotImplementedError(f"{name} begins or ends texts with a language, which the data do not name")
    return tokenizer(source, split_special_tokens=not special_tokens, verbose=False)["input_ids"]


def shortened(source: list[int], length: int, tail: int = 1) -> list[int]:
    """Cut ``source`` to ``length`` tokens. Keep its last ``tail``: a special token, or the end of the prompt."""
    return source if len(source) <= length else source[: length - tail] + source[len(source) - tail :]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    max_length: int = 96,
    *,
    encoder_decoder: bool = False,
    prompt: Prompt = DEFAULT,
    skip_bad_rows: bool = False,
) -> tuple[list[Row], int]:
    """All rows of an ``Encoder``, and how many were cut.

    Raises:
        ValueError: as ``Encoder`` and its ``rows``.
    """
    encoder = Encoder(tokenizer, max_length, encoder_decoder=encoder_decoder, prompt=prompt)
    return list(encoder.rows(examples, skip_bad_rows=skip_bad_rows)), encoder.cut


class Encoder:
    """Makes one row of tokens for each reference. Only the target and the end of the text have a loss.

    The text of a row is the prompt and the target. If it is too long, the end of the source is cut, never the target: a
    model that never sees the end does not learn to stop. Of a conversation every answer has a loss. For an
    encoder-decoder, ``input_ids`` is the source and ``labels`` the target, each of at most ``max_length`` tokens.

    Attributes:
        cut: how many rows were cut.
        cut_most: by how many tokens at most.
        longest: tokens of the longest row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        encoder_decoder: bool = False,
        prompt: Prompt = DEFAULT,
    ) -> None:
        """See the class.

        Raises:
            ValueError: the tokenizer lacks an end-of-text token or the chat template, or an encoder-decoder is to chat.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token (eos_token)")
        if encoder_decoder and prompt.template != DEFAULT.template:
            raise ValueError(f"an encoder reads the source alone: it takes no template, got {prompt.template!r}")
        self.tokenizer, self.max_length, self.prompt = tokenizer, max_length, prompt
        self.cut = self.cut_most = self.longest = 0
        self._chat = Chat(tokenizer, prompt) if prompt.is_chat else None
        self._tail = 0 if prompt.is_chat or encoder_decoder else prompt.tail(tokenizer)
        self._make = self._encoder_decoder_rows if encoder_decoder else self._text_rows
        if self._chat is not None:
            self._make = self._chat_rows

    def rows(self, examples: Iterable[Example], *, skip_bad_rows: bool = False, name: str = "data") -> Iterator[Row]:
        """Rows of all ``examples``, one example at a time. Messages call them ``name``.

        Raises:
            ValueError: targets do not fit even without their sources, or the chat template refuses a conversation, and
                these are not to be skipped. All are counted first.
            NotImplementedError: see ``source_ids``.
        """
        bad, needed = BadRows(name, "example"), 0
        for number, example in enumerate(examples, start=1):
            try:
                made = self._make(example)
            except TooLong as error:
                bad.add(number, error.reason, error.detail)
                needed = max(needed, error.needed)
            except ValueError as error:
                bad.add(number, str(error))
            else:
                bad.good += 1
                self.longest = max([self.longest, *(len(tokens) for row in made for tokens in row.values())])
                yield from made
        if not bad.count:
            return
        try:
            bad.settle(skip=skip_bad_rows)
        except ValueError as error:
            longest = f"; max_length={needed} takes all" if needed and bad.count > 1 else ""
            raise ValueError(f"{error}{longest}") from None

    def _note(self, left_out: Sequence[int]) -> None:
        """Note how many tokens of some rows were left out."""
        self.cut += sum(tokens > 0 for tokens in left_out)
        self.cut_most = max([self.cut_most, *left_out])

    def _encoder_decoder_rows(self, example: Example) -> list[Row]:
        if example.messages:
            raise ValueError("an encoder-decoder takes rows with a source and a target, not 'messages'")
        rows, special = [], self.prompt.special_tokens
        source = source_ids(self.tokenizer, example.source, special_tokens=special)
        kept = shortened(source, self.max_length)
        for reference in example.references:
            target = self.tokenizer(text_target=reference, split_special_tokens=not special, verbose=False)["input_ids"]
            if target[-1:] != [self.tokenizer.eos_token_id]:  # not all tokenizers add it
                target = [*target, self.tokenizer.eos_token_id]
            if len(target) > self.max_length:
                raise TooLong(self.max_length, len(target), reference)
            rows.append({"input_ids": kept, "labels": target})
        self._note([len(source) - len(kept)] * len(rows))
        return rows

    def _text_rows(self, example: Example) -> list[Row]:
        if example.messages:
            raise ValueError(f"'messages' need --template chat, got {self.prompt.template!r}")
        rows, left_out, special = [], list[int](), self.prompt.special_tokens
        prompt = self.prompt.ids(self.tokenizer, example.source)
        for reference in example.references:
            target = plain_ids(self.tokenizer, self.prompt.lead + reference, special_tokens=special)
            target = [*target, self.tokenizer.eos_token_id]
            room = self.max_length - len(target) - self._tail
            if room < 0:
                raise TooLong(self.max_length, len(target) + self._tail, reference)
            kept = shortened(prompt, room + self._tail, self._tail)
            left_out.append(len(prompt) - len(kept))
            rows.append({"input_ids": kept + target, "labels": [IGNORED] * len(kept) + target})
        self._note(left_out)
        return rows

    def _chat_rows(self, example: Example) -> list[Row]:
        assert self._chat is not None
        rows, left_out = list[Row](), list[int]()
        for reference in example.references:
            found, some = self._chat.rows(self._chat.messages(example, reference), self.max_length)
            left_out += some
            for row in found:
                ids = [token for token, _ in row]
                rows.append({"input_ids": ids, "labels": [token if mine else IGNORED for token, mine in row]})
        self._note(left_out)
        return rows


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
