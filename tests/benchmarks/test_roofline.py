"""benchmarks/kernels/roofline.py: its arithmetic, its verdicts, and the table that docs/kernels.md quotes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import operator
from benchmarks.kernels import roofline

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("is_causal", [False, True])
def test_flops_count_visible_pairs(is_causal: bool) -> None:
    c = operator.case(2, 7, 9, 4, (3, 1, 8), is_causal=is_causal)
    visible = torch.ones(7, 9).tril(2) if is_causal else torch.ones(7, 9)
    pairs = 2 * 3 * (int(visible.sum()) + 7 * 4)
    assert operator.flops(c, "forward") == operator.flops(c, "prefill") == pairs * 4 * 8
    assert operator.flops(c, "both") == 3.5 * operator.flops(c, "forward")
    assert operator.flops(c, "prefix-only") == 2 * 3 * 7 * 4 * 8 * 8


def test_bytes_count_each_tensor_once() -> None:
    c = operator.step(2, 9, 3, (4, 2, 8))
    step = [(2, 4, 1, 8), (2, 2, 9, 8), (2, 2, 9, 8), (2, 3, 8), (2, 3, 8), (2, 4, 1, 8)]
    size = lambda shapes: sum(torch.empty(shape, dtype=torch.bfloat16).nbytes for shape in shapes)
    assert operator.traffic(c, "decode") == size(step)
    full = [(2, 4, 9, 8), *step[1:5], (2, 4, 9, 8)]
    assert operator.traffic(c | {"S": 9}, "forward") == size(full) + 4 * 2 * 4 * 9


def test_no_prediction_beats_the_roofline() -> None:
    for row in roofline.targets():
        better = row.predicted <= row.roofline if row.unit in roofline.RATES else row.predicted >= row.roofline
        assert better, row.name


def record(what: str, way: str, case: dict[str, Any], seconds: float, **values: Any) -> dict[str, Any]:
    return {"suite": "operator", "what": what, "way": way, "case": case, "median": seconds, **values}


def test_a_run_is_held_against_the_targets() -> None:
    training, step, none = (
        operator.batch(8192, 128, (16, 16, 128), is_causal=False),
        operator.step(256, 512, 512),
        operator.step(256, 512, 0),
    )
    records = [
        record("forward", "triton", training, operator.flops(training, "forward") / 460e12),
        record("decode", "triton", step, 112e-6),
        record("decode", "triton", none, 100e-6),
        record("decode", "sdpa", none, 99e-6),
    ]
    rows = roofline.targets()
    found = {row.name: row.measured(records) for row in rows}
    assert found["forward, S = 8192, D = 128, not causal"] == pytest.approx(460)
    assert found["decode, what P = 512 adds at B = 256, S = 512"] == pytest.approx(12)
    assert found["decode, P = 0 over the best peer, worst case"] == pytest.approx(100 / 99)
    text = roofline.table(rows, records)
    assert text.count(" met |") == 2
    assert text.count(" missed |") == 2  # what P = 512 adds, and SDPA at P = 0
    assert text.count(" not measured |") == len(rows) - 4


def test_a_run_draws_the_roofline_from_its_own_ceilings() -> None:
    """Predictions stay those of an H100."""
    slow, fast = ({"ceilings": {"bfloat16": rate * 1e12, "memory": rate * 5e9}} for rate in (700.0, 800.0))
    peaks = roofline.of_run([slow, fast, {"records": []}])
    assert peaks is not None
    assert roofline.of_run([{"records": []}]) is None
    constants, own = ({row.name: row for row in rows} for rows in (roofline.targets(), roofline.targets(peaks)))
    forward, decode = "forward, S = 8192, D = 128, not causal", "decode, B = 64, S = 2048, P = 128"
    assert constants[forward].roofline == pytest.approx(989)
    assert own[forward].roofline == pytest.approx(800)
    assert own[decode].roofline == pytest.approx(100)
    assert peaks.source == "these results: a product at 800 TFLOP/s, a copy at 4 TB/s"
    assert {name: row.predicted for name, row in own.items()} == {n: row.predicted for n, row in constants.items()}


def test_the_document_quotes_the_table() -> None:
    assert roofline.table(roofline.targets()) in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
