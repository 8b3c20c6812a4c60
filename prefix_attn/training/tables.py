"""Read the rows of tables: encoding, delimiter, and each row with the place where it begins.

The csv and json modules read, not pandas under ``datasets.load_dataset``: that one turns "007" into 7 and "NA" into
nothing, stops at the first bad row, and does not say on which line a row is.
"""

from __future__ import annotations

import codecs
import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefix_attn.hf.io.files import opened, opened_text
from prefix_attn.quoting import quoted, shortened
from prefix_attn.training.examples import BadRows

DELIMITERS = (",", ";", "\t", "|")
Record = tuple[int, Mapping[str, Any]]  # the place of a row, and its cells by column

_log = logging.getLogger(__name__)

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: it begins with the same bytes
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CHUNK = 1 << 20
_NO_TEXT = set(map(chr, (*range(9), *range(14, 27), *range(28, 32), 127)))  # control characters that no text has
_CELL = 2**31 - 1  # characters; the csv module refuses cells beyond 131,072 otherwise


def check_reading(delimiter: str | None = None, encoding: str | None = None) -> None:
    """Refuse a delimiter or an encoding that no table has.

    Raises:
        ValueError: it names what was given.
    """
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ValueError(f"delimiter must be one character, such as ';' or a tab, got {delimiter!r}")
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError:
        raise ValueError(f"encoding must be one that Python knows, such as utf-8 or cp1252, got {encoding!r}") from None


# Encodings ------------------------------------------------------------------------------------------------------------


def encoding_of(path: Path, given: str | None = None) -> str:
    """The encoding of a text file: ``given``, or what a mark says, or UTF-8, or cp1252.

    Raises:
        ValueError: no encoding has this name, or the file is no text in any of these.
    """
    if given is not None:
        check_reading(encoding=given)
        name = codecs.lookup(given).name
        return "utf-8-sig" if name == "utf-8" else name
    with opened(path) as file:
        head = file.read(4096)
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if head.count(0) > len(head) // 8:
        raise ValueError(f"{path}: not UTF-8 text, many bytes are 0; --encoding utf-16-le or utf-16-be may read it")
    try:
        for _ in _decoded(path, "utf-8"):
            pass
        return "utf-8"
    except UnicodeDecodeError as error:
        found = f"{path}: not UTF-8 text ({error.reason}, byte 0x{error.object[error.start]:02x})"
    try:
        for text in _decoded(path, "cp1252"):
            # The mark of UTF-16 within a file: two files were joined.
            if not _NO_TEXT.isdisjoint(text) or "ÿþ" in text or "þÿ" in text:
                raise ValueError(f"{found}, and not cp1252; give its --encoding")
    except UnicodeDecodeError:
        raise ValueError(f"{found}, and not cp1252; give its --encoding") from None
    _log.warning("%s; read as cp1252, and --encoding says otherwise", found)
    return "cp1252"


def _decoded(path: Path, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    with opened(path) as file:
        while chunk := file.read(_CHUNK):
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)


def read_text(path: Path, encoding: str | None = None) -> str:
    """A whole text, its line breaks as they are."""
    with opened_text(path, encoding_of(path, encoding), "") as file:
        return file.read()


# Tables ---------------------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """What the first row of a table says."""

    columns: list[str]
    delimiter: str


def csv_header(path: Path, encoding: str, given: str | None, wanted: Callable[[Sequence[str]], bool]) -> Header:
    """Names of the columns. The delimiter is ``given``, or the first that gives the ``wanted`` columns, or the most.

    Raises:
        ValueError: the first row is no CSV, or names a column twice.
    """
    check_reading(delimiter=given)
    if given is not None:
        candidates: Sequence[str] = [given]
    else:
        candidates = (
            sorted(DELIMITERS, key=lambda delimiter: delimiter != "\t") if path.suffix == ".tsv" else DELIMITERS
        )
    found = []
    for delimiter in candidates:
        with opened_text(path, encoding, "") as file:
            try:
                columns = next(_reader(file, delimiter), [])
            except csv.Error as error:
                if delimiter != candidates[-1] or found:
                    continue
                raise ValueError(f"{path}, line 1: not CSV ({error})") from None
        found.append(Header([column.strip() for column in columns], delimiter))
    header = next((some for some in found if wanted(some.columns)), max(found, key=lambda some: len(some.columns)))
    if twice := [name for name, count in Counter(header.columns).items() if name and count > 1]:
        raise ValueError(f"{path}, line 1: more than one column is named {quoted(twice[0])}; rename them")
    return header


def csv_records(path: Path, encoding: str, header: Header, bad: BadRows) -> Iterator[Record]:
    """The rows below the header. A row is at the line where it begins; empty lines are none."""
    with opened_text(path, encoding, "") as file:
        reader, first = _reader(file, header.delimiter), True
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                bad.add(line, f"not CSV: {error}")
                continue
            if first or not cells:
                first = False
                continue
            width = len(header.columns)
            if any(cell.strip() for cell in cells[width:]):
                bad.add(line, f"more cells than columns; text with {header.delimiter!r} needs quotes")
                continue
            yield line, dict(zip(header.columns, [*cells, *[None] * (width - len(cells))]))


def _reader(file: Any, delimiter: str) -> Any:
    csv.field_size_limit(_CELL)
    return csv.reader(file, delimiter=delimiter, strict=True)


def jsonl_records(path: Path, encoding: str, bad: BadRows) -> Iterator[Record]:
    """One object a line. Empty lines are none."""
    with opened_text(path, encoding) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except json.JSONDecodeError as error:
                bad.add(number, f"not JSON ({error.msg})", f" at column {error.colno}")
            except RecursionError:
                bad.add(number, "not JSON (nested too deep)")
            except ValueError as error:
                bad.add(number, str(error))
            else:
                if isinstance(row, dict):
                    yield number, row
                else:
                    bad.add(number, f"must be a JSON object, got {type(row).__name__}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"more than one key is named {quoted(twice)}; rename them")
    return found


def parquet_records(path: Path, columns: Collection[str | None]) -> Iterator[Record]:
    """The rows of a Parquet file, a few at a time, without other columns than those named. Needs pyarrow.

    Raises:
        ValueError: the file is no Parquet, is damaged, names a column twice, or unpacks to far more than it is.
    """
    from pyarrow import ArrowException, parquet

    try:
        with opened(path) as stream, parquet.ParquetFile(stream, **_limits(stream)) as file:
            names = file.schema_arrow.names
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"{path}: more than one column is named {quoted(twice[0])}; rename them")
            # A row says what it lacks by what it has.
            wanted = [name for name in names if name in columns] if set(columns) & {*names} else names
            most, unpacked, number = unpacked_at_most(path), 0, 0
            groups = map(file.metadata.row_group, range(file.num_row_groups))
            # Not the sizes of columns: where statistics are damaged, pyarrow ends the process that asks for them.
            if any(group.total_byte_size > most for group in groups):
                raise ValueError(f"{path}: unpacks to more than {most} bytes")
            for batch in file.iter_batches(batch_size=64, columns=wanted):
                unpacked += batch.nbytes
                if unpacked > most:
                    raise ValueError(f"{path}: unpacks to more than {most} bytes")
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ArrowException, OSError, OverflowError) as error:
        raise ValueError(f"{path}: not Parquet ({shortened(error)})") from None


def _limits(stream: Any) -> dict[str, int]:
    """The longest list and text that the footer of a Parquet file can hold. pyarrow makes them before it reads them.

    An entry of a list that may be long has at least 8 bytes, and takes up to 2 kB of memory.
    """
    size = stream.seek(0, 2)
    stream.seek(max(size - 8, 0))
    footer = min(int.from_bytes(stream.read(4), "little"), size)
    stream.seek(0)
    return {
        "thrift_container_size_limit": min(max(footer // 8, 16), 10**6),
        "thrift_string_size_limit": min(max(size, 1), 10**8),
    }


def unpacked_at_most(path: Path) -> int:
    """Bytes that a compressed file may hold: no text is packed to a thousandth, and a bomb is."""
    return (1 << 24) + 500 * path.stat().st_size
