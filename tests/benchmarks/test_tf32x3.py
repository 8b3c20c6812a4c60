"""benchmarks/kernels/tf32x3.py: the emulation behind the choice of exact float32 products on a GPU."""

from __future__ import annotations

import torch

from benchmarks.kernels.tf32x3 import added, cut, draw, ratios


def test_numbers_are_cut_to_their_bits() -> None:
    x = torch.tensor([1 + 2.0**-10, 1 + 2.0**-11 + 2.0**-20, -(1 + 2.0**-11 + 2.0**-20), 0.0], dtype=torch.float64)
    assert cut(x, 11).tolist() == [1 + 2.0**-10, 1 + 2.0**-10, -(1 + 2.0**-10), 0.0]
    assert cut(x, 11, torch.trunc).tolist() == [1 + 2.0**-10, 1.0, -1.0, 0.0]


def test_a_sum_that_float32_holds_is_exact() -> None:
    """Three products of parts make a product of whole numbers, but for lo lo."""
    a, b = (torch.tensor(x, dtype=torch.float64) for x in ([[3.0, 5.0]], [[7.0], [2.0**12]]))
    for how in ("ieee", "nearest", "zero"):
        assert added(torch.ones(1, 1, dtype=torch.float64), a, b, how).item() == 1 + 21 + 5 * 2.0**12


def test_tensor_cores_lose_more_than_twice_what_torch_does() -> None:
    """The reason for ``ieee``. Rounding to nearest would not lose it: it is the accumulator, not the split."""
    found = ratios(*draw("normal", 256, 64))
    assert found["nearest"] < 2 < found["zero"]
    assert found["ieee"] < 2
