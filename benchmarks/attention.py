"""Training and prefill on a GPU: forward, backward and both, beside every peer at its best.

    useful FLOPs of a forward    4 * Hq * D * B * pairs,   pairs = S * P + (S * (S + 1) / 2 if causal else S * S)
    of a backward                2.5 times as many: five products where the forward has two. What a kernel computes
                                 twice does not count. Both: 3.5 times
    of a backward to the prefix  8 * Hq * D * B * S * P: four products, and only the prefix's columns

TFLOP/s are these over the median time. Every time is the device's own, with a cold L2 (``benchmarks.device``). Results
are compared with float64 first; a peer that is wrong is not timed. Batches have about 16 k tokens.

    python -m benchmarks.attention --what forward backward both --out results.jsonl
    python -m benchmarks.attention --device cpu --quick                tiny shapes, for the logic
    python -m benchmarks.attention --flex --budget 500                 FlexAttention tuned, on the shapes of the targets
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import Errors, errors, exact, multiple
from benchmarks.device import Budget, Log, Way, interleave, smi, spread
from benchmarks.peers import BASELINE, PEERS, SLOW_TO_PREPARE, Inputs, Ready, inputs, prepare

Case = dict[str, Any]
WHAT = ("forward", "backward", "both")
TOKENS = 16384
# A wrong mask is wrong by hundreds of times torch's rounding error. Whether ours is within twice is tests/test_gpu.py's
# to judge, and every line says it.
WRONG = 10.0


def case(S: int, P: int, D: int, Hq: int, Hkv: int, is_causal: bool, tokens: int = TOKENS) -> Case:
    return {"B": max(tokens // S, 1), "Hq": Hq, "Hkv": Hkv, "S": S, "P": P, "D": D, "is_causal": is_causal}


def grid(*, quick: bool = False, full: bool = False) -> list[Case]:
    """Cases without repetition, those of the targets first. Not ``full``: one thing varies at a time."""
    if quick:
        return [case(S, P, 16, 4, Hkv, c, 16) for S, P, Hkv, c in ((8, 4, 4, True), (8, 4, 2, False), (16, 0, 2, True))]
    both, sizes, lengths, prefixes = (False, True), (128, 64), (8192, 1024, 512, 2048, 4096), (128, 0, 16, 512)
    heads = ((16, 16), (32, 8))
    if full:
        found = [case(S, P, D, *H, c) for S, P, H, D, c in product(lengths, prefixes, heads, sizes, both)]
    else:
        found = [case(S, 128, D, 16, 16, c) for S, D, c in product(lengths[:2], sizes, both)]
        found += [case(S, 128, D, 32, 8, c) for S, D, c in product(lengths[:2], sizes[:1], both)]
        found += [case(2048, P, D, 16, 16, c) for P, D, c in product(prefixes, sizes[:1], both)]
        found += [case(S, 128, D, 16, 16, c) for S, D, c in product(lengths[2:], sizes, both)]
    return [found[i] for i in range(len(found)) if found[i] not in found[:i]]


def flex_cases() -> list[Case]:
    """Compiling and tuning takes minutes per case: the targets' shapes only."""
    return [case(S, 128, 128, 16, 16, c) for S, c in product((8192, 1024), (False, True))]


def flops(c: Mapping[str, Any], what: str, *, frozen: bool = False) -> float:
    """Useful floating-point operations; see the module."""
    B, Hq, S, P, D = (c[name] for name in ("B", "Hq", "S", "P", "D"))
    pairs = S * P + (S * (S + 1) / 2 if c["is_causal"] else S * S)
    forward = 4 * B * Hq * D * pairs
    backward = 8 * B * Hq * D * S * P if frozen else 2.5 * forward
    return {"forward": forward, "backward": backward, "both": forward + backward}[what]


def way(peer: Ready, what: str) -> Way:
    """What of the peer's call is timed."""

    @contextmanager
    def context() -> Iterator[None]:
        with peer.context(), torch.set_grad_enabled(what != "forward"):
            yield

    if what == "backward":
        return Way(peer.backward, setup=peer.forward, context=context)
    if what == "both":
        return Way(lambda _: peer.backward(peer.forward()), context=context)
    return Way(lambda _: peer.forward(), context=context)


def verified(
    ready: dict[str, Ready], reasons: dict[str, str], x: Inputs, *, gradients: bool
) -> tuple[dict[str, Errors], dict[str, float]]:
    """Errors of each peer, and as multiples of torch's own. A wrong peer moves from ``ready`` to ``reasons``."""
    truth = exact(x, gradients=gradients)
    found: dict[str, Errors] = {}
    for name, peer in ready.items():
        found[name] = errors(peer, truth)
    baseline = found.get(BASELINE, {})
    multiples = {n: multiple(of, baseline) for n, of in found.items() if set(of) <= set(baseline)}
    for name, ratio in multiples.items():
        if not ratio <= WRONG:
            del ready[name]
            reasons[name] = f"wrong, so not timed: {ratio:.3g} times the error of {BASELINE!r}"
    return found, multiples


def measure(c: Case, kinds: Sequence[str], names: Sequence[str], log: Log, device: str, rounds: int) -> None:
    """One case: prepare, verify, time, write."""
    dtype, gradients = torch.bfloat16, tuple(kinds) != ("forward",)
    shape = {name: c[name] for name in ("B", "Hq", "Hkv", "S", "P", "D", "is_causal")}
    x = inputs(**shape, T=c["S"], dtype=dtype, device=device)
    ready, reasons = prepare(names, x, gradients=gradients)
    found, multiples = verified(ready, reasons, x, gradients=gradients)
    if device == "cuda":
        torch.cuda.empty_cache()
    c = c | {"dtype": "bfloat16", "on": device}
    for what in kinds:
        timed = {n: p for n, p in ready.items() if what != "forward" or not n.endswith("frozen")}
        samples = interleave({n: way(p, what) for n, p in timed.items()}, device, rounds=rounds)
        state = smi() if device == "cuda" else {}
        for name, seconds in samples.items():
            row = spread(seconds)
            rate = flops(c, what, frozen=name.endswith("frozen")) / (row["median"] or 1) / 1e12
            accuracy = {"errors": found[name], "error_multiple": multiples.get(name)}
            log.add(c, what, name, seconds=seconds, **row, tflops=rate, **accuracy, smi=state)
        for name, reason in reasons.items():
            log.add(c, what, name, reason=reason)
        shown = log.records[-len(samples) - len(reasons) :]
        print(table(c, what, shown, reasons=what == kinds[0]), flush=True)


def table(c: Mapping[str, Any], what: str, records: Sequence[Mapping[str, Any]], *, reasons: bool = True) -> str:
    """The records of one case as text, the fastest first, then the reasons of those that did not run."""
    lines = [f"\n{what}  " + " ".join(f"{name}={value}" for name, value in c.items())]
    lines.append(f"  {'':20}{'median us':>11}{'IQR us':>9}{'TFLOP/s':>10}{'error x':>9}")
    timed = sorted((r for r in records if "seconds" in r), key=lambda r: r["median"])
    for r in timed:
        error = "?" if r["error_multiple"] is None else f"{r['error_multiple']:.2f}"
        iqr = 1e6 * (r["iqr"] or 0)
        lines.append(f"  {r['way']:20}{1e6 * r['median']:11.1f}{iqr:9.1f}{r['tflops']:10.2f}{error:>9}")
    if reasons:
        lines += [f"  {r['way']:20} -- {r['reason']}" for r in records if "reason" in r]
    return "\n".join(lines)


def sweep(cases: Sequence[Case], run: Callable[[Case], None], log: Log, budget: Budget) -> None:
    """Runs the cases while there is time, and says which are left."""
    left = list(cases)
    while left and not budget.spent():
        run(left.pop(0))
    for c in left:
        log.add(c, "left out", "", reason="the time was up")
    if left:
        print(f"\nthe time was up: {len(left)} of {len(cases)} cases left out", flush=True)


def options(description: str) -> argparse.ArgumentParser:
    """What every sweep asks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--full", action="store_true", help="the whole product of shapes")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too, on the shapes of the targets")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: all but the slow to prepare and eager")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each peer")
    parser.add_argument("--budget", type=float, help="seconds after which no new case begins")
    return parser


def chosen(args: argparse.Namespace) -> list[str]:
    """Names of the peers."""
    if args.peers:
        return args.peers
    slow = () if args.flex or args.quick else SLOW_TO_PREPARE
    return [name for name in PEERS if name not in (*slow, "eager")]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = options(__doc__ or "")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    args = parser.parse_args(arguments)
    log = Log("attention", args.out)
    cases = flex_cases() if args.flex else grid(quick=args.quick, full=args.full)
    names = chosen(args)
    sweep(cases, lambda c: measure(c, args.what, names, log, args.device, args.rounds), log, Budget(args.budget))
    return log.records


if __name__ == "__main__":
    main()
