"""Compiles every Triton kernel for GPUs that are not there: registers, spills, shared memory, matrix instructions.

    python -m benchmarks.kernels.compile_kernels --write docs/kernel-resources.md    every shipped architecture
    python -m benchmarks.kernels.compile_kernels --arch sm_90 --check                exit status 1 on a broken promise

The real host code chooses tiles and arguments, on CPU tensors, for a target instead of a device; only the launch is
left out. So what is compiled is what a launch with these shapes would compile, specialisations included.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import io
import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefix_attn.call import Call

# Shared memory that a block may opt in to, in bytes. sm_80's table also serves 8.6, 8.9 and 12.0, which have 99 KiB.
SHARED = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
ARCHITECTURES = tuple(SHARED)
DTYPES = {"half": torch.bfloat16, "float": torch.float32}
SIZES = (64, 128, 256)
# Bytes, stores and loads, that a tile may spill if a device timed it and found it faster than those that spill nothing.
TIMED_SPILLS = 64
# Instructions that products of tiles become, the best first. Those of sm_90 and sm_100 take 64 rows or more.
PRODUCTS = {
    "sm_80": ("mma.sync",),
    "sm_90": ("wgmma.mma_async", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"),
    "gfx942": ("v_mfma",),
}


class Kernel(NamedTuple):
    """One compiled kernel."""

    arch: str
    kernel: str
    dtype: str
    size: int
    variant: str
    tile: str
    registers: int
    spills: int  # bytes, stores and loads
    shared: int  # bytes
    product: str  # instruction of its products; fma for float32, which is multiplied exactly


def main(arguments: list[str] | None = None) -> int:
    """Compile what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels.compile_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument("--size", choices=SIZES, type=int, action="append", help="head size; default: all")
    parser.add_argument("--check", action="store_true", help="fail on spills, too much memory or missing instructions")
    parser.add_argument("--write", type=Path, help="markdown file for the table")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(arguments)
    variants = args.variant or list(VARIANTS)
    archs, dtypes, sizes = args.arch or ARCHITECTURES, args.dtype or DTYPES, args.size or SIZES
    jobs = [(arch, dtype, size, variants) for arch in archs for dtype in dtypes for size in sizes]
    found: list[Kernel] = []
    context = multiprocessing.get_context("spawn")  # Triton keeps one target per process
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool:
        for kernels in pool.map(compile_for, *zip(*jobs)):
            found += kernels
            print(f"{kernels[0].arch} {kernels[0].dtype} {kernels[0].size}: {len(kernels)} kernels", file=sys.stderr)
    text = table(found)
    if args.write:
        older = args.write.read_text(encoding="utf-8") if args.write.is_file() else ""
        args.write.write_text(text + "".join(re.findall(r"\n## .*", older, re.DOTALL)), encoding="utf-8")
    else:
        print(text)
    broken = [problem for kernel in found for problem in problems(kernel, TIMED_SPILLS if timed(kernel.arch) else 0)]
    print("\n".join(broken), file=sys.stderr)
    return 1 if args.check and broken else 0


def timed(arch: str) -> bool:
    """Whether a device chose the shipped tiles of ``arch``."""
    from prefix_attn.backends.triton.table import table

    return table()[arch]["source"].startswith("measured")


def problems(kernel: Kernel, spills: int = 0) -> list[str]:
    """What is wrong with a kernel that may spill ``spills`` bytes; nothing if it keeps every promise."""
    name = " ".join(map(str, kernel[:6]))
    found = []
    if kernel.spills > spills:
        found.append(f"{name}: {kernel.spills} bytes spilled")
    if kernel.shared > SHARED[kernel.arch]:
        found.append(f"{name}: {kernel.shared} bytes of shared memory, {SHARED[kernel.arch]} allowed")
    rows = int(kernel.tile.split("x")[0]) if kernel.kernel in ("forward", "grad_query") else 0
    wanted = PRODUCTS[kernel.arch][:1] if rows >= 64 else PRODUCTS[kernel.arch]
    if kernel.dtype == "half" and kernel.product not in wanted:
        found.append(f"{name}: its products are {kernel.product}, not {wanted[0]}")
    return found


def table(kernels: list[Kernel]) -> str:
    """Markdown."""
    import triton

    lines = [
        "# What the kernels take",
        "",
        "Made by `python -m benchmarks.kernels.compile_kernels --write docs/kernel-resources.md` with Triton "
        f"{triton.__version__}: compiled offline, nothing measured. Tile: BLOCK_M x BLOCK_N, warps, stages. Variant "
        "*plain* is causal with a shared prefix; *single* the worst of a window, a key mask, lengths, a bank and an "
        "infix; *options* has window, key mask, bias, softcap, sinks, dropout and a ragged bank at once.",
        "",
        "| architecture | kernel | dtype | D | variant | tile | registers | spilled bytes | shared KiB | products |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {k.arch} | {k.kernel} | {k.dtype} | {k.size} | {k.variant} | {k.tile} | {k.registers} | {k.spills} | "
        f"{k.shared / 1024:.1f} | {k.product} |"
        for k in kernels
    ]
    return "\n".join(lines) + "\n"


def compile_for(arch: str, dtype: str, size: int, variants: Sequence[str]) -> list[Kernel]:
    """Every kernel as the shipped table would launch it on ``arch``."""
    warnings.simplefilter("ignore")
    from prefix_attn.backends.triton import launch, plan
    from prefix_attn.backends.triton.table import table

    found: dict[tuple[str, ...], Kernel] = {}
    columns = [column for column in table()[arch].values() if isinstance(column, dict)]
    if not any(f"{dtype}/{size}*" in column for column in columns):  # served by the tiles of ``options``
        variants = [name for name in variants if name != "single"]
    with target(arch) as compiled:
        for variant in variants:
            for call in VARIANTS[variant](DTYPES[dtype], size):
                compiled.clear()
                out, lse = launch.forward(call)
                if call.query.shape[2] > plan.MAX_DECODE_QUERIES:
                    launch.backward(call, out, lse, out, None, [True] * 5 + [call.sinks is not None, False])
                for name, kernel, tile in compiled:
                    row = Kernel(arch, name, dtype, size, variant, tile, *resources(kernel, arch))
                    found[row[:6]] = max(row, found.get(row[:6], row), key=lambda k: (k.spills, k.registers))
    return list(found.values())


def plain(dtype: torch.dtype, size: int) -> list[Call]:
    """A training call; decode calls that split keys, with one and the most queries and with a folded prefix."""
    from prefix_attn.backends.triton import plan

    most = plan.max_decode_rows(dtype.itemsize, size) // 4
    decode = [_call(dtype, size, S=S, P=P, B=B) for S, P, B in ((1, 64, 4), (most, 64, 4), (1, 4096, 64))]
    return [_call(dtype, size, S=512, P=64), *decode]


def single(dtype: torch.dtype, size: int) -> list[Call]:
    """A training call with each of the options that a "*" entry serves."""
    call, bank = (_call(dtype, size, S=512, P=64, N=N) for N in (0, 3))
    zeros = torch.zeros(4, dtype=torch.int64)
    return [
        call._replace(key_mask=torch.ones(4, 512, dtype=torch.bool)),
        call._replace(key_lengths=zeros),
        call._replace(prefix_start=zeros),
        call._replace(window=256),
        bank._replace(prefix_ids=zeros),
    ]


def options(dtype: torch.dtype, size: int) -> list[Call]:
    """The plain calls with everything at once; decoding has neither bias nor dropout."""
    calls = []
    for S, P, B in ((512, 64, 4), (1, 64, 4), (1, 4096, 64)):
        call = _call(dtype, size, S=S, P=P, B=B, N=3)
        T, Hq = call.key.shape[2], call.query.shape[1]
        call = call._replace(
            sinks=torch.zeros(Hq),
            prefix_ids=torch.zeros(B, dtype=torch.int64),
            prefix_lengths=torch.zeros(3, dtype=torch.int64),
            prefix_start=torch.zeros(B, dtype=torch.int64),
            key_lengths=torch.zeros(B, dtype=torch.int64),
            key_mask=torch.ones(B, T, dtype=torch.bool),
            window=256,
            softcap=30.0,
        )
        if S > 1:
            bias, seed = torch.zeros(1, Hq, S, T, dtype=dtype), torch.zeros(1, dtype=torch.int64)
            call = call._replace(bias=bias, dropout_p=0.1, seed=seed)
        calls.append(call)
    return calls


def _call(dtype: torch.dtype, size: int, S: int, P: int, B: int = 4, N: int = 0, T: int = 512) -> Call:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    bank = (N,) if N else ()
    return Call(
        zeros(B, S, 8, size).transpose(1, 2),
        zeros(B, T, 2, size).transpose(1, 2),
        zeros(B, T, 2, size).transpose(1, 2),
        zeros(*bank, 2, P, size),
        zeros(*bank, 2, P, size),
        scale=size**-0.5,
    )


VARIANTS = {"plain": plain, "single": single, "options": options}
OF_ENTRY = {"": plain, "*": single, "+": options}  # of the table: the calls that it serves


@contextlib.contextmanager
def target(arch: str, only: str | None = None) -> Iterator[list[tuple[str, Any, str]]]:
    """Launches compile for ``arch`` instead of running; each is appended to the list as (name, kernel, tile).

    only: the one kernel to compile; the others are passed over.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from prefix_attn.backends.triton import plan

    gpu = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    compiled: list[tuple[str, Any, str]] = []

    def without_launch(self: Any, grid: Any) -> Any:
        def launch_kernel(*args: Any, **kwargs: Any) -> None:
            name = self.fn.__name__.lstrip("_")
            if only is not None and name != only:
                return
            kernel = self.warmup(*args, grid=grid, **kwargs)
            tile = [kwargs.get("BLOCK_M"), kwargs.get("BLOCK_N"), kwargs.get("num_warps"), kwargs.get("num_stages")]
            if None not in tile:
                m, n, warps, stages = tile
                compiled.append((name, kernel, f"{m}x{n} w{warps} s{stages}"))

        return launch_kernel

    before = JITFunction.__getitem__, plan.architecture, plan.processors
    driver.set_active(_Offline(gpu))
    JITFunction.__getitem__ = without_launch
    plan.architecture, plan.processors = lambda device: arch, lambda device: 132
    try:
        yield compiled
    finally:
        JITFunction.__getitem__, plan.architecture, plan.processors = before
        driver._active = None  # ``reset_active`` would look for a device


def built(arch: str, kernel: str, dtype: str, size: int, kind: str, tile: list[int]) -> list[tuple[Kernel, Any]]:
    """``kernel`` with ``tile``, for the calls that reach it, each with what the compiler made; no other is compiled."""
    from prefix_attn.backends.triton import launch, plan

    decode = kernel in ("split_keys", "fold_prefix")
    before, given = plan.options, dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile))
    plan.options = lambda call, name: before(call, name) | given
    try:
        with target(arch, only=kernel) as found:
            for call in OF_ENTRY[kind](DTYPES[dtype], size):
                if decode == (call.query.shape[2] <= plan.MAX_DECODE_QUERIES):
                    out, lse = launch.forward(call)
                    if not decode:
                        launch.backward(call, out, lse, out, None, [True] * 5 + [call.sinks is not None, False])
    finally:
        plan.options = before
    return [(Kernel(arch, name, dtype, size, kind, text, *resources(k, arch)), k) for name, k, text in found]


class _Offline:
    """A driver that has a target and no device."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu

    def get_current_target(self) -> Any:
        return self.gpu

    def get_current_device(self) -> str:
        return str(self.gpu)

    def get_current_stream(self, device: Any) -> int:
        return 0


def resources(kernel: Any, arch: str) -> tuple[int, int, int, str]:
    """(registers, bytes spilled, bytes of shared memory, the instruction of its products)."""
    shared = kernel.metadata.shared
    text = kernel.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
    product = next((name for name in PRODUCTS[arch] if name in text), "fma")
    if arch.startswith("gfx"):
        # Memory of a lane. Scalar registers spill into lanes of a vector register, not into memory, and do not count.
        spilled = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
        return _number(r"\.vgpr_count:\s+(\d+)", text), spilled, shared, product
    log = _assembled(kernel)
    spilled = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    return _number(r"Used (\d+) registers", log), spilled, shared, product


def _assembled(kernel: Any) -> str:
    """What the assembler says, called by Triton itself: versions give it other options, and with them others spill."""
    from triton import knobs
    from triton.compiler.compiler import make_backend

    backend = make_backend(kernel.metadata.target)
    said = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(kernel.asm["ptx"], {}, kernel.metadata, backend.target.arch)
    return said.getvalue()


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


if __name__ == "__main__":
    sys.exit(main())
