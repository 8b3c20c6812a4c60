"""The settings of one training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    ``learning_rate`` defaults to 3e-2 for a flat prefix and to 1e-3 for an MLP. Every ``validate_every`` steps the
    validation loss is measured and a checkpoint is written. ``resume`` continues, bit for bit, from the last complete
    checkpoint in ``output``.
    """

    output: Path
    steps: int = 200
    batch_size: int = 8
    learning_rate: float | None = None
    max_length: int = 96
    validate_every: int = 50
    seed: int = 0
    resume: bool = False
    gradient_checkpointing: bool = False
