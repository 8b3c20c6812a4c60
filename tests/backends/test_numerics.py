"""Every fast backend against the float64 specification: output, lse and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefix_attn import explain, prefix_attention
from prefix_attn.backends import cpu
from tests.numerics import CASES, Case, as_accurate, frozen, peers, random_case, run, widen

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BACKENDS = ("composed", "cpu", "triton")


def compare(backend: str, arguments: dict[str, Any]) -> None:
    asked = arguments | {n: arguments[n].detach() for n in frozen(backend, arguments)}
    refused = explain(**asked).refused.get(backend)
    if refused and refused != (cpu.slow(),):  # a call that it does not claim must be refused by name, never computed
        with pytest.raises(NotImplementedError, match="cannot run this call"):
            prefix_attention(**arguments, backend=backend)
        return
    # Without an lse gradient half precision has more peers: torch's own attention.
    half = arguments["query"].dtype.itemsize < 4
    got, exact = (run(b, a, lse_gradient=not half) for b, a in ((backend, arguments), ("eager", widen(arguments))))
    rough = [run(peer, arguments, lse_gradient=not half) for peer in peers(arguments)]
    for name in got:
        as_accurate(name, got[name], exact[name], [peer[name] for peer in rough if name in peer])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend: str, case: Case, dtype: torch.dtype) -> None:
    compare(backend, case.arguments(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("backend", ["composed", "cpu"])
def test_matches_float64_on_random_calls(backend: str, seed: int, dtype: torch.dtype) -> None:
    compare(backend, random_case(seed).arguments(dtype))


@pytest.mark.parametrize("seed", range(40))
def test_triton_matches_float64_on_random_calls(seed: int) -> None:
    """In the interpreter a call takes a second: each seed has one dtype, float32, the sharp one, every second time."""
    dtype = (torch.float32, torch.bfloat16, torch.float32, torch.float16)[seed % 4]
    compare("triton", random_case(seed).arguments(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_upstream_gradient(backend: str) -> None:
    """out.sum() hands backward a gradient with stride 0 everywhere; a kernel that reads rows must not trust it."""
    arguments = Case().arguments(torch.float32)
    grads = {}
    for name in (backend, "eager"):
        leaves = {n: arguments[n].clone().requires_grad_() for n in ("query", "prefix_key", "prefix_value")}
        prefix_attention(**arguments | leaves, backend=name).sum().backward()
        grads[name] = [leaf.grad for leaf in leaves.values()]
    torch.testing.assert_close(grads[backend], grads["eager"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_adversarial_logits(backend: str) -> None:
    """Scores of +-1e4 and a prefix that holds 1e-8 of the mass: no overflow, and the small share is kept."""
    case = Case(D=8, Dv=8)
    arguments = case.arguments(torch.float32)
    arguments["query"] = arguments["query"] * 100
    arguments["key"] = arguments["key"] * 100
    if backend == "cpu":
        compare(backend, arguments)
        return
    # GPU kernels have logits in units of log 2, and torch's kernels on some processors round them differently forward
    # and backward: probabilities are then only as exact as the saved lse.
    got, exact = run(backend, arguments, lse_gradient=True), run("eager", widen(arguments), lse_gradient=True)
    resolution = torch.finfo(torch.float32).eps * exact["lse"].abs().max()
    for name in got:
        worst = (got[name].double() - exact[name]).abs().max()
        assert worst <= 4 * resolution * exact[name].abs().max(), name
