"""The Hugging Face Trainer with our losses. ``train`` and ``distill`` run it through ``train.fit``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from prefix_attn.training.evaluate import target_loss
from prefix_attn.training.tokens import IGNORED, Batch

Objective = Callable[[Any, Batch], Tensor]  # from a model and a batch


class PrefixTrainer(Trainer):
    """A Trainer with our loss and our validation loss."""

    def __init__(
        self, *, objective: Objective | None = None, measure: Callable[[], float] | None = None, **options: Any
    ) -> None:
        """Options are those of Trainer.

        Args:
            objective: the mean loss of a model over the targets of a batch. Default: ``target_loss``.
            measure: returns the current validation loss.
            options: of Trainer.
        """
        # The Trainer wants rows to evaluate on. ``measure`` has its own.
        super().__init__(eval_dataset=None if measure is None else [], **options)
        self.objective, self.measure = objective, measure
        self.model_accepts_loss_kwargs = True  # compute_loss weights by tokens; the Trainer would by batches too
        # These would print dictionaries between the bars.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The batches of a step and the number of their targets, in all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum((self._targets(batch) for batch in samples), torch.zeros((), dtype=torch.int64, device=device))
        return samples, self.accelerator.reduce(count)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The share of ``inputs`` in the mean loss over the targets of a step."""
        if self.objective is None and model is not self.model:  # a wrapper that spreads the model over several devices
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = target_loss(model, inputs) if self.objective is None else self.objective(model, inputs)
        if num_items_in_batch is None:
            return loss
        # Processes average their gradients. With one batch a step the factor is 1.
        return loss * (self._targets(inputs) * self.accelerator.num_processes / num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The validation loss, in the Trainer's log. Checkpoints contain the log, so a resumed run has the curve."""
        assert self.measure is not None
        metrics = {"eval_loss": self.measure()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _targets(self, batch: Batch) -> Tensor:
        """The number of tokens that have a loss."""
        if "labels" not in batch:
            return batch["attention_mask"].sum()
        labels = batch["labels"] if self.model.config.is_encoder_decoder else batch["labels"][:, 1:]
        return (labels != IGNORED).sum()


class EarlyStopping(TrainerCallback):
    """Ends a training after ``patience`` validations in a row without a lower loss.

    It counts in the Trainer's log. The counter of transformers' EarlyStoppingCallback begins anew in a resumed run, or
    comes back with the old patience, and a run that did not have the callback cannot be resumed with it.
    """

    def __init__(self, patience: int) -> None:
        """``patience`` is at least 1."""
        self.patience = patience

    def is_over(self, state: TrainerState) -> bool:
        """Whether so many validations have passed since the best one."""
        best = state.best_global_step or 0
        return sum(entry["step"] > best for entry in state.log_history if "eval_loss" in entry) >= self.patience

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Checkpoints follow validations."""
        if self.is_over(state):
            control.should_training_stop = True


class Intervals(TrainerCallback):
    """Takes the intervals from the arguments. The Trainer would take those that a checkpoint was written with."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """After a checkpoint was loaded."""
        state.compute_steps(args, state.max_steps)


class Bar(TrainerCallback):
    """A progress bar that shows the loss of the last step."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Show it."""
        from tqdm import tqdm

        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """One step more."""
        self.bar.update()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the loss."""
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Close it."""
        self.bar.close()
