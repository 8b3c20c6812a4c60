"""Tables and pictures of what benchmarks.e2e measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from prefix_attn.metrics import METRICS

Run = dict[str, Any]


def read(path: Path) -> list[Run]:
    """The runs in a file of results."""
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
    return runs


def table(runs: Sequence[Run]) -> str:
    """Markdown: one row for each method and its settings, mean and standard deviation over seeds."""
    header = ["method", "settings", "seeds", "trainable", "first loss", "last loss", "s/step", *METRICS]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for (method, settings), group in _groups(runs).items():
        share = f"{group[0]['trainable_parameters']:,} ({group[0]['trainable_share']:.3%})"
        cells = [method, settings, str(len(group)), share]
        cells += [_spread([run["validation"][i][1] for run in group], 3) for i in (0, -1)]
        cells.append(_spread([run["seconds_per_step"] for run in group if "seconds_per_step" in run], 2))
        cells += [
            _spread([run["metrics"][name] for run in group if name in run.get("metrics", {})], 2) for name in METRICS
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _groups(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        hidden = ("train", "test", "model")  # the same in all runs of a file that is worth a table
        shown = {name: value for name, value in run["settings"].items() if name not in hidden and value is not None}
        settings = ", ".join(f"{name} {value}" for name, value in shown.items())
        groups.setdefault((run["method"], settings), []).append(run)
    return groups


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def plot(runs: Sequence[Run], out: Path) -> None:
    """Validation loss against steps: the seeds' mean as a line, their range as a band, frozen as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    groups = _groups(runs)
    methods = [method for method, _ in groups]
    for (method, settings), group in groups.items():
        label = f"{method} ({settings})" if methods.count(method) > 1 else method
        if method == "frozen":
            axes.axhline(group[0]["validation"][0][1], color="grey", linestyle="--", label="frozen, no prefix")
            continue
        steps = [step for step, _ in group[0]["validation"]]
        curves = list(zip(*([loss for _, loss in run["validation"]] for run in group), strict=True))
        (line,) = axes.plot(steps, [mean(values) for values in curves], label=f"{label}, {_seeds(group)}")
        low, high = [min(values) for values in curves], [max(values) for values in curves]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="training step", ylabel="validation loss (nats per target token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def _seeds(group: Sequence[Run]) -> str:
    return "1 seed" if len(group) == 1 else f"{len(group)} seeds"
