"""benchmarks/roofline.py: its arithmetic, and the table that docs/kernels.md quotes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import roofline

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("causal", [False, True])
def test_flops_count_visible_pairs(causal: bool) -> None:
    S, T, P, D = 7, 9, 4, 8
    visible = torch.ones(S, T).tril(T - S) if causal else torch.ones(S, T)
    pairs = int(visible.sum()) + S * P
    assert roofline.attention_flops(2, 3, S, T, P, D, causal=causal) == 2 * 3 * pairs * 4 * D


def test_bytes_count_each_tensor_once() -> None:
    tensors = [(2, 4, 7, 8), (2, 2, 9, 8), (2, 2, 9, 8), (2, 3, 8), (2, 3, 8), (2, 4, 7, 8)]
    expected = sum(torch.empty(shape, dtype=torch.bfloat16).nbytes for shape in tensors)
    assert roofline.attention_bytes(2, 4, 2, 7, 9, 3, 8) == expected


def test_nothing_is_predicted_below_its_floor() -> None:
    assert all(row.predicted > row.floor > 0 for row in roofline.targets())
    alone, full = roofline.prefix_only()
    assert alone.predicted < full.predicted / 3


def test_the_document_quotes_the_table() -> None:
    assert roofline.table(roofline.targets()) in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
