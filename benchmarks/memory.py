"""Peak memory of a forward and of a forward and backward, against B and P: is it flat in B * P?

extra    the most that was allocated at once, less what every way must have: the five inputs, the output and, with a
         backward, its gradient and theirs. A concatenation that a peer was handed counts as the peer's
growth   what B and P add only together, per row and prefix position, over what a copy would take:
         (extra(B2, P2) - extra(B1, P2) - extra(B2, P1) + extra(B1, P1))
             / (itemsize * 2 * Hkv * D * (B2 - B1) * (P2 - P1))
         1 = a copy of the prefix per row. "flat" = less than 0.02. B1 < B2 are the largest two batches, P1 and P2
         the smallest and the largest prefix; what grows with P alone (partial sums of its gradient) cancels

python -m benchmarks.memory --out results.jsonl
python -m benchmarks.memory --device cpu --quick       tiny shapes; torch's profiler counts the allocations
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from benchmarks.attention import Case, chosen, options, sweep
from benchmarks.device import Budget, Log
from benchmarks.peers import FIVE, Inputs, inputs, prepare

FLAT = 0.02
WHAT = ("forward", "both")


def grid(*, quick: bool = False) -> list[Case]:
    """Batches and prefixes; the sequence is short, so that a copy of the prefix per row would be most of it."""
    if quick:
        return [{"B": B, "Hq": 4, "Hkv": 2, "S": 8, "P": P, "D": 16} for B, P in product((2, 8), (512, 1536))]
    return [{"B": B, "Hq": 32, "Hkv": 8, "S": 256, "P": P, "D": 128} for B, P in product((1, 16, 64), (0, 128, 512))]


def unavoidable(x: Inputs, *, gradients: bool) -> int:
    """Bytes of what every way must have beside its inputs."""
    assert x.grad is not None
    sizes = {name: t.numel() * t.itemsize for name in (*FIVE, "grad") for t in [getattr(x, name)]}
    return sizes["grad"] + gradients * sum(sizes.values())


def peak(run: Callable[[], Any], device: str) -> int:
    """The most bytes that ``run`` had allocated at once above what was allocated before, its results included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    now = most = 0
    assert found.profiler is not None and found.profiler.kineto_results is not None
    events: list[Any] = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def extra(name: str, x: Inputs, what: str, device: str) -> int | str:
    """Bytes that the peer needs beyond inputs and results, or why it does not run."""
    gradients = what == "both"
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    ready, reasons = prepare([name], x, gradients=gradients)
    if name not in ready:
        return reasons[name]
    peer = ready[name]
    if device == "cuda":
        buffers = torch.cuda.memory_allocated() - before
    else:
        given = {getattr(x, name).untyped_storage().data_ptr() for name in FIVE}
        own = [t for t in (*peer.leaves.values(), peer.upstream) if t is not None]
        buffers = sum(t.numel() * t.itemsize for t in own if t.untyped_storage().data_ptr() not in given)

    def run() -> Any:
        with peer.context(), torch.set_grad_enabled(gradients):
            out = peer.forward()
            return peer.backward(out) if gradients else out

    run()
    return buffers + peak(run, device) - unavoidable(x, gradients=gradients)


def growth(extras: Mapping[tuple[int, int], int], Hkv: int, D: int, itemsize: int = 2) -> float:
    """What B and P add only together, in copies of the prefix; ``extras`` are by (B, P). See the module."""
    batches, prefixes = (sorted({key[i] for key in extras}) for i in (0, 1))
    (B1, B2), (P1, P2) = batches[-2:], (prefixes[0], prefixes[-1])
    mixed = extras[B2, P2] - extras[B1, P2] - extras[B2, P1] + extras[B1, P1]
    return mixed / (itemsize * 2 * Hkv * D * (B2 - B1) * (P2 - P1))


def measure(c: Case, names: Sequence[str], log: Log, device: str) -> None:
    """Every peer on one case."""
    shape = {name: c[name] for name in ("B", "Hq", "Hkv", "S", "P", "D")}
    x = inputs(**shape, T=c["S"], is_causal=True, dtype=torch.bfloat16, device=device)
    for what, name in product(WHAT, names):
        if device == "cuda":
            torch.cuda.empty_cache()
        found = extra(name, x, what, device)
        log.add(c | {"on": device}, what, name, **({"reason": found} if isinstance(found, str) else {"extra": found}))


def verdict(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per way that ran every case: its extra memory at each B and P, and its growth."""
    lines = []
    ways = dict.fromkeys((r["what"], r["way"]) for r in records if "extra" in r)
    cases = {(r["case"]["B"], r["case"]["P"]) for r in records if "case" in r and "B" in r["case"]}
    for what, name in ways:
        mine = [r for r in records if (r["what"], r["way"]) == (what, name) and "extra" in r]
        extras = {(r["case"]["B"], r["case"]["P"]): r["extra"] for r in mine}
        sizes = "  ".join(f"{B}x{P}: {size / 1e6:.1f}" for (B, P), size in sorted(extras.items()))
        if extras.keys() == cases:
            rate = growth(extras, mine[0]["case"]["Hkv"], mine[0]["case"]["D"])
            sizes += f"  growth {rate:.3f}" + (", flat" if rate < FLAT else "")
        lines.append(f"{what:8} {name:20} MB at BxP  {sizes}")
    reasons = {r["way"]: r["reason"] for r in records if "reason" in r and r["way"]}
    return "\n".join(lines + [f"{name:20} -- {reason}" for name, reason in reasons.items()])


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = options(__doc__ or "").parse_args(arguments)
    log, names = Log("memory", args.out), [name for name in chosen(args) if not name.endswith("frozen")]
    run: Callable[[Case], None] = lambda c: measure(c, names, log, args.device)
    sweep(grid(quick=args.quick), run, log, Budget(args.budget))
    print(verdict(log.records))
    return log.records


if __name__ == "__main__":
    main()
