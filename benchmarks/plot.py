"""Pictures of the sweeps, from their JSON lines and from nothing else.

    python -m benchmarks.plot --out FOLDER results/*.jsonl

One PNG per sweep: attention-<what>.png (TFLOP/s against S), decode.png (time and share of a copy's bandwidth against B
and against P), memory.png (what is allocated beyond inputs and results, against P).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import read

Record = Mapping[str, Any]
LOGARITHMIC = ("us", "MB")
MARKS = "osv^D<>pPX*hd+"


class Panel(NamedTuple):
    """One set of axes. Rates are drawn from 0, times and sizes on a logarithmic scale."""

    title: str
    records: list[Record]
    axis: str
    y: Callable[[Record], float]
    unit: str


def timed(records: Iterable[Record], bench: str, what: str) -> list[Record]:
    """The last measurement of every case and way."""
    wanted = [r for r in records if (r.get("bench"), r.get("what")) == (bench, what) and "reason" not in r]
    return list({(r["way"], repr(sorted(r["case"].items()))): r for r in wanted}.values())


def varying(records: Sequence[Record], axis: str) -> dict[tuple[Any, ...], list[Record]]:
    """Groups of cases equal but for ``axis``, with two values of it or more. B follows S: the tokens are the same."""
    free = {axis, "B"} if axis == "S" else {axis}
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        groups.setdefault(tuple((k, v) for k, v in r["case"].items() if k not in free), []).append(r)
    return {key: group for key, group in groups.items() if len({r["case"][axis] for r in group}) > 1}


def title(key: Iterable[tuple[str, Any]]) -> str:
    """A case in words, without what is the same everywhere."""
    return ", ".join(f"{name} {value}" for name, value in key if name not in ("dtype", "on"))


def curves(panel: Panel) -> dict[str, tuple[list[float], list[float]]]:
    """Of each way, x and y in ascending x."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for r in sorted(panel.records, key=lambda r: r["case"][panel.axis]):
        xs, ys = found.setdefault(r["way"], ([], []))
        xs.append(r["case"][panel.axis])
        ys.append(panel.y(r))
    return found


def attention(records: Sequence[Record], what: str) -> list[Panel]:
    groups = varying(timed(records, "attention", what), "S")
    return [Panel(title(key), group, "S", lambda r: r["tflops"], "TFLOP/s") for key, group in groups.items()]


def decode(records: Sequence[Record]) -> list[Panel]:
    graphs = timed(records, "decode", "graph")
    panels: list[Panel] = []
    for axis in ("B", "P"):
        for key, group in varying(graphs, axis).items():
            if len({r["case"][axis] for r in group}) > 2:
                panels.append(Panel(title(key), group, axis, lambda r: 1e6 * r["median"], "us"))
                panels.append(Panel(title(key), group, axis, lambda r: 100 * r["of_copy"], "% of a copy"))
    return panels


def memory(records: Sequence[Record]) -> list[Panel]:
    panels: list[Panel] = []
    for what in ("forward", "both"):
        for key, group in varying(timed(records, "memory", what), "P").items():
            panels.append(Panel(f"{what}, {title(key)}", group, "P", lambda r: r["extra"] / 1e6, "MB"))
    return panels


def draw(panels: Sequence[Panel], path: Path) -> None:
    """One picture; the same way has the same colour and mark in every panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.8 * columns, 3.6 * rows), squeeze=False)
    ways = list(dict.fromkeys(r["way"] for panel in panels for r in panel.records))
    for axis, panel in zip(axes.flat, panels):
        lines = curves(panel)
        for way, (xs, ys) in lines.items():
            i = ways.index(way)
            ours = way.startswith(("triton", "composed"))
            axis.plot(xs, ys, label=way, color=f"C{i % 10}", marker=MARKS[i % len(MARKS)], linewidth=2.5 if ours else 1)
        # P = 0 has no logarithm, but its place.
        axis.set_xscale(
            "symlog" if panel.axis == "P" else "log", base=2, **({"linthresh": 8} if panel.axis == "P" else {})
        )
        ticks = sorted({x for xs, _ in lines.values() for x in xs})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
        if panel.unit in LOGARITHMIC and all(y > 0 for _, ys in lines.values() for y in ys):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=min(0, *axis.get_ylim()))
        axis.set_xlabel(panel.axis)
        axis.set_ylabel(panel.unit)
        axis.set_title(panel.title, fontsize=8)
        axis.grid(alpha=0.3, which="both")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 7), fontsize=8)
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def figures(records: Sequence[Record]) -> dict[str, list[Panel]]:
    """The panels of every picture that has any."""
    found = {f"attention-{what}": attention(records, what) for what in ("forward", "backward", "both")}
    found |= {"decode": decode(records), "memory": memory(records)}
    return {name: panels for name, panels in found.items() if panels}


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    args = parser.parse_args(arguments)
    records = [line for path in args.results for line in read(path)]
    written = []
    for name, panels in figures(records).items():
        written.append(args.out / f"{name}.png")
        draw(panels, written[-1])
        print(written[-1])
    return written


if __name__ == "__main__":
    main()
