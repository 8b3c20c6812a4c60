"""Files of outputs: what they keep, and what a kill leaves."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from prefix_attn.training.data import Examples
from prefix_attn.training.outputs import OutputFile, check, file_digest

ROWS = [
    {"id": 7, "text": 'a "b", c;\td', "output": "x\n\n  y\r\nz\rend\n"},
    {"id": None, "text": "", "output": "ü😀 = 1 "},
    {"id": [1, {"a": "é"}], "text": "007", "output": "NA"},
]
SETTINGS = {"seed": 1, "stop": ("a",)}


def texts(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    def cell(value: Any) -> str:
        return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return [{name: cell(value) for name, value in row.items()} for row in rows]


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_rows_come_back_as_they_were(suffix: str, tmp_path: Path) -> None:
    """Line breaks of all kinds, quotes and delimiters stay; our own reader finds the same texts."""
    path = tmp_path / "new" / f"out.{suffix}"
    output = OutputFile(path, ["id", "text", "output"])
    output.write(ROWS[:1])
    output.write(ROWS[1:])
    assert output.rows == 3
    expected = ROWS if suffix == "jsonl" else texts(ROWS)
    assert read(path) == expected
    found = Examples(path, source_column="output", target_column=None)
    assert [example.source for example in found] == [row["output"] for row in ROWS]
    assert [dict(row) for row, _ in found.records()] == expected


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_any_kill_leaves_whole_rows(suffix: str, tmp_path: Path) -> None:
    """Cut anywhere, the file goes on with the first row that is not whole, and ends up the same."""
    path = tmp_path / f"out.{suffix}"
    OutputFile(path, ["id", "text", "output"], SETTINGS).write(ROWS)
    whole = path.read_bytes()
    counts = set()
    for length in range(0, len(whole) + 1, 2):
        path.write_bytes(whole[:length])
        output = OutputFile(path, ["id", "text", "output"], SETTINGS, resume=True)
        counts.add(output.rows)
        output.write(ROWS[output.rows :])
        assert path.read_bytes() == whole
    assert counts == {0, 1, 2, 3}


def test_a_file_is_resumed_with_its_own_settings_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    output = OutputFile(path, ["a"], SETTINGS, resume=True)
    assert output.rows == 0  # begins where there is nothing
    assert not path.exists()  # and leaves nothing when something else fails
    output.write([{"a": "b"}])
    with pytest.raises(ValueError, match=r"exists already; go on with it by --resume"):
        OutputFile(path, ["a"], SETTINGS)
    with pytest.raises(ValueError, match=r"begun with seed 1, now it is 2; give the same"):
        OutputFile(path, ["a"], SETTINGS | {"seed": 2}, resume=True)
    with pytest.raises(ValueError, match=r"begun with more None, now it is 'x'"):
        OutputFile(path, ["a"], SETTINGS | {"more": "x"}, resume=True)
    with pytest.raises(ValueError, match=r"begun with columns \['a'\], now it is \['b'\]"):
        OutputFile(path, ["b"], SETTINGS, resume=True)
    (tmp_path / "out.csv.settings.json").unlink()
    with pytest.raises(ValueError, match="nothing says what made it"):
        OutputFile(path, ["a"], SETTINGS, resume=True)
    with pytest.raises(ValueError, match=r"must end in \.csv, \.tsv or \.jsonl"):
        check(tmp_path / "out.txt")
    OutputFile(tmp_path / "plain.csv", ["a"]).write([])
    assert not (tmp_path / "plain.csv.settings.json").exists()


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(text)
    first, second, other = (file_digest(tmp_path / name) for name in "abc")
    assert first == second != other
    assert file_digest(tmp_path) is None
