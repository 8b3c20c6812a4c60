"""What a run finds in its folder: the checkpoints of the run before, and with what that was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.io.files import read_json
from prefix_attn.hf.io.writing import replace
from prefix_attn.training import prompts
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.row_file import digest
from prefix_attn.training.settings import TrainingSettings, default_learning_rate

if TYPE_CHECKING:
    from prefix_attn.training.tokens import Row

FILE = "settings.json"
Facts = Mapping[str, Any]  # what a training must have in common with that which it goes on with

SETTINGS = ("batch_size", "gradient_accumulation_steps", "max_length", "packing", "seed")
PREFIX = (
    *("num_virtual_tokens", "mode", "sites", "layers", "gate", "num_frozen_tokens", "position_mode", "dropout"),
    *("prefix_projection", "encoder_hidden_size", "encoder_depth", "encoder_activation", "modules_to_save"),
    *("init", "init_path"),
)


def checkpoints(output: Path) -> dict[int, Path]:
    """The complete checkpoints by their step. The Trainer writes trainer_state.json last: a killed one lacks it."""
    found = {}
    for path in output.glob("checkpoint-*"):
        try:
            step = read_json(path / "trainer_state.json").get("global_step")
        except (OSError, ValueError, TypeError, KeyError):  # none, half of it, or something else
            continue
        if isinstance(step, int):
            found[step] = path
    return found


def last_checkpoint(output: Path) -> Path | None:
    """The complete checkpoint of the latest step."""
    found = checkpoints(output)
    return found[max(found)] if found else None


def facts_of_settings(settings: TrainingSettings, config: PrefixConfig) -> dict[str, Any]:
    """The settings that change what each step does. Lengths, intervals and what is kept do not.

    A ``max_length`` that is not known yet is left out.
    """
    rate = settings.learning_rate
    facts = {name: value for name in SETTINGS if (value := getattr(settings, name)) is not None}
    return facts | {"learning_rate": default_learning_rate(config) if rate is None else rate}


def facts_of_training(
    settings: TrainingSettings,
    config: PrefixConfig,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    prompt: Prompt | None,
) -> dict[str, Any]:
    """All facts. ``config`` is that of the model's prefix, with its defaults filled in."""
    values = config.to_dict()
    prefix = {name: values[name] for name in PREFIX}
    data = {"training_data": digest(rows), "validation_data": digest(held_out) if held_out else None}
    return facts_of_settings(settings, config) | prefix | asdict(prompt or Prompt()) | data


def find_checkpoint(settings: TrainingSettings, facts: Facts) -> Path | None:
    """The checkpoint that a training goes on from. None: it begins from the start.

    Raises:
        ValueError: the folder has checkpoints, and this is not to go on with them, or differs in some of ``facts``.
    """
    last = last_checkpoint(settings.output)
    if last is None:
        return None
    if not settings.resume:
        # They would stay among those of the new training, and a later resume could pick one of them.
        raise ValueError(f"{settings.output}: holds checkpoints of another training; resume it, or take another folder")
    before: dict[str, Any] = {}
    for name in (FILE, prompts.FILE):
        before |= read_json(settings.output / name) if (settings.output / name).is_file() else {}
    check_same(settings.output, before, facts)
    return last


def check_same(output: Path, before: Facts, facts: Facts) -> None:
    """Refuse ``facts`` of a run in ``output`` that differ from those of ``before``, and say in what."""
    now = json.loads(json.dumps(facts))
    if changed := [name for name in now if name in before and before[name] != now[name]]:
        listed = "; ".join(f"{name} was {_shown(before[name])} and is {_shown(now[name])}" for name in changed)
        raise ValueError(
            f"{output}: cannot go on with other settings: {listed}. Take those of the run, or another folder"
        )


def with_length_of_before(settings: TrainingSettings) -> TrainingSettings:
    """``settings`` with the ``max_length`` of the run that they go on with, if they leave it open."""
    file = settings.output / FILE
    if settings.max_length is not None or not settings.resume or not file.is_file():
        return settings
    return replace_fields(settings, max_length=read_json(file).get("max_length"))


def keep(output: Path, facts: Facts, name: str = FILE) -> None:
    """Write ``facts`` for ``find_checkpoint``, or under another name for ``check_same``."""
    output.mkdir(parents=True, exist_ok=True)
    replace(output / name, json.dumps(facts, indent=2, ensure_ascii=False).encode())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]}...{text[-1]}"
