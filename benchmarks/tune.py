"""Makes prefix_attn/backends/triton/tiles.json: the tile that every kernel runs with.

    python -m benchmarks.tune --offline                for GPUs that are not here: the first candidate that fits
    python -m benchmarks.tune --device cuda            measured: the fastest candidate on this GPU, for its architecture

Candidates are listed in the order in which the literature and the register budget favour them. Offline, the first that
compiles without spilling a byte, within the architecture's shared memory, is taken. A second entry, marked "+", serves
calls with masks, windows, dropout or other options, which need more registers.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks import compile_kernels as offline
from prefix_attn.backends.triton import table
from prefix_attn.call import Call

FILE = Path(table.__file__).with_name("tiles.json")
FOLD_BYTES = 1 << 25  # predicted, see docs/kernels.md
INTERPRETER = {
    "forward": [32, 16], "grad_query": [32, 16], "grad_sequence": [16, 32], "grad_prefix": [32, 32],
    "split_keys": [16, 16], "fold_prefix": [16, 16],
}  # fmt: skip

# [BLOCK_M, BLOCK_N, warps, stages] per kernel and "dtype/head size".
_KEYS_HALF = {  # dk and dv in registers: BLOCK_N keys against BLOCK_M queries
    "half/64": [[64, 128, 8, 3], [64, 128, 8, 2], [64, 64, 4, 2], [32, 64, 4, 2], [32, 32, 4, 2], [16, 32, 4, 1]],
    "half/128": [[64, 128, 8, 2], [64, 64, 8, 2], [32, 64, 8, 2], [32, 64, 8, 1], [32, 32, 8, 1], [16, 32, 8, 1]],
    "half/256": [[32, 64, 8, 2], [32, 64, 8, 1], [32, 32, 8, 1], [16, 32, 8, 1], [16, 16, 8, 1]],
}
_KEYS_FLOAT = {
    "float/64": [[32, 32, 4, 2], [32, 32, 8, 2], [32, 32, 8, 1], [16, 32, 8, 1], [16, 16, 4, 1]],
    "float/128": [[32, 32, 8, 1], [16, 32, 8, 1], [16, 16, 8, 1], [16, 16, 4, 1]],
    "float/256": [[16, 32, 8, 1], [16, 16, 8, 1], [16, 16, 4, 1], [16, 16, 16, 1]],
}
CANDIDATES: dict[str, dict[str, list[list[int]]]] = {
    "forward": {
        "half/64": [[128, 64, 4, 3], [128, 64, 8, 3], [128, 64, 8, 2], [64, 64, 4, 2], [64, 32, 4, 2]],
        "half/128": [[128, 64, 8, 3], [128, 64, 8, 2], [64, 64, 4, 2], [64, 64, 8, 2], [64, 32, 4, 2], [32, 32, 4, 2]],
        "half/256": [[64, 64, 8, 2], [64, 32, 8, 2], [64, 32, 8, 1], [32, 32, 8, 1], [16, 32, 4, 1]],
        "float/64": [[64, 32, 8, 2], [64, 32, 8, 1], [32, 32, 4, 2], [32, 32, 8, 1], [16, 32, 4, 1]],
        "float/128": [[32, 32, 8, 2], [32, 32, 8, 1], [16, 32, 8, 1], [16, 16, 4, 1]],
        "float/256": [[32, 16, 8, 1], [16, 16, 8, 1], [16, 16, 16, 1]],
    },
    "grad_query": {
        "half/64": [[128, 64, 8, 3], [128, 64, 8, 2], [64, 64, 4, 2], [64, 64, 8, 2], [64, 32, 4, 2], [32, 32, 4, 2]],
        "half/128": [[128, 64, 8, 2], [64, 64, 8, 2], [64, 32, 8, 2], [64, 32, 8, 1], [64, 32, 4, 1], [32, 32, 8, 1]],
        "half/256": [[64, 32, 8, 2], [64, 32, 8, 1], [32, 32, 8, 1], [16, 32, 8, 1], [16, 16, 8, 1]],
    } | _KEYS_FLOAT,
    "grad_sequence": _KEYS_HALF | _KEYS_FLOAT,
    "grad_prefix": _KEYS_HALF | _KEYS_FLOAT,
    # BLOCK_M follows from the call, 16 to 64.
    "split_keys": {
        "half/64": [[16, 128, 4, 3], [16, 64, 4, 3], [16, 64, 4, 2], [16, 32, 4, 2]],
        "half/128": [[16, 64, 4, 3], [16, 64, 4, 2], [16, 32, 4, 3], [16, 32, 4, 2], [16, 32, 8, 2]],
        "half/256": [[16, 32, 4, 3], [16, 32, 4, 2], [16, 32, 8, 2], [16, 32, 8, 1], [16, 16, 8, 1]],
        "float/64": [[16, 32, 4, 3], [16, 32, 4, 2], [16, 32, 8, 2], [16, 32, 8, 1], [16, 16, 8, 1]],
        "float/128": [[16, 32, 8, 2], [16, 32, 8, 1], [16, 16, 8, 2], [16, 16, 8, 1], [16, 16, 4, 1]],
        "float/256": [[16, 16, 8, 2], [16, 16, 8, 1], [16, 16, 4, 1], [16, 16, 16, 1]],
    },
    "fold_prefix": {
        "half/64": [[64, 64, 4, 3], [64, 64, 4, 2], [64, 64, 8, 2], [64, 32, 4, 2]],
        "half/128": [[64, 64, 8, 2], [64, 32, 8, 2], [64, 32, 8, 1], [32, 32, 8, 1]],
        "half/256": [[64, 32, 8, 2], [32, 32, 8, 2], [32, 32, 8, 1], [16, 32, 8, 1]],
        "float/64": [[32, 32, 4, 2], [32, 32, 8, 2], [32, 32, 8, 1], [16, 16, 4, 1]],
        "float/128": [[32, 32, 8, 1], [16, 32, 8, 1], [16, 16, 8, 1]],
        "float/256": [[16, 16, 8, 1], [16, 16, 4, 1], [16, 16, 16, 1]],
    },
}  # fmt: skip
PLUS = ("forward", "grad_query", "grad_sequence", "grad_prefix", "split_keys", "fold_prefix")


def main(arguments: list[str] | None = None) -> None:
    """Tune as the command line asks, and write the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.tune", description=__doc__.splitlines()[0])
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--offline", action="store_true")
    how.add_argument("--device", help="a GPU, whose architecture is measured")
    parser.add_argument("--arch", choices=offline.ARCHITECTURES, action="append", help="offline: default all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args(arguments)
    shipped = json.loads(FILE.read_text()) if FILE.exists() else {}
    shipped["interpreter"] = {"fold_bytes": 1 << 14} | {
        kernel: {
            f"{d}/{s}{plus}": [*tile, 4, 1] for d in ("half", "float") for s in (64, 128, 256) for plus in ("", "+")
        }
        for kernel, tile in INTERPRETER.items()
    }
    found = _offline(args.arch or offline.ARCHITECTURES, args.jobs) if args.offline else _measured(args.device)
    args.out.write_text(_text(shipped | found), encoding="utf-8")


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


def _offline(archs: Any, jobs: int) -> dict[str, Any]:
    work = [(arch, kernel, key, plus) for arch in archs for kernel in CANDIDATES for key in CANDIDATES[kernel]
            for plus in ("", "+")]  # fmt: skip
    tiles: dict[str, Any] = {
        arch: {"source": "compiled offline, not measured", "fold_bytes": FOLD_BYTES} for arch in archs
    }
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for (arch, kernel, key, plus), tile in zip(work, pool.map(first_that_fits, *zip(*work))):
            tiles[arch].setdefault(kernel, {})[key + plus] = tile
            print(arch, kernel, key + plus, tile, file=sys.stderr, flush=True)
    return tiles


def first_that_fits(arch: str, kernel: str, key: str, plus: str) -> list[int]:
    """The first candidate that spills nothing and fits; an error if there is none."""
    warnings.simplefilter("ignore")
    dtype, size = key.split("/")
    tried = []
    for tile in CANDIDATES[kernel][key]:
        try:
            found = compiled(arch, kernel, dtype, int(size), plus, tile)
        except Exception as error:  # a pass of the compiler that fails is one more reason to pass over a candidate
            tried.append(f"{tile}: {type(error).__name__}")
            continue
        bad = [problem for k in found for problem in offline.problems(k)]
        if not bad:
            return tile
        tried.append(bad[0])
    raise RuntimeError(f"{arch} {kernel} {key}{plus}: nothing fits: {tried}")


def compiled(arch: str, kernel: str, dtype: str, size: int, plus: str, tile: list[int]) -> list[offline.Kernel]:
    """``kernel`` with ``tile``, for the calls that reach it; no other kernel is compiled."""
    from prefix_attn.backends.triton import launch

    calls = (offline.options if plus else offline.plain)(offline.DTYPES[dtype], size)
    decode = kernel in ("split_keys", "fold_prefix")
    before = launch.tile
    launch.tile = lambda *_: dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile))
    try:
        with offline.target(arch, only=kernel) as found:
            for call in calls:
                if decode == (call.query.shape[2] <= launch.MAX_DECODE_QUERIES):
                    out, lse = launch.forward(call)
                    if not decode:
                        launch.backward(call, out, lse, out, None, [True] * 5 + [call.sinks is not None, False])
    finally:
        launch.tile = before
    return [offline.Kernel(arch, name, dtype, size, plus, text, *offline.resources(k, arch)) for name, k, text in found]


def _measured(device: str) -> dict[str, Any]:
    """The fastest candidate of every kernel on ``device``, over shapes of training and decoding."""
    from prefix_attn.backends.triton import launch

    arch = table.architecture(torch.device(device))
    tiles: dict[str, Any] = {
        "source": f"measured on {torch.cuda.get_device_name(device)}, torch {torch.__version__}",
        "fold_bytes": table.table().get(arch, {}).get("fold_bytes", FOLD_BYTES),
    }
    for kernel, keys in CANDIDATES.items():
        for key, candidates in keys.items():
            for plus in ("", "+"):
                dtype, size = key.split("/")
                call = _to(_shape(kernel, offline.DTYPES[dtype], int(size), plus), device)
                times = [(_time(launch, call, kernel, tile), tile) for tile in candidates]
                tiles.setdefault(kernel, {})[key + plus] = min(times, key=lambda t: t[0])[1]
                print(arch, kernel, key + plus, [(round(t * 1e3, 1), tile) for t, tile in times], flush=True)
    return {arch: tiles}


def _shape(kernel: str, dtype: torch.dtype, size: int, plus: str) -> Call:
    S, P, B = {"split_keys": (1, 64, 64), "fold_prefix": (1, 512, 256)}.get(kernel, (2048, 128, 4))
    call = offline._call(dtype, size, S=S, P=P, B=B, T=2048)
    if plus:
        call = call._replace(softcap=30.0)
    return call


def _to(call: Call, device: str) -> Call:
    """The call with random numbers on ``device``."""
    return call._replace(
        **{
            name: torch.randn_like(t, device=device)
            for name, t in call._asdict().items()
            if isinstance(t, torch.Tensor) and t.is_floating_point()
        }
    )


def _time(launch: Any, call: Call, kernel: str, tile: list[int]) -> float:
    """Milliseconds of the whole pass in which ``kernel`` runs, with ``tile`` for it and the table's for the others."""
    before, fold = launch.tile, launch._folds
    options = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile))
    launch.tile = lambda arch, name, *rest: options if name == kernel else before(arch, name, *rest)
    launch._folds = lambda call: kernel == "fold_prefix"
    try:
        out, lse = launch.forward(call)
        needs = [kernel == "grad_query", *[kernel == "grad_sequence"] * 2, *[kernel == "grad_prefix"] * 2, False, False]
        run = lambda: launch.backward(call, out, lse, out, None, needs) if any(needs) else launch.forward(call)
        run()
        torch.cuda.synchronize()
        times = []
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times)[len(times) // 2]
    except Exception as error:  # out of shared memory, or a failed pass: this candidate is out, the search goes on
        print(f"{kernel} {tile}: {type(error).__name__}", file=sys.stderr)
        return float("inf")
    finally:
        launch.tile, launch._folds = before, fold


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
