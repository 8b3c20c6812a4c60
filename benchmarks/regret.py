"""The dispatcher's regret: how much longer the backend of ``auto`` took than the fastest of ours, case by case.

Both are timed in the same rounds. The regret is the smaller of the median of the paired ratios and the ratio of minima,
so noise has to move both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.measure import paired
from benchmarks.peers import OURS
from benchmarks.results import Case, Record

LIMIT = 0.10


class Regret(NamedTuple):
    """One case. ``regret`` is relative: 0.1 = ten per cent longer than the best."""

    case: Case
    what: str
    chosen: str
    best: str
    seconds: tuple[float, float]  # medians: of the chosen, of the best
    regret: float


def regrets(records: Sequence[Record]) -> list[Regret]:
    """The regret of every operator case that at least two backends ran, the largest first."""
    groups: dict[tuple[object, ...], dict[str, Record]] = {}
    for r in records:
        if r["way"] in OURS and "seconds" in r:
            groups.setdefault((r.get("run"), r["what"], *sorted(r["case"].items())), {})[r["way"]] = r
    found = []
    for group in groups.values():
        chosen = next(iter(group.values()))["auto"]
        if chosen not in group or len(group) < 2:
            continue
        mine = group[chosen]
        best = min(group, key=lambda name: group[name]["median"])
        ratio = paired(mine["seconds"], group[best]["seconds"])
        regret = max(0.0, min(ratio.median, ratio.of_minima) - 1)
        times = (mine["median"], group[best]["median"])
        found.append(Regret(mine["case"], mine["what"], chosen, best, times, regret))
    return sorted(found, key=lambda r: -r.regret)


def summary(found: Sequence[Regret]) -> str:
    """One line."""
    if not found:
        return "regret: no case was run by two backends"
    over = [r for r in found if r.regret > LIMIT]
    mean = sum(r.regret for r in found) / len(found)
    best = sum(r.chosen == r.best for r in found)
    return (
        f"regret of auto over {len(found)} cases: mean {mean:.1%}, largest {found[0].regret:.1%}; "
        f"the fastest was chosen {best} times; {len(over)} above {LIMIT:.0%}"
    )
