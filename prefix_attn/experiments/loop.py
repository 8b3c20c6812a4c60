"""Train any method with the Trainer that ``prefix-attn train`` runs: one loop, one order of rows, one schedule."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from prefix_attn.experiments.results import Result
from prefix_attn.training.evaluate import validation_loss
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.tokens import Batch, Row
from prefix_attn.training.train import make_trainer

NAME = "Trainer"  # in results; those that do not name their loop are of an older one, which did not clip gradients
PATIENCE = 60  # steps without a lower loss on the rows to stop by


def train(
    model: Any,
    rows: Sequence[Row],
    pad_id: int,
    validation: Sequence[Batch],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    validate_every: int,
    seed: int,
    keeps_best: bool = False,
) -> Result:
    """Train what requires a gradient for ``steps`` steps.

    With ``keeps_best`` stop early and restore the step with the lowest loss, the start included.

    Returns:
        Losses, and the time per step without validation.
    """
    watch = Watch([p for p in model.parameters() if p.requires_grad], patience=PATIENCE if keeps_best else None)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingSettings(
            Path(folder), steps, batch_size, learning_rate, validate_every=validate_every, seed=seed
        )
        measure = partial(validation_loss, model, validation)
        trainer = make_trainer(model, rows, pad_id, measure, settings, callbacks=[watch])
        trainer.args.save_strategy, trainer.args.eval_on_start = "no", True
        trainer.train()
    history = trainer.state.log_history
    found = {
        "loop": NAME,
        "train_loss": [entry["loss"] for entry in history if "loss" in entry],
        "validation": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
        "seconds_per_step": watch.seconds / trainer.state.global_step,
    }
    if keeps_best:
        watch.restore()
        found["best_step"] = watch.best_step
    return found


class Watch(TrainerCallback):
    """Times the steps and, with a ``patience``, keeps the parameters with the lowest validation loss so far."""

    def __init__(self, parameters: Sequence[Tensor], patience: int | None) -> None:
        """The patience is in steps, between the lowest loss and the end of the training."""
        self.parameters, self.patience = parameters, patience
        self.saved: list[Tensor] = []
        self.best_loss, self.best_step = float("inf"), 0
        self.seconds = self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock. The last step is followed by a validation."""
        self.seconds += time.perf_counter() - self._start
        control.should_evaluate |= state.global_step >= state.max_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Keep the parameters, or stop."""
        if self.patience is None:
            return
        if metrics["eval_loss"] < self.best_loss:
            self.best_loss, self.best_step = metrics["eval_loss"], state.global_step
            self.saved = [p.detach().clone() for p in self.parameters]
        elif state.global_step - self.best_step >= self.patience:
            control.should_training_stop = True

    @torch.no_grad()
    def restore(self) -> None:
        """Set the parameters to those that were kept."""
        for saved, parameter in zip(self.saved, self.parameters):
            parameter.copy_(saved)
