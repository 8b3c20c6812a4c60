"""How the tokens of an output are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLDEST = 1e-5  # logits that are divided by less overflow


@dataclass(frozen=True)
class Decoding:
    """How the tokens of an output are chosen, in the words of transformers.

    Attributes:
        num_beams: 1 takes the likeliest token each time, unless tokens are drawn.
        length_penalty: beams are ranked by log-likelihood divided by length to this power.
        max_new_tokens: limit of each output.
        temperature: draw tokens, with logits divided by this. 0 is None: tokens are not drawn.
        top_p: draw only from the likeliest tokens whose probabilities add up to this.
        top_k: draw only from this many of the likeliest tokens.
        seed: of what is drawn. An output depends on it, its own input and how often that came before, not on the
            others.
        stop: an output ends before the first of these texts.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    max_new_tokens: int = 48
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise a ValueError for what cannot be decoded."""
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature:g}")
        if self.temperature is not None and 0 < self.temperature < COLDEST:
            raise ValueError(f"temperature must be 0 or at least {COLDEST:g}, got {self.temperature:g}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be between 0 and 1, such as 0.9, got {self.top_p:g}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.temperature == 0 and (self.top_p, self.top_k) != (None, None):
            raise ValueError("temperature 0 draws nothing, so that it takes no top_p and top_k")
        if self.draws and self.num_beams > 1:
            raise ValueError(f"temperature, top_p and top_k need num_beams 1, got {self.num_beams}")
        if "" in self.stop:
            raise ValueError("stop must be a text of at least one character, got ''")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random."""
        return bool(self.temperature) or self.top_p is not None or self.top_k is not None

    def until_stop(self, text: str) -> str:
        """``text`` before the first text of ``stop``."""
        return text[: first_of(text, self.stop)]


def first_of(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of ``stops`` begins in ``text``."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
