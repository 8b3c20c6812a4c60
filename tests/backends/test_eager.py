"""The specification in float64 against the definition: output, lse and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics import CASES, DOUBLE, Case, close, random_case, run, widen


def compare(arguments: dict[str, Any]) -> None:
    close(*(run(name, widen(arguments), lse_gradient=True) for name in ("eager", "oracle")), DOUBLE)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_definition(case: Case) -> None:
    compare(case.arguments(torch.float64))


@pytest.mark.parametrize("seed", range(12))
def test_is_the_definition_on_random_calls(seed: int) -> None:
    compare(random_case(seed).arguments(torch.float64))


def holes(bias: Tensor) -> Tensor:
    """The bias of one row for all, -inf in places, and everywhere for the first query."""
    bias = bias[:1].masked_fill(torch.rand(bias[:1].shape) < 0.3, -torch.inf)
    bias[:, :, 0] = -torch.inf
    return bias


@pytest.mark.parametrize("P", [0, 3])
def test_is_the_definition_with_a_bias_that_hides(P: int) -> None:
    arguments = Case(P=P, S=6, T=9, with_=("bias", "key_mask"), options={"softcap": 1.5}).arguments(torch.float64)
    compare(arguments | {"bias": holes(arguments["bias"])})


def test_is_the_definition_with_a_gate_of_each_row() -> None:
    arguments = Case(B=3, N=2, S=6, T=9, with_=("prefix_ids", "prefix_start", "sinks")).arguments(torch.float64)
    compare(arguments | {"prefix_gate": torch.randn(3, 4)})
