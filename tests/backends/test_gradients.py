"""Who gets a gradient, of what precision, and what a second derivative does."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_attn import prefix_attention
from prefix_attn.backends import composed
from tests.numerics import GRADIENT, NAMES, ROUNDED, Case, close, close_in_norm

GRADCHECK = {
    "plain": Case(B=2, Hq=2, Hkv=1, S=3, T=4, P=2, D=3, Dv=2),
    "masked": Case(B=2, Hq=2, Hkv=1, S=4, T=3, P=2, D=2, Dv=2, with_=("left_padding", "sinks"), options={"window": 2}),
    "bias gate": Case(B=2, Hq=2, Hkv=1, S=2, T=3, P=2, D=2, Dv=2, with_=("bias", "prefix_gate")),
    "bank": Case(B=3, Hq=2, Hkv=2, S=2, T=2, P=2, D=2, Dv=2, N=2, with_=("prefix_ids", "prefix_lengths", "sinks")),
    "softcap": Case(B=1, Hq=2, Hkv=1, S=2, T=3, P=2, D=2, Dv=2, options={"softcap": 1.5}),
    "empty rows": Case(B=1, Hq=1, Hkv=1, S=4, T=2, P=0, D=2, Dv=2),
}


def _double(case: Case) -> tuple[list[str], list[Tensor], dict[str, Any]]:
    arguments = case.arguments(torch.float64)
    leaves = {n: arguments[n].double().requires_grad_() for n in NAMES if arguments.get(n) is not None}
    return list(leaves), list(leaves.values()), arguments


@pytest.mark.parametrize("case", GRADCHECK.values(), ids=GRADCHECK)
def test_eager_is_twice_differentiable(case: Case) -> None:
    names, leaves, arguments = _double(case)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = prefix_attention(**arguments | dict(zip(names, tensors)), backend="eager", return_lse=True)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("case", [c for n, c in GRADCHECK.items() if n in ("plain", "masked", "bank", "empty rows")])
def test_composed_passes_gradcheck(case: Case) -> None:
    names, leaves, arguments = _double(case)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = prefix_attention(**arguments | dict(zip(names, tensors)), backend="composed", return_lse=True)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("wanted", [w for w in product((False, True), repeat=3) if any(w)])
@pytest.mark.parametrize("backend", ["composed", "cpu", "triton"])
def test_only_what_is_asked(backend: str, wanted: tuple[bool, bool, bool]) -> None:
    """Query, sequence, prefix: each pattern of needs gives the full run's gradients for these, and None for others."""
    arguments = Case().arguments(torch.float32)
    groups = (("query",), ("key", "value"), ("prefix_key", "prefix_value"))
    asked = [n for names, needed in zip(groups, wanted) for n in names if needed]

    def grads(names: list[str]) -> dict[str, Tensor | None]:
        leaves = {n: arguments[n].clone().requires_grad_(n in names) for names_ in groups for n in names_}
        prefix_attention(**arguments | leaves, backend=backend).square().sum().backward()
        return {n: leaf.grad for n, leaf in leaves.items()}

    full, some = grads([n for names in groups for n in names]), grads(asked)
    for name, grad in some.items():
        if name in asked:
            assert torch.equal(grad, full[name])
        else:
            assert grad is None


def test_prefix_alone_runs_no_sequence_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer of a frozen model: its backward calls torch's kernel once, on the prefix's P keys."""
    lengths = []
    kernel = composed._backward

    def spy(grad: Tensor, query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Any:
        lengths.append(key.shape[2])
        return kernel(grad, query, key, *rest, **named)

    monkeypatch.setattr(composed, "_backward", spy)
    arguments = Case(P=5, T=17).arguments(torch.float32)
    leaf = arguments["prefix_value"].requires_grad_()
    prefix_attention(**arguments, backend="composed").sum().backward()
    assert lengths == [5]
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


@pytest.mark.parametrize(("backend", "B"), [("composed", 64), ("triton", 16)])
def test_half_precision_keeps_a_float32_prefix_gradient(backend: str, B: int) -> None:
    """Summed over thousands of queries in bfloat16 a gradient loses what float32 keeps."""
    case = Case(B=B, S=64, T=64, P=3, prefix_dtype=torch.float32)
    arguments = case.arguments(torch.bfloat16)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        cast = {n: a.to(dtype) if isinstance(a, Tensor) and dtype == torch.float64 else a for n, a in arguments.items()}
        leaf = cast["prefix_value"].detach().requires_grad_()
        prefix_attention(**cast | {"prefix_value": leaf}, backend=backend if dtype == torch.bfloat16 else "eager").mean(
            dtype=torch.float32
        ).backward()
        grads.append(leaf.grad)
    assert grads[0].dtype == torch.float32
    close_in_norm(grads[0].double(), grads[1], ROUNDED)


@pytest.mark.parametrize("backend", ["composed", "cpu", "triton"])
def test_second_derivative_of_a_fused_backend_is_refused(backend: str) -> None:
    """Without a formula on the backward op, autograd returns wrong numbers and only warns."""
    arguments = Case().arguments(torch.float32)
    leaf = arguments["prefix_key"].requires_grad_()
    out = prefix_attention(**arguments, backend=backend).square().sum()
    (grad,) = torch.autograd.grad(out, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["query", "prefix_key"])
@pytest.mark.parametrize("backend", ["composed", "cpu", "triton"])
def test_lse_alone(backend: str, name: str) -> None:
    """A loss on the lse only: no gradient of out arrives at all."""
    arguments = Case().arguments(torch.float32)
    grads = []
    for one in (backend, "eager"):
        leaf = arguments[name].clone().requires_grad_()
        _, lse = prefix_attention(**arguments | {name: leaf}, backend=one, return_lse=True)
        lse.square().sum().backward()
        grads.append(leaf.grad)
    close(*grads, GRADIENT)
