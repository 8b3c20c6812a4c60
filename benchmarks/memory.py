"""The memory suite: peak allocation against B and P. Is it flat in B * P?

Both parts cover every combination of some batches and prefix lengths. The operator, forward and forward + backward
("both"):

    extra    peak allocation minus what every way must have: the five inputs, the output and, with a backward, their
             gradients. If a peer was given a concatenation, it counts as the peer's

Whole models, one training step and decoding: peak allocation minus what was allocated before.

    growth   the part that needs both B and P, per row and prefix position, in copies of the prefix:
             (extra(B2, P2) - extra(B1, P2) - extra(B2, P1) + extra(B1, P1)) / (copy * (B2 - B1) * (P2 - P1))
             1 = a copy of the prefix per row; "flat" = less than 0.02. B1 < B2 are the largest two batches, P1 and P2
             the smallest and the largest prefix; what grows with P alone (partial sums of its gradient) cancels

Only torch's allocations count: on a GPU its allocator's peak, on a CPU those that its profiler reports.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from benchmarks.peers import FIVE, PEERS, Inputs, chosen, inputs, prepare
from benchmarks.results import Case, Record, Results

FLAT = 0.02
WHAT = ("forward", "both")


def grid(device: str, name: str = "default") -> list[tuple[Case, str]]:
    """Batches and prefixes. The sequence is short, so a copy of the prefix per row would dominate."""
    if name == "quick":
        shape, axes = {"Hq": 4, "Hkv": 2, "S": 8, "D": 16}, ((16, 32), (512, 1536))
    elif device == "cuda":
        shape, axes = {"Hq": 32, "Hkv": 8, "S": 256, "D": 128}, ((1, 16, 64), (0, 128, 512))
    else:
        shape, axes = {"Hq": 12, "Hkv": 12, "S": 64, "D": 64}, ((1, 16, 64), (0, 128, 512, 2048))
    dtype = "bfloat16" if device == "cuda" else "float32"
    return [({"B": B, "P": P, **shape, "dtype": dtype}, what) for B, P in product(*axes) for what in WHAT]


def unavoidable(x: Inputs, *, gradients: bool) -> int:
    """Bytes that every way must allocate in addition to its inputs."""
    sizes = {name: t.numel() * t.itemsize for name in (*FIVE, "grad") for t in [getattr(x, name)]}
    return sizes["grad"] + gradients * sum(sizes.values())


def peak(run: Callable[[], Any], device: str) -> int:
    """Peak bytes allocated during ``run``, its results included, minus those allocated before."""
    gc.collect()  # what earlier calls left would be freed meanwhile, and counted against this one
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
    """Bytes that the peer needs beyond inputs and results, or the reason why it does not run."""
    gradients = what == "both"
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    ready, reasons, _ = prepare({name: PEERS[name]}, x, gradients=gradients)
    if name not in ready:
        return reasons[name]
    peer = ready[name]
    if gradients and not peer.leaves:
        return "has no backward"
    if device == "cuda":
        buffers = torch.cuda.memory_allocated() - before
    else:
        given = {getattr(x, name).untyped_storage().data_ptr() for name in FIVE}
        own = [t for t in (*peer.leaves.values(), *peer.buffers, peer.upstream) if t is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
        buffers = sum(size for pointer, size in storages.items() if pointer not in given)

    def run() -> Any:
        with peer.context(), torch.set_grad_enabled(gradients):
            out = peer.forward()
            return peer.backward(out) if gradients else out

    run()
    return buffers + peak(run, device) - unavoidable(x, gradients=gradients)


def growth(extras: Mapping[tuple[int, int], float], copy: float) -> float:
    """The growth defined above. ``extras`` is by (B, P); a copy of the prefix takes ``copy`` bytes a position."""
    batches, prefixes = (sorted({key[i] for key in extras}) for i in (0, 1))
    (B1, B2), (P1, P2) = batches[-2:], (prefixes[0], prefixes[-1])
    mixed = extras[B2, P2] - extras[B1, P2] - extras[B2, P1] + extras[B1, P1]
    return mixed / (copy * (B2 - B1) * (P2 - P1))


def measure(c: Case, kinds: Sequence[str], results: Results, device: str, peers: Sequence[str] | None) -> None:
    """Every peer on one case."""
    shape = {name: c[name] for name in ("B", "Hq", "Hkv", "S", "P", "D")}
    dtype = getattr(torch, c["dtype"])
    x = inputs(**shape, T=c["S"], is_causal=True, dtype=dtype, device=device)
    copy = 2 * c["Hkv"] * c["D"] * dtype.itemsize
    for what, name in product(kinds, chosen(device, peers)):
        if device == "cuda":
            torch.cuda.empty_cache()
        found = extra(name, x, what, device)
        values: dict[str, Any] = {"reason": found} if isinstance(found, str) else {"extra": found, "copy": copy}
        results.add(c | {"on": device}, what, name, **values)
    print(f"{c['B']} x {c['P']}", flush=True)


def rectangles(records: Sequence[Record]) -> dict[tuple[Any, ...], dict[tuple[int, int], float]]:
    """Extra bytes by (B, P) for each (what, rest of the case, way, bytes of a copy)."""
    found: dict[tuple[Any, ...], dict[tuple[int, int], float]] = {}
    for r in records:
        if "extra" in r:
            rest = tuple((name, value) for name, value in r["case"].items() if name not in ("B", "P"))
            found.setdefault((r["what"], rest, r["way"], r["copy"]), {})[r["case"]["B"], r["case"]["P"]] = r["extra"]
    return found


def complete(extras: Mapping[tuple[int, int], float]) -> bool:
    """Whether at least two batches were each measured with the same prefixes, at least two."""
    batches, prefixes = ({key[i] for key in extras} for i in (0, 1))
    return min(len(batches), len(prefixes)) > 1 and len(extras) == len(batches) * len(prefixes)


def verdict(records: Sequence[Record]) -> str:
    """One line per way with its extra memory at each B and P and its growth; then the peers without, with reasons."""
    lines = []
    for (what, _, name, copy), extras in rectangles(records).items():
        sizes = "  ".join(f"{B}x{P}: {size / 1e6:.1f}" for (B, P), size in sorted(extras.items()))
        if complete(extras):
            rate = growth(extras, copy)
            sizes += f"  growth {rate:.3f}" + (", flat" if rate < FLAT else "")
        lines.append(f"{what:8} {name:20} MB at BxP  {sizes}")
    reasons = {r["way"]: r["reason"] for r in records if "reason" in r and r["way"]}
    return "\n".join(lines + [f"{name:20} -- {reason}" for name, reason in reasons.items()])
