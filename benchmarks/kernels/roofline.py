"""What an H100 should do with every target, by arithmetic alone; and beside it what a run measured.

    roofline     the largest of: FLOPs over the tensor cores' peak, exponentials over theirs, bytes over memory's peak.
                 With results: over the large product and the large copy that the same run measured, on its own GPU
    predicted    each resource at the efficiency that the target's row states, plus a floor per launch; always an H100

Nothing in this file was measured by this project. The H100's constants are the manufacturer's; the sustained and L2
bandwidth and the launch floor are taken from published measurements of other kernels. What the tensor cores can reach
is counted in the compiled loops (``benchmarks.kernels.inner_loops``), times the share of that which a published kernel
reaches. FLOPs and bytes are those of ``benchmarks.operator``.

    python -m benchmarks.kernels.roofline                     the table, in Markdown
    python -m benchmarks.kernels.roofline results/*.json      with a column of what those results say, and a verdict
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import operator, results
from benchmarks.kernels import dram
from benchmarks.memory import FLAT, complete, growth

# H100 SXM5
PROCESSORS = 132
CLOCK = 1.83e9  # at which the peak is stated: 132 processors of 4096 bfloat16 FLOP per cycle
TENSOR = 989e12  # dense bfloat16 FLOP/s
EXPONENTIALS = PROCESSORS * 16 * CLOCK  # per second
MEMORY = 3.35e12  # bytes/s
SUSTAINED = 3.0e12  # of a large copy, read plus written
L2 = 5.5e12
LAUNCH = 3e-6  # seconds: a kernel that does nothing, in a graph
OVERLAPPED_LAUNCH = 1e-6  # one that starts while the kernel before it runs
# Of the peak, by ``python -m benchmarks.kernels.inner_loops`` under Triton 3.9, in products that are really computed.
CEILINGS = {"forward 128": 0.58, "forward 64": 0.65, "grad_query 128": 0.70, "grad_sequence 128": 0.47,
            "grad_prefix 128": 0.64, "fold_prefix 128": 0.50}  # fmt: skip
# Triton's own attention reaches 477 TFLOP/s at D = 128, S = 16 k, and 353 at D = 64. Its loops, counted in the same way
# (one multiplication per score more than ours), have ceilings of 63 % and 62 %.
REACHED = {128: 0.77, 64: 0.58}
CAUSAL = 0.9  # what is left of it where tiles are cut by the diagonal and rows have different lengths


class Peaks(NamedTuple):
    """What the roofline is drawn with."""

    tensor: float  # bfloat16 FLOP/s
    memory: float  # bytes/s
    copy: float  # bytes/s of a large copy, read plus written
    source: str


DATA_SHEET = Peaks(TENSOR, MEMORY, SUSTAINED, "an H100's data sheet")

Records = Sequence[Mapping[str, Any]]
TRITON = "triton"


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


def of_run(documents: Sequence[Mapping[str, Any]]) -> Peaks | None:
    """The fastest product and copy of these results; None if none of them measured its ceilings."""
    found = [document["ceilings"] for document in documents if "ceilings" in document]
    if not found:
        return None
    product, copy = (max(ceilings[name] for ceilings in found) for name in ("bfloat16", "memory"))
    source = f"these results: a product at {product / 1e12:.3g} TFLOP/s, a copy at {copy / 1e12:.3g} TB/s"
    return Peaks(product, copy, copy, source)


def bound(flops: float, exponentials: float, size: float, peaks: Peaks = DATA_SHEET) -> tuple[str, float]:
    """Which resource the work waits for at its peak, and how many seconds."""
    times = {
        "tensor cores": flops / peaks.tensor,
        "exponentials": exponentials / EXPONENTIALS,
        "memory": size / peaks.memory,
    }
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
    found = {w: median(records, "decode", w, case) for w in ways if not w.startswith((TRITON, "composed", "eager"))}
    return {way: time for way, time in found.items() if time is not None}


def rate(kernel: str) -> float:
    """FLOP/s that a kernel is predicted to reach."""
    return CEILINGS[kernel] * REACHED[int(kernel.split()[1])] * TENSOR


def training(what: str, D: int, is_causal: bool, limit: float, peaks: Peaks) -> Target:
    """A rate at S = 8192."""
    c = operator.batch(8192, 128, (16, 16, D), is_causal=is_causal)
    flops, size = operator.flops(c, what), operator.traffic(c, what)
    name, seconds = bound(flops, operator.flops({**c, "D": 1}, "forward") / 4, size, peaks)
    if what == "backward":  # of five products: dq computes three, and dk and dv four
        busy, launches = 0.6 * flops / rate(f"grad_query {D}") + 0.8 * flops / rate(f"grad_sequence {D}"), 4
        how = (
            f"{CEILINGS[f'grad_query {D}']:.0%} and {CEILINGS[f'grad_sequence {D}']:.0%} of the peak, 3 and 4 products"
        )
    else:
        busy, launches = flops / rate(f"forward {D}"), 1
        how = f"{CEILINGS[f'forward {D}']:.0%} of the peak"
    how += f", times {REACHED[D]}"
    if is_causal:
        busy, how = busy / CAUSAL, f"{how}, times {CAUSAL}"
    predicted = max(busy, size / SUSTAINED) + launches * LAUNCH

    def measured(records: Records) -> float | None:
        time = median(records, what, TRITON, c)
        return None if time is None else flops / time / 1e12

    title = f"{what}, S = 8192, D = {D}, {'causal' if is_causal else 'not causal'}"
    work = flops / 1e12
    return Target(title, "TFLOP/s", limit, size, flops, name, work / seconds, work / predicted, how, measured)


def bandwidth(B: int, S: int, peaks: Peaks) -> Target:
    """Decoding against a copy."""
    c = operator.step(B, S, 128)
    flops, size = operator.flops(c, "decode"), operator.traffic(c, "decode")
    name, seconds = bound(flops, flops / 4 / c["D"], size, peaks)
    predicted = size / (0.92 * SUSTAINED) + LAUNCH + OVERLAPPED_LAUNCH

    def measured(records: Records) -> float | None:
        found = find(records, "decode", TRITON, c)
        return None if found is None else 100 * found["of_roofline"]  # the roofline of decoding is that copy

    return Target(
        f"decode, B = {B}, S = {S}, P = 128", "% of copy", 85, size, flops, name,
        100 * size / seconds / peaks.copy, 100 * size / predicted / SUSTAINED,
        "92% of a copy, two launches that overlap", measured,
    )  # fmt: skip


def prefix_cost(peaks: Peaks) -> Target:
    """What P = 512 adds to decoding 256 rows: folded into tiles of 128 queries, a second launch and its slots."""
    c, none = operator.step(256, 512, 512), operator.step(256, 512, 0)
    B, Hq, Hkv, P, D = (c[name] for name in ("B", "Hq", "Hkv", "P", "D"))
    flops, prefix = 4.0 * B * Hq * P * D, 2 * 2 * Hkv * P * D
    name, seconds = bound(flops, flops / 4 / D, prefix, peaks)
    copies = -(-B * (Hq // Hkv) // 128)  # how often the prefix is read from L2
    slots = 2 * 4 * B * Hq * (D + 1)  # written and read
    predicted = max(flops / rate("fold_prefix 128"), copies * prefix / L2) + slots / L2 + OVERLAPPED_LAUNCH

    def measured(records: Records) -> float | None:
        times = [median(records, "decode", TRITON, case) for case in (c, none)]
        return None if times[0] is None or times[1] is None else 1e6 * (times[0] - times[1])

    return Target(
        "decode, what P = 512 adds at B = 256, S = 512", "us", 10, prefix, flops, name, 1e6 * seconds, 1e6 * predicted,
        f"{CEILINGS['fold_prefix 128']:.0%} of the peak, times {REACHED[128]}; the prefix {copies} times and the slots "
        "from L2; a launch that overlaps", measured,
    )  # fmt: skip


def no_prefix() -> Target:
    """The price of the feature where it is not used: the worst of the P = 0 cases of the sweep."""
    cases = [c for c, what in operator.grid("cuda") if what == "decode" and not c["P"]]
    size = operator.traffic(cases[0], "decode")

    def measured(records: Records) -> float | None:
        ratios = []
        for c in cases:
            mine, peers = median(records, "decode", TRITON, c), others(records, c)
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
        graphs = [r for r in records if (r["what"], r["way"]) == ("decode", TRITON) and "median" in r]
        kinds = ("sdpa", "sdpa flash", "sdpa cudnn", "sdpa efficient")
        ratios = []
        for r in graphs:
            times = [t for n in kinds if (t := median(records, "decode", n, r["case"])) is not None]
            ratios += [r["median"] / min(times)] if times else []
        return max(ratios, default=None)

    return Target(
        "decode, over the best SDPA on the concatenation, worst case", "x", 1, one, 0, "memory",
        one / whole, (one / 0.92 / SUSTAINED + LAUNCH + OVERLAPPED_LAUNCH) / (whole / 0.92 / SUSTAINED + LAUNCH),
        "B = 256, S = 512, P = 128: bytes; two overlapping launches against one", measured,
    )  # fmt: skip


def prefix_only() -> Target:
    """The backward of a frozen model's first layer over the full one."""
    c = operator.batch(1024, 128, (16, 16, 128))
    few, all_ = operator.flops(c, "prefix-only"), operator.flops(c, "backward")
    size = 2 * c["B"] * c["Hq"] * c["S"] * c["D"] * 2  # delta: output and its gradient
    delta = size / SUSTAINED
    one = few / rate("grad_prefix 128") + 3 * LAUNCH + delta
    both = 0.6 * all_ / rate("grad_query 128") + 0.8 * all_ / rate("grad_sequence 128")
    predicted = one / (both / CAUSAL + 4 * LAUNCH + delta)

    def measured(records: Records) -> float | None:
        times = [median(records, what, TRITON, c) for what in ("prefix-only", "backward")]
        return None if times[0] is None or times[1] is None else times[0] / times[1]

    return Target(
        "backward to the prefix over the full one, S = 1024, P = 128, causal", "x", 1 / 3, size, few, "tensor cores",
        few / all_ / 1.4, predicted,  # the full one computes 7 products for 5
        f"{CEILINGS['grad_prefix 128']:.0%} of the peak, times {REACHED[128]}, against the full one's rates", measured,
    )  # fmt: skip


def read_once() -> Target:
    """What decoding reads from memory, over the sequences' keys and values, one prefix and the queries."""
    c = dram.CASES[0]
    size = dram.needed(c)
    again = 2 * c["B"] * c["Hq"] * c["D"]  # the queries, by both launches; slots stay in the L2 cache

    def measured(records: Records) -> float | None:
        ratios = [r["ratio"] for r in records if r["suite"] == "dram" and "ratio" in r]
        return max(ratios, default=None)

    return Target(
        "decode, bytes read from memory over what must be, worst case", "x", 1.1, size, 0, "memory", 1,
        (size + again) / size, "the queries a second time", measured,
    )  # fmt: skip


def flat() -> Target:
    """Copies of the prefix that a forward and backward keep per row."""

    def measured(records: Records) -> float | None:
        mine = [r for r in records if (r["suite"], r["what"], r["way"]) == ("memory", "both", TRITON) and "extra" in r]
        extras = {(r["case"]["B"], r["case"]["P"]): r["extra"] for r in mine}
        return growth(extras, mine[0]["copy"]) if extras and complete(extras) else None

    return Target("memory that B and P add together", "copies", FLAT, 0, 0, "-", 0, 0, "no such tensor", measured)


def targets(peaks: Peaks = DATA_SHEET) -> list[Target]:
    """Every target, in the order in which the project states them."""
    return [
        training("forward", 128, False, 450, peaks),
        training("forward", 128, True, 400, peaks),
        training("forward", 64, False, 370, peaks),
        training("backward", 128, False, 290, peaks),
        *(bandwidth(B, S, peaks) for B, S in ((64, 2048), (256, 2048), (64, 8192))),
        no_prefix(),
        prefix_cost(peaks),
        never_slower(),
        prefix_only(),
        read_once(),
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
    peaks = of_run([results.read(path) for path in args.results]) or DATA_SHEET
    text = table(targets(peaks), results.records(args.results) if args.results else None)
    print(f"roofline and bound: {peaks.source}. predicted: an H100 before any measurement.\n\n{text}")
    return text


if __name__ == "__main__":
    main()
