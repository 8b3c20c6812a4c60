"""E2E, DART and WebNLG as the paper writes them: one line a text, whatever spaces it had."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

from prefix_attn.hf.io.files import opened
from prefix_attn.quoting import shortened
from prefix_attn.training.examples import BadRows, Example, as_text
from prefix_attn.training.tables import unpacked_at_most


def linearise(mr: str) -> str:
    """Write E2E data as the paper does: ``name[Aromi], area[x]`` -> ``name : Aromi | area : x``."""
    slots = re.findall(r"\s*([^\[\],]+)\[([^\]]*)\]", mr)
    return " | ".join(f"{name.strip()} : {value.strip()}" for name, value in slots) or mr


def linearise_triples(triples: Iterable[Sequence[str]]) -> str:
    """Write triples as the paper does: ``subject : relation : object | subject : relation : object``."""
    return " | ".join(" : ".join(part.replace("_", " ").strip(' "') for part in triple) for triple in triples)


def read_json(path: Path, encoding: str = "utf-8-sig") -> list[Any]:
    """The entries of a JSON file, plain or gzipped. An object that is no list is the only entry."""
    try:
        with opened(path) as file:
            content = _unpacked(file, path) if path.suffix == ".gz" else file.read()
        entries = json.loads(content.decode(encoding))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not JSON ({shortened(error)})") from None
    return entries if isinstance(entries, list) else [entries]


def _unpacked(file: BinaryIO, path: Path) -> bytes:
    """What a gzip file holds. It is unpacked twice, so that a bomb is never in memory."""
    most, size = unpacked_at_most(path), 0
    for keep in (False, True):
        file.seek(0)
        with gzip.GzipFile(fileobj=file) as packed:
            if keep:
                return packed.read()
            while chunk := packed.read(1 << 20):
                size += len(chunk)
                if size > most:
                    raise ValueError(f"unpacks to more than {most} bytes")
    raise AssertionError


def dart_examples(entries: Iterable[Any], bad: BadRows) -> Iterator[Example]:
    """DART's entries (Nan et al. 2021), one example for each. The category is the collection of an entry."""
    for number, entry in enumerate(entries):
        try:
            yield from _dart_example(entry)
        except ValueError as error:
            bad.add(number, str(error))
        else:
            bad.good += 1


def _dart_example(entry: Any) -> list[Example]:
    try:
        triples = [[as_text(part, "tripleset", fold=True) for part in triple] for triple in entry["tripleset"]]
        if not triples or any(len(triple) != 3 for triple in triples):
            raise ValueError(f"'tripleset' must be a list of triples, got {entry['tripleset']!r:.60}")
        source = linearise_triples(triples)
        return [
            Example(source, (as_text(annotation["text"], "text", fold=True),), as_text(annotation["source"], "source"))
            for annotation in entry["annotations"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"must have 'tripleset' and 'annotations' with 'text', 'source' ({shortened(error)})"
        ) from None


def webnlg_examples(path: Path, bad: BadRows) -> Iterator[Example]:
    """WebNLG's XML (Gardent et al. 2017), a file or a folder. Only English texts not marked bad."""
    for file in sorted(path.rglob("*.xml")) if path.is_dir() else [path]:
        try:
            with opened(file) as stream:
                entries = ElementTree.parse(stream).getroot().iter("entry")
        except (ElementTree.ParseError, LookupError, ValueError) as error:  # of an encoding, say
            raise ValueError(f"{file}: not XML ({shortened(error)})") from None
        for entry in entries:
            try:
                yield from _webnlg_examples(entry)
            except ValueError as error:
                name = shortened(entry.get("eid"))
                bad.add(f"{name} of {file.name}" if path.is_dir() else name, str(error))
            else:
                bad.good += 1


def _webnlg_examples(entry: ElementTree.Element) -> list[Example]:
    triples = [(triple.text or "").split(" | ") for triple in entry.iterfind("modifiedtripleset/mtriple")]
    if not triples or any(len(triple) != 3 for triple in triples):
        raise ValueError("needs a modifiedtripleset with 'subject | relation | object' in each mtriple")
    source, category = linearise_triples(triples), entry.get("category", "")
    texts = [
        as_text(lex.findtext("text") or lex.text, "lex", fold=True)
        for lex in entry.iterfind("lex")
        if lex.get("comment") != "bad" and lex.get("lang", "en") == "en"
    ]
    return [Example(source, (text,), category) for text in texts]
