"""How an input is put to a model: a template of text, or the chat template of the tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from prefix_attn.hf.io.files import read_json
from prefix_attn.hf.io.writing import replace
from prefix_attn.quoting import quoted
from prefix_attn.training.examples import Example, check_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The space after the arrow is part of the target's first token, " The". Models have learnt words with a leading space,
# and a space by itself is rare. On E2E this is worth 0.2 nats per token without any training.
PROMPT = "{source}\n=>"
CHAT = "chat"
FILE = "prompt.json"


@dataclass(frozen=True)
class Prompt:
    """What stands around an input. Training and generation must use the same.

    Attributes:
        template: ``CHAT``, the chat template of the tokenizer, or a text with ``{source}`` and perhaps ``{system}``.
            The target follows it: after a space, or at once where the template ends in white space.
        system: the system message of a chat that has none, or what stands for ``{system}``.
        one_line: whether outputs end at their first line break, as those of E2E, DART and WebNLG.
        special_tokens: whether the names of special tokens in texts, such as ``</s>``, are these tokens. Otherwise they
            are text like any other. In the template they always are tokens.
    """

    template: str = PROMPT
    system: str | None = None
    one_line: bool = False
    special_tokens: bool = False

    def __post_init__(self) -> None:
        """Raise a ValueError for a template that cannot be filled."""
        for name, kind in {"template": str, "system": str | None, "one_line": bool, "special_tokens": bool}.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name!r} must be {getattr(kind, '__name__', kind)}, got {quoted(value)}")
            if isinstance(value, str) and not value.isascii():
                check_unicode(value, name)
        if self.is_chat:
            return
        try:
            parts = [part[1:] for part in Formatter().parse(self.template) if part[1] is not None]
        except ValueError as error:
            raise ValueError(
                f"template {quoted(self.template)}: {error}; write {{{{ or }}}} for a brace that stays one"
            ) from None
        names = [str(name) for name, *_ in parts]
        if any(form or conversion for _, form, conversion in parts):  # {source:>1000000000} takes a gigabyte
            raise ValueError(f"template {quoted(self.template)}: {{source}} and {{system}} take no format and no !")
        if wrong := set(names) - {"source", "system"}:
            raise ValueError(
                f"template {quoted(self.template)} may name {{source}} and {{system}}, got {{{min(wrong):.60}}}; the "
                "target follows by itself"
            )
        if names.count("source") != 1:
            raise ValueError(f"template must be 'chat' or name {{source}} once, got {quoted(self.template)}")
        if ("system" in names) != (self.system is not None):
            raise ValueError(
                f"template {quoted(self.template)} and system {quoted(self.system)} do not fit: a system text needs "
                "'chat' or a template that names {system}, and the other way round"
            )

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer's chat template is the template."""
        return self.template == CHAT

    @property
    def lead(self) -> str:
        """What stands between a prompt of text and its target, as part of the target's tokens."""
        return "" if self.template[-1:].isspace() else " "

    def ids(self, tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
        """Tokens of a prompt of text."""
        held = {} if self.special_tokens else held_tokens(tokenizer, source + (self.system or ""))
        text = self.template.format(source=hold(source, held), system=hold(self.system or "", held))
        return literal_ids(tokenizer, text, held)

    def tail(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """How many tokens of a prompt of text follow its source."""
        after = self.template.partition("{source}")[2].format(system=self.system)
        return len(literal_ids(tokenizer, after, {})) if after else 0

    def save(self, folder: Path) -> None:
        """Write it into the folder of an adapter."""
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False).encode())

    @classmethod
    def load(cls, adapter: Path) -> Prompt:
        """What an adapter was trained with; the default for one that does not say so. A checkpoint has its run's.

        Args:
            adapter: its folder, or a file in it.

        Raises:
            ValueError: the file is none that ``save`` wrote.
        """
        folder = (adapter.parent if adapter.is_file() else adapter).resolve()
        for place in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
            if (path := place / FILE).is_file():
                content = read_json(path)
                if unknown := content.keys() - {field.name for field in fields(cls)}:
                    raise ValueError(
                        f"{path}: unknown entries {quoted(sorted(unknown))}; a newer version may have written it"
                    )
                try:
                    return cls(**content)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None
        return cls()


def default_template(example: Example) -> str:
    """The template of data that begin with ``example``."""
    return CHAT if example.messages else PROMPT


# Special tokens as text -----------------------------------------------------------------------------------------------


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = False) -> list[int]:
    """Tokens of a text of the user's, in which the names of special tokens are text."""
    split = not special_tokens
    return tokenizer(text, add_special_tokens=False, split_special_tokens=split, verbose=False)["input_ids"]


def held_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, str]:
    """A character that ``text`` lacks for each special token that it names."""
    found = sorted({name for name in special_names(tokenizer) if name in text}, key=len, reverse=True)
    free = (character for character in map(chr, range(0x100000, 0x10FFFE)) if character not in text)
    return dict(zip(found, free))


def hold(text: str, held: Mapping[str, str]) -> str:
    """``text`` with these characters in the place of names."""
    for name, character in held.items():
        text = text.replace(name, character)
    return text


def release(text: str, held: Mapping[str, str]) -> str:
    """Undo ``hold``."""
    for name, character in held.items():
        text = text.replace(character, name)
    return text


def literal_ids(tokenizer: PreTrainedTokenizerBase, text: str, held: Mapping[str, str]) -> list[int]:
    """Tokens of a filled template. Names of special tokens are tokens, but those that are held are text."""
    if not held:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    names = sorted(special_names(tokenizer), key=len, reverse=True)
    ids: list[int] = []
    for number, part in enumerate(re.split(f"({'|'.join(map(re.escape, names))})", text)):
        if number % 2:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            ids += plain_ids(tokenizer, release(part, held))
    return ids


def special_names(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts that the tokenizer reads as special tokens."""
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
