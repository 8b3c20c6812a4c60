"""Values of files and arguments in messages: short, and printable on any terminal."""

from __future__ import annotations

import reprlib

_LONGEST = 400  # characters of a quoted value
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple, _REPR.maxset = 3, 8, 8, 8, 8
_REPR.maxstring, _REPR.maxother, _REPR.maxlong = 80, 120, 40


def quoted(value: object) -> str:
    """``repr(value)``, its middle left out where it is long."""
    return shortened(_REPR.repr(value), _LONGEST)


def shortened(text: object, longest: int = 300) -> str:
    """``str(text)`` on one line, of at most about ``longest`` characters.

    What a terminal does not print, or would obey, is escaped as in ``repr``: half a character, or ESC.
    """
    text = str(text)
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]}...{text[-longest // 3 :]}"
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
