"""The Triton kernels on packed sequences and under dropout, with whatever options a seed draws.

``test_numerics`` draws padded calls without dropout.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_attn import prefix_attention, prefix_attention_varlen
from tests.numerics import ROUNDED, Case, as_accurate, widen

NAMES = ("query", "key", "value", "prefix_key", "prefix_value", "sinks")


def packed_call(seed: int) -> dict[str, Any]:
    """A call of ``prefix_attention_varlen``: lengths of queries and keys apart, empty ones among them."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    B, Hkv, G, D = r.choice((1, 3, 5)), r.choice((1, 2)), r.choice((1, 2, 3)), r.choice((8, 12, 80))
    N, P = r.choice((0, 3)), r.choice((2, 9, 37))
    lengths = {"q": [r.choice((0, 1, 7, 33)) for _ in range(B)], "k": [r.choice((0, 1, 7, 45)) for _ in range(B)]}
    total = {kind: sum(of) for kind, of in lengths.items()}
    normal = lambda *shape: torch.randn(*shape, generator=g)
    bank = (N,) if N else ()
    call: dict[str, Any] = {
        "query": normal(total["q"], Hkv * G, D),
        "key": normal(total["k"], Hkv, D),
        "value": normal(total["k"], Hkv, 8),
        "prefix_key": normal(*bank, Hkv, P, D),
        "prefix_value": normal(*bank, Hkv, P, 8),
        "is_causal": r.random() < 0.6,
    }
    for kind, of in lengths.items():
        call[f"cu_seqlens_{kind}"] = torch.tensor([0, *of], dtype=r.choice((torch.int32, torch.int64))).cumsum(0)
        call[f"max_seqlen_{kind}"] = max(of) + r.choice((0, 9))
    optional: dict[str, Any] = {
        "sinks": normal(Hkv * G),
        "window": r.choice((1, 6, 20)),
        "softcap": 1.5,
        "scale": r.choice((-0.3, 0.2)),
        "prefix_start": torch.tensor([r.randint(-1, 20) for _ in range(B)]),
    }
    if N:
        call["prefix_ids"] = torch.tensor([r.randint(-1, N - 1) for _ in range(B)])
        optional["prefix_lengths"] = torch.tensor([r.randint(0, P) for _ in range(N)])
    return call | {name: value for name, value in optional.items() if r.random() < 0.35}


def results(call: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """out, lse and every gradient, the lse's part included."""
    leaves = {n: call[n].detach().requires_grad_() for n in NAMES if n in call}
    out, lse = prefix_attention_varlen(**call | leaves, return_lse=True, backend=backend)
    ramp = torch.linspace(-0.5, 1, max(out.numel(), 1))[: out.numel()].view(out.shape).to(out)
    objective = (out * ramp).sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
    grads = torch.autograd.grad(objective, list(leaves.values()))
    return {"out": out.detach(), "lse": lse.detach()} | {f"grad {n}": grad for n, grad in zip(leaves, grads)}


@pytest.mark.parametrize("seed", range(16))
def test_packed_calls_match_float64(seed: int) -> None:
    call = packed_call(seed)
    got, rough, exact = results(call, "triton"), results(call, "eager"), results(widen(call), "eager")
    for name, tensor in got.items():
        as_accurate(name, tensor, exact[name], [rough[name]])


DROPPED = {
    "padded": Case(B=2, S=9, T=20, with_=("left_padding", "sinks")),
    "window": Case(B=2, S=20, T=20, P=9, options={"window": 6}),
    "softcap lengths": Case(B=3, S=9, T=20, with_=("key_lengths",), options={"softcap": 2.0, "is_causal": False}),
    "bank infix": Case(B=4, N=3, S=20, T=20, P=9, with_=("prefix_ids", "prefix_lengths", "prefix_start")),
    "bias": Case(B=2, S=9, T=9, with_=("bias",)),
    "gate": Case(B=2, S=9, T=9, with_=("prefix_gate",)),
}


@pytest.mark.parametrize("case", DROPPED.values(), ids=DROPPED)
def test_gradients_under_dropout_are_those_of_the_output(case: Case) -> None:
    """Along a random direction: the output is linear in the values, and smooth in the rest, while the seed is the same.

    A backward that drew another mask than forward, in one option, would be wrong by the size of the gradient.
    """
    arguments = case.arguments(torch.float32)
    upstream = torch.randn(case.B, case.Hq, case.S, case.Dv)

    def objective(**changed: Tensor) -> Tensor:
        torch.manual_seed(7)
        out = prefix_attention(**arguments | changed, dropout_p=0.3, backend="triton")
        assert isinstance(out, Tensor)
        return (out * upstream).sum(dtype=torch.float64)

    names = NAMES[:5]
    leaves = {n: arguments[n].clone().requires_grad_() for n in names}
    grads = dict(zip(names, torch.autograd.grad(objective(**leaves), list(leaves.values()))))
    for name in names:
        direction = torch.randn_like(arguments[name])
        step = 1.0 if name.endswith("value") else 1e-2
        ahead, behind = (objective(**{name: arguments[name] + s * direction}) for s in (step, -step))
        slope, expected = float(ahead - behind) / (2 * step), float((grads[name].double() * direction).sum())
        size = float(grads[name].norm() * direction.norm())
        assert abs(slope - expected) <= ROUNDED.rtol * size, f"{name}: {slope} along the output, {expected} by backward"
