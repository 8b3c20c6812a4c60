"""What an H100 should do with every target, by arithmetic alone; and beside it what a run measured.

    roofline     the largest of: FLOPs over the tensor cores' peak, exponentials over theirs, bytes over memory's peak
    predicted    each resource at the efficiency that the target's row states, plus a floor per launch

Nothing in this file was measured by this project. The device's constants are the manufacturer's; the sustained and L2
bandwidth, the launch floor and the efficiencies are taken from published measurements of other kernels. FLOPs and bytes
are those of ``prefix_attn.bench.operator``.

    python -m benchmarks.roofline                           the table, in Markdown
    python -m benchmarks.roofline results/*.json            with a column of what those results say, and a verdict
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefix_attn.bench import operator
from prefix_attn.bench.memory import FLAT, complete, growth
from prefix_attn.bench.results import records as read

# H100 SXM5
PROCESSORS = 132
CLOCK = 1.83e9  # at which the peak is stated: 132 processors of 4096 bfloat16 FLOP per cycle
TENSOR = 989e12  # dense bfloat16 FLOP/s
EXPONENTIALS = PROCESSORS * 16 * CLOCK  # per second
MEMORY = 3.35e12  # bytes/s
SUSTAINED = 3.0e12  # of a large copy, read plus written
L2 = 5.5e12
LAUNCH = 3e-6  # seconds: a kernel that does nothing, in a graph

Records = Sequence[Mapping[str, Any]]
OURS = "triton"


class Target(NamedTuple):
    """One demand. Values are in ``unit``; a rate is better when larger, all else when smaller."""

    name: str
    unit: str
    limit: float
    bytes: float
    flops: float
    bound: str
    roofline: float
    predicted: float
    how: str  # the efficiencies of the prediction
    measured: Callable[[Records], float | None]

    def met(self, value: float) -> bool:
        return value >= self.limit if self.unit in RATES else value <= self.limit


RATES = ("TFLOP/s", "% of copy")


def bound(flops: float, exponentials: float, size: float) -> tuple[str, float]:
    """Which resource the work waits for at its peak, and how many seconds."""
    times = {"tensor cores": flops / TENSOR, "exponentials": exponentials / EXPONENTIALS, "memory": size / MEMORY}
    name = max(times, key=times.__getitem__)
    return name, times[name]


def find(records: Records, what: str, way: str, case: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The last record of this measurement."""
    wanted = ("operator", what, way)
    same = [
        r
        for r in records
        if (r["suite"], r["what"], r["way"]) == wanted and "median" in r and case.items() <= r["case"].items()
    ]
    return same[-1] if same else None


def median(records: Records, what: str, way: str, case: Mapping[str, Any]) -> float | None:
    found = find(records, what, way, case)
    return None if found is None else found["median"]


def others(records: Records, case: Mapping[str, Any]) -> dict[str, float]:
    """Medians of the peers in the decode sweep."""
    ways = {r["way"] for r in records if r["what"] == "decode" and r["case"].items() >= case.items()}
    found = {w: median(records, "decode", w, case) for w in ways if not w.startswith((OURS, "composed", "eager"))}
    return {way: time for way, time in found.items() if time is not None}


def training(what: str, D: int, is_causal: bool, limit: float, efficiency: float) -> Target:
    """A rate at S = 8192. ``efficiency`` is of the tensor cores' peak, in products that are really computed."""
    c = operator.batch(8192, 128, (16, 16, D), is_causal=is_causal)
    flops, size = operator.flops(c, what), operator.traffic(c, what)
    name, seconds = bound(flops, operator.flops({**c, "D": 1}, "forward") / 4, size)
    computed = flops * (7 / 5 if what == "backward" else 1)
    predicted = max(computed / (efficiency * TENSOR), size / SUSTAINED) + (4 if what == "backward" else 1) * LAUNCH

    def measured(records: Records) -> float | None:
        time = median(records, what, OURS, c)
        return None if time is None else flops / time / 1e12

    title = f"{what}, S = 8192, D = {D}, {'causal' if is_causal else 'not causal'}"
    how = f"{efficiency:.0%} of the tensor peak" + (", 7 products for 5" if what == "backward" else "")
    rate = flops / 1e12
    return Target(title, "TFLOP/s", limit, size, flops, name, rate / seconds, rate / predicted, how, measured)


def bandwidth(B: int, S: int) -> Target:
    """Decoding against a copy."""
    c = operator.step(B, S, 128)
    flops, size = operator.flops(c, "decode"), operator.traffic(c, "decode")
    name, seconds = bound(flops, flops / 4 / c["D"], size)
    predicted = size / (0.92 * SUSTAINED) + 2 * LAUNCH

    def measured(records: Records) -> float | None:
        found = find(records, "decode", OURS, c)
        return None if found is None else 100 * found["of_roofline"]  # the roofline of decoding is that copy

    ceiling = 100 / SUSTAINED
    return Target(
        f"decode, B = {B}, S = {S}, P = 128", "% of copy", 85, size, flops, name,
        ceiling * size / seconds, ceiling * size / predicted, "92% of a copy, two launches", measured,
    )  # fmt: skip


def prefix_cost() -> Target:
    """What P = 512 adds to decoding 256 rows: folded into tiles of 64 queries, a second launch and its slots."""
    c, none = operator.step(256, 512, 512), operator.step(256, 512, 0)
    B, Hq, Hkv, P, D = (c[name] for name in ("B", "Hq", "Hkv", "P", "D"))
    flops, prefix = 4.0 * B * Hq * P * D, 2 * 2 * Hkv * P * D
    name, seconds = bound(flops, flops / 4 / D, prefix)
    copies = -(-B * (Hq // Hkv) // 64)  # how often the prefix is read from L2
    slots = 2 * 4 * B * Hq * (D + 1)  # written and read
    predicted = max(flops / (0.4 * TENSOR), copies * prefix / L2) + slots / L2 + LAUNCH

    def measured(records: Records) -> float | None:
        times = [median(records, "decode", OURS, case) for case in (c, none)]
        return None if times[0] is None or times[1] is None else 1e6 * (times[0] - times[1])

    return Target(
        "decode, what P = 512 adds at B = 256, S = 512", "us", 10, prefix, flops, name, 1e6 * seconds, 1e6 * predicted,
        f"prefix read {copies} times from L2 at 5.5 TB/s or 40% of the tensor peak; slots; one launch", measured,
    )  # fmt: skip


def no_prefix() -> Target:
    """The price of the feature where it is not used: the worst of the P = 0 cases of the sweep."""
    cases = [c for c, what in operator.grid("cuda") if what == "decode" and not c["P"]]
    size = operator.traffic(cases[0], "decode")

    def measured(records: Records) -> float | None:
        ratios = []
        for c in cases:
            mine, peers = median(records, "decode", OURS, c), others(records, c)
            if mine is not None and peers:
                ratios.append(100 * (mine / min(peers.values()) - 1))
        return max(ratios, default=None)

    return Target(
        "decode, P = 0 over the best peer, worst case", "%", 3, size, 0, "memory", 0, 0, "the same bytes", measured
    )


def never_slower() -> Target:
    """Our time over that of SDPA's own choice on the concatenation: the worst of the sweep."""
    c = operator.step(256, 512, 128)
    one, whole = (operator.traffic(case, "decode") for case in (c, {**c, "T": 512 + 128, "P": 0}))

    def measured(records: Records) -> float | None:
        graphs = [r for r in records if (r["what"], r["way"]) == ("decode", OURS) and "median" in r]
        kinds = ("sdpa", "sdpa flash", "sdpa cudnn", "sdpa efficient")
        ratios = []
        for r in graphs:
            times = [t for n in kinds if (t := median(records, "decode", n, r["case"])) is not None]
            ratios += [r["median"] / min(times)] if times else []
        return max(ratios, default=None)

    return Target(
        "decode, over the best SDPA on the concatenation, worst case", "x", 1, one, 0, "memory",
        one / whole, (one / 0.92 / SUSTAINED + 2 * LAUNCH) / (whole / 0.92 / SUSTAINED + LAUNCH),
        "B = 256, S = 512, P = 128: bytes; two launches against one", measured,
    )  # fmt: skip


def prefix_only() -> Target:
    """The backward of a frozen model's first layer over the full one."""
    c = operator.batch(1024, 128, (16, 16, 128))
    few, all_ = operator.flops(c, "prefix-only"), operator.flops(c, "backward")
    size = 2 * c["B"] * c["Hq"] * c["S"] * c["D"] * 2  # delta: output and its gradient
    delta = size / SUSTAINED
    predicted = (few / (0.35 * TENSOR) + delta + 3 * LAUNCH) / (1.4 * all_ / (0.42 * TENSOR) + delta + 4 * LAUNCH)

    def measured(records: Records) -> float | None:
        times = [median(records, what, OURS, c) for what in ("prefix-only", "backward")]
        return None if times[0] is None or times[1] is None else times[0] / times[1]

    return Target(
        "backward to the prefix over the full one, S = 1024, P = 128, causal", "x", 1 / 3, size, few, "tensor cores",
        few / all_, predicted, "35% of the tensor peak against 42% and 7 products for 5; delta in both", measured,
    )  # fmt: skip


def flat() -> Target:
    """Copies of the prefix that a forward and backward keep per row."""

    def measured(records: Records) -> float | None:
        mine = [r for r in records if (r["suite"], r["what"], r["way"]) == ("memory", "both", OURS) and "extra" in r]
        extras = {(r["case"]["B"], r["case"]["P"]): r["extra"] for r in mine}
        return growth(extras, mine[0]["copy"]) if extras and complete(extras) else None

    return Target("memory that B and P add together", "copies", FLAT, 0, 0, "-", 0, 0, "no such tensor", measured)


def targets() -> list[Target]:
    """Every target, in the order in which the project states them."""
    return [
        training("forward", 128, False, 450, 0.46),
        training("forward", 128, True, 400, 0.41),
        training("forward", 64, False, 370, 0.37),
        training("backward", 128, False, 290, 0.42),
        *(bandwidth(B, S) for B, S in ((64, 2048), (256, 2048), (64, 8192))),
        no_prefix(),
        prefix_cost(),
        never_slower(),
        prefix_only(),
        flat(),
    ]


def table(rows: Sequence[Target], records: Records | None = None) -> str:
    """Markdown; with ``records`` also what they say."""
    heads = ["target", "demanded", "bytes", "FLOPs", "bound by", "roofline", "predicted", "assuming"]
    if records is not None:
        heads += ["measured", "verdict"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        sign = ">=" if row.unit in RATES else "<="
        number = lambda value, unit=row.unit: f"{value:.3g} {unit}"
        size = f"{row.bytes / 1e6:,.0f} MB" if row.bytes else "-"
        flops = f"{row.flops / 1e9:,.1f} G" if row.flops else "-"
        cells = [row.name, f"{sign} {number(row.limit)}", size, flops, row.bound, number(row.roofline)]
        cells += [number(row.predicted) + ("" if row.met(row.predicted) else " (misses)"), row.how]
        if records is not None:
            value = row.measured(records)
            cells += ["-", "not measured"] if value is None else [number(value), "met" if row.met(value) else "missed"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="files of results")
    args = parser.parse_args(arguments)
    text = table(targets(), read(args.results) if args.results else None)
    print(text)
    return text


if __name__ == "__main__":
    main()
