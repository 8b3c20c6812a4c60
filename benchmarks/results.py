"""Files of results. Each run is one JSON document: machine, versions, and every sample of every record."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from prefix_attn.hf.io.files import opened
from prefix_attn.quoting import shortened

Record = dict[str, Any]
Case = dict[str, Any]
Plan = list[tuple[Case, str]]  # cases, and what is done with each
T = TypeVar("T")


class Results:
    """One run. A record has a case, what was done (forward, decode, ...), the way, and its numbers or a reason."""

    def __init__(self, suite: str, out: Path | None, **about: Any) -> None:
        """``about`` stands at the head of the file ``out``; None = no file."""
        self.out = out
        self.records: list[Record] = []
        self.document: dict[str, Any] = {"suite": suite, **about, "records": self.records}

    def add(self, case: Mapping[str, Any], what: str, way: str, **values: Any) -> Record:
        """One record."""
        self.records.append({"case": dict(case), "what": what, "way": way, **values})
        return self.records[-1]

    def save(self) -> None:
        """Writes the file under a temporary name, then renames it. A killed run keeps its earlier results."""
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_name(self.out.name + ".partial")
        head = {name: value for name, value in self.document.items() if name != "records"}
        lines = ",\n".join(json.dumps(_short(record)) for record in self.records)
        text = json.dumps(head, indent=1)[:-2] + f',\n "records": [\n{lines}\n]}}\n'
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.out)


def _short(value: Any) -> Any:
    """Floats rounded to six digits; no measurement has more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _short(part) for name, part in value.items()}
    return [_short(part) for part in value] if isinstance(value, (list, tuple)) else value


def read(path: Path) -> dict[str, Any]:
    """The document that ``Results.save`` wrote.

    Raises:
        ValueError: the file is no such document.
    """
    with opened(path) as file:
        content = file.read()
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({shortened(error)})") from None
    if not isinstance(document, dict) or not {"suite", "records"} <= document.keys():
        raise ValueError(f"{path}: not a file of 'python -m benchmarks run'")
    return document


def records(paths: Iterable[Path]) -> list[Record]:
    """The records of several files. Each also gets its suite and its run (the file), since only one run is compared."""
    found = []
    for path in paths:
        document = read(path)
        found += [{"suite": document["suite"], "run": str(path), **record} for record in document["records"]]
    return found


def key(record: Record) -> tuple[Any, ...]:
    """Identifies a measurement: two records with the same key measured the same thing."""
    return (record.get("suite"), record["what"], record["way"], *sorted(record["case"].items()))


def title(case: Iterable[tuple[str, Any]]) -> str:
    """A case in words, without the device."""
    return ", ".join(f"{name} {value}" for name, value in case if name != "on")


def latest(found: Iterable[Record], suite: str, what: str) -> list[Record]:
    """The latest measurement of each case and way."""
    wanted = [r for r in found if (r["suite"], r["what"]) == (suite, what) and "reason" not in r]
    return list({(r["run"], *key(r)): r for r in wanted}.values())


def parse_filters(texts: Sequence[str]) -> dict[str, set[str]]:
    """``["P=0,128", "what=decode"]`` as sets of words.

    Raises:
        ValueError: a text is not of this form.
    """
    found: dict[str, set[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not (name and equals and values):
            raise ValueError(f"--select takes NAME=VALUE[,VALUE...], got {text!r}")
        found[name] = set(values.split(","))
    return found


def selected(cases: Plan, filters: Mapping[str, set[str]]) -> Plan:
    """The (case, what) pairs that pass every filter.

    Raises:
        ValueError: a filter names a field that no case has, or nothing is left.
    """
    known = {"what"} | {name for case, _ in cases for name in case}
    if unknown := sorted(set(filters) - known):
        raise ValueError(f"--select {unknown[0]}: cases have {', '.join(sorted(known))}")
    left = [
        (case, what)
        for case, what in cases
        if all(str({**case, "what": what}.get(name)) in values for name, values in filters.items())
    ]
    if not left:
        raise ValueError("--select leaves nothing; --list shows the cases")
    return left


class Budget:
    """Seconds that a sweep may take."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """The time starts now. None = no limit."""
        self.seconds, self.clock, self.start = seconds, clock, clock()

    def spent(self) -> bool:
        """Whether the time is up."""
        return self.seconds is not None and self.clock() - self.start > self.seconds


def sweep(items: Sequence[T], run: Callable[[T], None], results: Results, budget: Budget) -> list[T]:
    """Runs items until the time is up, and saves after each. Returns the items that are left."""
    left = list(items)
    while left and not budget.spent():
        run(left.pop(0))
        results.save()
    if left:
        print(f"\nthe time was up: {len(left)} of {len(items)} left out", flush=True)
    return left
