"""Pictures, drawn from files of results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import model, regret
from benchmarks.peers import OURS, PEERS
from benchmarks.results import Record, latest, read, records, title

MARKS = "osv^D<>pPX*hd+"
KINDS = ("decode", "forward", "backward", "both", "prefix-only", "prefill")
NAMES = {"both": "forward + backward", "prefix-only": "backward to the prefix alone", "train": "training step"}
Figure = Any


class Panel(NamedTuple):
    """One set of axes: y against the case's ``axis``, a line for each way."""

    title: str
    records: list[Record]
    axis: str
    y: Callable[[Record], float]
    unit: str


def varying(found: Sequence[Record], axis: str, least: int) -> dict[tuple[Any, ...], list[Record]]:
    """Groups of one run's cases that differ only in ``axis`` and have ``least`` values of it. B may vary with S."""
    free = {axis, "B", "T"} if axis == "S" else {axis}
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in found:
        groups.setdefault((("run", r["run"]), *((k, v) for k, v in r["case"].items() if k not in free)), []).append(r)
    return {k: group for k, group in groups.items() if len({r["case"][axis] for r in group}) >= least}


def short(case: Iterable[tuple[str, Any]]) -> str:
    """A case as a title: B, S and T, then heads."""
    c = dict(case)
    found = [f"{name} {c[name]}" for name in ("B", "S", "T", "P") if name in c]
    if "Hq" in c:
        found.append(f"{c['Hq']}/{c['Hkv']} heads of {c['D']}")
    return ", ".join(found + [c["dtype"]] * ("dtype" in c))


def curves(panel: Panel) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of each way, in ascending x."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for r in sorted(panel.records, key=lambda r: r["case"][panel.axis]):
        xs, ys = found.setdefault(r["way"], ([], []))
        xs.append(r["case"][panel.axis])
        ys.append(panel.y(r))
    return found


def latency(found: Sequence[Record], axis: str) -> list[Panel]:
    """Time of every peer against P or S; one panel for each kind and shape."""
    panels = []
    for what in KINDS:
        for key, group in varying(latest(found, "operator", what), axis, 4 if axis == "P" else 5).items():
            panels.append(
                Panel(f"{NAMES.get(what, what)}\n{short(key)}", group, axis, lambda r: 1e3 * r["median"], "ms")
            )
    return panels


def pyplot() -> Any:
    """matplotlib.pyplot without a window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def style(way: str) -> dict[str, Any]:
    """The same way looks the same in every picture; ours are thick. No two peers share a colour."""
    i = list(PEERS).index(way) if way in PEERS else len(PEERS)
    color = pyplot().colormaps["tab20"](2 * (i % 10) + i // 10 % 2)  # C0 to C9, then the same ten in light
    color, mark = {"ours": ("C0", "o"), "PEFT": ("C3", "s"), "adapters": ("C5", "v")}.get(
        way, (color, MARKS[i % len(MARKS)])
    )
    thick = way in (*OURS, "ours") and way != "eager"
    return {"color": color, "marker": mark, "linewidth": 2.6 if thick else 1.2}


def grid_of_axes(count: int, width: float = 4.8, height: float = 3.7) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` axes, four in a row at most."""
    columns = 3 if count in (5, 6) else min(count, 4)
    rows = -(-count // columns)
    figure, axes = pyplot().subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis in list(axes.flat)[count:]:
        axis.set_visible(False)
    figure.set_layout_engine("constrained")
    return figure, list(axes.flat)[:count]


def prefix_axis(axis: Any, ticks: Iterable[float]) -> None:
    """P on a logarithmic scale that includes 0."""
    ticks = sorted(set(ticks))
    axis.set_xscale("symlog", base=2, linthresh=8)
    axis.set_xlim(-1 if ticks[0] == 0 else None, 1.3 * ticks[-1])
    usual = (0, 10, 128, 512, 2048) if 2048 in ticks and 10 in ticks else (0, 8, 32, 128, 512, 2048)
    shown = [t for t in ticks if t in usual] if len(ticks) > 4 else ticks
    axis.set_xticks(shown, [f"{t:g}" for t in shown])
    axis.minorticks_off()
    axis.set_xlabel("P, tokens of the prefix")


def plain_log(axis: Any, marks: Sequence[float] = (1, 2, 5), unit: str = "") -> None:
    """A logarithmic scale with plain numbers: ``marks`` and their tens."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=marks))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend for all axes, below them, in as many columns as fit the width of the figure."""
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    for columns in range(min(len(handles), 8), 0, -1):
        found = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=9)
        if found.get_window_extent().width < 0.98 * figure.bbox.width:
            break
        if columns > 1:
            found.remove()


def draw_latency(panels: Sequence[Panel]) -> Figure:
    """Lines on logarithmic scales."""
    figure, axes = grid_of_axes(len(panels))
    for axis, panel in zip(axes, panels):
        lines = curves(panel)
        for way, (xs, ys) in lines.items():
            axis.plot(xs, ys, label=way, **style(way))
        ticks = [x for xs, _ in lines.values() for x in xs]
        if panel.axis == "P":
            prefix_axis(axis, ticks)
        else:
            axis.set_xscale("log", base=2)
            axis.set_xlabel(panel.axis)
        plain_log(axis)
        axis.set_ylabel(panel.unit)
        axis.set_title(panel.title, fontsize=9)
        axis.grid(alpha=0.3, which="both")
    legend(figure, axes)
    return figure


def speedups(found: Sequence[Record]) -> dict[tuple[str, str, str], dict[tuple[int, int], tuple[float, str]]]:
    """By (what, shape, row axis), then (row, P): the fastest peer's time over that of auto's choice; its name."""
    cells: dict[tuple[Any, ...], dict[tuple[int, int], dict[str, Record]]] = {}
    for what, axis in (("decode", "B"), ("both", "S")):
        for r in latest(found, "operator", what):
            c = r["case"]
            free = ("P", "B") if axis == "B" else ("P", "B", "S", "T")
            if axis == "S" and c["B"] * c["S"] != 1024:
                continue
            rest = tuple((k, v) for k, v in c.items() if k not in free)
            cells.setdefault((what, short(rest), axis), {}).setdefault((c[axis], c["P"]), {})[r["way"]] = r
    speed = {}
    for group, table in cells.items():
        best = {}
        for place, ways in table.items():
            peers = {name: r["median"] for name, r in ways.items() if name not in OURS}
            ours = next((ways[r["auto"]] for r in ways.values() if r["auto"] in ways), None)
            if peers and ours:
                name = min(peers, key=peers.__getitem__)
                best[place] = (peers[name] / ours["median"], name)
        rows, columns = ({place[i] for place in best} for i in (0, 1))
        if len(rows) > 1 and len(columns) > 1:
            speed[group] = best
    return speed


def draw_speedup(found: Sequence[Record]) -> Figure | None:
    """Heat maps. In a red cell, the peer is faster."""
    tables = speedups(found)
    if not tables:
        return None
    from matplotlib.colors import LogNorm

    figure, axes = grid_of_axes(len(tables), 8, 3.6)
    for axis, ((what, shape, row), table) in zip(axes, tables.items()):
        rows, columns = (sorted({place[i] for place in table}) for i in (0, 1))
        dense = [P for P in columns if all((value, P) in table for value in rows)]
        numbers = [[table[value, P][0] for P in dense] for value in rows]
        axis.imshow(numbers, cmap="RdYlGn", norm=LogNorm(0.25, 4), aspect="auto")
        for i, value in enumerate(rows):
            for j, P in enumerate(dense):
                ratio, peer = table[value, P]
                color = "white" if abs(math.log2(ratio)) > 1.4 else "black"
                axis.text(j, i, f"{ratio:.2g}x\n{peer}", ha="center", va="center", fontsize=9, color=color)
        axis.set_xticks(range(len(dense)), [str(P) for P in dense])
        axis.set_yticks(range(len(rows)), [str(value) for value in rows])
        axis.set_xlabel("P, tokens of the prefix")
        axis.set_ylabel(row if row == "B" else "S, with B * S = 1024")
        axis.set_title(f"{NAMES.get(what, what)}, {shape}\nfastest peer over ours: above 1 we win", fontsize=9)
    return figure


def draw_roofline(found: Sequence[Record], ceilings: Mapping[str, float]) -> Figure | None:
    """FLOP/s of auto's choice against FLOPs per byte, with the measured ceilings."""
    import numpy

    chosen = [r for what in KINDS for r in latest(found, "operator", what) if r["way"] == r["auto"]]
    if not chosen:
        return None
    dtypes = list(dict.fromkeys(r["case"]["dtype"] for r in chosen))
    figure, axes = grid_of_axes(len(dtypes), 6.5, 4.6)
    for axis, dtype in zip(axes, dtypes):
        points = [r for r in chosen if r["case"]["dtype"] == dtype and r["tflops"]]
        for i, what in enumerate(w for w in KINDS if any(r["what"] == w for r in points)):
            mine = [r for r in points if r["what"] == what]
            x = [1e12 * r["tflops"] / r["bytes_per_second"] for r in mine]
            axis.scatter(x, [1e3 * r["tflops"] for r in mine], label=NAMES.get(what, what), marker=MARKS[i], s=28)
        intensity = numpy.logspace(-1, 3.5, 200)
        peak = max(ceilings["float32"], ceilings[dtype])
        axis.plot(
            intensity,
            numpy.minimum(intensity * ceilings["memory"], peak) / 1e9,
            color="black",
            label="measured ceilings",
        )
        axis.set(xscale="log", yscale="log", xlabel="useful FLOPs per byte that must move", ylabel="GFLOP/s")
        axis.set_title(f"ours, {dtype}: {peak / 1e9:.0f} GFLOP/s, {ceilings['memory'] / 1e9:.0f} GB/s", fontsize=10)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    return figure


def draw_memory(found: Sequence[Record]) -> Figure | None:
    """Peak memory against B * P. Flat lines are the aim."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in found:
        if r["suite"] == "memory" and "extra" in r:
            groups.setdefault((r["what"], r["case"].get("model", "operator")), []).append(r)
    if not groups:
        return None
    figure, axes = grid_of_axes(len(groups), 5.2, 4.2)
    for axis, ((what, subject), group) in zip(axes, groups.items()):
        rest = {k: v for k, v in group[0]["case"].items() if k not in ("B", "P", "model")}
        for way, B in dict.fromkeys((r["way"], r["case"]["B"]) for r in group):
            mine = sorted((B * r["case"]["P"], r["extra"]) for r in group if (r["way"], r["case"]["B"]) == (way, B))
            axis.plot([x for x, _ in mine], [size / 1e6 for _, size in mine], label=way, **style(way))
        axis.set_xscale("symlog", base=10, linthresh=10)
        axis.set_xlabel(f"B * P; a line for each B: {', '.join(map(str, sorted({r['case']['B'] for r in group})))}")
        if subject == "operator":
            axis.set_yscale("symlog", linthresh=1)
            axis.set_ylim(bottom=-0.1)
            axis.set_ylabel("MB beyond inputs and results")
        else:
            plain_log(axis)
            axis.set_ylabel("MB allocated at the peak")
        axis.set_title(f"{subject}: {NAMES.get(what, what)}, {short(rest.items())}", fontsize=9)
        axis.grid(alpha=0.3, which="both")
    legend(figure, axes)
    return figure


def draw_model(found: Sequence[Record]) -> Figure | None:
    """Time over that of the frozen model without a prefix."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in model.relative(found):
        c = {k: v for k, v in r["case"].items() if k not in ("P", "on")}
        name = f"{NAMES.get(r['what'], r['what'])}, {title(c.items())}"
        groups.setdefault((r["what"], name), []).append(r)
    groups = {k: rows for k, rows in groups.items() if len({r["case"]["P"] for r in rows}) > 1}
    if not groups:
        return None
    figure, axes = grid_of_axes(len(groups), 5, 4)
    for axis, ((_, name), rows) in zip(axes, groups.items()):
        ticks = {0} | {r["case"]["P"] for r in rows}
        for way in dict.fromkeys(r["way"] for r in rows):
            points = [(0, 1.0)] + sorted((r["case"]["P"], r["ratio"]) for r in rows if r["way"] == way)
            axis.plot([P for P, _ in points], [ratio for _, ratio in points], label=way, **style(way))
        axis.axhline(1, color="grey", linestyle="--", linewidth=1)
        plain_log(axis, (1, 1.5, 2, 3, 4, 6, 8), "x")
        axis.set_ylim(0.9, 1.1 * max(2.0, *(r["ratio"] for r in rows)))
        prefix_axis(axis, ticks)
        axis.set_ylabel("time, over the model without a prefix")
        axis.set_title(name, fontsize=8)
        axis.grid(alpha=0.3, which="both")
    legend(figure, axes)
    return figure


def draw_regret(found: Sequence[Record]) -> Figure | None:
    """How much longer auto's choice took than the fastest of our backends, in every case."""
    rows = regret.regrets([r for r in found if r["suite"] == "operator"])
    if not rows:
        return None
    figure, (axis,) = grid_of_axes(1, 7, 4.2)
    for i, what in enumerate(w for w in KINDS if any(r.what == w for r in rows)):
        mine = [r for r in rows if r.what == what]
        axis.scatter([1e3 * r.seconds[1] for r in mine], [100 * r.regret for r in mine], label=NAMES.get(what, what),
                     marker=MARKS[i], s=30)  # fmt: skip
    axis.axhline(100 * regret.LIMIT, color="red", linestyle="--", linewidth=1, label="limit")
    axis.set(xscale="log", xlabel="ms of the fastest backend", ylabel="% that auto's choice took longer")
    axis.set_ylim(bottom=-0.5, top=max(12.0, 110 * rows[0].regret))
    axis.set_title(regret.summary(rows).replace("; ", "\n", 1), fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def figures(paths: Sequence[Path]) -> dict[str, Figure]:
    """What the files of results allow, by the name of the picture."""
    found = records(paths)
    ceilings = next((d["ceilings"] for d in map(read, paths) if d["suite"] == "operator"), {})
    panels = {"latency": latency(found, "P"), "lengths": latency(found, "S")}
    drawn = {name: draw_latency(some) if some else None for name, some in panels.items()}
    drawn |= {"speedup": draw_speedup(found), "roofline": draw_roofline(found, ceilings)}
    drawn |= {"regret": draw_regret(found), "memory": draw_memory(found), "model": draw_model(found)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def pictures(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Draws what the files allow, each picture in ``folder``; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures(paths).items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=100)
        pyplot().close(figure)
    return written
