"""One generation that a client waits for: its prompt, how its tokens are chosen, and what was written so far."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from prefix_attn.training.decoding import COLDEST, first_of
from prefix_attn.training.generate import warpers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer writes for a character whose last bytes are still to come


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when they end, in OpenAI's words and vLLM's.

    Attributes:
        max_tokens: limit of the output.
        temperature: logits are divided by it. 0 takes the likeliest token.
        top_p: draw from the likeliest tokens whose probabilities add up to this.
        top_k: draw from this many of the likeliest tokens. 0 or less: from all.
        min_p: draw from tokens with at least this share of the likeliest one's probability.
        repetition_penalty: logits of tokens that are in the prompt or the output are divided by it, or multiplied
            where they are negative.
        seed: of what is drawn. None: another one each time.
        stop: the output ends before the first of these texts.
        stop_ids: the output ends with the first of these tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn. Else the likeliest is taken."""
        return self.temperature > COLDEST

    def warpers(self) -> LogitsProcessorList:
        """What changes the logits before a token is chosen, and where one is drawn, before that."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if not self.draws:
            return found
        top_k = self.top_k if self.top_k > 0 else None
        found.extend(warpers(self.temperature, top_k, self.top_p, self.min_p or None))
        return found


@dataclass(frozen=True)
class Piece:
    """News of a generation.

    Attributes:
        text: what was written since the last piece.
        finish_reason: "stop" or "length" in the last piece. None before it.
        error: why there will be no more.
    """

    text: str = ""
    finish_reason: str | None = None
    error: str | None = None


class Generation:
    """A prompt in the engine.

    Attributes:
        prompt: its tokens.
        prefix: the name of its prefix. None: no prefix.
        tokens: what was generated so far, with the token that ended it.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        prefix: str | None,
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase,
        listener: Callable[[Piece], Any],
    ) -> None:
        """Take a prompt. ``listener`` is called in the engine's thread."""
        self.prompt, self.prefix, self.sampling = list(prompt), prefix, sampling
        self.tokens: list[int] = []
        self._tokenizer, self._listener = tokenizer, listener
        self._sent = 0  # characters
        self._warpers = sampling.warpers()
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)
        self._over = threading.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be written."""
        return self._over.is_set()

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self.sampling.max_tokens - len(self.tokens)

    def cancel(self) -> None:
        """Stop after the token that is being made. Nobody is told."""
        self._over.set()

    def fail(self, error: str) -> None:
        """End with an error."""
        self._end(Piece(error=error))

    def choose(self, logits: Tensor) -> Tensor:
        """(V,) scores with which the likeliest token is the one that this generation takes."""
        if not self._warpers and not self.sampling.draws:
            return logits
        scores = self._warpers(torch.tensor([self.prompt + self.tokens]), logits[None].float().cpu())
        if not self.sampling.draws:
            return scores[0].to(logits)
        token = torch.multinomial(scores.softmax(-1), 1, generator=self._random)
        return torch.full_like(logits, -torch.inf).scatter(0, token[0].to(logits.device), 0.0)

    def add(self, token: int) -> None:
        """Take the next token, and tell the listener what it adds."""
        if self.is_over:
            return None
        self.tokens.append(token)
        ends = token in self.sampling.stop_ids  # not all tokenizers know their ends as special tokens
        text = self._tokenizer.decode(self.tokens[:-1] if ends else self.tokens, skip_special_tokens=True)
        if (at := first_of(text, self.sampling.stop)) is not None:
            return self._end(Piece(text[self._sent : at], "stop"))
        if ends:
            return self._end(Piece(text[self._sent :], "stop"))
        if self.left == 0:
            return self._end(Piece(text[self._sent :], "length"))
        # A character or a stop text may have begun.
        ready = len(text) - held_back(text, self.sampling.stop)
        if ready > self._sent:
            self._listener(Piece(text[self._sent : ready]))
            self._sent = ready
        return None

    def _end(self, piece: Piece) -> None:
        if not self.is_over:
            self._over.set()
            self._listener(piece)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop, or of a character."""
    whole = text.rstrip(UNFINISHED)
    begun = (n for stop in stops for n in range(1, len(stop)) if whole.endswith(stop[:n]))
    return len(text) - len(whole) + max(begun, default=0)
