"""The specification in float64 against the definition: output, lse and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_attn import prefix_attention
from tests.numerics import CASES, DOUBLE, ROUNDED, Case, close, close_in_norm, random_case, run, widen


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


@pytest.mark.parametrize("backend", ["eager", "composed", "cpu"])
def test_float16_products_beyond_its_range(backend: str) -> None:
    """Scores are formed in float32: products of 800,000 under a small scale are no NaN, forward or backward."""
    g = torch.Generator().manual_seed(0)
    query, key = (200 * torch.randn(1, 2, 5, 64, generator=g) for _ in range(2))
    given = [t.half() for t in (query, key, torch.randn(1, 2, 5, 64, generator=g))]
    assert (given[0].double() @ given[1].double().mT).abs().max() > torch.finfo(torch.half).max
    results = []
    for tensors, name in ((given, backend), ([t.double() for t in given], "eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = prefix_attention(*leaves, None, None, scale=1e-5, backend=name)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for got, exact in zip(*results):
        close_in_norm(got.double(), exact, ROUNDED)
