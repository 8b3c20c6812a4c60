"""Decoding on a CPU, as a share of what the machine can do: the longer of bytes / read rate and FLOPs / product rate.

    python -m benchmarks.kernels.shares --processes 5

Each process measures the machine (``benchmarks.machine.ceilings``) and the kernels, on one thread. Of all processes the
fastest of each counts: what else runs on the machine makes either slower, never faster. Bytes and FLOPs are those of
``benchmarks.operator``; the cases are 64 rows with 128 keys each, and a prefix of 512 or 2048 that they share.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from benchmarks import machine, operator
from benchmarks.measure import Way, back_to_back
from benchmarks.peers import inputs, ours

CASES = [operator.step(64, 128, P, operator.GPT2, t) for t, P in product(("float32", "bfloat16"), (512, 2048))]
TARGETS = {"float32": 0.75, "bfloat16": 0.55}


def once(rounds: int) -> dict[str, Any]:
    """What this process finds: ceilings, and seconds of each case."""
    torch.set_num_threads(1)
    seconds = []
    for c in CASES:
        sizes = {name: c[name] for name in ("B", "Hq", "Hkv", "S", "T", "P", "D", "is_causal")}
        call = ours("cpu")(inputs(**sizes, dtype=getattr(torch, c["dtype"]), device="cpu")).forward
        with torch.no_grad():
            seconds.append(min(back_to_back({"": Way(lambda _, call=call: call())}, "cpu", rounds=rounds)[""]))
    return {"ceilings": machine.ceilings("cpu"), "seconds": seconds, "processor": machine.processor(),
            "instructions": machine.instruction_set()}  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: the fastest of all processes."""
    best = {name: max(one["ceilings"][name] for one in found) for name in found[0]["ceilings"]}
    rates = ", ".join(f"{name} {rate / 1e9:.0f} G/s" for name, rate in best.items())
    lines = [
        f"{found[0]['processor']}, {found[0]['instructions']}, one thread, {len(found)} processes; {rates}",
        "",
        "| dtype | P | ms | bound by | share | target |",
        "|---|---|---|---|---|---|",
    ]
    for c, *times in zip(CASES, *(one["seconds"] for one in found)):
        limit = operator.roofline(c, "decode", best)
        bound = "memory" if limit == operator.traffic(c, "decode") / best["memory"] else "products"
        share = limit / min(times)
        lines.append(
            f"| {c['dtype']} | {c['P']} | {1e3 * min(times):.2f} | {bound} | {share:.0%} | {TARGETS[c['dtype']]:.0%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5, help="one after the other (default 5)")
    parser.add_argument("--rounds", type=int, default=30, help="calls of each case in a process (default 30)")
    parser.add_argument("--once", action="store_true", help="measure in this process, and print JSON")
    args = parser.parse_args(arguments)
    if args.once:
        machine.tune_malloc(["-m", "benchmarks.kernels.shares", "--once", "--rounds", str(args.rounds)])
        print(json.dumps(once(args.rounds)))
        return
    command = [sys.executable, "-m", "benchmarks.kernels.shares", "--once", "--rounds", str(args.rounds)]
    done = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(args.processes)]
    print(table([json.loads(one.stdout) for one in done]))


if __name__ == "__main__":
    main()
