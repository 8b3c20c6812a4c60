"""The C++ kernels take no more instructions than recorded: a slower inner loop shows where timings are too noisy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.instructions import (
    CASES,
    ISAS,
    RECORD,
    ROOT,
    TOLERANCE,
    Case,
    above,
    build,
    count,
    main,
    multiplications,
)

RECORDED = json.loads(RECORD.read_text())["instructions"]


@pytest.mark.valgrind
def test_no_more_than_recorded() -> None:
    assert main([]) == 0


@pytest.mark.valgrind
def test_an_instruction_more_is_seen(tmp_path: Path) -> None:
    """``vec{} + x`` spread a scalar by an addition and a shuffle, since -0 + 0 is 0: 15 % more over a bank."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    tile = tmp_path / "csrc/cpu/tile.h"
    text = tile.read_text()
    assert "return x - vec{};" in text
    tile.write_text(text.replace("return x - vec{};", "return vec{} + x;"))
    case = CASES[1]
    counts = {f"avx2 {case.title}": count(build(tmp_path, tmp_path / "csrc"), "avx2", case)}
    assert len(above(counts, RECORDED)) == 1, counts


def test_every_case_is_recorded() -> None:
    assert list(RECORDED) == [f"{isa} {case.title}" for isa in ISAS for case in CASES]


def test_above() -> None:
    counts = {"a": int(1000 * TOLERANCE), "b": int(1000 * TOLERANCE) + 1, "c": 1}
    assert above(counts, {"a": 1000, "b": 1000}) == [
        "b: 1031 instructions, 1000 recorded",
        "c: 1 instructions, 0 recorded",
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_multiplications(case: Case) -> None:
    """Forward q k and p v; backward q k again, dout v, and the gradients of value, key and, if asked for, query."""
    queries, keys = (1, case.S) if case.what == "decode" else (case.S, case.S)
    sequence = torch.ones(queries, keys).tril(keys - queries)
    prefix = torch.ones(queries, case.P)
    products = {"decode": 2, "forward": 2, "backward": 2 + 3, "prefix-only": 2 + 2}[case.what]
    visible = prefix.sum() + (0 if case.what == "prefix-only" else sequence.sum())
    assert multiplications(case) == case.B * 2 * 64 * products * int(visible)
