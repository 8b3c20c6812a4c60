"""Shipped kernels compile, spill nothing and fit, for every architecture of the table; no GPU is needed.

A part of them, as it takes minutes: every head size for Hopper, one for each other architecture; with all options at
once for Hopper; float32, which multiplies without matrix instructions, for the smallest head.
``python -m benchmarks.kernels.compile_kernels --check`` does everything.

In processes of their own: Triton decides at its import whether it interprets, and this test process does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels.compile_kernels import ARCHITECTURES, SHARED, SIZES, Kernel, problems

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"forward", "grad_query", "grad_sequence", "grad_prefix", "split_keys", "fold_prefix"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def compiled(tmp_path: Path, *options: str) -> list[list[str]]:
    """The rows of the table of what ``options`` choose, all of which keep their promises."""
    table = tmp_path / "table.md"
    done = python("-m", "benchmarks.kernels.compile_kernels", "--check", *options, "--write", str(table))
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in table.read_text().splitlines() if line.startswith(tuple(f"| {a}" for a in ARCHITECTURES))]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize(
    ("arch", "sizes"), {"sm_80": (64,), "sm_90": SIZES, "sm_100": (128,), "gfx942": (256,)}.items(), ids=str
)
def test_what_is_shipped_compiles(tmp_path: Path, arch: str, sizes: tuple[int, ...]) -> None:
    """Each tile of the table, in the call that reaches it: no spills, memory within the limit, matrix instructions."""
    chosen = [part for size in sizes for part in ("--size", str(size))]
    rows = compiled(tmp_path, "--variant", "plain", "--dtype", "half", "--arch", arch, *chosen)
    found = {tuple(row[:4]) for row in rows}
    assert found == {(arch, kernel, "half", str(size)) for kernel in KERNELS for size in sizes}


@pytest.mark.parametrize(("dtype", "sizes"), [("half", SIZES), ("float", (64,))], ids=str)
def test_all_options_at_once_compile(tmp_path: Path, dtype: str, sizes: tuple[int, ...]) -> None:
    """Masks, window, softcap, sinks, dropout, bias and a ragged bank in one call."""
    chosen = [part for size in sizes for part in ("--size", str(size))]
    rows = compiled(tmp_path, "--variant", "options", "--dtype", dtype, "--arch", "sm_90", *chosen)
    assert {tuple(row[1:5]) for row in rows} == {(k, dtype, str(size), "options") for k in KERNELS for size in sizes}


def test_a_spill_is_seen() -> None:
    """A tile far too large for its registers: if this compiled without a spill, the check above would see none."""
    code = (
        "from benchmarks.kernels import compile_kernels;"
        "((kernel, _),) = compile_kernels.built('sm_90', 'forward', 'half', 128, '', [128, 128, 4, 2]);"
        "print(kernel.spills)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) > 0


def test_the_loop_of_forward_multiplies_no_score() -> None:
    """Scale, subtraction and log 2 are one instruction per score. What is multiplied is the output, to rescale it."""
    code = (
        "from benchmarks.kernels import compile_kernels, inner_loops;"
        "((row, kernel),) = compile_kernels.built('sm_90', 'forward', 'half', 128, '', [128, 64, 8, 3]);"
        "counts = inner_loops.fastest(kernel, 8).counts;"
        "print(counts['FMUL'], counts['FFMA'], counts['F2FP'], counts['LDGSTS'], counts['LDG'])"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-4000:]
    multiplied, fused, rounded, asynchronous, loads = map(int, done.stdout.split())
    scores, outputs = 128 * 64 // 256, 128 * 128 // 256  # of a thread
    assert outputs <= multiplied <= outputs + 4
    assert scores <= fused <= scores + 4
    assert rounded == scores // 2  # two probabilities in one instruction
    assert (asynchronous, loads) == (
        2 * 64 * 128 * 2 // 16 // 256,
        0,
    )  # keys and values go to shared memory by themselves


def test_a_packed_training_compiles_once() -> None:
    """Every batch has another number of tokens. What Triton would compile for it is the same, as are its keys."""
    code = """if True:
        from triton import knobs
        import torch
        from benchmarks.kernels import compile_kernels
        from prefix_attn.backends.triton import launch
        from prefix_attn.call import Call
        asked = set()
        knobs.runtime.jit_cache_hook = lambda key, fn, **_: asked.add((fn.name, key)) or True
        with compile_kernels.target("sm_90"):
            for total in (512, 513, 1):
                query = torch.zeros(1, total, 4, 64).transpose(1, 2)
                prefix, cu = torch.zeros(4, 8, 64), torch.tensor([0, total])
                call = Call(query, query, query, prefix, prefix, cu_seqlens_q=cu, cu_seqlens_k=cu)
                call = call._replace(max_seqlen_q=total, max_seqlen_k=total)
                out, lse = launch.forward(call)
                launch.backward(call, out, lse, out, None, [True] * 5 + [False] * 2)
        print(*sorted(name for name, _ in asked))
    """
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["_delta", "_forward", "_grad_prefix", "_grad_query", "_grad_sequence", "_sum_splits"]


def test_the_second_launch_of_decoding_starts_early_where_the_device_can() -> None:
    """Folding allows it from its first instruction on; splitting waits before it reads what folding wrote."""
    code = (
        "from benchmarks.kernels import compile_kernels;"
        "texts = [k.asm['ptx'] for name in ('fold_prefix', 'split_keys') for arch in ('sm_90', 'sm_80')"
        "         for row, k in compile_kernels.built(arch, name, 'half', 64, '', [16, 32, 4, 2])[-1:]];"
        "print([[word in text for word in ('griddepcontrol.launch_dependents', 'griddepcontrol.wait')]"
        "       for text in texts])"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "[[True, False], [False, False], [False, True], [False, False]]"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"spills": 8}, ["8 bytes spilled"]),
        ({"shared": SHARED["sm_90"] + 1}, ["bytes of shared memory"]),
        ({"product": "mma.sync"}, ["its products are mma.sync, not wgmma.mma_async"]),
        ({"product": "mma.sync", "kernel": "split_keys"}, []),
        ({"product": "fma", "kernel": "split_keys"}, ["its products are fma"]),
        ({"product": "fma", "dtype": "float"}, []),
    ],
)
def test_problems(change: dict[str, Any], said: list[str]) -> None:
    kernel = Kernel("sm_90", "forward", "half", 128, "plain", "128x64 w8 s3", 200, 0, 131072, "wgmma.mma_async")
    found = problems(kernel._replace(**change))
    assert len(found) == len(said)
    assert all(part in problem for part, problem in zip(said, found))
