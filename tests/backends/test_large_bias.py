"""Rows in which a bias of a mask, finfo.min or -1e4, lies on every key: what they give, forward and backward.

Hugging Face's additive masks make such rows of left padding. All scores of finfo.min are equal, so that the output is
the mean of the values. An lse in float32 has no digits left for log T: a backward pass that trusts it takes every
probability for 1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_attn import prefix_attention
from tests.backends.test_numerics import compare
from tests.numerics import HALF, LONG, Case, close, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows in Triton's interpreter

S = T = 8
LOW = torch.finfo(torch.float32).min
NEVER = -torch.inf


def rows(fill: float) -> Tensor:
    """(S, T): one kind of row each, the last two without a mask."""
    bias = torch.zeros(S, T, dtype=torch.float64)
    bias[0] = fill
    bias[1, ::2], bias[1, 1::2] = fill, NEVER
    bias[2] = fill
    bias[2, 1] = -1.0  # one key that is not hidden
    bias[3, 4:], bias[3, :4] = fill, fill / 2  # the larger ones share everything
    bias[4, :5] = fill  # with causality all that it sees, while hidden keys have none
    bias[5] = NEVER
    return bias


SMALL: dict[str, Any] = {"B": 1, "Hq": 2, "Hkv": 1, "S": S, "T": T, "P": 3, "D": 8, "Dv": 8}
CALLS: dict[str, tuple[Case, dict[str, Any]]] = {
    "no prefix": (Case(**SMALL, with_=("no_prefix",)), {"is_causal": False}),
    "causal": (Case(**SMALL | {"P": 0}), {}),
    "a prefix takes all": (Case(**SMALL), {"is_causal": False}),
    "gate": (Case(**SMALL, with_=("prefix_gate",)), {"is_causal": False}),
    "infix": (Case(**SMALL | {"B": 2}, options={"prefix_start": torch.tensor([3, T])}), {}),
    "bank": (Case(**SMALL | {"B": 2}, N=2, options={"prefix_ids": torch.tensor([-1, 1])}), {"is_causal": False}),
    "sinks": (Case(**SMALL | {"P": 0}, with_=("sinks",)), {"is_causal": False}),
    "key mask": (Case(**SMALL | {"P": 0}, with_=("key_mask",)), {"is_causal": False}),
    "one query": (Case(**SMALL | {"S": 1, "P": 0}), {}),
    "softcap": (Case(**SMALL | {"P": 0}, options={"softcap": 2.0}), {}),
    "more keys than a tile": (Case(**SMALL | {"T": 40, "P": 0}), {"is_causal": False}),
}


def arguments(name: str, dtype: torch.dtype, fill: float) -> dict[str, Any]:
    case, options = CALLS[name]
    bias = rows(fill)[: case.S]
    if case.T > T:  # the same rows, over and over
        bias = bias.repeat(1, case.T // T)
    return case.arguments(dtype) | options | {"bias": bias.to(dtype).expand(1, case.Hq, -1, -1)}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["composed", "triton"])
def test_rows_of_finfo_min(backend: str, name: str) -> None:
    compare(backend, arguments(name, torch.float32, LOW))


@pytest.mark.parametrize("backend", ["composed", "triton"])
def test_rows_of_finfo_min_in_half_precision(backend: str) -> None:
    """bfloat16's own, and float32's in a bias that stays float32 (which torch's kernel refuses)."""
    compare(backend, arguments("no prefix", torch.bfloat16, torch.finfo(torch.bfloat16).min))
    compare(backend, arguments("no prefix", torch.float16, 0.0) | {"bias": rows(LOW).float().expand(1, 2, -1, -1)})


def test_rows_of_finfo_min_in_float64() -> None:
    compare("composed", arguments("no prefix", torch.float64, torch.finfo(torch.float64).min))


@pytest.mark.parametrize("backend", ["composed", "triton"])
def test_other_masks(backend: str) -> None:
    """float32 rounds score + bias to 1e-3 (-1e4), or takes the score away (-1e9), in each backend as in eager."""
    fills = (-1e3, -1e4, torch.finfo(torch.float16).min, -1e6, -1e9, -1e30, LOW, 1e9)
    given = arguments("no prefix", torch.float32, 0.0)
    given["bias"] = torch.tensor(fills)[:, None].expand(1, 2, S, T)
    got, expected = run(backend, given, lse_gradient=True), run("eager", given, lse_gradient=True)
    for result, tensor in got.items():
        close(tensor, expected[result], HALF)
    close(got["out"][:, :, 4:], expected["out"][:, :, 4:], LONG)

    # What the probabilities of a row give to the values adds up to 1.
    value = given["value"].detach().requires_grad_()
    out = prefix_attention(**given | {"value": value}, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), value)
    close(grad.sum(2), torch.full_like(grad.sum(2), 2 * S), LONG)  # two query heads read each
