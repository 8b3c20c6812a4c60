"""Tables and plots of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from textwrap import shorten
from typing import Any

from prefix_attn.experiments.results import Result
from prefix_attn.training.metrics import METRICS

AXES = ("step", "virtual_tokens", "examples", "method")
_TITLES = {"bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rougeL": "ROUGE-L", "cider": "CIDEr", "chrf": "chrF++"}
_TITLES |= {"ter": "TER"}
_LAST_STEPS = 10  # over which the training loss is averaged
_LABEL = 56  # maximum length of the label of a bar
_GENERATION = ("test", "limit", "num_beams", "max_new_tokens", "length_penalty")


def table(results: Sequence[Result]) -> str:
    """A Markdown table: one row per method and settings, with mean and standard deviation over seeds and subsets."""
    groups = _groups(results)
    names = [name for name in METRICS if any(name in result.get("metrics", {}) for result in results)]
    columns: dict[str, Callable[[Result], Any]] = {
        "first loss": lambda r: r["validation"][0][1],
        "last loss": _last_loss,
        "training loss": _training_loss,
        "s/step": lambda r: r.get("seconds_per_step"),
    }
    for name in names:
        columns[_TITLES[name]] = lambda r, name=name: r.get("metrics", {}).get(name)
    for part in ("seen", "unseen"):
        if any(f"metrics_{part}" in result for result in results):
            columns[f"BLEU {part}"] = lambda r, part=part: r.get(f"metrics_{part}", {}).get("bleu")
    header = ["method", "settings", "runs", "trained", "stored", *columns]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for (method, settings), group in groups.items():
        shares = [f"{group[0][name]:.3%}" for name in ("trained_share", "stored_share")]
        cells = [_spread([column(r) for r in group]) for column in columns.values()]
        lines.append("| " + " | ".join([method, settings or "-", str(len(group)), *shares, *cells]) + " |")
    return "\n".join(lines)


def _groups(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Group results that differ only in seed and subset, by method and by the settings that are worth showing.

    A setting is shown if its values differ, or if some other run of the same method lacks it. Settings of generation
    that a run lacks because it generates nothing do not count.
    """
    hidden = {"task", "method", "seed", "subset"}
    settings = [{name: _text(value) for name, value in r["run"].items() if name not in hidden} for r in results]
    for result, found in zip(results, settings):
        if "train_loss" in result:  # what does not name its loop was trained before all methods had the Trainer's
            found["loop"] = result.get("loop", "before the Trainer")
    names = list(dict.fromkeys(name for found in settings for name in found))
    values = {name: {found[name] for found in settings if name in found} for name in names}
    lacking = {
        (result["run"]["method"], name)
        for result, found in zip(results, settings)
        for name in names
        if name not in found and (name not in _GENERATION or "test" in found)
    }
    groups: dict[tuple[str, str], list[Result]] = {}
    for result, found in zip(results, settings):
        method = result["run"]["method"]
        shown = [
            f"{name} {found[name]}"
            for name in names
            if name in found and (len(values[name]) > 1 or (method, name) in lacking)
        ]
        groups.setdefault((method, ", ".join(shown)), []).append(result)
    return groups


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _last_loss(result: Result) -> float:
    """Loss of the parameters that were kept. With few examples, ``validation`` is only for stopping early."""
    return result.get("held_out_loss", result["validation"][-1][1])


def _training_loss(result: Result) -> float | None:
    losses = result.get("train_loss")
    return mean(losses[-_LAST_STEPS:]) if losses else None


def _spread(found: Sequence[float | None]) -> str:
    """Mean and standard deviation, and the number of runs if some have no value."""
    values = [value for value in found if value is not None]
    if not values:
        return "-"
    digits = 1 if max(values) >= 10 else 2 if max(values) >= 5 else 3
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}" + (f" (of {len(values)})" if len(values) < len(found) else "")


def plot(results: Sequence[Result], axis: str, out: Path) -> None:
    """Plot validation loss against steps, or losses and BLEU against another setting, into a PNG.

    Args:
        results: results of any runs.
        axis: "step", "virtual_tokens", "examples" or "method". The last draws a bar per method and settings.
        out: the file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from prefix_attn.hf.io.writing import replace_figure

    if axis not in AXES:
        raise ValueError(f"axis must be one of {AXES}, got {axis!r}")
    measures: dict[str, Callable[[Result], float | None]] = {"validation loss (nats per target token)": _last_loss}
    if axis == "virtual_tokens":
        measures["training loss"] = _training_loss
    if any("metrics" in result for result in results):
        measures["BLEU"] = lambda r: r["metrics"]["bleu"] if "metrics" in r else None
    if axis == "step":
        measures = dict(list(measures.items())[:1])
    width, height = (7 if axis == "step" else 4.6 * len(measures)), 4.2
    if axis == "method":  # the panels share the labels on the left
        width, height = width + 2, 1.2 + 0.3 * len(_labelled(results))
    figure, panels = pyplot.subplots(
        1, len(measures), figsize=(width, height), layout="constrained", squeeze=False, sharey=axis == "method"
    )
    for axes, (name, measure) in zip(panels[0], measures.items()):
        if axis == "step":
            _draw_curves(axes, results)
        elif axis == "method":
            _draw_bars(axes, results, measure)
        else:
            _draw_lines(axes, results, axis, measure)
        (axes.set_xlabel if axis == "method" else axes.set_ylabel)(name)
        axes.grid(alpha=0.3)
        if axis != "method":
            axes.legend(fontsize="small")
    replace_figure(out, figure, dpi=150)
    pyplot.close(figure)


def _draw_curves(axes: Any, results: Sequence[Result]) -> None:
    """Draw the mean over seeds as a line and their range as a band. A method without training is a dashed line."""
    for label, group in _labelled(results).items():
        steps = [step for step, _ in group[0]["validation"]]
        curves = list(zip(*([loss for _, loss in r["validation"]] for r in group)))
        if len(steps) == 1:
            axes.axhline(curves[0][0], color="grey", linestyle="--", label=label)
            continue
        _draw_band(axes, steps, curves, f"{label}, {_count(group)}")
    axes.set_xlabel("training step")


def _draw_lines(axes: Any, results: Sequence[Result], axis: str, measure: Callable[[Result], float | None]) -> None:
    """Draw a line per method over the values of a setting. Methods without that setting are dashed.

    The axis fits the lines only: with the frozen model in view, no difference between the others would be visible.
    """
    methods: dict[str, dict[Any, list[float]]] = {}
    for result in results:
        if (value := measure(result)) is not None:
            methods.setdefault(result["run"]["method"], {}).setdefault(result["run"].get(axis), []).append(value)
    shown, ticks = [], set()
    for method, found in methods.items():
        places = sorted(place for place in found if place is not None)
        if places:
            _draw_band(axes, places, [found[place] for place in places], method, marker="o")
            shown += [value for place in places for value in found[place]]
            ticks.update(places)
        else:
            axes.axhline(mean(found[None]), color="grey", linestyle="--", label=f"{method}: {mean(found[None]):.2f}")
    if shown:
        margin = 0.1 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), sorted(ticks))
    axes.minorticks_off()
    axes.set_xlabel({"virtual_tokens": "virtual tokens", "examples": "training examples"}[axis])


def _draw_bars(axes: Any, results: Sequence[Result], measure: Callable[[Result], float | None]) -> None:
    for place, group in enumerate(_labelled(results).values()):
        values = [value for r in group if (value := measure(r)) is not None]
        if values:
            axes.barh(place, mean(values), xerr=stdev(values) if len(values) > 1 else None, capsize=3)
    labels = [shorten(label, _LABEL, placeholder=" ...") for label in _labelled(results)]
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first is on top


def _draw_band(axes: Any, places: Sequence[float], values: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    (line,) = axes.plot(places, [mean(found) for found in values], label=label, **style)
    low, high = [min(found) for found in values], [max(found) for found in values]
    axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _labelled(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups = _groups(results)
    methods = [method for method, _ in groups]
    return {
        f"{method} ({settings})" if methods.count(method) > 1 and settings else method: group
        for (method, settings), group in groups.items()
    }


def _count(group: Sequence[Result]) -> str:
    return "1 seed" if len(group) == 1 else f"{len(group)} seeds"
