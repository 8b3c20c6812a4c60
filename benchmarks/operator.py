"""The operator suite: one attention call over [prefix ; sequence], compared with every peer.

    forward, prefill    4 * Hq * D * B * pairs useful FLOPs; pairs = S * P + visible pairs of the sequence. Prefill is a
                        forward of one long row
    decode              a forward with one query per row
    backward            2.5 times a forward: five products instead of two; recomputation does not count
    both                3.5 times: forward and backward
    prefix-only         8 * Hq * D * B * S * P: a backward to the prefix alone; four products

Bytes count inputs and results once. The roofline of a case is the larger of two times: its FLOPs over the rate of a
large product, and its bytes over the rate of a large read (on a GPU: copy). Both rates are measured in the same run.
Data that stays in a cache can be faster than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch

from benchmarks.accuracy import Errors, errors, exact, multiple
from benchmarks.machine import clocks, free_bytes
from benchmarks.measure import Way, back_to_back, captured, interleave, launches, spread
from benchmarks.peers import (
    BASELINE,
    FIVE,
    PREFIX,
    SCORES,
    STORES_SCORES,
    Inputs,
    Ready,
    chosen,
    inputs,
    prepare,
)
from benchmarks.results import Case, Plan, Record, Results
from prefix_attn import explain

BACKWARD = ("backward", "both")
WITH_GRADIENTS = (*BACKWARD, "prefix-only")
TRAINING = ("forward", *WITH_GRADIENTS)
TOKENS = 16384  # of a batch on a GPU
PREFIXES = (0, 1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FEW = (0, 16, 128, 512, 2048)
GPT2, SMOLLM2, LLAMA = (12, 12, 64), (9, 3, 64), (32, 8, 128)  # query heads, key heads, head size
# A peer is wrong if its error is this many times torch's own. A wrong mask gives hundreds of times in half precision,
# and 1e5 times in float32, where another order of summation gives ten. Every record has its multiple.
WRONG = {torch.float32: 100.0, torch.bfloat16: 10.0}
EAGER_CALLS = 20


def case(
    B: int, S: int, T: int, P: int, heads: tuple[int, int, int], dtype: str = "float32", *, is_causal: bool = True
) -> Case:
    """``heads``: query heads, key heads, head size."""
    Hq, Hkv, D = heads
    return {"B": B, "Hq": Hq, "Hkv": Hkv, "S": S, "T": T, "P": P, "D": D, "is_causal": is_causal, "dtype": dtype}


def step(B: int, T: int, P: int, heads: tuple[int, int, int] = LLAMA, dtype: str = "bfloat16") -> Case:
    """Decoding: one query per row, over T keys."""
    return case(B, 1, T, P, heads, dtype)


def batch(S: int, P: int, heads: tuple[int, int, int], *, is_causal: bool = True) -> Case:
    """Training on a GPU, with ``TOKENS`` tokens in the batch."""
    return case(max(TOKENS // S, 1), S, S, P, heads, "bfloat16", is_causal=is_causal)


def grid(device: str, name: str = "default") -> Plan:
    """Distinct (case, what) pairs. ``name``: default, quick (tiny), full (every combination), flex (a few)."""
    if device == "cuda":
        makers = {"default": _on_gpu, "quick": _tiny, "flex": _flex_on_gpu, "full": _all_on_gpu}
    else:
        makers = {"default": _on_cpu, "quick": _tiny, "flex": _flex_on_cpu, "full": _all_on_cpu}
    return list({(*sorted(c.items()), what): (c, what) for c, what in makers[name]()}.values())


def _on_cpu() -> Iterator[tuple[Case, str]]:
    """Varies one dimension at a time, plus two for the heat maps. At most ten minutes on two cores."""
    half = "bfloat16"
    for P in PREFIXES:
        yield step(64, 128, P, GPT2, "float32"), "decode"
        yield from ((case(8, 128, 128, P, GPT2), what) for what in TRAINING if P or what != "prefix-only")
    for P in FEW:
        yield step(64, 128, P, GPT2, half), "decode"
        yield case(8, 128, 128, P, GPT2, half), "both"
        yield from ((case(1, 1024, 1024, P, GPT2, dtype), "prefill") for dtype in ("float32", half))
    for P, B in product(FEW, (1, 4, 16)):
        yield step(B, 128, P, GPT2, "float32"), "decode"
    for P, S in product(FEW, (32, 512)):
        yield case(1024 // S, S, S, P, GPT2), "both"
    for P, heads in product((16, 512), (SMOLLM2, LLAMA)):
        yield step(16, 128, P, heads, "float32"), "decode"
        yield case(4, 128, 128, P, heads), "both"
    for T in (512, 2048):
        yield step(16, T, 128, GPT2, "float32"), "decode"


def _all_on_cpu() -> Iterator[tuple[Case, str]]:
    for P, heads, dtype in product(PREFIXES, (GPT2, SMOLLM2, LLAMA), ("float32", "bfloat16")):
        for B, T in product((1, 4, 16, 64), (128, 512, 2048)):
            yield step(B, T, P, heads, dtype), "decode"
        for B, S in ((8, 32), (8, 128), (2, 512)):
            yield from ((case(B, S, S, P, heads, dtype), what) for what in TRAINING if P or what != "prefix-only")
        for S in (512, 1024, 2048):
            yield case(1, S, S, P, heads, dtype), "prefill"


def _on_gpu() -> Iterator[tuple[Case, str]]:
    """Cases with a performance target come first."""
    square, wide = (16, 16, 128), (16, 16, 64)
    causal = (False, True)
    training = [batch(S, 128, H, is_causal=c) for S, H, c in product((8192, 1024), (square, wide), causal)]
    training += [batch(S, 128, LLAMA, is_causal=c) for S, c in product((8192, 1024), causal)]
    training += [batch(2048, P, square, is_causal=c) for P, c in product((128, 0, 16, 512), causal)]
    training += [batch(S, 128, H, is_causal=c) for S, H, c in product((512, 2048, 4096), (square, wide), causal)]
    yield batch(1024, 128, square), "prefix-only"
    yield from product(training, ("forward", *BACKWARD))
    yield from ((step(256, 512, P), "decode") for P in (128, 0, 512, 16, 64, 256, 2048))
    yield from ((step(B, T, 128), "decode") for T, B in product((2048, 8192), (256, 64)))
    yield from ((step(B, T, 0), "decode") for T, B in product((512, 2048), (256, 64, 1, 8)))
    yield from ((step(B, T, 128), "decode") for T, B in product((512, 2048, 8192, 128), (256, 64, 1, 8, 32, 128)))
    heads = [(*H, D) for H, D in product(((32, 8), (32, 32), (8, 1)), (128, 64))]
    yield from ((step(B, 2048, 128, H), "decode") for H, B in product(heads, (64, 8)))


def _all_on_gpu() -> Iterator[tuple[Case, str]]:
    heads = [(*H, D) for H, D in product(((16, 16), (32, 8), (32, 32), (8, 1)), (128, 64))]
    for S, P, H, c in product((8192, 1024, 512, 2048, 4096), PREFIXES, heads, (False, True)):
        yield from ((batch(S, P, H, is_causal=c), what) for what in TRAINING if P or what != "prefix-only")
    for H, T, P, B in product(heads, (512, 2048, 8192, 128), PREFIXES, (256, 64, 1, 8, 32, 128)):
        yield step(B, T, P, H), "decode"


def _flex_on_cpu() -> Iterator[tuple[Case, str]]:
    """Two cases, as compiling FlexAttention takes half a minute each. The other grids have no P of 100."""
    yield case(8, 128, 128, 100, GPT2), "forward"
    yield case(1, 1024, 1024, 100, GPT2), "prefill"


def _flex_on_gpu() -> Iterator[tuple[Case, str]]:
    """Few cases, as compiling and tuning FlexAttention takes minutes each."""
    cases = [batch(S, 128, (16, 16, 128), is_causal=c) for S, c in product((8192, 1024), (False, True))]
    yield from product(cases, ("forward", *BACKWARD))
    yield from ((step(B, T, P), "decode") for B, T, P in ((256, 512, 512), (64, 2048, 128), (8, 2048, 128)))


def _tiny() -> Iterator[tuple[Case, str]]:
    """Tiny shapes that exercise the logic. P varies for the pictures."""
    for P in (0, 5, 16):
        yield step(2, 16, P, (4, 2, 16)), "decode"
    yield step(2, 8, 4, (4, 1, 16), "float32"), "decode"
    for P, Hkv, c in ((4, 4, True), (4, 2, False), (0, 2, True)):
        yield from ((case(2, 8, 8, P, (4, Hkv, 16), "bfloat16", is_causal=c), w) for w in ("forward", *BACKWARD))
    yield case(2, 8, 8, 4, (4, 2, 16)), "prefix-only"
    yield case(1, 16, 16, 4, (4, 2, 16)), "prefill"


# Arithmetic -----------------------------------------------------------------------------------------------------------


def flops(c: Mapping[str, Any], what: str) -> float:
    """Useful floating-point operations; see the module."""
    B, Hq, S, T, P, D = (c[name] for name in ("B", "Hq", "S", "T", "P", "D"))
    own = S * T - (S * (S - 1) / 2 if c["is_causal"] else 0)
    forward = 4.0 * B * Hq * D * (S * P + own)
    prefix_only = 8.0 * B * Hq * D * S * P
    return {"backward": 2.5 * forward, "both": 3.5 * forward, "prefix-only": prefix_only}.get(what, forward)


def traffic(c: Mapping[str, Any], what: str) -> float:
    """Bytes of inputs and results, each counted once; in training, of the log-sum-exp too."""
    B, Hq, Hkv, S, T, P, D = (c[name] for name in ("B", "Hq", "Hkv", "S", "T", "P", "D"))
    item = getattr(torch, c["dtype"]).itemsize
    query, lse = item * B * Hq * S * D, 4 * B * Hq * S
    own, prefix = 2 * item * B * Hkv * T * D, 2 * item * Hkv * P * D
    forward = 2 * query + own + prefix
    backward = 4 * query + 2 * (own + prefix) + lse  # query, output, its gradient, and query's
    if what in ("decode", "prefill"):
        return forward
    prefix_only = 3 * query + lse + 2 * prefix
    return {"forward": forward + lse, "backward": backward, "prefix-only": prefix_only}.get(
        what, forward + lse + backward
    )


def roofline(c: Mapping[str, Any], what: str, ceilings: Mapping[str, float]) -> float:
    """Seconds. Half precision counts at the faster of its rate and float32's: kernels may compute in either."""
    rate = max(ceilings["float32"], ceilings[c["dtype"]])
    return max(flops(c, what) / rate, traffic(c, what) / ceilings["memory"])


def needed_bytes(c: Mapping[str, Any]) -> float:
    """About what decoding allocates: inputs, concatenation, the two copies of ``cat + sdpa``, one head in float64."""
    whole = 2.0 * c["B"] * c["Hkv"] * (c["T"] + c["P"]) * c["D"]
    return 4 * whole * getattr(torch, c["dtype"]).itemsize + 3 * whole / c["Hkv"] * 8


# Running --------------------------------------------------------------------------------------------------------------


class RunOptions(NamedTuple):
    """What the command line says about a run of the operator suite."""

    device: str
    rounds: int
    seconds: float  # of sampling per case and what
    ceilings: dict[str, float]
    peers: list[str] | None = None  # None: all that are worth their time here


def grouped(plan: Plan) -> list[tuple[Case, list[str]]]:
    """Groups the plan by tensors: what is done with the same ones runs together."""
    groups: dict[tuple[Any, ...], tuple[Case, list[str]]] = {}
    for c, what in plan:
        share = what if what in ("prefix-only", "decode", "prefill") else ""
        groups.setdefault((share, *sorted(c.items())), (c, []))[1].append(what)
    return list(groups.values())


def measure(c: Case, kinds: Sequence[str], results: Results, options: RunOptions) -> None:
    """Prepares, verifies, times and records one case."""
    device, gradients = options.device, any(what in WITH_GRADIENTS for what in kinds)
    labelled = c | {"on": device}
    if device == "cuda" and needed_bytes(c) > 0.95 * free_bytes(device):
        for what in kinds:
            results.add(labelled, what, "", reason=f"needs up to {needed_bytes(c) / 1e9:.0f} GB")
        return
    x = inputs(**{n: c[n] for n in ("B", "Hq", "Hkv", "S", "T", "P", "D", "is_causal")},
               dtype=getattr(torch, c["dtype"]), device=device)  # fmt: skip
    x = x._replace(wanted=PREFIX if "prefix-only" in kinds else FIVE)
    scores = 4 * c["B"] * c["Hq"] * c["S"] * (c["P"] + c["T"])
    too_large = not options.peers and scores > SCORES
    peers = {n: p for n, p in chosen(device, options.peers).items() if not (too_large and n in STORES_SCORES)}
    ready, reasons, seconds = prepare(peers, x, gradients=gradients)
    if too_large and device == "cpu":
        reasons |= dict.fromkeys(STORES_SCORES, f"stores {scores >> 20} MiB of scores: not run unless named")
    found, multiples = verified(ready, reasons, x, gradients=gradients)
    automatic = explain(*x[:5], is_causal=x.is_causal).backend
    for what in kinds:
        begin, absent = len(results.records), dict(reasons)
        able = {n: peer for n, peer in ready.items() if peer.leaves or what not in WITH_GRADIENTS}
        absent |= dict.fromkeys(ready.keys() - able, "has no backward")
        for name, values in timed(able, what, absent, options).items():
            rates = {"tflops": flops(c, what) / values["median"] / 1e12}
            rates["bytes_per_second"] = traffic(c, what) / values["median"]
            rates["rows_per_second"] = c["B"] / values["median"]
            rates["of_roofline"] = roofline(c, what, options.ceilings) / values["median"]
            accuracy = {"errors": found[name], "error_multiple": multiples.get(name)}
            results.add(labelled, what, name, **values, **rates, **accuracy, auto=automatic, prepare=seconds[name])
        for name, reason in absent.items():
            results.add(labelled, what, name, reason=reason)
        print(table(c, what, results.records[begin:], reasons=what == kinds[0]), flush=True)


def way(peer: Ready, what: str) -> Way:
    """The part of the peer's call that is timed."""

    @contextmanager
    def context() -> Iterator[None]:
        with peer.context(), torch.set_grad_enabled(what in WITH_GRADIENTS):
            yield

    if what in ("backward", "prefix-only"):
        return Way(peer.backward, setup=peer.forward, context=context)
    if what == "both":
        return Way(lambda _: peer.backward(peer.forward()), context=context)
    return Way(lambda _: peer.forward(), context=context)


def verified(
    ready: dict[str, Ready], reasons: dict[str, str], x: Inputs, *, gradients: bool
) -> tuple[dict[str, Errors], dict[str, float]]:
    """Each peer's errors, absolute and as multiples of torch's. A wrong peer moves from ``ready`` to ``reasons``."""
    truth = exact(x, gradients=gradients)
    found: dict[str, Errors] = {}
    for name, peer in ready.items():
        found[name] = errors(peer, truth)
    baseline = found.get(BASELINE, {})
    multiples = {n: multiple(of, baseline) for n, of in found.items() if set(of) <= set(baseline)}
    for name, ratio in multiples.items():
        if not ratio <= WRONG[x.query.dtype]:
            del ready[name]
            reasons[name] = f"wrong, so not timed: {ratio:.3g} times the error of {BASELINE!r}"
    return found, multiples


def timed(
    ready: Mapping[str, Ready], what: str, reasons: dict[str, str], options: RunOptions
) -> dict[str, dict[str, Any]]:
    """Samples of every peer. Decoding on a GPU is timed twice: as a graph's replay, and called from Python."""
    ways = {name: way(peer, what) for name, peer in ready.items()}
    limits: dict[str, Any] = {"rounds": options.rounds, "seconds": options.seconds}
    if options.device != "cuda":
        samples = interleave(ways, options.device, **limits)
        return {name: {"seconds": values, **spread(values)} for name, values in samples.items()}
    torch.cuda.empty_cache()
    if what != "decode":
        return _described(interleave(ways, "cuda", **limits), ways)
    called = back_to_back(ways, "cuda", rounds=max(options.rounds // 6, 1), calls=EAGER_CALLS)
    replays: dict[str, Way] = {}
    for name, call in ways.items():
        try:
            replay = captured(call)
            replays[name] = Way(lambda _, replay=replay: replay())
        except Exception as error:  # what a peer raises under capture is its result
            reasons[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
            torch.cuda.synchronize()
    found = _described(interleave(replays, "cuda", **limits), ways)
    for name, values in found.items():
        values |= {"eager": called[name], "eager_median": spread(called[name])["median"]}
    return found


def _described(samples: Mapping[str, list[float]], ways: Mapping[str, Way]) -> dict[str, dict[str, Any]]:
    """The samples of a GPU with its clocks and the number of launches, or None if the profiler cannot tell.

    Both are asked for once: a call of nvidia-smi and a session of the profiler take longer than many of the samples.
    """
    state = clocks("cuda")
    try:
        counts: dict[str, int | None] = {n: len(of) for n, of in launches({n: ways[n] for n in samples}).items()}
    except Exception:  # no count is worth the samples
        counts = dict.fromkeys(samples)
    return {
        name: {"seconds": values, **spread(values), "launches": counts[name], "clocks": state}
        for name, values in samples.items()
    }


def table(c: Mapping[str, Any], what: str, records: Sequence[Record], *, reasons: bool = True) -> str:
    """The records of one case as text: times, the fastest first, then the reasons of peers that did not run."""
    lines = [f"\n{what}  " + " ".join(f"{name}={value}" for name, value in c.items())]
    heads = ("median us", "IQR us", "eager us", "launches", "TFLOP/s", "GB/s", "roofline", "error x")
    lines.append(f"  {'':20}" + "".join(f"{head:>10}" for head in heads))
    for r in sorted((r for r in records if "seconds" in r), key=lambda r: r["median"]):
        error = "?" if r["error_multiple"] is None else f"{r['error_multiple']:.2f}"
        eager = f"{1e6 * r['eager_median']:.1f}" if "eager_median" in r else ""
        lines.append(
            f"  {r['way']:20}{1e6 * r['median']:10.1f}{1e6 * (r['iqr'] or 0):10.1f}{eager:>10}"
            f"{r.get('launches') or '':>10}{r['tflops']:10.3f}{r['bytes_per_second'] / 1e9:10.1f}"
            f"{r['of_roofline']:10.1%}{error:>10}"
        )
    if reasons:
        lines += [f"  {r['way']:20} -- {r['reason']}" for r in records if "reason" in r]
    return "\n".join(lines)
