"""Conversations as tokens, by the chat template of a tokenizer, and which of them are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from prefix_attn.quoting import shortened
from prefix_attn.training.examples import Example, Message
from prefix_attn.training.prompts import Prompt, held_tokens, hold, literal_ids, special_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = tuple[str, bool]  # a piece of a conversation's text, and whether the assistant writes it
Token = TypeVar("Token")
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat:
    """The chat template of a tokenizer.

    A conversation is tokenised in parts, which begin and end with an answer. So the tokens of a prompt are the first
    tokens of the conversation that training sees.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
        """Take the template.

        Raises:
            ValueError: the tokenizer has none.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template, which rows with 'messages' and --template chat need: take a chat "
                "model, or rows with a source and a target and a --template such as '{source}\\n=>'"
            )
        self.tokenizer, self.prompt = tokenizer, prompt
        self._has_markers = bool(_MARKERS.search(tokenizer.get_chat_template()))
        answer = self.tokens(self._last([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), {})
        names = special_names(tokenizer)
        ends = {token for token, mine in answer if mine and tokenizer.convert_ids_to_tokens(token) in names}
        self.stop_ids: list[int] = sorted(ends | {tokenizer.eos_token_id})

    def messages(self, example: Example | str | Sequence[Message], answer: str | None = None) -> list[Message]:
        """The messages of an example or a prompt, with the system's where they have none, and an answer to them."""
        given = example.prompt if isinstance(example, Example) else example
        messages: list[Message] = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
        if self.prompt.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.prompt.system})
        return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]

    def prompt_ids(self, messages: Sequence[Message], length: int | None = None) -> tuple[list[int], bool]:
        """Tokens of a conversation that the assistant is to continue, and whether it was cut as in ``rows``.

        Raises:
            ValueError: the template refuses the messages, or takes more than ``length`` tokens by itself.
        """
        held, messages = self._held(messages)

        def ids(some: Sequence[Message]) -> list[int]:
            parts = self._parts(some, asks=True) or [(self._text(some, asks=True), False)]
            return [token for token, _ in self.tokens(parts, held)]

        found, left_out = _fitted(messages, -1, ids, length)
        return found, left_out > 0

    def rows(self, messages: Sequence[Message], length: int) -> tuple[list[list[tuple[int, bool]]], list[int]]:
        """Tokens of a conversation that ends with an answer, each with whether it has a loss.

        One row, or one for each answer where the template writes earlier answers otherwise than the last. A row that is
        too long loses its first exchanges, then the end of the text that its last answer answers.

        Returns:
            The rows, and how many tokens were left out of each.

        Raises:
            ValueError: the template refuses the messages, or the answer does not fit into ``length``.
        """
        held, messages = self._held(messages)

        def row(some: Sequence[Message]) -> list[tuple[int, bool]]:
            tokens = self.tokens(((self._parts(some) if whole else None) or self._last(some)), held)
            ends = any(token in self.stop_ids for token, mine in tokens if mine)
            return tokens if ends else [*tokens, (self.tokenizer.eos_token_id, True)]

        whole = self._parts(messages) is not None
        turns = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
        found = [_fitted(messages[: i + 1], -2, row, length) for i in (turns[-1:] if whole else turns)]
        return [tokens for tokens, _ in found], [left_out for _, left_out in found]

    def tokens(self, parts: Sequence[Part], held: Mapping[str, str]) -> list[tuple[int, bool]]:
        """Tokens of ``parts``, each with whether it is the assistant's."""
        return [(token, mine) for text, mine in parts for token in literal_ids(self.tokenizer, text, held)]

    def _held(self, messages: Sequence[Message]) -> tuple[dict[str, str], list[Message]]:
        """Characters for the special tokens that the texts name, and the messages with these in their place."""
        texts = "\n".join(str(message.get("content")) for message in messages)
        held = {} if self.prompt.special_tokens else held_tokens(self.tokenizer, texts)
        if not held:
            return {}, list(messages)

        def kept(content: Any) -> Any:
            return hold(content, held) if isinstance(content, str) else content

        return held, [{**message, "content": kept(message.get("content"))} for message in messages]

    def _parts(self, messages: Sequence[Message], *, asks: bool = False) -> list[Part] | None:
        """The text of a conversation in parts. None if the template does not write it part by part."""
        text, spans = self._text(messages, asks=asks), list[tuple[int, int]]()
        if self._has_markers:
            spans = self._marked(messages, asks=asks)
        else:
            for i, message in enumerate(messages):
                if i == 0 or message["role"] != "assistant":
                    continue
                before, after = self._text(messages[:i], asks=True), self._text(messages[: i + 1])
                if not (after.startswith(before) and text.startswith(after)):
                    return None
                spans.append((len(before), self._end(after)))
        parts, at = [], 0
        for start, end in spans:
            parts += [(text[at:start], False), (text[start:end], True)]
            at = end
        return [(part, mine) for part, mine in [*parts, (text[at:], False)] if part]

    def _last(self, messages: Sequence[Message]) -> list[Part]:
        """The text before the last answer, and the answer."""
        if self._has_markers and (marked := self._parts(messages)):
            return marked
        before, after = self._text(messages[:-1], asks=True), self._text(messages)
        if not after.startswith(before):
            raise ValueError(
                "the chat template writes an answer otherwise than it asks for one, so that it does not show where "
                "answers begin: take a template with {% generation %} around them"
            )
        end = self._end(after)
        return [part for part in ((before, False), (after[len(before) : end], True), (after[end:], False)) if part[0]]

    def _end(self, text: str) -> int:
        """Where the answer at the end of ``text`` ends: behind a special token, white space is the template's."""
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(tuple(special_names(self.tokenizer))) else len(text)

    def _text(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks)
        except (TemplateError, TypeError) as error:  # such as a text that is added to None
            raise ValueError(f"the chat template refuses the messages: {shortened(error)}") from None

    def _marked(self, messages: Sequence[Message], *, asks: bool) -> list[tuple[int, int]]:
        """Where text between {% generation %} and {% endgeneration %} is, as return_assistant_tokens_mask finds it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, (spans,) = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            add_generation_prompt=asks,
            **self.tokenizer.special_tokens_map,
        )
        return spans


class TooLong(ValueError):
    """A target does not fit into a row, even without its source."""

    def __init__(self, length: int, needed: int, target: str) -> None:
        """``needed`` tokens would do."""
        self.reason, self.needed = f"max_length={length} is too short for the target", needed
        self.detail = f" {target!r:.60}: needs {needed}"
        super().__init__(self.reason + self.detail)


def _fitted(
    messages: Sequence[Message], asked: int, row: Callable[[Sequence[Message]], list[Token]], length: int | None
) -> tuple[list[Token], int]:
    """``row`` of the ``messages``, or of fewer where it is too long, and how many tokens of it were left out.

    ``asked`` is the message that is answered.
    """
    found = row(messages)
    if length is None or len(found) <= length:
        return found, 0
    whole = len(found)
    while len(found) > length and (shorter := _without_first_exchange(messages)) is not None:
        messages, found = shorter, row(shorter)
    if len(found) <= length:
        return found, whole - len(found)
    text = str(messages[asked].get("content") or "")

    def of(characters: int) -> list[Token]:
        some = list(messages)
        some[asked] = {**messages[asked], "content": text[:characters]}
        return row(some)

    kept, too_many, found = 0, len(text), of(0)
    if len(found) > length:
        raise TooLong(length, len(found), str(messages[-1].get("content")))
    while too_many - kept > 1:
        middle = (kept + too_many) // 2
        if len(tried := of(middle)) <= length:
            kept, found = middle, tried
        else:
            too_many = middle
    return found, whole - len(found)


def _without_first_exchange(messages: Sequence[Message]) -> list[Message] | None:
    """``messages`` without their first answer and what it answers. None if that is all."""
    answers = [i for i, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
    if not answers:
        return None
    system = [message for message in messages[: answers[0]] if message["role"] == "system"]
    return [*system, *messages[answers[0] + 1 :]]
