"""Read text-to-text data from files and packages."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefix_attn.quoting import quoted
from prefix_attn.training.aws import AWS_TASKS, aws_records
from prefix_attn.training.examples import BadRows, Example, as_conversation, as_text, group
from prefix_attn.training.tables import (
    Record,
    csv_header,
    csv_records,
    encoding_of,
    jsonl_records,
    parquet_records,
)
from prefix_attn.training.tasks import dart_examples, linearise, read_json, webnlg_examples

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".json", ".json.gz", ".xml")
MESSAGES = "messages"
CHUNK = "chunk"  # of a text that is distilled, by its number


def read_examples(spec: str | Path, **options: Any) -> list[Example]:
    """Read all examples of a file or a built-in task. Rows with the same source become one example.

    Args:
        spec: see ``Examples``.
        options: those of ``Examples``.

    Raises:
        ValueError: as ``Examples`` and ``Examples.check``.
    """
    examples = Examples(spec, **options)
    return group(examples.checked())


class Examples:
    """The examples of a file or a task, one for each row, read anew each time that they are iterated.

    Texts are what the file has, line breaks and spaces included. Only E2E, DART, WebNLG and the tasks of botocore have
    one line a text, as in the paper.
    """

    def __init__(
        self,
        spec: str | Path,
        *,
        split: str = "train",
        source_column: str = "source",
        target_column: str | None = "target",
        delimiter: str | None = None,
        encoding: str | None = None,
        skip_bad_rows: bool = False,
    ) -> None:
        """Look at the head of a file.

        Args:
            spec: "aws" (operations of AWS services -> first sentence of their documentation, from the botocore
                package), "aws-summary" (the rest of that documentation -> its first sentence), or a path. A path is a
                .jsonl, .csv, .tsv, .parquet or .json file of rows, DART's .json or .json.gz, WebNLG's .xml, or a folder
                of WebNLG's files. An E2E file (columns mr and ref) needs no column names. A row without the two
                columns may have a conversation in "messages".
            split: "train", "dev" or "test". Only "aws" and "aws-summary" have splits. A file is read whole.
            source_column: column or JSON key of the input.
            target_column: column or JSON key of the output. A list of strings gives several references. None: rows
                need no output, and a conversation ends before the answer that is asked for.
            delimiter: between the cells of .csv and .tsv. Default: what the header shows, of comma, semicolon, tab, |.
            encoding: of a text file. Default: what its bytes show, of UTF-8, UTF-16, UTF-32 (with a mark), cp1252.
            skip_bad_rows: leave out rows that give no example, and say so once.

        Raises:
            ValueError: there is no such file or task, or the head of the file is none of these.
        """
        self.spec, self.split, self.skip_bad_rows = str(spec), split, skip_bad_rows
        self.columns = source_column, target_column
        self._path = path = Path(spec)
        self._entries: Sequence[Any] | None = None
        self.kind = _kind_of(self.spec, path)
        if delimiter is not None and self.kind != "csv":
            raise ValueError(f"{path}: a delimiter is for .csv and .tsv files, got {delimiter!r}")
        if encoding is not None and self.kind in ("aws", "parquet", "webnlg"):
            raise ValueError(f"{path}: an encoding is for .csv, .tsv, .json and .jsonl files, got {encoding!r}")
        if self.kind in ("csv", "jsonl", "json") and path.suffix != ".gz":
            self._encoding = encoding_of(path, encoding)
        with self._decoding():
            if self.kind == "csv":
                self._header = csv_header(path, self._encoding, delimiter, self._has_columns)
                self._name_columns()
            elif self.kind == "json":
                self._entries = read_json(path, "utf-8-sig" if path.suffix == ".gz" else self._encoding)
                first = self._entries[0] if self._entries else None
                if not isinstance(first, Mapping) or "tripleset" in first:
                    self.kind = "dart"

    @property
    def one_line(self) -> bool:
        """Whether every text is one line, whatever the file has: E2E, DART, WebNLG and the tasks of botocore."""
        return self.kind in ("aws", "dart", "e2e", "webnlg")

    def __iter__(self) -> Iterator[Example]:
        """The examples of all good rows, in their order."""
        return (example for _, example in self.records())

    def checked(self) -> Iterator[Example]:
        """The same, and at the end what ``check`` says."""
        return (example for _, example in self.records(check=True))

    def records(self, *, check: bool = False) -> Iterator[tuple[Mapping[str, Any], Example]]:
        """The same, each beside the cells of its row. Of DART, WebNLG and botocore the only cell is its source."""
        units = {"csv": "line", "e2e": "line", "jsonl": "line", "parquet": "row"}
        bad = BadRows(self.spec, units.get(self.kind, "entry"))
        yield from self._read(bad)
        if check:
            bad.settle(skip=self.skip_bad_rows)

    def check(self) -> int:
        """The number of examples. All rows are read.

        Raises:
            ValueError: rows give no example and are not to be skipped, or no row gives one. The message counts them,
                says why, and names the first lines.
        """
        return sum(1 for _ in self.checked())

    def _read(self, bad: BadRows) -> Iterator[tuple[Mapping[str, Any], Example]]:
        if self.kind in ("aws", "dart", "webnlg"):
            for example in self._task(bad):
                yield {"source": example.source}, example
        else:
            with self._decoding():
                for place, row in self._records(bad):
                    try:
                        example = self._example(row)
                    except ValueError as error:
                        bad.add(place, str(error))
                    else:
                        bad.good += 1
                        yield row, example

    def _task(self, bad: BadRows) -> Iterator[Example]:
        if self.kind == "dart":
            yield from dart_examples(self._entries or [], bad)
        elif self.kind == "webnlg":
            yield from webnlg_examples(self._path, bad)
        else:
            for bad.good, example in enumerate(aws_records(self.split, self.spec), start=1):
                yield example

    def _records(self, bad: BadRows) -> Iterator[Record]:
        if self.kind == "jsonl":
            return jsonl_records(self._path, self._encoding, bad)
        if self.kind == "parquet":
            return parquet_records(self._path, {*self.columns, MESSAGES, CHUNK})
        if self.kind == "json":
            return enumerate(self._entries or [])
        return csv_records(self._path, self._encoding, self._header, bad)

    def _example(self, row: Mapping[str, Any]) -> Example:
        source_column, target_column = self.columns
        if not isinstance(row, Mapping):
            raise ValueError(f"must be a JSON object, got {type(row).__name__}")
        if MESSAGES in row and not set(self._wanted) <= row.keys():
            return as_conversation(row[MESSAGES], answered=target_column is not None)
        for column in self._wanted:
            if column not in row:
                raise ValueError(f"no key {column!r}; there are {quoted(sorted(row))}")
        fold = self.kind == "e2e"
        source = as_text(row[source_column], source_column, fold=fold)
        if target_column is None:
            return Example(linearise(source) if fold else source, ())
        targets = row[target_column]
        targets = targets if isinstance(targets, list) else [targets]
        if not targets:
            raise ValueError(f"{target_column!r} is empty")
        references = tuple(as_text(target, target_column, fold=fold) for target in targets)
        return Example(linearise(source) if fold else source, references)

    @property
    def _wanted(self) -> list[str]:
        return [column for column in self.columns if column is not None]

    def _has_columns(self, names: Sequence[str]) -> bool:
        return set(self._wanted) <= set(names) or self._e2e_columns <= {name.lower() for name in names}

    @property
    def _e2e_columns(self) -> set[str]:
        return {"mr", "ref"} if self.columns[1] is not None else {"mr"}

    def _name_columns(self) -> None:
        """Check the columns of a table. E2E's have names of their own."""
        columns, lower = self._header.columns, {column.lower(): column for column in self._header.columns}
        if self.columns[0] not in columns and self._e2e_columns <= lower.keys():
            self.kind, self.columns = "e2e", (lower["mr"], lower["ref"] if self.columns[1] is not None else None)
        for column in self._wanted if columns else ():
            if column not in columns:
                found = f"{quoted(columns)}, with {self._header.delimiter!r}"
                raise ValueError(
                    f"{self._path}, line 1: no column {column!r}; there are {found} "
                    "between cells; --source-column, --target-column and --delimiter say otherwise"
                )

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Errors of decoding name the file."""
        try:
            yield
        except UnicodeDecodeError as error:
            place = f"{error.reason} at byte {error.start}"
            raise ValueError(f"{self._path}: not {error.encoding} text ({place}); --encoding says otherwise") from None
        except MemoryError:
            raise ValueError(f"{self._path}: does not fit into memory; more and smaller files do") from None


def _kind_of(spec: str, path: Path) -> str:
    if spec in AWS_TASKS:
        return "aws"
    if not path.is_dir() and not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: data must be one of {AWS_TASKS} or a file that ends in one of {SUFFIXES}")
    if not path.exists():
        raise ValueError(f"{path}: no such file; give one that is there")
    if path.is_dir() and not any(path.rglob("*.xml")):
        raise ValueError(f"{spec!r} is a folder without WebNLG's .xml files: give a file of rows")
    if path.is_dir() or path.suffix == ".xml":
        return "webnlg"
    return {".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}.get(path.suffix, "json")


def hold_out(examples: Examples, share: float, rows: int) -> tuple[Iterator[Example], list[Example]]:
    """Split into examples to train on, read when they are asked for, and at most ``rows`` others with their references.

    ``share`` of the examples are not trained on, chosen by the hash of their input: those with the same input stay
    together, and each stays where it is when rows are added or in another order.

    Raises:
        ValueError: one of the two is empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"validation share must be between 0 and 1, such as 0.05, got {share:g}")
    counts, first = {True: 0, False: 0}, set[bytes]()
    for example in examples:
        counts[out := is_held_out(example.key, share)] += 1
        if out:
            first.add(_digest(example.key))
        if len(first) > 2 * rows:
            first = set(heapq.nsmallest(rows, first))
    if not all(counts.values()):
        raise ValueError(
            f"{examples.spec}: a validation share of {share:g} holds out {counts[True]} of {sum(counts.values())} rows;"
            " take another share, or a file to validate on"
        )
    first = set(heapq.nsmallest(rows, first))
    held_out = group(example for example in examples if _digest(example.key) in first)
    return (example for example in examples if not is_held_out(example.key, share)), held_out


def is_held_out(source: str, share: float, byte: int = 0) -> bool:
    """Whether a text is among those held out: ``share`` of all, by its hash from ``byte`` on.

    It depends on nothing but the text, so it stays so when rows are added or in another order.
    """
    return int.from_bytes(_digest(source)[byte : byte + 8], "big") < share * 2**64


def _digest(text: str) -> bytes:
    return hashlib.sha1(text.encode()).digest()
