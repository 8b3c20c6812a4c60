"""A thousand damaged files, forty for each reader: ``python -m tests.fuzz`` does as many as it is told."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from tests import fuzz
from tests.memory import peak_growth


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_good_file_is_read(name: str, tmp_path: Path) -> None:
    """Otherwise damage would say nothing."""
    assert fuzz.fault(name, fuzz.good(name), tmp_path) == ("read", "")


def test_damaged_files_are_read_or_refused() -> None:
    """Each by one short ValueError that names it, and without much memory."""
    names, counts = list(fuzz.TARGETS), Counter[str]()
    for name in names:
        fuzz.good(name)
    logging.disable()  # warnings of files that are read all the same
    try:
        with peak_growth() as grown:
            for number, name, verdict, why in fuzz.fuzz(range(1000), names):
                counts[verdict] += 1
                assert verdict != "fault", f"{name}, file {number}: {why}"
    finally:
        logging.disable(logging.NOTSET)
    assert counts["refused"] > 500
    assert counts["read"] > 50
    assert grown() < 200 << 20


def test_a_fault_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another error, a message without the file, one that is long, and one of two lines."""
    messages = ("no file", f"{tmp_path}: " + "x" * 3000, f"{tmp_path}: a\nb")
    for error in (KeyError(str(tmp_path)), *map(ValueError, messages)):

        def read(_: Path, error: Exception = error) -> None:
            raise error

        monkeypatch.setitem(fuzz.TARGETS, "csv", fuzz.TARGETS["csv"]._replace(read=read))
        assert fuzz.fault("csv", fuzz.good("csv"), tmp_path)[0] == "fault"
