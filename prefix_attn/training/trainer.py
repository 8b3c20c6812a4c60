"""The Hugging Face Trainer with our losses. ``train`` and ``distill`` run it through ``train.fit``."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from prefix_attn.hf.attach.ranks import is_first
from prefix_attn.training.evaluate import target_loss
from prefix_attn.training.memory import give_back
from prefix_attn.training.ranks import sums
from prefix_attn.training.record import peak_memory
from prefix_attn.training.resume import last_checkpoint
from prefix_attn.training.tokens import IGNORED, Batch

_log = logging.getLogger(__name__)
Objective = Callable[[Any, Batch], Tensor]  # from a model and a batch

# The Trainer reads the optimizer's state onto the device of its process. Without GPUs accelerate calls that "cpu:0",
# which torch.save's tags know as "cpu" alone: no run of several processes could be resumed.
torch.serialization.register_package(
    100, lambda _: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


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
        self.bar = Bar()
        self.add_callback(self.bar)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer has it. The bar is closed whatever happens, so that an error has a line of its own."""
        self._since = time.perf_counter()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.bar.close()

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
        loss = target_loss(model, inputs) if self.objective is None else self.objective(model, inputs)
        self._give_back()
        if num_items_in_batch is None:
            return loss
        # Processes average their gradients. With one batch a step the factor is 1.
        return loss * (self._targets(inputs) * self.accelerator.num_processes / num_items_in_batch)

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of one batch.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._give_back()
        if not loss.isfinite().all():
            raise not_finite(self, self.state.global_step + 1, f"the loss is {float(loss)}, not finite")
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            raise not_finite(self, self.state.global_step + 1, f"the norm of the gradient is {float(norm)}, not finite")
        if norm == 0 and self.state.global_step == 0:
            raise ValueError(
                "no gradient reaches the prefix: it is 0 in the first step. The weights of the base model let none "
                "through, as quantised ones may, or its outputs are the same whatever the prefix is"
            )
        return norm

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        step, folder = self.state.global_step, self.args.output_dir
        if is_first() and not Path(folder).is_dir():  # the Trainer would make one for this checkpoint alone
            raise FileNotFoundError(f"{folder}: the folder disappeared during the training; stopped at step {step}")
        if not_finite_parameters(self.model):
            raise not_finite(self, step, "the prefix is not finite")
        try:
            with self.bar.showing("saving"):
                super()._save_checkpoint(*args, **kwargs)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder}: the checkpoint of step {step} cannot be written ({error})") from error
        self._since = time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the costs of a step to its loss. Each step has an entry."""
        if "loss" in logs:
            seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
            logs |= {"seconds": seconds, "peak_memory_bytes": peak_memory(self.args.device)}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The validation loss, in the Trainer's log. Checkpoints contain the log, so a resumed run has the curve.

        Raises:
            FloatingPointError: it is not finite.
        """
        assert self.measure is not None
        with self.bar.showing("validating"):
            metrics = {"eval_loss": self.measure()}
        if not math.isfinite(metrics["eval_loss"]):
            raise not_finite(self, self.state.global_step, f"the validation loss is {metrics['eval_loss']}, not finite")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since = time.perf_counter()
        return metrics

    def _give_back(self) -> None:
        if self.model.device.type == "cpu" and self.model.is_gradient_checkpointing:
            give_back()

    def _targets(self, batch: Batch) -> Tensor:
        """The number of tokens that have a loss."""
        if "labels" not in batch:
            return batch["attention_mask"].sum()
        labels = batch["labels"] if self.model.config.is_encoder_decoder else batch["labels"][:, 1:]
        return (labels != IGNORED).sum()


def not_finite(trainer: Trainer, step: int, found: str) -> FloatingPointError:
    """The error of a training that ends at ``step`` because of what was ``found``: why, and what is left."""
    rate = f"take a lower learning rate than {trainer.args.learning_rate:g}"
    if bad := not_finite_parameters(trainer.model):
        cause = f"an update made {bad[0]} overflow: {rate}"
    elif step <= 1:
        cause = "nothing is trained yet: it is the base model, its dtype, or where the prefix starts"
    else:
        cause = f"what is trained is finite: {rate}, or look at the data and at the base model's dtype"
    kept = last_checkpoint(Path(trainer.args.output_dir))
    left = f"the last good prefix is {kept}" if kept else "no prefix was saved before"
    return FloatingPointError(f"step {step}: {found}; {cause}; {left}")


def not_finite_parameters(model: torch.nn.Module) -> list[str]:
    """The names of trainable parameters with a number that is not finite. A sum over each is enough to see it."""
    trained = ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)
    return [name for name, p in trained if not p.sum(dtype=torch.float32).isfinite()]


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
            _log.warning(
                "no lower validation loss in %d validations: ends at step %d", self.patience, state.global_step
            )
            control.should_training_stop = True


class StopWhenTold(TrainerCallback):
    """Saves a checkpoint after the step in which a signal came, and ends the training."""

    def __init__(self, noted: Sequence[int]) -> None:
        """``noted`` are the signals that came."""
        self.noted = noted

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """After each step. All processes end after the same one: a signal comes to each at its own time."""
        if sums(len(self.noted), device=args.device)[0]:
            control.should_save = control.should_training_stop = True


class Intervals(TrainerCallback):
    """Takes the intervals from the arguments. The Trainer would take those that a checkpoint was written with."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """After a checkpoint was loaded."""
        state.compute_steps(args, state.max_steps)


class WhenItBegins(TrainerCallback):
    """Calls something after a checkpoint was loaded, and before the first validation and step."""

    def __init__(self, then: Callable[[], None]) -> None:
        """``then`` is called by every process."""
        self._then = then

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Call it."""
        self._then()


class Bar(TrainerCallback):
    """A progress bar with step, time left, losses and tokens per second. It says what else takes time."""

    def __init__(self) -> None:
        """It is shown when training begins, by the first process."""
        self._bar: Any = None
        self._shown: dict[str, str] = {}
        self._seconds, self._tokens = 0.0, 0  # of this run; tokens: those before it

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Show it."""
        from tqdm.auto import tqdm

        self._seconds, self._tokens = 0.0, state.num_input_tokens_seen
        done, shown = state.global_step, state.is_world_process_zero
        self._bar = tqdm(total=state.max_steps, initial=done, desc="training", unit="step", disable=not shown)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """One step more."""
        self._bar.update()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """Show what is new, when the bar is drawn again."""
        if "seconds" in logs:
            self._seconds += logs["seconds"]
            rate = (state.num_input_tokens_seen - self._tokens) / self._seconds
            self._shown |= {"loss": f"{logs['loss']:.3f}", "tokens/s": f"{rate:,.0f}"}
        if "eval_loss" in logs:
            self._shown["validation"] = f"{logs['eval_loss']:.3f}"
        self._bar.set_postfix(self._shown, refresh=False)

    @contextmanager
    def showing(self, what: str) -> Iterator[None]:
        """Say ``what`` is done instead of training."""
        self._bar.set_description(what)
        yield
        self._bar.set_description("training")

    def close(self) -> None:
        """Leave it as it is."""
        if self._bar is not None:
            self._bar.close()
