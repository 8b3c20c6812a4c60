"""A markdown report from files of results: machine, pictures, tables, and every case where a peer is faster."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import memory, model, regret
from benchmarks.peers import OURS
from benchmarks.plot import KINDS, NAMES, short
from benchmarks.results import Record, key, read, records, title

CAPTIONS = {
    "latency": "Time of one call against the length of the prefix.",
    "lengths": "Time of one call against the length of the sequence.",
    "speedup": "Time of the fastest peer over that of `auto`'s choice. Below 1, the peer named in the cell is faster.",
    "roofline": "`auto`'s choices under the measured limits of this machine. Points above the slope ran from cache.",
    "regret": "How much longer `auto`'s choice took than our fastest backend, timed in the same rounds.",
    "memory": "Peak memory against B * P.",
    "model": "Time over that of the same frozen model without a prefix, in the same run.",
}


def row(cells: Iterable[Any]) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def rows(head: Sequence[str], body: Iterable[Sequence[Any]]) -> list[str]:
    """A table."""
    return [row(head), "|" + "---|" * len(head), *map(row, body), ""]


def about(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """How and on which machine each file was measured."""
    lines = []
    for d in documents:
        m = d["machine"]
        ceilings = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in d["ceilings"].items())
        clocks = m["clocks"].get("cpu_mhz")
        clock = f" at {max(clocks) / 1e3:.1f} GHz" if clocks else f", {m['clocks']}"
        packages = ", ".join(f"{name} {number}" for name, number in m["versions"].items() if number)
        malloc = "malloc keeps freed memory" if all(m["malloc"].values()) else "default malloc"
        lines.append(
            f"* {d['suite']}: {m['device']}, {m['processors']} cores{clock}, {m['threads']} threads, C++ kernels "
            f"{m['instruction_set']}; {packages}; Python {m['python']}; {malloc}. Ceilings in G/s: {ceilings}. "
            f"The same call timed twice differs by up to {d['noise_floor']:.1%}. {m['time'][:10]}, `{d['command']}`"
        )
    return lines + [""]


def cases(found: Sequence[Record]) -> dict[tuple[Any, ...], dict[str, Record]]:
    """The operator's records by (what, run, case), then by way. Those with a reason and no time are included."""
    groups: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in found:
        if r["suite"] == "operator" and r["way"]:
            groups.setdefault((r["what"], r["run"], *sorted(r["case"].items())), {})[r["way"]] = r
    return groups


def operator(found: Sequence[Record]) -> list[str]:
    """One row per case: ours and the three fastest peers."""
    lines: list[str] = []
    groups = cases(found)
    for what in KINDS:
        body = []
        for group in (g for k, g in groups.items() if k[0] == what):
            timed = {name: r for name, r in group.items() if "seconds" in r}
            ours = next((timed[r["auto"]] for r in timed.values() if r["auto"] in timed), None)
            if ours is None:
                continue
            peers = sorted((r["median"] / ours["median"], name) for name, r in timed.items() if name not in OURS)
            cells = [f"{name} {ratio:.2f}" if ratio >= 1 else f"**{name} {ratio:.2f}**" for ratio, name in peers[:3]]
            cells += ["-"] * (3 - len(cells))
            rate = f"{1e3 * ours['tflops']:.0f}", f"{ours['bytes_per_second'] / 1e9:.1f}", f"{ours['of_roofline']:.0%}"
            spread = f"{1e3 * ours['median']:.3f} ± {1e3 * (ours['iqr'] or 0) / 2:.3f}"
            body.append([short(ours["case"].items()), ours["way"], spread, *rate, *cells])
        if body:
            lines += [f"### {NAMES.get(what, what).capitalize()}", ""]
            heads = ("case", "auto", "ms (median ± half the IQR)", "GFLOP/s", "GB/s", "of the roofline")
            lines += rows((*heads, "fastest peer over ours", "second", "third"), body)
    return lines


def losses(found: Sequence[Record]) -> list[str]:
    """Every case in which a peer was faster than the backend that auto chose."""
    body = []
    for (what, *_), group in cases(found).items():
        timed = {name: r for name, r in group.items() if "seconds" in r}
        ours = next((timed[r["auto"]] for r in timed.values() if r["auto"] in timed), None)
        peers = {n: r for n, r in timed.items() if n not in OURS}
        if ours is None or not peers:
            continue
        name = min(peers, key=lambda n: peers[n]["median"])
        lost = ours["median"] / peers[name]["median"]
        if lost > 1:
            body.append((lost, [what, short(ours["case"].items()), name, f"{lost:.2f}"]))
    total = sum(1 for group in cases(found).values() if any("seconds" in r for r in group.values()))
    body.sort(key=lambda item: -item[0])
    lines = [f"A peer is faster in {len(body)} of {total} cases.", ""]
    if body:
        lines += rows(("what", "case", "fastest peer", "our time over theirs"), [cells for _, cells in body])
    return lines


def absent(found: Sequence[Record]) -> list[str]:
    """Peers that never ran, or not in every case, and why."""
    ran = {r["way"] for r in found if "reason" not in r}
    reasons = {r["way"]: r["reason"] for r in found if "reason" in r and r["way"] and r["way"] not in ran}
    partly = {
        (r["way"], r["reason"]) for r in found if "reason" in r and r["way"] in ran and "scores" not in r["reason"]
    }
    lines = ["Peers that did not run here:", ""]
    lines += [f"* {name}: {reason.removeprefix('NotImplementedError: ')}" for name, reason in sorted(reasons.items())]
    if partly:
        lines += ["", "Peers that did not run everywhere:", ""]
        lines += [f"* {name}: {reason}" for name, reason in sorted(partly)]
    return lines + [""]


def whole_models(found: Sequence[Record]) -> list[str]:
    """Relative times of whole models, one row per model and way; then all times."""
    table: dict[tuple[str, str, str], dict[int, str]] = {}
    for r in model.relative(found):
        rest = title((k, v) for k, v in r["case"].items() if k not in ("P", "on"))
        table.setdefault((r["what"], rest, r["way"]), {})[r["case"]["P"]] = f"{r['ratio']:.2f} ({r['of_medians']:.2f})"
    prefixes = sorted({P for ratios in table.values() for P in ratios})
    if not prefixes:
        return []
    body = [
        [NAMES.get(what, what), rest, way, *(ratios.get(P, "-") for P in prefixes)]
        for (what, rest, way), ratios in table.items()
    ]
    lines = rows(("what", "model", "way", *(f"P = {P}" for P in prefixes)), body)
    speeds = [r for r in found if r["suite"] == "model" and "seconds" in r]
    body = [
        [NAMES.get(r["what"], r["what"]), title((k, v) for k, v in r["case"].items() if k != "on"), r["way"],
         f"{r['median']:.3f}", f"{r['minimum']:.3f}", f"{r['iqr'] or 0:.3f}", f"{r['tokens_per_second']:.0f}"]
        for r in sorted(speeds, key=lambda r: (r["what"], str(key(r)[3:]), r["way"]))
    ]  # fmt: skip
    heads = ("what", "case", "way", "s (median)", "min", "IQR", "tokens/s")
    return [
        "Time over that of P = 0, by the fastest samples (in parentheses: by the medians):",
        "",
        *lines,
        "Seconds per training step, or per decoded token of the whole batch:",
        "",
        *rows(heads, body),
    ]


def allocated(found: Sequence[Record]) -> list[str]:
    """Growth of memory with B * P, in copies of the prefix per row."""
    body = []
    for (what, rest, way, copy), extras in memory.rectangles(found).items():
        if not memory.complete(extras):
            continue
        subject = dict(rest).get("model", "operator")
        rate = memory.growth(extras, copy)
        (B1, P1), (B2, P2) = min(extras), max(extras)
        sizes = f"{extras[B1, P1] / 1e6:.1f} MB at {B1} x {P1}", f"{extras[B2, P2] / 1e6:.1f} MB at {B2} x {P2}"
        body.append(
            [subject, NAMES.get(what, what), way, *sizes, f"{rate:.3f}" + (", flat" if rate < memory.FLAT else "")]
        )
    heads = ("subject", "what", "way", "smallest (B x P)", "largest (B x P)", "growth, copies of the prefix per row")
    return rows(heads, body) if body else []


def calls(found: Sequence[Record]) -> list[str]:
    """Microseconds of a call that computes almost nothing."""
    body = [[r["what"], r["way"], f"{1e6 * r['minimum']:.1f}", f"{1e6 * r['median']:.1f}"]
            for r in found if r["suite"] == "overhead" and r["what"] != "decode" and "seconds" in r]  # fmt: skip
    return rows(("what", "way", "us (min)", "us (median)"), body) if body else []


def markdown(paths: Sequence[Path], pictures: Sequence[Path], out: Path) -> str:
    """The whole report, with links relative to ``out``. It begins with the first results' ``notes.md``, if any."""
    documents, found = [read(path) for path in paths], records(paths)
    link = {p.stem: f"![{CAPTIONS[p.stem]}]({os.path.relpath(p, out.parent)})" for p in pictures}
    images = lambda *names: [line for n in names if n in link for line in (link[n], "", CAPTIONS[n], "")]
    parts = {
        "Whole models": [*images("model"), *whole_models(found)],
        "One call": [*images("latency", "speedup", "lengths", "roofline"), *losses(found), *operator(found)],
        "The choice of a backend": [*images("regret"), regret.summary(regret.regrets(found)), ""],
        "Memory": [*images("memory"), *allocated(found)],
        "The overhead of a call": calls(found),
        "Peers": absent(found),
    }
    suites = {d["suite"] for d in documents}
    if "operator" not in suites:
        del parts["One call"], parts["The choice of a backend"]
    elsewhere = {folder for picture in pictures if (folder := picture.parent) != paths[0].parent}
    figures = "".join(f" --figures {os.path.relpath(folder)}" for folder in elsewhere)
    command = f"python -m benchmarks report {' '.join(map(str, paths))}{figures} --out {out}"
    made = f"Made by `{command}`. Do not edit by hand."
    how = "The method is described in `benchmarks/__init__.py`."
    notes = paths[0].with_name("notes.md")
    said = [notes.read_text(encoding="utf-8").strip(), ""] if notes.is_file() else []
    lines = ["# Benchmarks", "", made, how, "", *said, "## Machine and method", "", *about(documents)]
    for name, body in parts.items():
        if body:
            lines += [f"## {name}", "", *body]
    return "\n".join(lines).rstrip() + "\n"
