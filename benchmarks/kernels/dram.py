"""What a decode step really reads from memory, counted by Nsight Compute: every key once, and the prefix once.

    python -m benchmarks.kernels.dram --out results.json

``ncu`` is looked for on PATH and where CUDA and Nsight are installed. It runs this module again as a child, which
brackets one call between the profiler's start and stop; caches are flushed before each kernel. The clocks stay as they
are: bytes do not depend on them, and the machine may not be ours. Needed are the keys and values of the sequences, one
prefix and the queries. Without ncu, or where the driver keeps the counters to the administrator, the reason is written
instead of a number.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import operator
from benchmarks.machine import describe
from benchmarks.peers import inputs
from benchmarks.results import Record, Results
from prefix_attn import prefix_attention

METRIC = "dram__bytes_read.sum"
PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
CASES = [operator.step(64, 2048, 128), operator.step(256, 512, 512), operator.step(256, 512, 16)]
ITEMSIZE = 2


def needed(c: Mapping[str, Any]) -> int:
    """Bytes that a step must read: keys and values of the sequences, one prefix and the queries."""
    return ITEMSIZE * c["D"] * (2 * c["B"] * c["Hkv"] * c["T"] + 2 * c["Hkv"] * c["P"] + c["B"] * c["Hq"])


def bytes_read(text: str) -> dict[str, float]:
    """Bytes per kernel from ``ncu --csv --page raw --print-units base``; a kernel's launches are added."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"ncu gave no table: {text.strip()[-300:]}")
    found: dict[str, float] = {}
    for row in csv.DictReader(lines[start:]):
        if row["ID"]:  # the first row has the units
            found[row["Kernel Name"]] = found.get(row["Kernel Name"], 0.0) + float(row[METRIC].replace(",", ""))
    return found


def find_ncu() -> str | None:
    places = [str(path) for place in PLACES for path in sorted(Path("/").glob(place[1:]))]
    return shutil.which("ncu") or next(reversed(places), None)


def one_call(index: int) -> None:
    """In the child: the call, warm, between the profiler's start and stop."""
    c = CASES[index]
    shape = {name: c[name] for name in ("B", "Hq", "Hkv", "P", "D")}
    x = inputs(**shape, S=1, T=c["T"], is_causal=True, dtype=torch.bfloat16, device="cuda")
    for profiled in (False, True):
        torch.cuda.synchronize()
        if profiled:
            torch.cuda.profiler.start()
        prefix_attention(*x[:5], backend="triton")
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of results (JSON)")
    parser.add_argument("--call", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.call is not None:
        one_call(args.call)
        return []
    ncu = find_ncu()
    log = Results("dram", args.out, machine=describe("cuda" if torch.cuda.is_available() else "cpu"))
    for i, c in enumerate(CASES):
        reason = "ncu is not installed"
        log.save()  # of the cases before, should this one be the last
        if ncu:
            command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--metrics", METRIC, "--csv",
                       "--page", "raw", "--print-units", "base", sys.executable, "-m", "benchmarks.kernels.dram",
                       "--call", str(i)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            try:
                kernels = bytes_read(done.stdout)
                read = sum(kernels.values())
                log.add(c, "read", "triton", read=read, needed=needed(c), ratio=read / needed(c), kernels=kernels)
                print(f"{c}: {read / 1e6:.1f} MB read, {read / needed(c):.3f} times what is needed", flush=True)
                continue
            except (ValueError, KeyError) as error:
                reason = f"{error} {done.stderr.strip()[-300:]}"
        log.add(c, "read", "triton", reason=reason)
        print(f"{c}: not counted: {reason}", flush=True)
    log.save()
    return log.records


if __name__ == "__main__":
    main()
