"""Decoding on a GPU: one query per row, beside every peer at its best.

    bytes that a step must move    itemsize * (2 * B * Hkv * S * D  +  2 * Hkv * P * D  +  2 * B * Hq * D)
                                   keys and values of the sequences, one prefix, queries and output

GB/s are these over the median time, and are given as a percentage of what a large copy reached in the same run. Four
columns: the replay of a CUDA graph with a cold L2 (a 256 MiB buffer is overwritten between replays, as Hydragen's
benchmark does), which is the kernels' time; the call from Python, one after the other with a warm L2; and the number of
kernels, copies and fills that a call launches. Results are compared with float64 first.

    python -m benchmarks.decode --out results.jsonl
    python -m benchmarks.decode --device cpu --quick       tiny shapes, for the logic
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from benchmarks.attention import Case, chosen, options, sweep, verified, way
from benchmarks.device import (
    Budget,
    Log,
    Way,
    captured,
    copy_bandwidth,
    eager,
    free_bytes,
    interleave,
    launches,
    smi,
    spread,
)
from benchmarks.peers import inputs, prepare

ITEMSIZE = 2  # bfloat16
CALLS = 20


def case(B: int, S: int, P: int, Hq: int = 32, Hkv: int = 8, D: int = 128) -> Case:
    return {"B": B, "Hq": Hq, "Hkv": Hkv, "S": S, "P": P, "D": D}


def grid(*, quick: bool = False, full: bool = False) -> list[Case]:
    """Cases without repetition, those of the targets first. Not ``full``: one thing varies at a time."""
    if quick:
        return [case(2, 16, P, 4, Hkv, 16) for P, Hkv in ((0, 4), (16, 2), (5, 1))]
    batches, lengths, prefixes = (256, 64, 1, 8, 32, 128), (512, 2048, 8192, 128), (128, 0, 512, 16, 64, 256, 2048)
    heads, sizes = ((32, 8), (32, 32), (8, 1)), (128, 64)
    if full:
        return [case(B, S, P, *H, D) for H, D, S, P, B in product(heads, sizes, lengths, prefixes, batches)]
    found = [case(256, 512, P) for P in prefixes]
    found += [case(B, S, 128) for S, B in product(lengths[1:3], batches[:2])]
    found += [case(B, S, 0) for S, B in product(lengths[:2], batches[:4])]
    found += [case(B, S, 128) for S, B in product(lengths, batches)]
    found += [case(B, 2048, 128, *H, D) for H, D, B in product(heads, sizes, (64, 8))]
    return [found[i] for i in range(len(found)) if found[i] not in found[:i]]


def flex_cases() -> list[Case]:
    """Compiling and tuning takes minutes per case: few."""
    return [case(256, 512, 512), case(64, 2048, 128), case(8, 2048, 128)]


def unique_bytes(c: Mapping[str, Any], itemsize: int = ITEMSIZE) -> int:
    """Bytes that a step must move; see the module."""
    B, Hq, Hkv, S, P, D = (c[name] for name in ("B", "Hq", "Hkv", "S", "P", "D"))
    return itemsize * D * (2 * B * Hkv * S + 2 * Hkv * P + 2 * B * Hq)


def needed_bytes(c: Mapping[str, Any], itemsize: int = ITEMSIZE) -> int:
    """About what a case allocates: inputs, concatenation, two copies of ``cat + sdpa``; one key head in float64."""
    B, Hkv, S, P, D = (c[name] for name in ("B", "Hkv", "S", "P", "D"))
    whole = 2 * B * Hkv * (S + P) * D
    return 4 * whole * itemsize + 3 * whole // Hkv * 8


def replays(ways: Mapping[str, Way]) -> tuple[dict[str, Way], dict[str, str]]:
    """Each call as a graph's replay, and why a call could not be captured."""
    found: dict[str, Way] = {}
    reasons: dict[str, str] = {}
    for name, call in ways.items():
        try:
            replay = captured(call)
            found[name] = Way(lambda _, replay=replay: replay())
        except Exception as error:  # what a peer raises under capture is its result
            reasons[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return found, reasons


def counted(call: Way) -> list[str] | None:
    """The launches of a call; None where the profiler cannot tell."""
    if not torch.cuda.is_available():
        return None
    try:
        return launches(call)
    except RuntimeError:
        return None


def measure(c: Case, names: Sequence[str], log: Log, device: str, rounds: int, ceiling: float) -> None:
    """One case: prepare, verify, time, write."""
    c = c | {"dtype": "bfloat16", "on": device}
    free, needed = free_bytes(device), needed_bytes(c)
    if needed > 0.95 * free:
        log.add(c, "left out", "", reason=f"needs up to {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
        print(f"\n{c}\n  {log.records[-1]['reason']}", flush=True)
        return
    shape = {name: c[name] for name in ("B", "Hq", "Hkv", "P", "D")}
    x = inputs(**shape, S=1, T=c["S"], is_causal=True, dtype=torch.bfloat16, device=device)
    ready, reasons = prepare([n for n in names if not n.endswith("frozen")], x, gradients=False)
    found, multiples = verified(ready, reasons, x, gradients=False)
    ways = {name: way(peer, "forward") for name, peer in ready.items()}
    called = eager(ways, rounds=max(rounds // 6, 1), calls=CALLS if device == "cuda" else 1)
    replayed, uncaptured = replays(ways)
    samples = interleave(replayed, device, rounds=rounds)
    state = smi() if device == "cuda" else {}
    begin = len(log.records)
    for name in ready:
        accuracy = {"errors": found[name], "error_multiple": multiples.get(name)}
        kernels = counted(ways[name])
        count = None if kernels is None else len(kernels)
        log.add(c, "eager", name, seconds=called[name], **spread(called[name]), launches=count, kernels=kernels)
        if name in samples:
            row: dict[str, Any] = spread(samples[name])
            rate = unique_bytes(c) / row["median"]
            row |= {"bytes_per_second": rate, "of_copy": rate / ceiling, "copy": ceiling, "launches": count}
            log.add(c, "graph", name, seconds=samples[name], **row, **accuracy, smi=state)
    for name, reason in (reasons | uncaptured).items():
        log.add(c, "graph", name, reason=reason)
    print(table(c, log.records[begin:]), flush=True)


def table(c: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The records of one case as text, the fastest replay first, then the reasons."""
    lines = ["\n" + " ".join(f"{name}={value}" for name, value in c.items())]
    heads = ("graph us", "IQR us", "eager us", "launches", "GB/s", "of copy", "error x")
    lines.append(f"  {'':20}" + "".join(f"{head:>10}" for head in heads))
    calls = {r["way"]: r for r in records if r["what"] == "eager"}
    for r in sorted((r for r in records if r["what"] == "graph" and "seconds" in r), key=lambda r: r["median"]):
        count, error = r["launches"], r["error_multiple"]
        lines.append(
            f"  {r['way']:20}{1e6 * r['median']:10.1f}{1e6 * (r['iqr'] or 0):10.1f}"
            f"{1e6 * calls[r['way']]['median']:10.1f}{'?' if count is None else count:>10}"
            f"{r['bytes_per_second'] / 1e9:10.0f}{r['of_copy']:10.1%}{'?' if error is None else f'{error:.2f}':>10}"
        )
    lines += [f"  {r['way']:20} -- {r['reason']}" for r in records if "reason" in r]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = options(__doc__ or "").parse_args(arguments)
    log, names, device = Log("decode", args.out), chosen(args), args.device
    ceiling = copy_bandwidth(device) if device == "cuda" else copy_bandwidth(device, 1 << 20, 3)
    log.add({"on": device}, "copy", "torch", bytes_per_second=ceiling)
    print(f"copy: {ceiling / 1e9:.0f} GB/s, read plus written")
    cases = flex_cases() if args.flex else grid(quick=args.quick, full=args.full)
    run: Callable[[Case], None] = lambda c: measure(c, names, log, device, args.rounds, ceiling)
    sweep(cases, run, log, Budget(args.budget))
    return log.records


if __name__ == "__main__":
    main()
