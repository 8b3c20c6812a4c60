"""Which prefix a request has: its ``cache_salt`` and its first tokens say so, and nothing else does.

vLLM finds a block in its cache by a hash of the salt and of all token ids up to the block's end. The salt holds the
digest of the prefix, so a block with the keys and values of a prefix has a hash that no other prefix, and no request
without one, can have. Since the same salt chooses what is written, a request that carries a salt of ours without being
told cannot put anything else under this hash either: it gets the prefix, or it fails.

The placeholders are made from the digest too. Whatever compares prompts by token ids alone, such as a router in front
of several servers, keeps prefixes apart by them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

MARK = "prefix_attn:"
_SALT = re.compile(rf"{MARK}([0-9a-f]{{40}}):([1-9][0-9]{{0,6}}):([0-9a-f]{{32}}|)")


class Choice(NamedTuple):
    """A prefix, as a request names it.

    Attributes:
        digest: of its keys and values.
        length: P.
    """

    digest: str
    length: int

    def salt(self, own: str | None = None) -> str:
        """The ``cache_salt`` of such a request. ``own`` is the client's, whose blocks nobody else is to share."""
        kept = "" if not own else hashlib.sha256(own.encode(errors="surrogatepass")).hexdigest()[:32]
        return f"{MARK}{self.digest}:{self.length}:{kept}"

    def placeholders(self, vocabulary: int) -> tuple[int, ...]:
        """P token ids below ``vocabulary``."""
        return placeholders(self.digest, self.length, vocabulary)


class Refused(ValueError):
    """A request with a salt of ours that cannot be answered with a prefix."""


@lru_cache(maxsize=1024)
def placeholders(digest: str, length: int, vocabulary: int) -> tuple[int, ...]:
    """``length`` token ids that look random, always the same for a digest.

    They are from the middle half of the vocabulary. Tokenizers keep their special tokens at its ends, and vLLM looks
    for some of those in prompts: the end of a reasoning, say, or a picture.
    """
    stream = hashlib.shake_256(digest.encode()).digest(8 * length)
    first, number = vocabulary // 4, max(1, vocabulary // 2)
    return tuple(first + int.from_bytes(stream[i : i + 8], "big") % number for i in range(0, 8 * length, 8))


def choice_of(salt: str | None, prompt: Sequence[int] | None, vocabulary: int) -> Choice | None:
    """The prefix that a request chooses. None: it chooses none.

    Args:
        salt: its ``cache_salt``.
        prompt: its token ids, where it has some.
        vocabulary: the size of the model's.

    Raises:
        Refused: the salt is ours, and the tokens are not those of a text behind this prefix.
    """
    if salt is None or not salt.startswith(MARK):
        return None
    if (found := _SALT.fullmatch(salt)) is None:
        raise Refused(f"the cache_salt {salt!r:.150} names no prefix")
    choice = Choice(found[1], int(found[2]))
    if prompt is None:
        raise Refused("the prompt holds embeddings, and must begin with the placeholders of its prefix")
    if len(prompt) <= choice.length:
        raise Refused(f"the prompt has {len(prompt)} tokens: no text behind a prefix of {choice.length}")
    if tuple(prompt[: choice.length]) != choice.placeholders(vocabulary):
        raise Refused("the prompt does not begin with the placeholders of its prefix")
    return choice
