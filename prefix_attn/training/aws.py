"""The tasks "aws" and "aws-summary": operations of AWS services, from botocore's API descriptions."""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefix_attn.training.examples import Example, group

SPLITS = ("train", "dev", "test")
AWS_TASKS = ("aws", "aws-summary")

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
    rows: dict[str, list[Example]] = {split: [] for split in SPLITS}
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
                rows[_aws_split(service.name)].append(Example(source, (target,)))
    return {split: tuple(group(found)) for split, found in rows.items()}


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
