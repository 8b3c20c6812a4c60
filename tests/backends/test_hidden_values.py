"""What a query does not see changes nothing: neither out, nor lse, nor a gradient, whatever it holds.

Static caches are made by torch.empty, and padding holds anything. A probability of 0 hides no NaN: 0 * NaN is NaN. So
is 0 * inf, and products with 1e38 are inf.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from prefix_attn import prefix_attention
from prefix_attn.backends import composed
from tests.numerics import DOUBLE, FLOAT, GRADIENT, LONG, NAMES, close

B, H, T, P, D = 2, 2, 20, 3, 16
ANYTHING, FINITE = (float("nan"), float("inf"), 1e38), (1e38,)
MASK = torch.arange(T) % 3 > 0  # hides the first key, among others
MASKS, LENGTHS = torch.stack([MASK, torch.zeros(T, dtype=torch.bool)]), torch.tensor([7, 0])  # row 1 sees no key


class Hidden(NamedTuple):
    """A call, and which of its keys and of its prefix's tokens no query sees (or none with a loss)."""

    options: dict[str, Any]
    keys: Tensor | None = None  # broadcast to (B, H, T, 1)
    prefix: Tensor | None = None  # (H, P, 1) or (N, H, P, 1)
    fills: tuple[float, ...] = ANYTHING
    blind: slice = slice(None)  # queries that do not see the hidden keys: the loss is theirs


def tokens(*hidden: int, of: int = P, bank: bool = False) -> Tensor:
    """(H, P, 1), True for ``hidden``; or (3, H, P, 1), True for all tokens of these entries."""
    chosen = torch.zeros(3 if bank else of, dtype=torch.bool)
    chosen[list(hidden)] = True
    return chosen.view(3, 1, 1, 1).expand(3, H, P, 1) if bank else chosen.view(of, 1).expand(H, of, 1)


SHORT = torch.arange(P)[:, None] >= torch.tensor([3, 1, 0]).view(3, 1, 1, 1).expand(3, H, 1, 1)
CASES = {
    "key_mask": Hidden({"key_mask": MASKS}, ~MASKS[:, None, :, None]),
    "key_mask, softcap": Hidden({"key_mask": MASKS, "softcap": 2.0}, ~MASKS[:, None, :, None]),
    "key_lengths": Hidden({"key_lengths": LENGTHS}, (torch.arange(T) >= LENGTHS[:, None])[:, None, :, None]),
    "prefix_lengths": Hidden(
        {"prefix_ids": torch.tensor([1, 2]), "prefix_lengths": torch.tensor([3, 1, 0])}, prefix=SHORT
    ),
    "an entry that no row reads": Hidden({"prefix_ids": torch.tensor([0, 2])}, prefix=tokens(1, bank=True)),
    "prefix_ids = -1": Hidden({"prefix_ids": torch.tensor([-1, -1])}, prefix=tokens(0, 1, 2, bank=True)),
    "gate 0": Hidden({"prefix_gate": torch.zeros(2 * H)}, prefix=tokens(0, 1, 2)),
    "gate 0 of one row": Hidden(
        {"prefix_gate": torch.tensor([[0.5], [0.0]]).expand(B, 2 * H), "prefix_ids": torch.tensor([0, 2])},
        prefix=tokens(1, 2, bank=True),
    ),
    "prefix_start": Hidden({"prefix_start": torch.tensor([T, T])}, prefix=tokens(0, 1, 2), fills=FINITE),
    "prefix_start of some": Hidden(
        {"prefix_start": torch.tensor([9, T])}, prefix=tokens(0, 1, 2), fills=FINITE, blind=slice(None, 8)
    ),
    "window": Hidden({"window": 2}, (torch.arange(T) == 0)[:, None], fills=FINITE, blind=slice(2, None)),
    "window, softcap": Hidden(
        {"window": 2, "softcap": 2.0}, (torch.arange(T) == 0)[:, None], fills=FINITE, blind=slice(2, None)
    ),
    "causality": Hidden({}, (torch.arange(T) == T - 1)[:, None], fills=FINITE, blind=slice(None, -1)),
}

# composed has no softcap, and torch's own kernel overflows behind causality and windows.
TRIED = [
    (backend, name)
    for backend in ("eager", "composed", "cpu", "triton")
    for name, case in CASES.items()
    if backend != "composed" or not (case.fills is FINITE or "softcap" in case.options)
]


def run(backend: str, S: int, case: Hidden, fill: float) -> dict[str, Tensor]:
    """What queries without sight of the hidden values get; those with it are 0, so that theirs stays finite."""
    g = torch.Generator().manual_seed(0)
    prefix = (H, P, D) if case.prefix is None else (*case.prefix.shape[:-1], D)
    shapes = ((B, 2 * H, S, D), (B, H, T, D), (B, H, T, D), prefix, prefix)
    drawn = [torch.randn(shape, generator=g) for shape in shapes]
    weight = torch.zeros(S, 1)
    weight[slice(None) if S == 1 else case.blind] = 1
    hidden = (None, case.keys, case.keys, case.prefix, case.prefix)
    drawn[0] = drawn[0] * weight
    leaves = [(t if h is None else t.masked_fill(h, fill)).requires_grad_() for t, h in zip(drawn, hidden)]
    out, lse = prefix_attention(*leaves, **case.options, backend=backend, return_lse=True)
    grads = torch.autograd.grad((out * weight * torch.randn(out.shape, generator=g)).sum(), leaves)
    seen = weight[:, 0] > 0
    return {"out": out[:, :, seen], "lse": lse[:, :, seen]} | {f"grad {n}": t for n, t in zip(NAMES, grads)}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows in Triton's interpreter
@pytest.mark.parametrize("S", [1, T], ids=["decode", "forward"])
@pytest.mark.parametrize(("backend", "name"), TRIED)
def test_hidden_values_change_nothing(backend: str, name: str, S: int) -> None:
    case = CASES[name]
    if S == 1 and name in ("causality", "prefix_start of some"):
        S = T - 1  # the last query sees everything
    expected = run(backend, S, case, 0.0)
    for fill in case.fills if backend != "triton" else case.fills[:1]:  # in the interpreter each takes seconds
        got = run(backend, S, case, fill)
        for result, tensor in expected.items():
            assert got[result].isfinite().all() or result == "lse", f"{result} with {fill}"
            close(got[result], tensor, FLOAT)


@pytest.mark.parametrize(("lengths", "read"), [([7, 7], "as it lies"), ([7, 3], "copied"), ([0, 0], "not at all")])
def test_composed_reads_no_more_of_a_cache_than_is_full(
    lengths: list[int], read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, value, prefix = torch.full((B, H, 4096, D), torch.nan), torch.randn(B, H, 4096, D), torch.randn(H, P, D)
    query, seen = torch.randn(B, H, 1, D), []
    kernel = composed._forward

    def spy(query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Any:
        seen.append((key.shape[2], key.untyped_storage().data_ptr()))
        return kernel(query, key, *rest, **named)

    key[:, :, :7] = torch.randn(B, H, 7, D)
    monkeypatch.setattr(composed, "_forward", spy)
    call = {"key_lengths": torch.tensor(lengths), "prefix_key": prefix, "prefix_value": prefix}
    results = [
        prefix_attention(query, key[:, :, :T], value[:, :, :T], **call, backend=backend)
        for T, backend in ((4096, "composed"), (7, "eager"))
    ]
    close(*results, FLOAT)
    expected = {"as it lies": [(7, True), (P, False)], "copied": [(7, False), (P, False)], "not at all": [(P, False)]}
    assert [(n, at == key.untyped_storage().data_ptr()) for n, at in seen] == expected[read]


def test_a_gate_of_zero_learns() -> None:
    """Nothing passes it, and its gradient is that of what would."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(B, heads, T, D, generator=g) for heads in (2 * H, H, H))
    prefix = torch.randn(2, H, P, D, generator=g)
    gates = [torch.full((2 * H,), size).requires_grad_() for size in (0.0, 0.5)]
    grads = []
    for gate in gates:
        out = prefix_attention(query, key, value, *prefix, prefix_gate=gate, backend="cpu")
        grads.append(torch.autograd.grad(out.sum(), gate)[0])
    close(grads[0], grads[1], GRADIENT)
    assert grads[0].abs().min() > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's forward mode
def test_a_gate_of_zero_has_second_derivatives() -> None:
    """Also where another row of the same prefix is open, and forward mode agrees with backward mode."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 3, 4, generator=g, dtype=torch.float64) for _ in range(3))
    prefix = torch.randn(2, 2, 3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    gate = torch.tensor([[0.0, 0.5], [0.5, 0.0]], dtype=torch.float64, requires_grad=True)

    def call(prefix: Tensor, gate: Tensor) -> Tensor:
        return prefix_attention(query, key, value, *prefix.unbind(), prefix_gate=gate, backend="eager")

    assert torch.autograd.gradgradcheck(call, (prefix, gate))
    _, tangent = torch.func.jvp(lambda gate: call(prefix.detach(), gate), (gate.detach(),), (torch.ones_like(gate),))
    shut = call(prefix.detach(), torch.ones_like(gate)) - call(prefix.detach(), torch.zeros_like(gate))
    close(tangent, shut.detach(), DOUBLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "composed", "cpu"])
def test_autocast_keeps_scores_and_lse_in_float32(backend: str, dtype: torch.dtype) -> None:
    query, key = 100 * torch.ones(1, 1, 2, 64), 100 * torch.ones(1, 1, 3, 64)
    with torch.autocast("cpu", dtype=dtype):
        out, lse = prefix_attention(
            query, key, key / 100, None, None, scale=1e-5, return_lse=True, backend=backend, is_causal=False
        )
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    close(lse, torch.full_like(lse, 6.4 + math.log(3)), LONG)
