"""Prompts of requests as tokens, and how many tokens may follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.chat import Chat
from prefix_attn.training.positions import positions_of
from prefix_attn.training.prompts import Prompt, special_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 1 << 20  # tokens, of models that name no limit


def limit_of(model: PrefixModel) -> int:
    """The number of positions that a model has."""
    return positions_of(model) or UNLIMITED


def shift_of(model: PrefixModel, prefix: str | None) -> int:
    """How many positions a prefix takes."""
    return model.prefix_configs[prefix].shift if prefix is not None else 0


class Prompts:
    """Turns what clients send into tokens.

    Attributes:
        defaults: how the model's generation_config draws tokens; requests may say otherwise.
    """

    def __init__(self, model: PrefixModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a causal model and its tokenizer."""
        self.model, self.tokenizer = model, tokenizer
        self._chat, self._no_chat = None, ""
        try:
            self._chat = Chat(tokenizer, Prompt(template="chat"))
        except ValueError as error:  # texts are served all the same
            self._no_chat = str(error)
        config = model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
        self._ends: tuple[int, ...] = tuple(ends) if isinstance(ends, list) else (ends,)
        drawn = ("temperature", "top_p", "top_k", "min_p") if config.do_sample else ()
        values = {name: getattr(config, name, None) for name in (*drawn, "repetition_penalty")}
        self.defaults = {name: value for name, value in values.items() if value is not None}

    def text(self, prompt: str | list[int]) -> list[int]:
        """Tokens of a text, with those that the tokenizer puts around one.

        Raises:
            ValueError: it is empty, or holds ids that are no tokens.
        """
        if isinstance(prompt, str):
            prompt = list(self.tokenizer(prompt)["input_ids"])
        if not prompt:
            raise ValueError("the prompt is empty: give a text")
        size = self.model.config.get_text_config().vocab_size
        if wrong := next((token for token in prompt if not 0 <= token < size), None):
            raise ValueError(f"{wrong} is no token of this model: its tokens are 0 to {size - 1}")
        return prompt

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Tokens of a conversation that the model is to answer.

        Raises:
            ValueError: there is no chat template that can be used, or it refuses the messages.
        """
        if self._chat is None:
            raise ValueError(f"there are no chats with this model, use /v1/completions: {self._no_chat}")
        return self._chat.prompt_ids(messages)[0]

    def stop_ids(self, stops: Sequence[str], *, chat: bool) -> tuple[int, ...]:
        """Tokens that end an output. Special tokens are in no output's text, so those among ``stops`` are tokens."""
        special = sorted(set(stops) & set(special_names(self.tokenizer)))
        chats = self._chat.stop_ids if chat and self._chat else ()
        return (*self._ends, *chats, *self.tokenizer.convert_tokens_to_ids(special))

    def room(self, prompt: Sequence[int], prefix: str | None, wanted: int | None) -> int:
        """How many tokens may follow, at most ``wanted``.

        Raises:
            ValueError: the prompt, or the prompt and what is wanted, do not fit into the model's positions.
        """
        limit, taken = limit_of(self.model), shift_of(self.model, prefix)
        room = limit - taken - len(prompt)
        if room < (wanted or 1):
            behind = f" behind a prefix of {taken}" if taken else ""
            raise ValueError(
                f"the model has {limit} positions: a prompt of {len(prompt)} tokens{behind} leaves room for "
                f"{max(room, 0)}, and {wanted or 1} were asked for"
            )
        return room if wanted is None else wanted
