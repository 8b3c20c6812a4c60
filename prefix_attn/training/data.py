"""Read text-to-text data from files and packages."""

from __future__ import annotations

import csv
import gzip
import hashlib
import html
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

SPLITS = ("train", "dev", "test")
AWS_TASKS = ("aws", "aws-summary")
SUFFIXES = (".jsonl", ".csv", ".json", ".json.gz", ".xml")

_Row = tuple[str, str, str]  # source, one reference, category


@dataclass(frozen=True)
class Example:
    """One input and all of its correct outputs. ``category`` is empty unless the data set has categories."""

    source: str
    references: tuple[str, ...]
    category: str = ""


def read_examples(
    spec: str | Path, *, split: str = "train", source_column: str = "source", target_column: str = "target"
) -> list[Example]:
    """Read examples from a file or a built-in task. Rows with the same source become one example.

    Args:
        spec: "aws" (operations of AWS services -> first sentence of their documentation, from the botocore package),
            "aws-summary" (the rest of that documentation -> its first sentence), or a path. A path is a .jsonl or .csv
            file, DART's .json or .json.gz, WebNLG's .xml, or a folder of WebNLG's files. An E2E file (.csv with the
            columns mr and ref) needs no column names.
        split: "train", "dev" or "test". Only "aws" and "aws-summary" have splits. A file is read whole.
        source_column: column or JSON key of the input.
        target_column: column or JSON key of the output. In JSON, a list of strings gives several references.

    Raises:
        ValueError: the file is empty, malformed, or lacks a column. The message names the file and the line.
    """
    if str(spec) in AWS_TASKS:
        return list(aws_records(split, str(spec)))
    path = Path(spec)
    if not path.is_dir() and not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: data must be one of {AWS_TASKS} or a file that ends in one of {SUFFIXES}")
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        rows = _jsonl_rows(path, source_column, target_column)
    elif path.suffix == ".csv":
        rows = _csv_rows(path, source_column, target_column)
    else:
        rows = _webnlg_rows(path) if path.is_dir() or path.suffix == ".xml" else _dart_rows(path)
    try:
        examples = _group(rows)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not examples:
        raise ValueError(f"{path}: empty, at least one row is needed")
    return examples


def _group(rows: Iterable[_Row]) -> list[Example]:
    """Merge rows with the same source into one example, in the order of first appearance."""
    references: dict[str, list[str]] = {}
    categories: dict[str, str] = {}
    for source, target, category in rows:
        references.setdefault(source, []).append(target)
        categories.setdefault(source, category)
    return [Example(source, tuple(targets), categories[source]) for source, targets in references.items()]


def _jsonl_rows(path: Path, source_column: str, target_column: str) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: must be a JSON object, got {type(row).__name__}")
            for column in (source_column, target_column):
                if column not in row:
                    raise ValueError(f"{where}: no key {column!r}; there are {sorted(row)}")
            targets = row[target_column]
            targets = targets if isinstance(targets, list) else [targets]
            if not targets:
                raise ValueError(f"{where}: {target_column!r} is empty")
            for target in targets:
                yield _text(row[source_column], source_column, where), _text(target, target_column, where), ""


def _csv_rows(path: Path, source_column: str, target_column: str) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            columns = list(reader.fieldnames or ())
            lower = {column.lower(): column for column in columns}
            is_e2e = source_column not in columns and {"mr", "ref"} <= lower.keys()
            if is_e2e:
                source_column, target_column = lower["mr"], lower["ref"]
            for column in (source_column, target_column):
                if columns and column not in columns:
                    raise ValueError(f"{path}, line 1: no column {column!r}; there are {columns}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if any(cell.strip() for cell in row.get(None) or ()):
                    raise ValueError(f"{where}: more cells than columns; text with a comma needs quotes")
                source = _text(row[source_column], source_column, where)
                target = _text(row[target_column], target_column, where)
                yield linearise(source) if is_e2e else source, target, ""
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str | None):
        raise ValueError(f"{where}: {column!r} must be text, got {type(value).__name__}")
    folded = " ".join((value or "").split())
    if not folded:
        raise ValueError(f"{where}: {column!r} is empty")
    return folded


def linearise(mr: str) -> str:
    """Write E2E data as the paper does: ``name[Aromi], area[x]`` -> ``name : Aromi | area : x``."""
    slots = re.findall(r"\s*([^\[\],]+)\[([^\]]*)\]", mr)
    return " | ".join(f"{name.strip()} : {value.strip()}" for name, value in slots) or mr


# Triples --------------------------------------------------------------------------------------------------------------


def linearise_triples(triples: Iterable[Sequence[str]]) -> str:
    """Write triples as the paper does: ``subject : relation : object | subject : relation : object``."""
    return " | ".join(" : ".join(part.replace("_", " ").strip(' "') for part in triple) for triple in triples)


def _dart_rows(path: Path) -> Iterator[_Row]:
    """DART's JSON (Nan et al. 2021), plain or gzipped. The category is the collection of an entry."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            entries = json.load(file)
    except (json.JSONDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        where = f"{path}, entry {number}"
        try:
            triples = [[_text(part, "tripleset", where) for part in triple] for triple in entry["tripleset"]]
            if not triples or any(len(triple) != 3 for triple in triples):
                raise ValueError(f"{where}: 'tripleset' must be a list of triples, got {entry['tripleset']!r:.60}")
            for annotation in entry["annotations"]:
                yield linearise_triples(triples), _text(annotation["text"], "text", where), annotation["source"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{where}: must have 'tripleset' and 'annotations' with 'text', 'source' ({error})"
            ) from None


def _webnlg_rows(path: Path) -> Iterator[_Row]:
    """WebNLG's XML (Gardent et al. 2017), a file or a folder. Only English texts not marked bad."""
    for file in sorted(path.rglob("*.xml")) if path.is_dir() else [path]:
        try:
            entries = ElementTree.parse(file).getroot().iter("entry")
        except ElementTree.ParseError as error:
            raise ValueError(f"{file}: not XML ({error})") from None
        for entry in entries:
            where = f"{file}, entry {entry.get('eid')}"
            triples = [(triple.text or "").split(" | ") for triple in entry.iterfind("modifiedtripleset/mtriple")]
            if not triples or any(len(triple) != 3 for triple in triples):
                raise ValueError(
                    f"{where}: needs a modifiedtripleset with 'subject | relation | object' in each mtriple"
                )
            for lex in entry.iterfind("lex"):
                if lex.get("comment") != "bad" and lex.get("lang", "en") == "en":
                    text = lex.findtext("text") or lex.text
                    yield linearise_triples(triples), _text(text, "lex", where), entry.get("category", "")


# AWS operations -------------------------------------------------------------------------------------------------------

_MAX_MEMBERS = 6  # inputs and outputs listed in a source; more would only make it longer
_MIN_WORDS = 20  # in a documentation to summarise


def aws_records(split: str = "train", task: str = "aws") -> tuple[Example, ...]:
    """Read operations of AWS services and the first sentence of their documentation, split by service.

    Args:
        split: "train", "dev" or "test".
        task: "aws": the source is the operation's record. "aws-summary": the source is the rest of the documentation,
            as in XSum (Narayan et al. 2018).

    Raises:
        ValueError: unknown split or task, or botocore is not installed.
    """
    if task not in AWS_TASKS:
        raise ValueError(f"task must be one of {AWS_TASKS}, got {task!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    spec = importlib.util.find_spec("botocore")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the data {task!r} come from the botocore package: pip install 'prefix-attn[demo]'")
    return _aws_splits(Path(spec.submodule_search_locations[0]) / "data", task)[split]


@lru_cache(maxsize=2)
def _aws_splits(folder: Path, task: str = "aws") -> dict[str, tuple[Example, ...]]:
    rows: dict[str, list[_Row]] = {split: [] for split in SPLITS}
    targets: set[str] = set()  # over all splits: no test may ask for a sentence seen in training
    sources: set[str] = set()
    for service in sorted(path for path in folder.iterdir() if path.is_dir()):
        versions = sorted(service.glob("*/service-2.json.gz"))
        if not versions:
            continue
        with gzip.open(versions[-1]) as file:
            description = json.load(file)
        for source, target in _aws_pairs(description, task):
            if source not in sources and target not in targets:
                sources.add(source)
                targets.add(target)
                rows[_aws_split(service.name)].append((source, target, ""))
    return {split: tuple(_group(found)) for split, found in rows.items()}


def _aws_split(service: str) -> str:
    """Assign 92 % of services to train, 5 % to dev, 3 % to test, the same on every machine and botocore version."""
    percent = int.from_bytes(hashlib.sha1(service.encode()).digest()[:4], "big") % 100
    return "train" if percent < 92 else "dev" if percent < 97 else "test"


def _aws_pairs(description: dict[str, Any], task: str) -> Iterator[tuple[str, str]]:
    metadata, shapes = description["metadata"], description["shapes"]
    service = metadata.get("serviceAbbreviation") or metadata["serviceFullName"]
    for name, operation in sorted(description["operations"].items()):
        target, rest = _first_sentence(operation.get("documentation", ""))
        if target is None:
            continue
        if task == "aws-summary":
            if len(rest.split()) >= _MIN_WORDS:
                yield rest, target
            continue
        inputs = shapes.get(operation.get("input", {}).get("shape"), {}).get("required", ())
        outputs = shapes.get(operation.get("output", {}).get("shape"), {}).get("members", ())
        fields = {
            "service": service,
            "operation": _words(name),
            "inputs": ", ".join(list(inputs)[:_MAX_MEMBERS]),
            "outputs": ", ".join(list(outputs)[:_MAX_MEMBERS]),
        }
        yield " | ".join(f"{field} : {value}" for field, value in fields.items() if value), target


def _words(name: str) -> str:
    """``AcceptAddressTransfer`` -> ``accept address transfer``; ``ListVPCLinks`` -> ``list vpc links``."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])[0-9]*|[A-Z]?[a-z0-9]+", name)).lower()


def _first_sentence(documentation: str) -> tuple[str | None, str]:
    """Return the first sentence as plain text and the text after it. None for a sentence not of 4 to 40 words."""
    # A block tag ends the sentence before it. Otherwise a heading would run into its paragraph.
    blocks = re.split(r"</?(?:p|ul|ol|li|note|important|h\d|div|br|fullname)\b[^>]*>", documentation)
    folded = (" ".join(html.unescape(re.sub(r"<[^>]+>", "", block)).split()) for block in blocks)
    texts = [text for text in folded if text] or [""]
    # A period after one of these abbreviations does not end a sentence.
    match = re.match(r"(.+?(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)\.)(?=\s+[A-Z]|$)", texts[0])
    sentence = match[1] if match else ""
    rest = " ".join([texts[0][len(sentence) :].strip(), *texts[1:]]).strip()
    return (sentence if 4 <= len(sentence.split()) <= 40 else None), rest
