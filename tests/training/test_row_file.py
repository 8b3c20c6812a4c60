"""Rows on disk are those that came, and are not in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from prefix_attn.training.row_file import RowFile


def test_rows_are_those_that_came(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 70_000], "labels": [-100, 2]}, {"input_ids": [5], "labels": [5]}]
    found = RowFile(iter(rows), tmp_path / "new" / "folder")
    assert list(found) == rows
    assert (len(found), found[-1], found[:1]) == (2, rows[1], rows[:1])
    with pytest.raises(IndexError):
        found[2]
    assert list(tmp_path.iterdir()) == []
    assert len(RowFile([], tmp_path)) == 0


def test_rows_are_not_in_memory(tmp_path: Path) -> None:
    """20,000 rows of 100 tokens are 16 MB on disk, and were 140 MB of Python's integers."""
    row = {"input_ids": list(range(1000, 1100)), "labels": list(range(1000, 1100))}
    tracemalloc.start()
    found = RowFile((row for _ in range(20_000)), tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found[19_999] == row
    assert peak < 1_000_000
