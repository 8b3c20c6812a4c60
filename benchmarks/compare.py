"""Two files of results, case by case: times, and times relative to torch's own attention in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import BASELINE
from benchmarks.results import Record, key, read, records, title

REFERENCES = (BASELINE, "bare", "sdpa, concatenated before")  # one of each suite that is timed


def relative(found: Sequence[Record]) -> dict[tuple[Any, ...], float]:
    """Of each measurement, its median over the reference's: of the same case, or of P = 0 where only that has one."""
    medians = {key(r): r["median"] for r in found if "median" in r}
    ratios = {}
    for r in found:
        if "median" not in r or r["way"] in REFERENCES:
            continue
        places = [r["case"], r["case"] | {"P": 0}]
        floors = [medians.get(key({**r, "way": way, "case": c})) for way in REFERENCES for c in places]
        floor = next((value for value in floors if value), None)
        if floor:
            ratios[key(r)] = r["median"] / floor
    return ratios


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What of the two machines is not the same: absolute times then say little."""
    names = ("device", "processors", "threads", "instruction_set", "python", "system", "versions")
    return [f"{name}: {before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after.get(name)]


def table(before: Path, after: Path) -> str:
    """Markdown. B / A below 1 = faster. A ratio within the larger noise floor of the two is marked "~"."""
    one, other = read(before), read(after)
    noise = max(one.get("noise_floor", 0.0), other.get("noise_floor", 0.0))
    old, new = records([before]), records([after])
    medians = {key(r): r["median"] for r in old if "median" in r}
    ratios = relative(old), relative(new)
    lines = [f"A = {before.name}, B = {after.name}; noise floor {noise:.1%}"]
    lines += [f"not the same: {line}" for line in differences(one.get("machine", {}), other.get("machine", {}))]
    lines += ["", "| what | case | way | A ms | B ms | B / A | relative to the reference, A | B |", "|---" * 8 + "|"]
    shared = 0
    for r in new:
        k = key(r)
        if "median" not in r or k not in medians:
            continue
        shared += 1
        change = r["median"] / medians[k]
        mark = "~" if abs(change - 1) <= noise else ""
        cells = [f"{found[k]:.3f}" if k in found else "-" for found in ratios]
        lines.append(
            f"| {r['what']} | {title(r['case'].items())} | {r['way']} | {1e3 * medians[k]:.4g} "
            f"| {1e3 * r['median']:.4g} | {mark}{change:.3f} | {cells[0]} | {cells[1]} |"
        )
    if not shared:
        raise ValueError(f"{before} and {after} have no case in common")
    return "\n".join(lines)
