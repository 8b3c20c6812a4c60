"""Rows of tokens on disk, for data that are larger than memory."""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from prefix_attn.training.tokens import Row


class RowFile(Sequence["Row"]):
    """Rows with labels in a file that has no name and vanishes with this object. In memory are 16 bytes a row."""

    def __init__(self, rows: Iterable[Row], folder: Path) -> None:
        """Write ``rows`` as they come, on the disk of ``folder``, which need not exist yet."""
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        self._ends = array("q", [0])  # of ids and labels in turns, in bytes
        self._hash = hashlib.sha256()
        with tempfile.TemporaryFile(dir=place) as file:
            for row in rows:
                for name in ("input_ids", "labels"):
                    tokens = array("i", row[name]).tobytes()
                    self._ends.append(self._ends[-1] + file.write(tokens))
                    _add(self._hash, tokens)
            file.flush()
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self._ends[-1] else b""

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._ends) // 2

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """A row, or those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = 2 * range(len(self))[index]
        return {"input_ids": self._tokens(first), "labels": self._tokens(first + 1)}

    def __iter__(self) -> Iterator[Row]:
        """All rows, one at a time."""
        return (self[i] for i in range(len(self)))

    def _tokens(self, part: int) -> list[int]:
        return array("i", self._bytes[self._ends[part] : self._ends[part + 1]]).tolist()

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens and labels."""
        return self._hash.hexdigest()


def digest(rows: Sequence[Row]) -> str:
    """SHA-256 of the tokens and labels of ``rows``: that of the ``RowFile``, or others, that know it."""
    if (known := getattr(rows, "digest", None)) is not None:
        return known
    found = hashlib.sha256()
    for row in rows:
        for values in row.values():
            _add(found, array("i", values).tobytes())
    return found.hexdigest()


def _add(found: Any, tokens: bytes) -> None:
    found.update(len(tokens).to_bytes(8, "little") + tokens)
