"""Files of results survive a kill and become tables and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefix_attn.experiments import report, results


def result(method: str, seed: int, bleu: float, loss: float, **settings: Any) -> results.Result:
    """The result of a run with one validation before the training and one after it."""
    return {
        "run": {"task": "e2e", "method": method, "seed": seed, "train": "a.csv", **settings},
        "trained_share": 0.001,
        "stored_share": 0.002,
        "validation": [[0, 3.0], [10, loss]],
        "train_loss": [loss] * 10,
        "seconds_per_step": 0.5,
        "metrics": {"bleu": bleu, "cider": bleu / 20},
    }


def test_a_half_written_line_is_dropped_and_replaced(tmp_path: Path) -> None:
    """A kill in the middle of a line left a file that could not be read or continued."""
    path = tmp_path / "runs" / "results.jsonl"
    assert results.read(path) == []
    first, second = result("prefix", 0, 50.0, 1.5), result("prefix", 1, 52.0, 1.4)
    results.append(path, first)
    whole = path.read_bytes()
    line = json.dumps(second).encode() + b"\n"
    for length in (1, len(line) // 2, len(line) - 1):
        path.write_bytes(whole + line[:length])
        assert results.read(path) == [first]
        results.append(path, second)
        assert path.read_bytes() == whole + line
        assert results.read(path) == [first, second]


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"run": {}}\n{\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: not JSON"):
        results.read(path)
    path.write_text('{"method": 1}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: not a result"):
        results.read(path)


def test_table_has_means_and_deviations() -> None:
    rows = [result("prefix", s, 50.0 + s, 1.5, virtual_tokens=10) for s in (0, 1)]
    rows.append(result("prefix", 0, 40.0, 1.75, virtual_tokens=1))
    rows[2] |= {"metrics_seen": {"bleu": 45.0}, "metrics_unseen": {"bleu": 30.5}}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.table(rows).splitlines()]
    assert lines[0] == ["method", "settings", "runs", "trained", "stored", "first loss", "last loss"] + [
        "training loss",
        "s/step",
        "BLEU",
        "CIDEr",
        "BLEU seen",
        "BLEU unseen",
    ]
    assert lines[2] == ["prefix", "virtual_tokens 10", "2", "0.100%", "0.200%", "3.000 ± 0.000", "1.500 ± 0.000"] + [
        "1.500 ± 0.000",
        "0.500 ± 0.000",
        "50.5 ± 0.7",
        "2.525 ± 0.035",
        "-",
        "-",
    ]
    assert lines[3][-2:] == ["45.0", "30.5"]
    assert len(lines) == 4
    del rows[1]["metrics"]
    assert "| 50.0 (of 1) |" in report.table(rows)


def test_the_loss_is_that_of_the_parameters_kept() -> None:
    row = result("prefix", 0, 50.0, 1.5)
    assert report.table([row]).splitlines()[2].split(" | ")[6] == "1.500"
    assert report.table([row | {"held_out_loss": 1.25}]).splitlines()[2].split(" | ")[6] == "1.250"


def test_what_only_some_runs_of_a_method_have_is_no_seed() -> None:
    """Runs with all categories were averaged with runs that left some out, and 63 inputs with all inputs."""
    generated = {"test": "b.csv", "num_beams": 1}
    rows = [
        result("prefix", 0, 50.0, 1.5, rank=2, **generated),
        result("prefix", 0, 40.0, 1.5, rank=2, unseen=["x"], **generated),
        result("prefix", 0, 30.0, 1.5, rank=2, limit=63, **generated),
        result("prefix", 1, 50.0, 1.5, rank=2),
        result("frozen", 0, 9.0, 1.5),
    ]
    cells = [line.split(" | ")[:3] for line in report.table(rows).splitlines()[2:]]
    assert cells == [
        ["| prefix", "-", "2"],
        ["| prefix", "unseen x", "1"],
        ["| prefix", "limit 63", "1"],
        ["| frozen", "-", "1"],
    ]


@pytest.mark.parametrize("axis", report.AXES)
def test_pictures(tmp_path: Path, axis: str) -> None:
    rows = [
        result(m, s, 50.0, 1.5, virtual_tokens=P, examples=P)
        for m in ("prefix", "peft")
        for P in (1, 10)
        for s in (0, 1)
    ]
    frozen = result("frozen", 0, 9.0, 2.6) | {"validation": [[0, 2.6]]}
    report.plot([*rows, frozen], axis, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="axis must be one of"):
        report.plot(rows, "loss", tmp_path / "y.png")
