"""What must hold whatever the numbers are: concatenation, permutation, repetition, causality, padding, memory."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefix_attn import prefix_attention
from tests.backends.test_numerics import compare
from tests.numerics import Case

BACKENDS = ("eager", "composed", "cpu", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torch_on_the_concatenation(backend: str) -> None:
    """The one definition that does not come from this project."""
    a = Case(Hq=4, Hkv=4).arguments(torch.float32)
    key = torch.cat([a["prefix_key"].expand(2, -1, -1, -1), a["key"]], dim=2)
    value = torch.cat([a["prefix_value"].expand(2, -1, -1, -1), a["value"]], dim=2)
    mask = torch.cat([torch.ones(17, 5, dtype=torch.bool), torch.ones(17, 17, dtype=torch.bool).tril()], dim=1)
    expected = F.scaled_dot_product_attention(a["query"], key, value, attn_mask=mask)
    torch.testing.assert_close(prefix_attention(**a, backend=backend), expected)


@pytest.mark.parametrize(
    ("backend", "threads"), [("composed", 1), ("composed", 2), ("cpu", 1), ("cpu", 2), ("triton", 1)]
)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_bitwise_repeatable(backend: str, threads: int, layout: str) -> None:
    length = 40 if backend == "triton" else 70  # the interpreter takes a second for each
    arguments = Case(B=3, S=length, T=length, P=33, layout=layout).arguments(torch.float32)
    results = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            leaves = {n: arguments[n].clone().requires_grad_() for n in ("query", "key", "prefix_key", "prefix_value")}
            out = prefix_attention(**arguments | leaves, backend=backend)
            out.square().sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves.values())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_see_each_other(backend: str) -> None:
    arguments = Case(B=4, N=4, with_=("prefix_ids",)).arguments(torch.float32)
    order = torch.tensor([2, 0, 3, 1])
    moved = {n: a[order] if n in ("query", "key", "value", "prefix_ids") else a for n, a in arguments.items()}
    out, permuted = (prefix_attention(**a, backend=backend) for a in (arguments, moved))
    torch.testing.assert_close(permuted, out[order])


@pytest.mark.parametrize("S", [1, 7, 70])
def test_a_row_of_a_bank_is_the_same_bits_in_any_company(S: int) -> None:
    """Other rows, in another order, with other entries, and garbage after its own entry, which is shorter than they.

    The backend cpu adds up each query by itself. The others share matrix products between rows, whose rounding depends
    on how many there are: test_rows_do_not_see_each_other has their bound.
    """
    query, key, value = torch.randn(5, 4, S, 16), *torch.randn(2, 5, 2, S + 9, 16)
    entries = [torch.randn(2, 2, length, 16) for length in (5, 70, 33)]
    alone = prefix_attention(query[:1], key[:1], value[:1], *entries[0], backend="cpu")
    for rows, ids in (
        ([0], [0]),
        ([0, 1], [0, 0]),
        ([3, 0], [1, 0]),
        ([4, 1, 0, 2], [-1, 2, 0, 2]),
        ([2, 3, 4, 1, 0], [0, 1, -1, 2, 0]),
    ):
        bank = torch.full((2, 3, 2, 70, 16), torch.nan)
        for n, entry in enumerate(entries):
            bank[:, n, :, : entry.shape[2]] = entry
        out = prefix_attention(
            *(t[rows] for t in (query, key, value)),
            *bank,
            prefix_ids=torch.tensor(ids),
            prefix_lengths=torch.tensor([5, 70, 33]),
            backend="cpu",
        )
        assert torch.equal(out[rows.index(0)], alone[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_causality(backend: str) -> None:
    """What comes later changes nothing, to the bit."""
    arguments = Case().arguments(torch.float32)
    before = prefix_attention(**arguments, backend=backend)
    arguments["key"][:, :, 9:] += 1
    arguments["value"][:, :, 9:] += 1
    after = prefix_attention(**arguments, backend=backend)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert (before[:, :, 9:] - after[:, :, 9:]).abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gate_is_no_prefix(backend: str) -> None:
    arguments = Case().arguments(torch.float32)
    plain = prefix_attention(**arguments | {"prefix_key": None, "prefix_value": None}, backend=backend)
    gated = prefix_attention(**arguments, prefix_gate=torch.zeros(4), backend=backend)
    assert torch.equal(gated, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_rows_are_zero_and_pass_no_gradient(backend: str) -> None:
    arguments = Case(P=0).arguments(torch.float32) | {"key_mask": torch.zeros(2, 17, dtype=torch.bool)}
    leaves = {n: arguments[n].requires_grad_() for n in ("query", "key", "value")}
    out, lse = prefix_attention(**arguments | leaves, backend=backend, return_lse=True)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_an_empty_rows_lse_may_be_nan(backend: str) -> None:
    """torch.logaddexp of two empty rows gives such a gradient, and the rows add nothing."""
    arguments = Case(P=0, with_=("key_mask",)).arguments(torch.float32)
    arguments["key_mask"][1] = False
    leaves = [arguments[n].requires_grad_() for n in ("query", "key", "value")]
    _, lse = prefix_attention(**arguments, return_lse=True, backend=backend)
    upstream = torch.ones_like(lse).masked_fill(lse == -torch.inf, torch.nan)
    query, key, _ = torch.autograd.grad(lse, leaves, upstream, allow_unused=True)
    assert query[0].abs().max() > 0
    assert not query[1].any()
    assert key.isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "composed", "cpu"])
def test_nan_is_not_hidden(backend: str) -> None:
    """A prefix that diverged must be seen by whoever looks for NaN. Triton's interpreter warns of it."""
    for name, queries in (("prefix_key", 17), ("key", 17), ("prefix_key", 1)):
        arguments = Case(S=queries, D=16).arguments(torch.float32)
        arguments[name][..., 0, 3] = torch.nan
        assert prefix_attention(**arguments, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_options(backend: str) -> None:
    """A scale of 0, a softcap far above all logits, a window as long as can be: forward and gradients of float64."""
    softcap = 1e6 if backend != "triton" else 50.0  # its tanh is exact to a few 1e-8 of the cap
    for options in ({"scale": 0.0}, {"softcap": softcap}, {"window": 2**63 - 1, "is_causal": False}):
        for case in (Case(S=8, T=3, options=options), Case(S=1, options=options)):
            compare(backend, case.arguments(torch.float32))


@pytest.mark.parametrize(("backend", "layout"), [("composed", "bhsd"), ("composed", "bshd"), ("triton", "bshd")])
def test_no_memory_grows_with_batch_times_prefix(backend: str, layout: str) -> None:
    """Forward and backward at B = 16, P = 512: no tensor of B * P rows is ever made, and no [S, P] scores."""
    B, Hq, S, P, D = 16, 2, 4, 512, 8
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    arguments = Case(B=B, Hq=Hq, Hkv=1, S=S, T=S, P=P, D=D, Dv=D, layout=layout).arguments(torch.float32)
    leaves = {n: arguments[n].requires_grad_() for n in ("query", "key", "prefix_key", "prefix_value")}
    with Watch():
        prefix_attention(**arguments | leaves, backend=backend).square().sum().backward()
    assert largest == P * D, f"largest tensor has {largest} elements: the prefix has {P * D}, scores {B * Hq * S * P}"


def test_decoding_a_bank_takes_time_in_proportion() -> None:
    """Sixteen times the rows and entries took 256 times as long: each unit or entry went through the whole batch."""

    def seconds(B: int) -> float:
        query = torch.randn(B, 4, 1, 8)
        bank, ids = torch.randn(B // 4, 4, 4, 8), torch.arange(B) % (B // 4)
        best = float("inf")
        for _ in range(4):
            start = time.process_time()
            with torch.no_grad():
                prefix_attention(query, query, query, bank, bank, prefix_ids=ids, backend="cpu")
            best = min(best, time.process_time() - start)
        return best

    assert seconds(16000) < 64 * seconds(1000)
