"""The Triton kernels on a GPU: numerics, bitwise repetition, graphs, far offsets.

    pytest -m gpu            or, where pytest is not installed,            python -m tests.test_gpu

The same calls and the same tolerances as in the interpreter (tests/numerics.py).
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prefix_attn import explain, prefix_attention, prefix_attention_varlen
from tests.numerics import CASES, Case, as_accurate, frozen, random_case, run, widen

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# What the small cases of the table do not reach: several tiles of the largest shipped size, every loop more than once.
LARGE = {
    "large causal": Case(B=2, Hq=8, Hkv=2, S=777, T=777, P=130, D=64, Dv=64, layout="bshd"),
    "large D=128": Case(B=2, Hq=4, Hkv=4, S=513, T=700, P=65, D=128, Dv=128, layout="bshd"),
    "large D=80": Case(B=1, Hq=4, Hkv=2, S=300, T=300, P=33, D=80, Dv=80),
    "large full": Case(B=2, S=260, T=515, P=300, D=96, Dv=64, options={"is_causal": False}),
    "large window": Case(B=2, S=600, T=600, P=40, D=64, Dv=64, with_=("sinks",), options={"window": 200}),
    "large mask": Case(B=3, S=400, T=400, P=40, D=64, Dv=64, with_=("key_mask", "prefix_start")),
    "large padding": Case(B=4, S=500, T=500, P=128, D=128, Dv=128, with_=("left_padding",), layout="bshd"),
    "large bank": Case(B=9, N=4, S=200, T=200, P=200, D=64, Dv=64, with_=("prefix_ids", "prefix_lengths")),
    "large bias": Case(B=2, S=300, T=300, P=30, D=64, Dv=64, with_=("bias",), options={"softcap": 20.0}),
    "decode": Case(B=64, Hq=32, Hkv=8, S=1, T=2000, P=100, D=128, Dv=128, layout="bshd"),
    "decode folded": Case(B=200, Hq=32, Hkv=8, S=1, T=300, P=520, D=128, Dv=128),
    "decode bank": Case(B=100, Hq=16, Hkv=8, N=7, S=2, T=300, P=600, D=64, Dv=64, with_=("prefix_ids", "key_lengths")),
    "decode one row": Case(B=1, Hq=8, Hkv=1, S=1, T=5000, P=17, D=128, Dv=128),
    "speculate": Case(B=8, Hq=8, Hkv=2, S=5, T=900, P=64, D=128, Dv=128, with_=("key_lengths", "sinks")),
}


def compare(arguments: dict[str, Any], peers: tuple[str, ...] = ("eager", "torch")) -> None:
    """At most twice as wrong as plain PyTorch on the same device, in every output and gradient."""
    asked = arguments | {n: arguments[n].detach() for n in frozen("triton", arguments)}
    assert not explain(**asked).refused.get("triton"), explain(**asked)
    half = arguments["query"].dtype.itemsize < 4
    got = run("triton", arguments, lse_gradient=not half)
    exact = run("eager", widen(arguments), lse_gradient=not half)
    rough = [run(peer, arguments, lse_gradient=not half) for peer in (peers if half else ("eager",))]
    for name in got:
        as_accurate(name, got[name], exact[name], [r[name] for r in rough if name in r])


def check_case(case: Case, dtype: torch.dtype) -> None:
    compare(case.arguments(dtype, device="cuda"))


def check_bitwise(case: Case) -> None:
    """A hundred times the same bits: no order of arrival shows."""
    arguments = case.arguments(torch.bfloat16, device="cuda")
    first = run("triton", arguments, lse_gradient=False)
    for _ in range(99):
        again = run("triton", arguments, lse_gradient=False)
        assert all(torch.equal(first[name], again[name]) for name in first)


def check_dropout() -> None:
    """One-hot values read off the mask of forward; dv follows from the same mask in backward."""
    case = Case(B=2, Hq=2, Hkv=2, S=100, T=100, P=28, D=64, Dv=128, options={"is_causal": False})
    arguments = case.arguments(torch.float32, device="cuda")
    columns = torch.eye(128, device="cuda")
    one_hot = {"prefix_value": columns[:28].expand(2, 28, 128).contiguous()}
    one_hot["value"] = columns[28:].expand(2, 2, 100, 128).contiguous().requires_grad_()
    plain = prefix_attention(**arguments | one_hot, backend="eager").detach()
    dropped = prefix_attention(**arguments | one_hot, dropout_p=0.3, backend="triton")
    keep = dropped != 0
    torch.testing.assert_close(dropped, torch.where(keep, plain / 0.7, 0.0), rtol=1e-4, atol=1e-6)
    assert abs(float(keep.float().mean()) - 0.7) < 0.02
    upstream = torch.randn_like(dropped)
    (grad,) = torch.autograd.grad(dropped, one_hot["value"], upstream)
    exact = (dropped[..., 28:].double().transpose(-1, -2) @ upstream.double()).float()
    torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-4)


def check_graph() -> None:
    """A captured decode step follows lengths, tokens and prefix ids as they change in place."""
    case = Case(B=16, Hq=8, Hkv=2, N=5, S=1, T=512, P=90, D=64, Dv=64, with_=("key_lengths", "prefix_ids"))
    arguments = case.arguments(torch.bfloat16, device="cuda")
    step = lambda: prefix_attention(**arguments, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(5):
        torch.manual_seed(seed)
        arguments["key_lengths"].copy_(torch.randint(0, 513, (16,)))
        arguments["prefix_ids"].copy_(torch.randint(-1, 5, (16,)))
        arguments["query"].normal_()
        graph.replay()
        assert torch.equal(out, step())


def check_far_offsets() -> None:
    """Index times stride beyond 2**31: an int32 product would read elsewhere."""
    storage = torch.empty(3 * 2**30, dtype=torch.bfloat16, device="cuda")
    near = Case(B=3, Hq=2, Hkv=1, S=40, T=40, P=3, D=64, Dv=64).arguments(torch.bfloat16, device="cuda")
    far = dict(near)
    for i, (name, strides) in enumerate(
        {"query": (2**30, 8192, 64), "key": (2**30, 8192, 64), "value": (2**30, 8192, 64)}.items()
    ):
        far[name] = storage.as_strided(near[name].shape, (*strides, 1), (i + 1) * 2**20)
        far[name].copy_(near[name])
    a, b = (run("triton", arguments, lse_gradient=False) for arguments in (near, far))
    assert all(torch.equal(a[name], b[name]) for name in a)


def check_varlen() -> None:
    """Packed sequences equal one call for each."""
    lengths = [300, 1, 0, 77, 130]
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    total = sum(lengths)
    make = lambda *shape: torch.randn(*shape, device="cuda")
    tensors = [make(total, 8, 64), make(total, 2, 64), make(total, 2, 64), make(2, 33, 64), make(2, 33, 64)]
    packed = [t.clone().requires_grad_() for t in tensors]
    single = [t.clone().requires_grad_() for t in tensors]
    same = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 300, "max_seqlen_k": 300}
    out = prefix_attention_varlen(*packed, **same, backend="triton")
    parts = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist()):
        q, k, v = (t[start:end].transpose(0, 1)[None] for t in single[:3])
        parts.append(prefix_attention(q, k, v, *single[3:], backend="eager")[0].transpose(0, 1))
    torch.testing.assert_close(out, torch.cat(parts), rtol=1e-4, atol=1e-4)
    grads = (torch.autograd.grad(x.square().sum(), leaves) for x, leaves in ((out, packed), (torch.cat(parts), single)))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def check_compile() -> None:
    """One graph for every batch size, equal results and gradients."""
    compiled = torch.compile(
        lambda *tensors: prefix_attention(*tensors, backend="triton").square(), fullgraph=True, dynamic=True
    )
    for B, S in ((3, 40), (6, 70)):
        tensors = list(Case(B=B, S=S, T=S, D=64, Dv=64).arguments(torch.float32, device="cuda").values())
        leaves: list[Tensor] = [t.requires_grad_() for t in tensors]
        plain = prefix_attention(*leaves, backend="triton").square()
        torch.testing.assert_close(compiled(*leaves), plain)


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check with its name."""
    for name, case in (CASES | LARGE).items():
        for dtype_name, dtype in DTYPES.items():
            yield f"{name} {dtype_name}", lambda case=case, dtype=dtype: check_case(case, dtype)
    for seed in range(40):
        for dtype_name, dtype in DTYPES.items():
            yield f"random {seed} {dtype_name}", lambda seed=seed, dtype=dtype: check_case(random_case(seed), dtype)
    for name in ("large causal", "large bank", "decode", "decode folded", "decode bank", "decode one row"):
        yield f"bitwise {name}", lambda name=name: check_bitwise(LARGE[name])
    for check in (check_dropout, check_graph, check_far_offsets, check_varlen, check_compile):
        yield check.__name__, check


def main(only: list[str]) -> int:
    """Run the checks whose names contain one of ``only``; how many failed."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    failed = passed = 0
    began = time.perf_counter()
    for name, check in checks():
        if only and not any(part in name for part in only):
            continue
        try:
            check()
            passed += 1
        except Exception:
            failed += 1
            print(f"FAILED {name}\n{traceback.format_exc(limit=-3)}", flush=True)
    print(f"{passed} passed, {failed} failed in {time.perf_counter() - began:.0f} s")
    return failed


if "pytest" in sys.modules:
    import pytest

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in checks()])
    def test_on_gpu(check: Callable[[], None]) -> None:
        check()


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
