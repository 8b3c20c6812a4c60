"""The backend ``cuda`` on a device: what the emulated GPU cannot show.

    python -m tests.test_gpu_cuda                        primitives, parity, repeats, graphs; 1 if one fails
    python -m tests.test_gpu_cuda --golden FILE          and every primitive's numbers into FILE
    python -m tests.test_gpu_cuda --bare decode wide     only the kernel, nothing beside it: for compute-sanitizer
    python -m tests.test_gpu_cuda --speed FILE           beside Triton, launched one by one and in a graph
    PREFIX_ATTN_EMULATE=1 python -m tests.test_gpu_cuda --device cpu --only parity     the checks' own logic

FILE of --golden belongs to tests/data/cuda_primitives.txt: the emulated GPU is then held against a real one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.compile_cuda import nvcc
from prefix_attn import prefix_attention
from prefix_attn.backends._native_cuda import NVCC
from tests.numerics import FINE, LONG, Case, close, widen, within_eps
from tests.test_gpu import captured

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests/backends/emulated/primitives.cpp"
GOLDEN = ROOT / "tests/data/cuda_primitives.txt"
ROUNDED = ("exp2", "log2", "reciprocal", "mma half", "mma bfloat")  # no two kinds of hardware agree to the bit
CASES = {
    "decode": Case(B=5, Hq=8, Hkv=2, S=1, T=300, P=45, D=64, Dv=64, with_=("key_lengths",)),
    "decode 128": Case(B=3, Hq=32, Hkv=8, S=1, T=600, P=130, D=128, Dv=128, with_=("key_lengths",)),
    "folded": Case(B=65, Hq=16, Hkv=8, S=1, T=190, P=515, D=64, Dv=64, with_=("key_lengths",)),
    "few": Case(B=4, Hq=8, Hkv=2, S=3, T=300, P=45, D=80, Dv=80, layout="bshd"),
    "wide": Case(B=2, Hq=16, Hkv=2, S=8, T=200, P=70, D=96, Dv=96, with_=("key_mask",), options={"window": 90}),
    "chunks": Case(B=3, Hq=71, Hkv=1, S=1, T=300, P=45, D=64, Dv=64, with_=("sinks",)),
    "bank": Case(B=40, N=4, Hq=8, Hkv=2, S=1, T=130, P=200, D=64, Dv=64, with_=("prefix_ids", "prefix_lengths")),
    "softcap": Case(B=3, Hq=8, Hkv=2, S=1, T=300, P=45, D=128, Dv=128, options={"softcap": 5.0}),
}
SHAPES = [(B, T, P) for B in (1, 16, 64) for T, P in ((512, 128), (2048, 512))]  # of --speed; 32 on 8 heads of 128


def attend(arguments: dict[str, Any], backend: str = "cuda") -> tuple[Any, ...]:
    """(out, lse) without gradients."""
    with torch.no_grad():
        return tuple(prefix_attention(**arguments, return_lse=True, backend=backend))


def parity(case: Case, dtype: torch.dtype, device: str) -> None:
    """Against float64."""
    arguments = case.arguments(dtype, device)
    (out, lse), (exact, exact_lse) = attend(arguments), attend(widen(arguments), "eager")
    within_eps(out, exact)
    close(lse.double(), exact_lse, FINE)


def repeats(case: Case, dtype: torch.dtype, device: str) -> None:
    """Bitwise equal, also while the device is busy with something else."""
    arguments = case.arguments(dtype, device)
    first, noise = attend(arguments), torch.randn(1024, 1024, device=device)
    for i in range(100 if device == "cuda" else 2):
        if device == "cuda" and i % 2:
            with torch.cuda.stream(torch.cuda.Stream()):
                noise = noise @ noise * 1e-3
        again = attend(arguments)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, again)), f"repeat {i}"


def graph(case: Case, dtype: torch.dtype, device: str) -> None:
    """One captured graph, replayed on two streams as the lengths on the device change."""
    arguments = case.arguments(dtype, device)
    replay, results = captured(lambda: attend(arguments), device)
    for step in range(4):
        lengths = (torch.arange(case.B, device=device) * 37 + step * 101) % (case.T + 1)
        arguments["key_lengths"].copy_(lengths)
        got = replay() or results
        expected = attend(arguments)
        assert all(map(torch.equal, got, expected)), f"step {step}"


def primitives(device: str, folder: Path) -> str:
    """The output of primitives.cpp on the device, or on the emulated one."""
    program, core = folder / "primitives", [ROOT / f"csrc/emulate/{name}.cpp" for name in ("emulate", "warp")]
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        command = [str(nvcc()), *NVCC, "-x=cu", f"-I{ROOT / 'csrc/cuda'}", f"-arch=sm_{major}{minor}", SOURCE]
    else:
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, "-std=c++20", "-O1", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc/emulate'}", SOURCE, *core]
    subprocess.run([*map(str, command), "-o", str(program)], check=True, capture_output=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


def same_primitives(got: str, expected: str) -> None:
    """Bits, but for what hardware rounds as it likes."""
    lines = [dict(line.split(":") for line in text.splitlines()) for text in (got, expected)]
    assert lines[0].keys() == lines[1].keys()
    for name in lines[0]:
        words = [torch.tensor([int(word, 16) for word in found[name].split()]) for found in lines]
        if name in ROUNDED:
            close(*(bits.to(torch.int32).view(torch.float32) for bits in words), LONG)
        else:
            assert torch.equal(*words), name


def speed(device: str) -> list[dict[str, Any]]:
    """Microseconds of a decode step, launched one by one and in a graph of ten, the median of many."""
    found, many = [], 10 if device == "cuda" else 1
    for B, T, P in SHAPES if device == "cuda" else [(1, 16, 16)]:
        case = Case(B=B, Hq=32, Hkv=8, S=1, T=T, P=P, D=128, Dv=128)
        arguments = case.arguments(torch.bfloat16, device)
        for backend in ("cuda", "triton") if device == "cuda" else ("cuda", "eager"):
            call = functools.partial(attend, arguments, backend)
            replay, _ = captured(lambda call=call: [call() for _ in range(many)], device)
            times = {"eager": timed(call, device), "graph": timed(replay, device) / many}
            found.append({"B": B, "T": T, "P": P, "backend": backend, "device": device} | times)
            print(found[-1], flush=True)
    return found


def timed(call: Callable[[], Any], device: str, rounds: int = 50) -> float:
    """Microseconds until the device is done with one call."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(rounds if device == "cuda" else 1):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        times.append((time.perf_counter() - begin) * 1e6)
    return sorted(times)[len(times) // 2]


def checks() -> dict[str, Callable[[str], None]]:
    """Every check by name; it takes a device."""
    found: dict[str, Callable[[str], None]] = {}
    for name, case in CASES.items():
        for dtype in (torch.bfloat16, torch.float16):
            found[f"parity {name} {str(dtype)[6:]}"] = functools.partial(parity, case, dtype)
        found[f"repeats {name}"] = functools.partial(repeats, case, torch.bfloat16)
    for name in ("decode", "folded"):
        found[f"graph {name}"] = functools.partial(graph, CASES[name], torch.bfloat16)
    return found


with contextlib.suppress(ImportError):  # the module form needs no pytest
    import pytest

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", checks())
    def test_on_a_device(name: str) -> None:
        checks()[name]("cuda")

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")
    def test_emulated_primitives(tmp_path: Path) -> None:
        """As a GPU has them, where one was there; else those that follow from their definition."""
        said = primitives("cpu", tmp_path)
        if GOLDEN.is_file():
            same_primitives(said, GOLDEN.read_text(encoding="utf-8"))
        lines = {name: [int(word, 16) for word in words.split()] for name, words in
                 (line.split(":") for line in said.splitlines())}  # fmt: skip
        found = {name: torch.tensor(words).to(torch.int32).view(-1, 4) for name, words in lines.items()}
        drawn, x = [], 1
        for _ in range(32 * 16):
            drawn.append(x := (x * 1664525 + 1013904223) % 2**32)
        words = torch.tensor(drawn).view(32, 16)
        low, high = (((words[:, :4] >> shift & 0xFFFF) - 32768) / 4096 for shift in (0, 16))
        lanes = torch.arange(32)
        for i, mask in enumerate((1, 2, 8, 16)):
            assert torch.equal(found["shuffle_xor"].view(torch.float32)[:, i], low[lanes ^ mask, i])
        for name, dtype in (("pack half", torch.float16), ("pack bfloat", torch.bfloat16)):
            pairs = torch.stack([low, high * 1000], -1).to(dtype).view(torch.int32)[..., 0]
            assert torch.equal(found[name], pairs), name
        close(found["exp2"].view(torch.float32), torch.exp2(4 * low), LONG)
        close(found["log2"].view(torch.float32), torch.log2(low * low + 1e-3), LONG)
        close(found["reciprocal"].view(torch.float32), 1 / (low + 9), LONG)
        copied = words[:, 4:8].to(torch.int32)[lanes ^ 1] * ((lanes ^ 1) % 2 == 0)[:, None]
        assert torch.equal(found["copy_async"], copied)
        assert found["count"][:, 0].unique().tolist() == [32]


def failed(only: Sequence[str], device: str) -> list[str]:
    """Runs the checks whose names begin with one of ``only``; those that fail."""
    wrong = []
    for name, check in checks().items():
        if not only or name.startswith(tuple(only)):
            try:
                check(device)
            except Exception:  # the others still run
                wrong.append(name)
                traceback.print_exc(limit=-3)
            print(f"{'FAILED' if name in wrong else 'ok'} {name}", flush=True)
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", default=[], help="checks whose name begins with one of these")
    parser.add_argument("--golden", type=Path, metavar="FILE")
    parser.add_argument("--bare", nargs="+", choices=CASES, metavar="CASE")
    parser.add_argument("--speed", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if args.bare:
        for name in args.bare:
            attend(CASES[name].arguments(torch.bfloat16, args.device))
            print(name, flush=True)
        return 0
    if args.speed:
        args.speed.write_text(json.dumps(speed(args.device)), encoding="utf-8")
        return 0
    if args.golden:
        with tempfile.TemporaryDirectory() as folder:
            args.golden.write_text(primitives(args.device, Path(folder)), encoding="utf-8")
            if args.device == "cuda":
                same_primitives(primitives("cpu", Path(folder)), args.golden.read_text(encoding="utf-8"))
    wrong = failed(args.only, args.device)
    print("\n".join(f"FAILED {name}" for name in wrong) or "all passed")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
