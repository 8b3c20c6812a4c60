"""A table of outputs that grows row by row, and goes on after a kill."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefix_attn.hf.io.files import opened, read_json
from prefix_attn.hf.io.writing import replace
from prefix_attn.quoting import quoted, shortened

DELIMITERS = {".csv": ",", ".tsv": "\t"}


class OutputFile:
    """A .csv, .tsv or .jsonl file of rows, in UTF-8. Beside it, ``NAME.settings.json`` says what made it.

    Attributes:
        path: the file.
        rows: how many rows it has.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], settings: Mapping[str, Any] | None = None, *, resume: bool = False
    ) -> None:
        """Look at what is there. The first ``write`` makes the file; half a row at the end of one is removed at once.

        Args:
            path: its name ends in .csv, .tsv or .jsonl.
            columns: of the tables; a row of .jsonl has its own.
            settings: what makes the rows. Without them the file cannot be resumed.
            resume: go on with the file, or begin it where there is none.

        Raises:
            ValueError: see ``check``; or the file was made with other settings or without, or is no such table.
        """
        check(path, resume=resume)
        self.path, self.rows, self._columns, self._resumable = path, 0, list(columns), settings is not None
        self._settings = json.loads(json.dumps({**(settings or {}), "columns": self._columns}, default=str))
        self._beside = path.with_name(f"{path.name}.settings.json")
        if path.exists():
            self._check_same()
            self.rows, end = self._whole_rows()
            os.truncate(path, end)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append ``rows``. They are on the disk when this returns."""
        rows = list(rows)
        if not self.path.exists() or not self.path.stat().st_size:
            self._begin()
        self._append("".join(map(self._line, rows)))
        self.rows += len(rows)

    def _begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._resumable:
            replace(self._beside, json.dumps(self._settings, indent=2, ensure_ascii=False).encode())
        self._append(self._cells(self._columns) if self._delimiter else "")

    def _append(self, text: str) -> None:
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    @property
    def _delimiter(self) -> str | None:
        return DELIMITERS.get(self.path.suffix)

    def _line(self, row: Mapping[str, Any]) -> str:
        if self._delimiter:
            return self._cells(_cell(row.get(column)) for column in self._columns)
        return json.dumps(row, ensure_ascii=False, default=str) + "\n"

    def _cells(self, cells: Iterable[str]) -> str:
        # Rows end with \r\n, as RFC 4180 says: the csv module quotes only what its line ends have.
        text = io.StringIO(newline="")
        csv.writer(text, delimiter=self._delimiter or ",").writerow(cells)
        return text.getvalue()

    def _check_same(self) -> None:
        if not self._beside.is_file():
            raise ValueError(
                f"{self.path}: nothing says what made it ({self._beside.name} is missing); take another --output"
            )
        before = read_json(self._beside)
        for name in {**before, **self._settings}:
            was, now = before.get(name), self._settings.get(name)
            if was != now:
                raise ValueError(
                    f"{self.path}: was begun with {shortened(name)} {quoted(was):.60}, now it is {quoted(now):.60}; "
                    "give the same, or take another --output"
                )

    def _whole_rows(self) -> tuple[int, int]:
        """How many rows are complete, and the number of bytes up to the last one's end."""
        at = end = count = 0

        def lines() -> Iterator[str]:
            nonlocal at
            with opened(self.path) as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        return  # cut within a row
                    at += len(line)
                    yield line.decode()

        if not self._delimiter:
            return sum(1 for _ in lines()), at
        csv.field_size_limit(2**31 - 1)
        rows = csv.reader(lines(), delimiter=self._delimiter, strict=True)
        try:
            for row in rows:
                if not count and row != self._columns:
                    raise ValueError(f"{self.path}: its first row is not {self._columns}; take another --output")
                count, end = count + 1, at
        except csv.Error:
            pass  # cut between two lines of a cell
        return max(0, count - 1), end


def check(path: Path, *, resume: bool | None = False) -> None:
    """Look at the name of a file of outputs before anything else is done. ``resume`` is None where it cannot be.

    Raises:
        ValueError: it has another end than .csv, .tsv and .jsonl, or there is such a file and it is not to be resumed.
    """
    if path.suffix not in (*DELIMITERS, ".jsonl"):
        raise ValueError(f"{path}: an output must end in .csv, .tsv or .jsonl")
    if path.exists() and not resume:
        other = "" if resume is None else "go on with it by --resume, or "
        raise ValueError(f"{path}: exists already; {other}take another --output")


def file_digest(path: Path) -> str | None:
    """What tells the content of a file from others. None for what is no file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
