"""What data are made of: examples, and the rows of a file that give none."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefix_attn.quoting import quoted

Message = Mapping[str, Any]  # "role" and "content", as chat templates take them

SHOWN_LINES, SHOWN_REASONS = 3, 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One input and all of its correct outputs.

    Attributes:
        source: the input. Of a conversation, the text of the message before the last answer.
        references: the outputs. Of a conversation, its last answer.
        category: empty unless the data set has categories.
        messages: a conversation up to its last answer. Empty for other rows.
    """

    source: str
    references: tuple[str, ...]
    category: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def key(self) -> str:
        """What tells this example's input from others."""
        return json.dumps(self.prompt, sort_keys=True, default=str) if self.messages else self.source

    @property
    def prompt(self) -> str | tuple[Message, ...]:
        """What a model answers: the source, or the conversation before the last answer."""
        return self.messages[:-1] or self.source


def group(examples: Iterable[Example]) -> list[Example]:
    """Merge rows with the same source into one example, in the order of first appearance. Conversations stay apart."""
    merged: dict[Any, Example] = {}
    for number, example in enumerate(examples):
        key = number if example.messages else example.source
        if key in merged:
            first = merged[key]
            example = Example(first.source, first.references + example.references, first.category)
        merged[key] = example
    return list(merged.values())


def as_text(value: Any, column: str, *, fold: bool = False) -> str:
    """``value`` as it is, or with ``fold`` its words with one space between them.

    Raises:
        ValueError: it is no text, or has nothing but white space.
    """
    if not isinstance(value, str | None):
        raise ValueError(f"{column!r} must be text, got {type(value).__name__}")
    if not value or value.isspace():
        raise ValueError(f"{column!r} is empty")
    check_unicode(value, column)
    return " ".join(value.split()) if fold else value


def check_unicode(text: str, column: str) -> None:
    """Refuse halves of characters, which JSON can hold and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{column!r} holds half of a character, \\u{ord(text[error.start]):x}") from None


def as_conversation(value: Any, column: str = "messages", *, answered: bool = True) -> Example:
    """An example of a list of messages. What follows the last answer has no loss, and is left out.

    With ``answered=False`` the example has no reference: it asks for an answer to all of the messages, or, where the
    last one is an answer, for another.

    Raises:
        ValueError: it is no list of messages with a role and a text, or the assistant says nothing.
    """
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{column!r} must be a list of messages, got {quoted(value):.60}")
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{column!r} needs messages with 'role' and 'content', got {quoted(message):.60}")
        kept = {name: part for name, part in message.items() if part is not None or name == "content"}
        if not isinstance(kept.get("content"), str) and "tool_calls" not in kept:
            kind = type(message.get("content")).__name__
            raise ValueError(f"{column!r}: the content of {quoted(message['role'])} must be text, got {kind}")
        check_unicode(json.dumps(kept, ensure_ascii=False, default=str), column)
        messages.append(kept)
    if not answered:
        return _asking(messages[:-1] if messages[-1]["role"] == "assistant" else messages, column)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        roles = list(dict.fromkeys(message["role"] for message in messages))
        raise ValueError(f"{column!r} has no message of the role 'assistant'; its roles are {quoted(roles)}")
    if answers[-1] == 0:
        raise ValueError(f"{column!r} begins with its only answer: there is nothing to answer")
    answer = as_text(messages[answers[-1]].get("content"), f"the last answer of {column}")
    source = messages[answers[-1] - 1].get("content") or ""
    return Example(source, (answer,), messages=tuple(messages[: answers[-1] + 1]))


def _asking(messages: Sequence[Message], column: str) -> Example:
    if not messages:
        raise ValueError(f"{column!r} has nothing to answer")
    source = messages[-1].get("content") or ""
    return Example(source, (), messages=(*messages, {"role": "assistant", "content": ""}))


class BadRows:
    """The rows of a file that give no example: how many, why, and where the first of each kind are."""

    def __init__(self, path: str | Path, unit: str = "line") -> None:
        """``unit`` is what the places of rows are called."""
        self.path, self.unit, self.count, self.good = str(path), unit, 0, 0
        self._reasons: dict[str, list[int | str]] = {}
        self._counts: dict[str, int] = {}
        self._detail = ""

    def add(self, place: int | str, reason: str, detail: str = "") -> None:
        """A row that cannot be used. Rows of the same reason are counted together; ``detail`` is of this row alone."""
        self.count += 1
        self._detail = detail
        self._counts[reason] = self._counts.get(reason, 0) + 1
        places = self._reasons.setdefault(reason, [])
        if len(places) < SHOWN_LINES:
            places.append(place)

    def settle(self, *, skip: bool) -> None:
        """Say what was found, once all rows were seen.

        Raises:
            ValueError: there are bad rows and ``skip`` is false, or no row is good.
        """
        if self.count and not skip:
            if self.count == 1:
                (reason, (place,)), *_ = self._reasons.items()
                raise ValueError(
                    f"{self.path}, {self.unit} {place}: {reason}{self._detail}; mend it, or pass --skip-bad-rows"
                )
            raise ValueError(
                f"{self.path}: {self.count} of {self.count + self.good} rows cannot be used: {self._summary()}; "
                "mend them, or leave them out with --skip-bad-rows"
            )
        if self.count and self.good:
            total = self.count + self.good
            _log.warning("%s: %d of %d rows are left out: %s", self.path, self.count, total, self._summary())
        if not self.good:
            found = f"no row can be used ({self._summary()})" if self.count else "empty"
            raise ValueError(f"{self.path}: {found}, at least one row is needed")

    def _summary(self) -> str:
        ordered = sorted(self._counts.items(), key=lambda item: -item[1])
        texts = []
        for reason, count in ordered[:SHOWN_REASONS]:
            places = self._reasons[reason]
            plural = self.unit.removesuffix("y") + "ies" if self.unit.endswith("y") else self.unit + "s"
            where = ", ".join(map(str, places)) + (", ..." if count > len(places) else "")
            texts.append(f"{count} x {reason} ({plural if count > 1 else self.unit} {where})")
        if len(ordered) > SHOWN_REASONS:
            texts.append(f"{sum(count for _, count in ordered[SHOWN_REASONS:])} for other reasons")
        return ", ".join(texts)
