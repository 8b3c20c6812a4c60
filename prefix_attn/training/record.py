"""What a run leaves to read: metrics.json, and its losses as a plot and as a line of text."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prefix_attn import __version__
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.io.writing import replace_figure
from prefix_attn.training.settings import TrainingSettings

WIDTH = 50  # of a line of losses


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch allocated on a GPU; elsewhere the most that this process had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def losses(history: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """``train_loss`` and ``validation_loss`` in a Trainer's log, as [[step, loss], ...]."""
    names = {"train_loss": "loss", "validation_loss": "eval_loss"}
    return {ours: [[e["step"], e[name]] for e in history if name in e] for ours, name in names.items()}


def costs(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Time, tokens and memory of the steps in a Trainer's log.

    Checkpoints contain the log, so the steps of earlier runs that a resumed one goes on from are among them, and steps
    that were lost are not. Time is that of the steps: without validation, checkpoints and loading.
    """
    steps = [entry for entry in history if "seconds" in entry]
    seconds, tokens = sum(e["seconds"] for e in steps), max((e["num_input_tokens_seen"] for e in steps), default=0)
    return {
        "seconds": seconds,
        "seconds_per_step": seconds / len(steps) if steps else None,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
        "peak_memory_bytes": max((e["peak_memory_bytes"] for e in steps), default=None),
    }


def configuration(settings: TrainingSettings, config: PrefixConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, the prefix, the prompt, hashes and versions.

    The text that a prefix starts from may be long, and is in adapter_config.json.
    """
    chosen = {name: value for name, value in asdict(settings).items() if name not in ("output", "resume")}
    prefix = {name: value for name, value in config.to_dict().items() if name not in ("init_text", "init_token_ids")}
    packages = {"torch": torch.__version__, "transformers": version("transformers")}
    return {
        "seed": settings.seed,
        "settings": chosen | {"learning_rate": facts["learning_rate"]},
        "prefix": prefix,
        "prompt": {name: facts[name] for name in ("template", "system", "one_line", "special_tokens")},
        "data_hashes": {name: facts[name] for name in ("training_data", "validation_data")},
        "versions": {"prefix_attn": __version__, "python": platform.python_version(), **packages},
    }


def curve(values: Sequence[float], width: int = WIDTH) -> str:
    """``values`` as blocks of different heights, at most ``width`` of them: each is the mean of those in its place."""
    from prefix_attn.hf.mass import BARS

    count = min(width, len(values))
    parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(BARS[round((mean - low) / ((high - low) or 1) * (len(BARS) - 1))] for mean in means)


def plot(metrics: Mapping[str, Any], path: Path) -> None:
    """Plot training and validation loss against steps into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    if metrics["train_loss"]:
        axes.plot(*zip(*metrics["train_loss"], strict=True), label="training", alpha=0.6)
    if metrics["validation_loss"]:
        axes.plot(*zip(*metrics["validation_loss"], strict=True), label="validation", marker="o")
    axes.set(xlabel="step", ylabel="loss (nats per target token)")
    axes.grid(alpha=0.3)
    axes.legend()
    replace_figure(path, figure, dpi=120)
    pyplot.close(figure)
