"""Makes prefix_attn/backends/triton/tiles.json: the tile that every kernel runs with, and from where decoding folds.

    python -m benchmarks.kernels.tune --offline           for GPUs that are not here: compiled and counted, not run
    python -m benchmarks.kernels.tune --device cuda       measured: the fastest candidate on this GPU
    python -m benchmarks.kernels.tune --offline --python ELSEWHERE/bin/python    only what the Triton there can take

Offline, of the candidates that compile without spilling a byte, within the architecture's shared memory, the one is
taken that inner_loops.py predicts to be the fastest; where it has no model (float32, memory-bound kernels, other
architectures) the first, in the order in which the literature and the register budget favour them. A second
entry, marked "+", serves calls with masks, windows, dropout or other options, which need more registers; a third, "*",
those with one of the options that need few. On a device
the same candidates are timed, those that spill a few bytes (compile_kernels.TIMED_SPILLS) among them: only a clock can
tell whether a second block per processor is worth a spill. The crossover from a prefix in the loop to a folded one is
found as well.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import compile_kernels as offline
from benchmarks.kernels import inner_loops
from benchmarks.measure import Way, interleave
from prefix_attn.backends.triton import table
from prefix_attn.call import Call

FILE = Path(table.__file__).with_name("tiles.json")
DECODE = ("split_keys", "fold_prefix")
FOLD_BYTES = 1 << 25  # predicted, see docs/kernels.md
INTERPRETER = {
    "forward": [32, 16], "grad_query": [32, 16], "grad_sequence": [16, 32], "grad_prefix": [32, 32],
    "split_keys": [16, 16], "fold_prefix": [16, 16],
}  # fmt: skip

# [BLOCK_M, BLOCK_N, warps, stages] per kernel and "dtype/head size".
_KEYS_HALF = {  # dk and dv in registers: BLOCK_N keys against BLOCK_M queries
    "half/64": [
        [64, 128, 8, 3],
        [64, 128, 8, 2],
        [64, 64, 4, 3],
        [64, 64, 4, 2],
        [64, 64, 8, 2],
        [32, 64, 4, 2],
        [32, 32, 4, 2],
        [16, 32, 4, 1],
    ],
    "half/128": [
        [64, 128, 8, 2],
        [32, 128, 8, 2],
        [32, 64, 4, 2],
        [64, 64, 4, 2],
        [64, 64, 8, 2],
        [32, 64, 8, 2],
        [32, 64, 8, 1],
        [32, 32, 8, 1],
        [16, 32, 8, 1],
    ],
    "half/256": [
        [32, 128, 8, 1],
        [16, 128, 8, 1],
        [32, 64, 8, 2],
        [32, 64, 8, 1],
        [16, 64, 8, 2],
        [32, 32, 8, 1],
        [16, 32, 8, 1],
        [16, 16, 8, 1],
    ],
}
_KEYS_FLOAT = {
    "float/64": [
        [32, 32, 4, 2],
        [32, 32, 8, 2],
        [16, 32, 4, 2],
        [32, 32, 8, 1],
        [16, 32, 8, 1],
        [16, 16, 4, 1],
    ],
    "float/128": [[32, 32, 8, 2], [32, 32, 8, 1], [16, 32, 8, 1], [16, 16, 8, 1], [16, 16, 4, 1]],
    "float/256": [[16, 32, 8, 2], [16, 16, 8, 2], [16, 32, 8, 1], [16, 16, 8, 1], [16, 16, 4, 1], [16, 16, 16, 1]],
}
CANDIDATES: dict[str, dict[str, list[list[int]]]] = {
    "forward": {
        "half/64": [[128, 64, 8, 3], [128, 64, 4, 3], [128, 128, 8, 2], [128, 64, 8, 2], [64, 64, 4, 2],
                    [64, 32, 4, 2]],
        "half/128": [[128, 128, 8, 2], [128, 64, 8, 3], [128, 64, 8, 2], [128, 32, 4, 3], [64, 64, 4, 2],
                     [64, 64, 8, 2], [64, 32, 4, 2]],
        "half/256": [[128, 64, 8, 2], [128, 32, 8, 2], [64, 64, 8, 2], [64, 32, 8, 2], [64, 32, 8, 1], [32, 32, 8, 1],
                     [16, 32, 4, 1]],
        "float/64": [[64, 32, 8, 2], [64, 32, 8, 1], [32, 32, 4, 2], [32, 32, 8, 1], [16, 32, 4, 1]],
        "float/128": [[32, 32, 8, 2], [32, 32, 8, 1], [16, 32, 8, 1], [16, 16, 4, 1]],
        "float/256": [[32, 16, 8, 1], [16, 16, 8, 1], [16, 16, 16, 1]],
    },
    "grad_query": {
        "half/64": [[128, 64, 8, 3], [128, 64, 8, 2], [64, 64, 4, 2], [64, 64, 8, 2], [64, 32, 4, 2], [32, 32, 4, 2]],
        "half/128": [[128, 64, 8, 2], [64, 64, 8, 2], [64, 32, 8, 2], [64, 32, 8, 1], [64, 32, 4, 1],
                     [32, 32, 4, 2], [32, 32, 8, 1]],
        "half/256": [[128, 32, 8, 2], [128, 32, 8, 1], [64, 32, 4, 2], [64, 32, 8, 2], [64, 32, 8, 1],
                     [32, 32, 8, 1], [32, 16, 8, 2], [16, 32, 8, 1], [16, 16, 8, 1]],
    } | _KEYS_FLOAT,
    "grad_sequence": _KEYS_HALF | _KEYS_FLOAT,
    "grad_prefix": _KEYS_HALF | _KEYS_FLOAT,
    # BLOCK_M follows from the call, 16 to 64.
    "split_keys": {
        "half/64": [[16, 128, 4, 3], [16, 64, 4, 3], [16, 64, 4, 2], [16, 32, 4, 2]],
        "half/128": [[16, 64, 4, 3], [16, 64, 4, 2], [16, 32, 4, 3], [16, 32, 4, 2], [16, 64, 8, 2],
                     [16, 32, 8, 2]],
        "half/256": [[16, 32, 4, 3], [16, 32, 4, 2], [16, 32, 8, 2], [16, 32, 8, 1], [16, 16, 8, 1]],
        "float/64": [[16, 32, 4, 3], [16, 32, 4, 2], [16, 32, 8, 2], [16, 32, 8, 1], [16, 16, 8, 1]],
        "float/128": [[16, 32, 8, 2], [16, 32, 8, 1], [16, 16, 8, 2], [16, 16, 8, 1], [16, 16, 4, 1]],
        "float/256": [[16, 16, 8, 2], [16, 16, 8, 1], [16, 16, 4, 1], [16, 16, 16, 1]],
    },
    "fold_prefix": {
        "half/64": [[128, 64, 8, 3], [64, 64, 4, 3], [64, 64, 4, 2], [64, 64, 8, 2], [64, 32, 4, 2]],
        "half/128": [[128, 64, 8, 2], [64, 64, 4, 2], [64, 32, 4, 2], [64, 64, 8, 2], [64, 32, 8, 2], [64, 32, 8, 1],
                     [32, 32, 8, 1]],
        "half/256": [[128, 32, 8, 2], [64, 32, 4, 2], [64, 32, 8, 2], [32, 32, 8, 2], [32, 32, 8, 1],
                     [16, 32, 8, 2], [16, 32, 8, 1]],
        "float/64": [[32, 32, 4, 2], [32, 32, 8, 2], [32, 32, 8, 1], [16, 16, 4, 1]],
        "float/128": [[32, 32, 8, 1], [16, 32, 8, 1], [16, 16, 8, 1], [16, 16, 4, 2]],
        "float/256": [[16, 16, 8, 1], [16, 16, 4, 1], [16, 16, 16, 1], [32, 16, 8, 1]],
    },
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Tune as the command line asks, and write the table."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--offline", action="store_true")
    how.add_argument("--device", help="a GPU, whose architecture is measured")
    how.add_argument("--problems", metavar="JSON", help=argparse.SUPPRESS)  # of one candidate: what --python runs
    parser.add_argument("--arch", choices=offline.ARCHITECTURES, action="append", help="offline: default all")
    parser.add_argument("--kernel", choices=CANDIDATES, action="append", help="default: all")
    parser.add_argument("--dtype", choices=offline.DTYPES, action="append", help="default: both")
    parser.add_argument("--size", choices=offline.SIZES, type=int, action="append", help="head size; default: all")
    parser.add_argument("--plain", action="store_true", help="not the entries with options")
    parser.add_argument("--python", action="append", default=[], help="offline: another interpreter with its Triton")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args(arguments)
    if args.problems:
        print(json.dumps(problems(*json.loads(args.problems))))
        return
    tiles = json.loads(FILE.read_text())
    tiles["interpreter"] = {"fold_bytes": 1 << 14} | {
        kernel: {
            f"{d}/{s}{kind}": [*tile, 4, 1] for d in ("half", "float") for s in (64, 128, 256) for kind in ("", "+")
        }
        for kernel, tile in INTERPRETER.items()
    }
    keys = [
        (kernel, key, kind)
        for kernel in args.kernel or CANDIDATES
        for key in CANDIDATES[kernel]
        for kind in (("",) if args.plain else ("", "+") if kernel in DECODE else ("", "*", "+"))
        if key.split("/")[0] in (args.dtype or offline.DTYPES)
        and int(key.split("/")[1]) in (args.size or offline.SIZES)
    ]
    if args.offline:
        _offline(tiles, args.arch or offline.ARCHITECTURES, keys, args.python, args.jobs)
    else:
        _measured(tiles, args.device, keys, args.jobs)
    args.out.write_text(_text(tiles), encoding="utf-8")


def _text(tiles: dict[str, Any]) -> str:
    """JSON with one line per tile."""
    lines = []
    for arch in sorted(tiles):
        entries = []
        for name, value in tiles[arch].items():
            if isinstance(value, dict):
                inner = ",\n".join(f"   {json.dumps(key)}: {json.dumps(tile)}" for key, tile in value.items())
                entries.append(f"  {json.dumps(name)}: {{\n{inner}\n  }}")
            else:
                entries.append(f"  {json.dumps(name)}: {json.dumps(value)}")
        lines.append(f" {json.dumps(arch)}: {{\n" + ",\n".join(entries) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


Key = tuple[str, str, str]  # kernel, "dtype/head size", "+" or nothing


def _offline(
    tiles: dict[str, Any], archs: Sequence[str], keys: Sequence[Key], pythons: Sequence[str], jobs: int
) -> None:
    """Fills in the entries of ``keys``."""
    work = [(arch, *key) for arch in archs for key in keys]
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for (arch, kernel, key, kind), ranked in zip(work, pool.map(ranking, *zip(*work))):
            fit = (t for t in ranked if not any(_elsewhere(p, arch, kernel, key, kind, t) for p in pythons))
            if (tile := next(fit, None)) is None:
                raise RuntimeError(f"{arch} {kernel} {key}{kind}: of {CANDIDATES[kernel][key]} none fits")
            column = tiles.setdefault(arch, {"fold_bytes": FOLD_BYTES})
            column["source"] = "compiled offline, not measured"
            column.setdefault(kernel, {})[key + kind] = tile
            print(arch, kernel, key + kind, tile, file=sys.stderr, flush=True)


def ranking(arch: str, kernel: str, key: str, kind: str) -> list[list[int]]:
    """The candidates that spill nothing and fit, the best first."""
    warnings.simplefilter("ignore")
    dtype, size = key.split("/")
    modelled = arch == inner_loops.ARCH and dtype == "half" and kernel != "split_keys"  # which waits for memory
    found: list[tuple[float, list[int]]] = []
    for tile in CANDIDATES[kernel][key]:
        try:
            rows = offline.built(arch, kernel, dtype, int(size), kind, tile)
        except Exception as error:  # a pass of the compiler that fails is one more reason to pass over a candidate
            print(f"{arch} {kernel} {key}{kind} {tile}: {type(error).__name__}", file=sys.stderr)
            continue
        if any(offline.problems(row) for row, _ in rows):
            continue
        if not modelled:
            found.append((0.0, tile))
            if len(found) == 2:  # the second for a Triton elsewhere
                break
            continue
        rates = [inner_loops.of_peak(row, inner_loops.fastest(k, tile[2])) for row, k in rows]
        # The model is no finer: the order of candidates decides. The options of "*" count the same.
        found.append((-round(statistics.mean(rates), 2), tile))
    # Without a second stage a block waits for memory at every tile, which the model does not see.
    return [tile for _, tile in sorted(found, key=lambda one: (one[1][3] == 1, one[0]))]


def problems(arch: str, kernel: str, key: str, kind: str, tile: list[int], spills: int = 0) -> list[str]:
    """What is wrong under this Triton with one candidate that may spill ``spills`` bytes."""
    warnings.simplefilter("ignore")
    dtype, size = key.split("/")
    try:
        rows = offline.built(arch, kernel, dtype, int(size), kind, tile)
    except Exception as error:
        return [type(error).__name__]
    return [problem for row, _ in rows for problem in offline.problems(row, spills)]


def _elsewhere(python: str, *candidate: Any) -> list[str]:
    """``problems`` of a candidate under the Triton of another interpreter."""
    command = [python, "-m", "benchmarks.kernels.tune", "--problems", json.dumps(candidate)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _measured(tiles: dict[str, Any], device: str, keys: Sequence[Key], jobs: int) -> None:
    """The fastest candidate of every key on ``device``, over shapes of training and decoding, and the crossover."""
    arch = table.architecture(torch.device(device))
    column = tiles[arch]
    work = [(arch, *key, tile) for key in keys for tile in CANDIDATES[key[0]][key[1]]]
    # Compiled in processes beside: the candidates that spill much are left out, the others wait in Triton's cache.
    check = functools.partial(problems, spills=offline.TIMED_SPILLS)
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        bad = {json.dumps(one[:-1]) + str(one[-1]): found for one, found in zip(work, pool.map(check, *zip(*work)))}
    for kernel, key, kind in keys:
        dtype, size = key.split("/")
        fit = [t for t in CANDIDATES[kernel][key] if not bad[json.dumps((arch, kernel, key, kind)) + str(t)]]
        call = _to(_shape(kernel, offline.DTYPES[dtype], int(size), kind), device)
        times = _times(call, kernel, fit, device)
        if times:
            column[kernel][key + kind] = min(times, key=lambda t: t[0])[1]
        print(arch, kernel, key + kind, [(f"{t * 1e6:.1f} us", tile) for t, tile in times], flush=True)
    column["fold_bytes"] = crossover(_both_ways(device))
    column["source"] = f"measured on {torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    print(arch, "fold_bytes", column["fold_bytes"], flush=True)


def _both_ways(device: str) -> list[tuple[int, float, float]]:
    """(bytes of prefix that a decode step would read in its loop, seconds in the loop, seconds folded)."""
    from prefix_attn.backends.triton import launch, plan

    found = []
    before = plan.folds
    for B in (16, 64, 256):
        for P in (16, 64, 128, 256, 512, 1024):
            call = _to(offline._call(torch.bfloat16, 128, S=1, P=P, B=B, T=512), device)
            ways = {}
            for fold in (False, True):

                def run(_: Any, call: Call = call, fold: bool = fold) -> None:
                    plan.folds = lambda _: fold
                    launch.forward(call)

                ways[str(fold)] = Way(run)
            samples = interleave(ways, device, rounds=11)
            read = B * call.key.shape[1] * P * 2 * 128 * 2
            found.append((read, *(sorted(samples[name])[5] for name in ("False", "True"))))
            loop, folded = (1e6 * seconds for seconds in found[-1][1:])
            print(f"B={B} P={P}: {loop:.1f} us in the loop, {folded:.1f} us folded", flush=True)
    plan.folds = before
    return found


def crossover(points: Sequence[tuple[int, float, float]]) -> int:
    """The bytes from which on to fold, so that all points together take the least time; see ``_both_ways``."""
    limits = sorted({read for read, _, _ in points})
    limits.append(2 * limits[-1])  # never
    total = lambda limit: sum(folded if read >= limit else loop for read, loop, folded in points)
    return min(limits, key=total)


def _shape(kernel: str, dtype: torch.dtype, size: int, kind: str) -> Call:
    S, P, B = {"split_keys": (1, 64, 64), "fold_prefix": (1, 512, 256)}.get(kernel, (2048, 128, 4))
    call = offline._call(dtype, size, S=S, P=P, B=B, T=2048)
    one = {"": {}, "*": {"key_mask": torch.ones(B, 2048, dtype=torch.bool)}, "+": {"softcap": 30.0}}[kind]
    return call._replace(**one)


def _to(call: Call, device: str) -> Call:
    """The call with random numbers on ``device``."""
    return call._replace(
        **{
            name: torch.randn_like(t, device=device) if t.is_floating_point() else t.to(device)
            for name, t in call._asdict().items()
            if isinstance(t, torch.Tensor)
        }
    )


def _times(call: Call, kernel: str, tiles: Sequence[list[int]], device: str) -> list[tuple[float, list[int]]]:
    """(seconds on the device, tile) of the pass in which ``kernel`` runs. Tiles that cannot run there are left out."""
    from prefix_attn.backends.triton import launch

    out, lse = launch.forward(call)
    needs = [kernel == "grad_query", *[kernel == "grad_sequence"] * 2, *[kernel == "grad_prefix"] * 2, False, False]
    run = lambda _: launch.backward(call, out, lse, out, None, needs) if any(needs) else launch.forward(call)
    ways: dict[int, Way] = {}
    for number, tile in enumerate(tiles):
        way = Way(run, context=functools.partial(_with_tile, kernel, tile))
        try:
            with way.context():
                run(None)
                torch.cuda.synchronize()
            ways[number] = way
        except Exception as error:  # out of shared memory, or a failed pass: this candidate is out, the search goes on
            print(f"{kernel} {tile}: {type(error).__name__}", file=sys.stderr)
    samples = interleave(ways, device, rounds=11)
    return [(sorted(samples[number])[5], tiles[number]) for number in ways]


@contextmanager
def _with_tile(kernel: str, tile: list[int]) -> Iterator[None]:
    """``kernel`` runs with ``tile``, the others with the table's; decoding folds only for the kernel that folds."""
    from prefix_attn.backends.triton import plan

    before, fold = plan.options, plan.folds
    options = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile))
    plan.options = lambda call, name: before(call, name) | (options if name == kernel else {})
    plan.folds = lambda call: kernel == "fold_prefix"
    try:
        yield
    finally:
        plan.options, plan.folds = before, fold


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
