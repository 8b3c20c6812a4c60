"""The Triton kernels, and ``composed``, on a device: everything that the interpreter cannot show.

    pytest -m gpu                                  every check is one test
    python -m tests.test_gpu --jobs 12             the same without pytest; exit status 1 if one fails
    python -m tests.test_gpu --bare plain decode   only our kernels, no reference beside them: for compute-sanitizer
    TRITON_INTERPRET=1 python -m tests.test_gpu --device cpu --only plain-f32      the checks' own logic

Memory is NaN until it is written while our kernels run (torch's deterministic mode), so what is left out is seen.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Deterministic mode asks for it before cuBLAS first runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import Tensor

from prefix_attn import explain, prefix_attention, prefix_attention_varlen
from tests.numerics import (
    CASES,
    DRAWS,
    GRADIENT,
    LONG,
    NAMES,
    Case,
    as_accurate,
    close,
    frozen,
    peers,
    random_case,
    run,
    widen,
)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
REPEATS = 100

# Sizes at which every loop of the kernels runs more than once, and no size is a multiple of a tile.
ODD = {
    "long": Case(B=2, Hq=6, Hkv=2, S=333, T=345, P=77, D=64, Dv=64),
    "long full": Case(B=2, Hq=4, Hkv=4, S=300, T=300, P=150, D=128, Dv=128, options={"is_causal": False}),
    "long 80": Case(B=3, Hq=4, Hkv=1, S=257, T=257, P=33, D=80, Dv=80, layout="bshd"),
    "long 96 masked": Case(B=3, Hq=4, Hkv=2, S=130, T=190, P=20, D=96, Dv=96, with_=("key_mask", "sinks")),
    "long window": Case(B=2, Hq=4, Hkv=2, S=300, T=300, P=140, D=64, Dv=64, options={"window": 100}),
    "long 256": Case(B=1, Hq=2, Hkv=1, S=200, T=200, P=40, D=256, Dv=256),
    "long bank": Case(B=7, N=3, S=200, T=200, P=70, D=64, Dv=64, with_=("prefix_ids", "prefix_lengths")),
    "decode": Case(B=5, Hq=8, Hkv=2, S=1, T=1003, P=45, D=64, Dv=64),
    "decode 128": Case(B=3, Hq=32, Hkv=8, S=1, T=2050, P=130, D=128, Dv=128, with_=("key_lengths",)),
    "decode folded": Case(B=65, Hq=16, Hkv=8, S=1, T=190, P=515, D=64, Dv=64, with_=("key_lengths",)),
    "decode few": Case(B=4, Hq=8, Hkv=2, S=3, T=700, P=45, D=80, Dv=80),
    "decode many heads": Case(B=3, Hq=71, Hkv=1, S=1, T=700, P=45, D=64, Dv=64),  # two chunks of up to 64
    "decode bank": Case(B=9, N=4, Hq=8, Hkv=2, S=1, T=130, P=70, D=64, Dv=64, with_=("prefix_ids", "prefix_lengths")),
}


@contextlib.contextmanager
def poisoned(on: bool = True) -> Iterator[None]:
    """Deterministic mode: torch.empty is NaN. Off for the peers, whose backward on a GPU it may forbid."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def matches(case: Case, dtype: torch.dtype, device: str, backend: str = "triton") -> None:
    """Output, lse and gradients at most twice as wrong as plain torch, each against float64."""
    arguments = case.arguments(dtype, device)
    asked = arguments | {name: arguments[name].detach() for name in frozen(backend, arguments)}
    reasons = explain(**asked).refused.get(backend)
    assert not reasons, reasons
    half = dtype.itemsize < 4
    with poisoned(backend == "triton"):
        got = run(backend, arguments, lse_gradient=not half)
    with poisoned(False):
        exact = run("eager", widen(arguments), lse_gradient=not half)
        rough = [run(peer, arguments, lse_gradient=not half) for peer in peers(arguments)]
    for name, result in got.items():
        as_accurate(name, result, exact[name], [peer[name] for peer in rough if name in peer])


def repeats(case: Case, dtype: torch.dtype, device: str) -> None:
    """Bitwise equal, forward and every gradient, also while the device is busy with something else."""
    arguments = case.arguments(dtype, device)
    first = run("triton", arguments, lse_gradient=True)
    side = torch.cuda.Stream() if device == "cuda" else None
    noise = torch.randn(1024, 1024, device=device)
    for i in range(REPEATS if device == "cuda" else 2):
        if side and i % 2:
            with torch.cuda.stream(side):
                noise = noise @ noise * 1e-3
        again = run("triton", arguments, lse_gradient=True)
        different = [name for name in first if not torch.equal(_bits(first[name]), _bits(again[name]))]
        assert not different, f"repeat {i}: {different}"


def _bits(tensor: Tensor) -> Tensor:
    """As integers: equal NaNs are equal, and 0 is not -0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def captured(call: Callable[[], Any], device: str) -> tuple[Callable[[], Any], Any]:
    """What replays the call, and where its results then are. Without a device the call itself."""
    results = call()
    if device != "cuda":
        return call, results
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results


def graph_follows_lengths(case: Case, dtype: torch.dtype, device: str) -> None:
    """One captured graph, replayed as the lengths on the device change."""
    arguments = case.arguments(dtype, device)
    lengths = arguments["key_lengths"]
    with torch.no_grad():
        replay, results = captured(lambda: prefix_attention(**arguments, return_lse=True, backend="triton"), device)
        for step in range(4):
            lengths.copy_((torch.arange(case.B, device=device) * 37 + step * 101) % (case.T + 1))
            results = replay() or results
            exact, rough = (
                prefix_attention(**a, return_lse=True, backend="eager") for a in (widen(arguments), arguments)
            )
            for name, got, e, r in zip(("out", "lse"), results, exact, rough):
                as_accurate(f"{name} at step {step}", got, e, [r])


def far_apart(axis: int, dtype: torch.dtype, device: str) -> None:
    """Strides along one axis that lead past 2**31 elements, in one storage that query, key and value share."""
    B, H, L, D = sizes = (33, 2, 64, 64) if axis == 0 else (2, 33, 64, 64) if axis == 1 else (2, 2, 33, 64)
    far = 2**26 if device == "cuda" else 2**14
    strides = [H * L * D, L * D, D, 1] if axis == 0 else [L * D, L * D * B, D, 1] if axis == 1 else [D, D * B, D, 1]
    strides[axis] = far
    room = max(sum((n - 1) * s for n, s in zip(sizes, strides)) + 1, 0)
    block = B * H * L * D  # at one place of the axis
    storage = torch.empty(room + 3 * block, dtype=dtype, device=device)
    assert device == "cpu" or room > 2**31
    tensors = {}
    for i, name in enumerate(NAMES[:3]):
        tensors[name] = storage.as_strided(sizes, strides, i * block).copy_(torch.randn(sizes, device=device))
    plain = Case(B=B, Hq=H, Hkv=H, S=L, T=L, P=20, D=D, Dv=D).arguments(dtype, device) | tensors
    exact, rough = (run("eager", a, lse_gradient=False) for a in (widen(plain), plain))
    # Leaves are views: nothing of the large storage is copied.
    got = run("triton", plain, lse_gradient=False)
    for name, result in got.items():
        as_accurate(name, result, exact[name], [rough[name]])


def many_elements(dtype: torch.dtype, device: str) -> None:
    """Query, output and gradient of more than 2**31 elements each; the last row is compared."""
    B, H, S, D = (129, 64, 1024, 256) if device == "cuda" else (3, 2, 8, 16)
    if device == "cuda":
        assert B * H * S * D > 2**31
        if torch.cuda.mem_get_info()[0] < 40e9:
            print("needs 40 GB of free memory", file=sys.stderr)
            return
    case = Case(B=B, Hq=H, Hkv=1, S=1, T=S, P=20, D=D, Dv=D)
    arguments = case.arguments(dtype, device)
    query = torch.empty(B, H, S, D, dtype=dtype, device=device).normal_().requires_grad_()
    out = prefix_attention(**arguments | {"query": query}, backend="triton")
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out, query, torch.ones(1, dtype=dtype, device=device).expand(out.shape))
    last = {n: a[-1:] if n in NAMES[:3] else a for n, a in (arguments | {"query": query.detach()}).items()}
    results = []
    for of in (widen(last), last):
        leaf = of["query"].clone().requires_grad_()
        expected = prefix_attention(**of | {"query": leaf}, backend="eager")
        assert isinstance(expected, Tensor)
        results.append((expected.detach(), *torch.autograd.grad(expected, leaf, torch.ones_like(expected))))
    for name, got, exact, rough in zip(("out", "grad query"), (out.detach(), grad), *results):
        as_accurate(name, got[-1:], exact, [rough])


def compiles(case: Case, dtype: torch.dtype, device: str) -> None:
    """torch.compile without a break in the graph: the same results and gradients."""
    arguments = case.arguments(dtype, device)
    leaves = {n: arguments[n].detach().requires_grad_() for n in NAMES[:5]}

    def step(**named: Tensor) -> Any:
        return prefix_attention(**arguments | named, backend="triton")

    torch.compiler.reset()
    found = []
    for function in (torch.compile(step, fullgraph=True), step):
        out = function(**leaves)
        found.append([out.detach(), *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))])
    for name, got, expected in zip(("out", *leaves), *found):
        assert torch.equal(got, expected), name


def dropout(device: str) -> None:
    """One-hot values read off the mask of forward; dv follows from the same mask in backward."""
    case = Case(B=2, Hq=2, Hkv=2, S=100, T=100, P=28, D=64, Dv=128, options={"is_causal": False})
    arguments = case.arguments(torch.float32, device)
    columns = torch.eye(128, device=device)
    one_hot = {"prefix_value": columns[:28].expand(2, 28, 128).contiguous()}
    one_hot["value"] = columns[28:].expand(2, 2, 100, 128).contiguous().requires_grad_()
    plain = prefix_attention(**arguments | one_hot, backend="eager").detach()
    dropped = prefix_attention(**arguments | one_hot, dropout_p=0.3, backend="triton")
    keep = dropped != 0
    close(dropped, torch.where(keep, plain / 0.7, 0.0), GRADIENT)
    close(float(keep.float().mean()), 0.7, DRAWS)
    upstream = torch.randn_like(dropped)
    (grad,) = torch.autograd.grad(dropped, one_hot["value"], upstream)
    exact = (dropped[..., 28:].double().transpose(-1, -2) @ upstream.double()).float()
    close(grad, exact, LONG)


def packed(device: str) -> None:
    """Packed sequences equal one call for each."""
    lengths = [300, 1, 0, 77, 130]
    cu = torch.tensor([0, *lengths], device=device).cumsum(0)
    make = lambda *shape: torch.randn(*shape, device=device)
    total = sum(lengths)
    tensors = [make(total, 8, 64), make(total, 2, 64), make(total, 2, 64), make(2, 33, 64), make(2, 33, 64)]
    together, apart = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    same = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 300, "max_seqlen_k": 300}
    out = prefix_attention_varlen(*together, **same, backend="triton")
    parts = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist()):
        q, k, v = (t[start:end].transpose(0, 1)[None] for t in apart[:3])
        parts.append(prefix_attention(q, k, v, *apart[3:], backend="eager")[0].transpose(0, 1))
    close(out, torch.cat(parts), LONG)
    grads = (torch.autograd.grad(x.square().sum(), t) for x, t in ((out, together), (torch.cat(parts), apart)))
    close(*grads, LONG)


def _checks() -> dict[str, Callable[[str], None]]:
    """Every check by name; it takes a device."""
    found: dict[str, Callable[[str], None]] = {}
    # Most of the time goes into compiling. float16 differs from bfloat16 in one type: it is tried where loops are long.
    for name, case in (CASES | ODD).items():
        for short in ("f32", "bf16", "f16") if name in ODD else ("f32", "bf16"):
            found[f"{name}-{short}"] = functools.partial(matches, case, DTYPES[short])
    for seed in range(40):
        short = ("f32", "bf16", "f16", "bf16")[seed % 4]
        found[f"random {seed}-{short}"] = functools.partial(matches, random_case(seed), DTYPES[short])
    for name in ("long", "long 96 masked", "long bank", "decode", "decode 128", "decode folded", "decode many heads",
                 "decode bank"):  # fmt: skip
        found[f"repeats {name}"] = functools.partial(repeats, ODD[name], torch.bfloat16)
    for name in ("decode 128", "decode folded"):
        found[f"graph {name}"] = functools.partial(graph_follows_lengths, ODD[name], torch.bfloat16)
    for axis, name in enumerate(("batch", "heads", "rows")):
        found[f"far apart {name}"] = functools.partial(far_apart, axis, torch.bfloat16)
    found["many elements"] = functools.partial(many_elements, torch.bfloat16)
    found |= {"dropout": dropout, "packed": packed}
    for name in ("long", "decode"):
        found[f"compile {name}"] = functools.partial(compiles, ODD[name], torch.float32)
    # The last: should one of them end the device's context, the kernels were checked before.
    for name, case in (CASES | ODD).items():
        if "softcap" not in case.options:  # which torch's kernels do not have
            for short in ("f32", "bf16"):
                matching = functools.partial(matches, case, DTYPES[short], backend="composed")
                found[f"composed {name}-{short}"] = matching
    return found


CHECKS = _checks()

with contextlib.suppress(ImportError):  # the module form needs no pytest
    import pytest

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", CHECKS)
    def test_on_a_device(name: str) -> None:
        with poisoned(False):
            CHECKS[name]("cuda")


def bare(name: str, device: str) -> None:
    """Our kernels forward and backward on a case, and nothing else that a sanitizer would have to watch."""
    arguments = (CASES | ODD)[name].arguments(torch.bfloat16, device)
    run("triton", arguments, lse_gradient=False)
    if device == "cuda":
        torch.cuda.synchronize()


def outcome(name: str, device: str) -> tuple[str, float, str]:
    """Name, seconds and what went wrong."""
    begin = time.perf_counter()
    try:
        CHECKS[name](device)
        if device == "cuda":
            torch.cuda.synchronize()
        wrong = ""
    except Exception:  # reported at the end; the others still run
        wrong = traceback.format_exc(limit=-3)
    return name, time.perf_counter() - begin, wrong


def _in_child(name: str, device: str) -> tuple[str, float, str]:
    torch.set_num_threads(1)
    return outcome(name, device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0 runs in this one")
    parser.add_argument("--only", nargs="+", help="checks whose name begins with one of these")
    parser.add_argument("--bare", nargs="+", metavar="CASE")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1
    if args.bare:
        for name in args.bare:
            bare(name, args.device)
            print(name, flush=True)
        return 0
    names = [name for name in CHECKS if not args.only or name.startswith(tuple(args.only))]
    if args.jobs:
        pool = concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
        with pool:
            futures = [pool.submit(_in_child, name, args.device) for name in names]
            found = [future.result() for future in concurrent.futures.as_completed(futures)]
    else:
        found = [outcome(name, args.device) for name in names]
    failed = [one for one in found if one[2]]
    for name, _, wrong in failed:
        print(f"\nFAILED {name}\n{wrong}")
    for name, seconds, _ in sorted(found, key=lambda one: -one[1])[:5]:
        print(f"{seconds:7.1f} s  {name}")
    print(f"{len(found) - len(failed)} passed, {len(failed)} failed")
    return int(bool(failed) or not found)


if __name__ == "__main__":
    sys.exit(main())
