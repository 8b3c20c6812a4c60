"""Calls to test with, and how wrong a result may be: the only place where tolerances live."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn import prefix_attention
from tests import oracle


class Tolerance(NamedTuple):
    """Results agree where |got - expected| <= atol + rtol * |expected|; in norm, up to rtol."""

    rtol: float
    atol: float


DOUBLE = Tolerance(1e-13, 1e-12)  # float64: the same sums in another order
FLOAT = Tolerance(1e-6, 1e-6)  # float32: one operation, whose results are shares or near 1
MODEL = Tolerance(2e-5, 2e-5)  # float32: through all the layers of a tiny model
GRADIENT = Tolerance(1e-4, 1e-6)  # float32: back through them; gradients are small, and sums of larger terms
LONG = Tolerance(1e-4, 1e-4)  # float32: sums of hundreds of terms, or of terms that are not near 1
ROUNDED = Tolerance(2**-9, 2**-8)  # bfloat16: one rounding on the way, or several that average out
HALF = Tolerance(2**-6, 2**-6)  # bfloat16 or float16: through a few layers
FINE = Tolerance(0, 1e-4)  # float32: an lse
EPS = 1.5  # of the output's dtype: operands of both products and the output rounded once
DRAWS = Tolerance(0, 0.02)  # a share or a mean of thousands of random draws

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
    "key-lengths full": Case(B=4, S=3, T=11, with_=("key_lengths",), options={"is_causal": False}),
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
    same without a gradient of the sinks, which makes torch take the kernel that rounds its output. "written out" has
    its scores in memory. "oracle" is the definition, in tests/oracle.py.
    """
    leaves = {n: arguments[n].detach().requires_grad_() for n in NAMES if arguments.get(n) is not None}
    for name in frozen(backend, arguments):
        leaves[name] = leaves[name].detach()
    if backend in ("torch", "torch kernel", "written out"):
        out, lse = concatenated(arguments | leaves, written_out if backend == "written out" else fused)
    elif backend == "oracle":
        out, lse = oracle.attention(arguments | leaves)
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


def peers(arguments: dict[str, Any]) -> list[str]:
    """What the errors of a call are compared with: plain torch in the call's dtype.

    ``eager`` is that in float32. In half precision it is better, since it forms scores in float32.
    """
    if arguments["query"].dtype.itemsize >= 4:
        return ["eager"]
    return ["written out"] if arguments.get("softcap") else ["written out", "torch", "torch kernel"]


def frozen(backend: str, arguments: dict[str, Any]) -> list[str]:
    """Tensors whose gradient a backend may refuse, and is therefore not asked for."""
    if backend in ("eager", "oracle", "written out"):
        return []
    half = arguments["query"].dtype.itemsize < 4 and backend in ("composed", "torch kernel")
    return [n for n in ("bias", *(("sinks",) if half else ())) if arguments.get(n) is not None]


def concatenated(arguments: dict[str, Any], attend: Callable[..., tuple[Tensor, Tensor | None]]) -> Any:
    """(out, lse) of the call in plain torch: everything concatenated, one ``attend`` (two with a gate)."""
    query, gate, bias = arguments["query"], arguments.get("prefix_gate"), arguments.get("bias")
    B, Hq, S, _ = query.shape
    T = arguments["key"].shape[2]
    visible = oracle.visible(arguments)[:, None]  # [B, 1, S, P + T]
    P = visible.shape[-1] - T
    if not visible.numel():  # nothing to attend to: zeros, with a graph
        empty = query.new_full((B, Hq, S), -torch.inf, dtype=torch.float32)
        return query.sum() * 0 + query.new_zeros(B, Hq, S, arguments["value"].shape[-1]), empty
    rows = [oracle.concatenation(arguments, b) for b in range(B)]
    key, value = (torch.stack(parts) for parts in zip(*rows))
    group = Hq // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    mask = query.new_zeros(B, Hq, S, P + T)
    if bias is not None:
        mask = mask + F.pad(bias, (P, 0))
    mask = mask.masked_fill(~visible, -torch.inf)
    options = {name: arguments.get(name) for name in ("scale", "softcap")}
    if gate is None:
        return attend(query, key, value, mask, arguments.get("sinks"), **options)
    out, lse = attend(query, key[:, :, P:], value[:, :, P:], mask[..., P:], arguments.get("sinks"), **options)
    other, _ = attend(query, key[:, :, :P], value[:, :, :P], mask[..., :P], None, **options)
    return (out + gate[..., None, None] * other).to(query.dtype), lse


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    *,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, None]:
    """torch's own kernel, which gives no lse. A sink is one more key with value 0; equal head sizes let it be taken."""
    assert softcap is None
    if sinks is not None:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        sink = sinks.to(mask.dtype)[:, None, None].expand(*mask.shape[:3], 1)
        mask = torch.cat([mask, sink], dim=-1)
    D, Dv = query.shape[-1], value.shape[-1]
    query, key, value = (F.pad(t, (0, max(D, Dv) - t.shape[-1])) for t in (query, key, value))
    scale = D**-0.5 if scale is None else scale
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)[..., :Dv], None


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    *,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """What people write with matmul and softmax: products in the dtype of the tensors, the softmax in float32."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.mT).to(exact) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(exact)[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    lse = scores.detach().logsumexp(-1)
    seen = (lse > -torch.inf)[..., None]
    weights = torch.where(seen, scores, 0.0).softmax(-1) * seen
    return weights[..., : mask.shape[-1]].to(query.dtype) @ value, lse


def _upstream(tensor: Tensor) -> Tensor:
    """An upstream gradient whose sum does not cancel: errors would then be measured against nearly nothing."""
    ramp = torch.linspace(-0.5, 1, max(tensor.numel(), 2), dtype=torch.float64)[: tensor.numel()]
    return ramp.view(tensor.shape).to(tensor)


def widen(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {n: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for n, a in arguments.items()}


def close(got: Any, expected: Any, tolerance: Tolerance) -> None:
    """Fail unless two numbers, tensors or collections of them agree, element by element."""
    torch.testing.assert_close(got, expected, **tolerance._asdict())


def close_in_norm(got: Tensor, expected: Tensor, tolerance: Tolerance, *, name: str = "", dim: Any = None) -> None:
    """Fail unless the difference is small beside ``expected``, both measured over ``dim`` (over everything)."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
    error = ((got - expected).norm(dim=dim) / expected.norm(dim=dim)).max()
    assert error <= tolerance.rtol, f"{name}: relative error {error:.1e}"


def within_eps(got: Tensor, exact: Tensor, unit: Tensor | None = None) -> None:
    """Fail unless errors are at most ``EPS`` eps of got's dtype times ``unit``: by default a query's largest output."""
    if not got.numel():
        return
    unit = exact.abs().amax(-1, keepdim=True) if unit is None else unit
    error = ((got.double() - exact).abs() / unit.clamp(min=1e-3)).max() / torch.finfo(got.dtype).eps
    assert error <= EPS, f"error of {error:.2f} eps"


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
