"""Calls to test with, and how wrong a result may be: the only place where tolerances live."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn import prefix_attention
from prefix_attn.backends import eager
from prefix_attn.call import Call
from prefix_attn.functional import _split

NAMES = ("query", "key", "value", "prefix_key", "prefix_value", "sinks", "bias", "prefix_gate")


@dataclass(frozen=True)
class Case:
    """One call. The defaults are the plain one; a test names only what it changes. N = 0: a shared prefix."""

    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    S: int = 17
    T: int = 17
    P: int = 5
    D: int = 16
    Dv: int = 16
    N: int = 0
    layout: str = "bhsd"  # or "bshd": the strides that models give
    prefix_dtype: torch.dtype | None = None
    with_: tuple[str, ...] = ()  # optional tensors to add
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        """Every argument of the call, drawn from a seed that depends on the case alone."""
        g = torch.Generator().manual_seed(sum(map(ord, repr(self))) % 2**31)

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=g).to(device, dtype)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high + 1, shape, generator=g).to(device)

        def heads(H: int, length: int, size: int) -> Tensor:
            if self.layout == "bshd":
                return normal(self.B, length, H, size).transpose(1, 2)
            return normal(self.B, H, length, size)

        bank = (self.N,) if self.N else ()
        prefix = self.prefix_dtype or dtype
        out: dict[str, Any] = {
            "query": heads(self.Hq, self.S, self.D),
            "key": heads(self.Hkv, self.T, self.D),
            "value": heads(self.Hkv, self.T, self.Dv),
            "prefix_key": normal(*bank, self.Hkv, self.P, self.D, dtype=prefix),
            "prefix_value": normal(*bank, self.Hkv, self.P, self.Dv, dtype=prefix),
        }
        extra: dict[str, Callable[[], Tensor | None]] = {
            "no_prefix": lambda: None,
            "sinks": lambda: normal(self.Hq, dtype=torch.float32),
            "bias": lambda: normal(self.B, self.Hq, self.S, self.T),
            "prefix_gate": lambda: normal(self.Hq, dtype=torch.float32),
            "prefix_ids": lambda: integers(-1, self.N - 1, self.B),
            "prefix_lengths": lambda: integers(0, self.P, self.N),
            "prefix_start": lambda: integers(-1, self.T, self.B),
            "key_lengths": lambda: integers(0, self.T, self.B),
            "key_mask": lambda: integers(0, 3, self.B, self.T) > 0,
            "left_padding": lambda: torch.arange(self.T, device=device) >= integers(0, self.T, self.B)[:, None],
        }
        for name in self.with_:
            out["key_mask" if name == "left_padding" else name] = extra[name]()
        if "no_prefix" in self.with_:
            del out["no_prefix"]
            out["prefix_key"] = out["prefix_value"] = None
        return out | self.options


CASES = {
    "plain": Case(),
    "full": Case(options={"is_causal": False}),
    "one-query": Case(S=1),
    "odd": Case(B=3, S=33, T=33, P=7, D=80, Dv=80),
    "multi-query": Case(Hq=8, Hkv=1, layout="bshd"),
    "multi-head": Case(Hq=3, Hkv=3, D=8, Dv=8, layout="bshd"),
    "long-prefix": Case(P=130, S=5, T=9),
    "tiny-head": Case(D=1, Dv=1),
    "decode-wide": Case(S=1, P=130, D=128, Dv=128),
    "decode-odd": Case(S=2, P=300, D=80, Dv=80),
    "large-head": Case(B=1, D=256, Dv=256, S=7, T=7),
    "Dv<D": Case(D=24, Dv=8),
    "Dv>D": Case(D=8, Dv=24),
    "P=0": Case(P=0),
    "no-prefix": Case(with_=("no_prefix",)),
    "T=0": Case(T=0, S=3),
    "S=0": Case(S=0),
    "B=0": Case(B=0),
    "nothing": Case(P=0, T=0, S=3),
    "S<T": Case(S=5, T=19),
    "S>T": Case(S=19, T=5),
    "S>T no-prefix": Case(S=19, T=5, P=0),
    "scale": Case(options={"scale": 0.5}),
    "key-mask": Case(with_=("key_mask",)),
    "key-mask full": Case(with_=("key_mask",), options={"is_causal": False}),
    "left-padding": Case(B=4, with_=("left_padding",), layout="bshd"),
    "left-padding P=0": Case(B=4, P=0, with_=("left_padding",)),
    "key-lengths": Case(B=4, S=3, T=11, with_=("key_lengths",)),
    "window": Case(options={"window": 4}),
    "window full": Case(options={"window": 3, "is_causal": False}),
    "window mask": Case(with_=("key_mask",), options={"window": 2}),
    "sinks": Case(with_=("sinks",)),
    "sinks only": Case(P=0, with_=("sinks", "left_padding")),
    "bias": Case(with_=("bias",)),
    "bias mask": Case(with_=("bias", "left_padding")),
    "softcap": Case(options={"softcap": 2.0}),
    "bank own entry": Case(B=3, N=3),
    "bank one entry": Case(B=3, N=1),
    "bank ids": Case(B=5, N=3, with_=("prefix_ids",), layout="bshd"),
    "bank ragged": Case(B=5, N=4, with_=("prefix_ids", "prefix_lengths")),
    "infix": Case(B=4, with_=("prefix_start",)),
    "infix bank": Case(B=4, N=2, with_=("prefix_start", "prefix_ids", "sinks")),
    "gate": Case(with_=("prefix_gate",)),
    "gate infix sinks": Case(B=4, T=21, with_=("prefix_gate", "prefix_start", "sinks", "key_lengths")),
    "float32 prefix": Case(prefix_dtype=torch.float32, layout="bshd"),
    "everything": Case(
        B=4,
        S=9,
        T=23,
        N=3,
        D=24,
        Dv=20,
        with_=("sinks", "bias", "prefix_ids", "prefix_lengths", "prefix_start", "key_lengths", "key_mask"),
        options={"window": 6},
    ),
}


def random_case(seed: int) -> Case:
    """A call with random sizes and options: what the table forgot."""
    r = random.Random(seed)
    Hkv, D = r.choice((1, 2, 3)), r.choice((1, 5, 8, 16, 24, 64))
    N = r.choice((0, 0, 1, 3))
    B = 3 if N == 3 else r.choice((1, 2, 3, 5))
    optional = ["sinks", "bias", "prefix_start", "key_lengths", "key_mask", "prefix_gate", "left_padding"]
    if N:
        optional += ["prefix_ids", "prefix_lengths"]
    return Case(
        B=B,
        Hq=Hkv * r.choice((1, 2, 3)),
        Hkv=Hkv,
        S=r.choice((0, 1, 2, 7, 31, 40)),
        T=r.choice((0, 1, 3, 7, 31, 40)),
        # Not 1: over a single key every gradient of the softmax is an exact 0, and any rounding is infinitely wrong.
        P=r.choice((0, 2, 9, 33)),
        D=D,
        Dv=r.choice((D, D, D, 8)),
        N=N,
        layout=r.choice(("bhsd", "bshd")),
        prefix_dtype=r.choice((None, torch.float32)),
        with_=tuple(name for name in optional if r.random() < 0.25),
        options={"is_causal": r.random() < 0.6} | ({"window": r.choice((1, 5, 12))} if r.random() < 0.25 else {}),
    )


def run(backend: str, arguments: dict[str, Any], *, lse_gradient: bool) -> dict[str, Tensor]:
    """out, lse and a gradient per differentiable tensor, for upstream gradients that are the same for every backend.

    backend "torch" is scaled_dot_product_attention on the concatenated tensors, which has no lse; "torch kernel" the
    same without a gradient of the sinks, which makes torch take the kernel that rounds its output.
    """
    leaves = {n: arguments[n].detach().requires_grad_() for n in NAMES if arguments.get(n) is not None}
    for name in frozen(backend, arguments):
        leaves[name] = leaves[name].detach()
    if backend.startswith("torch"):
        out, lse = concatenated(arguments | leaves), None
    else:
        out, lse = prefix_attention(**arguments | leaves, backend=backend, return_lse=True)
    objective = (out * _upstream(out)).sum()
    if lse is not None and lse_gradient:  # an empty row's lse is -inf, and has no gradient
        objective = objective + (torch.where(lse.isfinite(), lse, 0.0) * _upstream(lse)).sum().to(objective.dtype)
    results = {"out": out.detach()} if lse is None else {"out": out.detach(), "lse": lse.detach()}
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(objective, list(wanted.values()), allow_unused=True)
    for (name, leaf), grad in zip(wanted.items(), grads):
        results[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def frozen(backend: str, arguments: dict[str, Any]) -> list[str]:
    """Tensors whose gradient a backend may refuse, and is therefore not asked for."""
    if backend == "eager":
        return []
    half = arguments["query"].dtype.itemsize < 4 and backend in ("composed", "torch kernel")
    return [n for n in ("bias", *(("sinks",) if half else ())) if arguments.get(n) is not None]


def concatenated(arguments: dict[str, Any]) -> Tensor:
    """The call in plain torch: everything concatenated, one scaled_dot_product_attention (two with a gate).

    A sink is one more key, with score ``sink`` and value 0. Equal head sizes let torch take its own kernel.
    """
    fields = {n: a for n, a in arguments.items() if n in Call._fields}
    call = Call(**{"scale": arguments["query"].shape[-1] ** -0.5} | fields)
    if (gate := arguments.get("prefix_gate")) is not None:
        sequence, prefix = _split(call)
        return (_attention(sequence) + gate[:, None, None] * _attention(prefix)).to(call.query.dtype)
    return _attention(call)


def _attention(call: Call) -> Tensor:
    key, value, visible = eager._concatenate(call)
    mask = call.query.new_zeros(*call.query.shape[:3], key.shape[2])
    if call.bias is not None:
        mask = mask + F.pad(call.bias, (call.prefix_length, 0))
    if visible is not None:
        mask = mask.masked_fill(~visible, -torch.inf)
    if call.sinks is not None:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        sink = call.sinks.to(mask.dtype)[:, None, None].expand(*mask.shape[:3], 1)
        mask = torch.cat([mask, sink], dim=-1)
    Dv = value.shape[-1]
    size = max(call.query.shape[-1], Dv)
    query, key, value = (F.pad(t, (0, size - t.shape[-1])) for t in (call.query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=call.scale)[..., :Dv]


def _upstream(tensor: Tensor) -> Tensor:
    """An upstream gradient whose sum does not cancel: errors would then be measured against nearly nothing."""
    ramp = torch.linspace(-0.5, 1, max(tensor.numel(), 2), dtype=torch.float64)[: tensor.numel()]
    return ramp.view(tensor.shape).to(tensor)


def widen(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {n: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for n, a in arguments.items()}


def as_accurate(name: str, got: Tensor, exact: Tensor, roughs: list[Tensor], *, few: bool = False) -> None:
    """Fail unless ``got`` is at most twice as wrong as plain PyTorch is in the same dtype.

    exact: the same call in float64. roughs: the same call by concatenation in ``got``'s dtype, each a fair peer. Two
    sizes of error are bounded, because a wild element hides in the rms and a small bias hides in the maximum. A few
    units of rounding are free: a peer can be exact by luck. ``few``: so few numbers of so few bits that which of the
    two has the largest error is luck, and only the rms counts.
    """
    assert got.shape == exact.shape, name
    assert all(got.dtype == rough.dtype for rough in roughs), name
    finite = exact.isfinite()
    assert torch.equal(got[~finite].double(), exact[~finite]), f"{name}: infinities differ"
    if not finite.any():
        return
    errors = [(t.double() - exact)[finite] for t in (got, *roughs)]
    assert errors[0].isfinite().all(), f"{name}: not finite"
    free = torch.finfo(got.dtype).eps * (8 if got.dtype.itemsize >= 4 else 1)
    for size in (_rms,) if few else (_largest, _rms):
        error, *fair = (size(e) for e in errors)
        bound = 2 * max(fair) + free * max(size(exact[finite]), 1e-3)
        assert error <= bound, f"{name}: {size.__name__} error {error:.2e}, plain PyTorch {max(fair):.2e}"


def _largest(error: Tensor) -> float:
    return float(error.abs().max())


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())
