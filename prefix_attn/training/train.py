"""Train a prefix with the Hugging Face Trainer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from prefix_attn.hf.io.files import replace
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.evaluate import target_loss, validation_loss
from prefix_attn.training.examples import Example
from prefix_attn.training.packing import check_packing, pack
from prefix_attn.training.prompts import FILE, Prompt
from prefix_attn.training.row_file import RowFile
from prefix_attn.training.settings import TrainingSettings, default_learning_rate
from prefix_attn.training.tokens import DEFAULT, Batch, Collator, Encoder, Row, batches, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WARMUP = 20  # steps
VALIDATION_BATCH = 16
Objective = Callable[[Any, Batch], Tensor]  # from a model and a batch
_log = logging.getLogger(__name__)


def train(
    model: PrefixModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    validation: Iterable[Example],
    settings: TrainingSettings,
    *,
    prompt: Prompt = DEFAULT,
    skip_bad_rows: bool = False,
) -> dict[str, Any]:
    """Train the active prefix of ``model`` and save it into ``settings.output``.

    It uses AdamW without weight decay, with linear warm-up and decay, and bfloat16 autocast on devices with bfloat16
    units. The folder also gets prompt.json, metrics.json and loss.png. ``skip_bad_rows`` leaves out rows whose target
    does not fit.

    Returns:
        ``train_loss`` [[step, loss], ...], ``validation_loss`` in the same form from step 0 on (nats per target token),
        ``cut`` (rows whose source was too long), ``steps``, ``trainable_parameters`` and their ``trainable_share``.

    Raises:
        ValueError: there are no examples, a target does not fit into ``max_length``, there is nothing to resume from,
            or ``settings.output`` holds checkpoints of another training.
    """
    longest, options = settings.max_length, {"prompt": prompt, "encoder_decoder": model.config.is_encoder_decoder}
    encoder = Encoder(tokenizer, longest, **options)
    rows = RowFile(encoder.rows(examples, skip_bad_rows=skip_bad_rows), settings.output)
    if not rows:
        raise ValueError("no examples to train on")
    if cut := encoder.cut:
        _log.warning("%d of %d rows have a source longer than max_length=%d: cut", cut, len(rows), longest)
    held_out = encode(tokenizer, validation, longest, skip_bad_rows=skip_bad_rows, **options)[0]
    if settings.packing:
        check_packing(model, rows)
    pad_id = tokenizer.pad_token_id
    held_out_batches = batches(held_out, VALIDATION_BATCH, pad_id)
    measure = partial(validation_loss, model, held_out_batches) if held_out else lambda: None
    return fit(model, rows, pad_id, measure, settings, prompt=prompt, extra={"cut": cut})


def fit(
    model: PrefixModel,
    rows: Sequence[Row],
    pad_id: int,
    measure: Callable[[], float | None],
    settings: TrainingSettings,
    *,
    objective: Objective | None = None,
    prompt: Prompt | None = None,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Run the Trainer, then save the prefix, metrics and plot. ``train`` and ``distill`` share this.

    Args:
        model: its active prefix is trained and saved.
        rows: the training data.
        pad_id: token that pads the rows of a batch.
        measure: returns the current validation loss, or None if there is nothing to measure it on.
        settings: how to train.
        objective: the loss of the model on a batch. Default: ``target_loss``.
        prompt: what stands around the inputs in ``rows``. It is saved beside the prefix.
        extra: added to the metrics.
    """
    checkpoint = _checkpoint(settings)
    if prompt is not None:
        _keep(prompt, settings)
    if settings.gradient_checkpointing:
        set_checkpointing(model, use_reentrant=False)
    trainer = _Trainer(
        model=model,
        args=_arguments(model, settings),
        train_dataset=rows,
        data_collator=pack if settings.packing else Collator(pad_id),
        callbacks=[_Validation(measure)],
    )
    trainer.objective = objective
    # The Trainer's own callbacks would print dictionaries between the bars.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar())
    if checkpoint is not None and (_step(Path(checkpoint)) or 0) >= settings.steps:
        # It was killed after its last step. The Trainer would do one more step before it notices.
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        trainer._load_from_checkpoint(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainable, total = model.get_nb_trainable_parameters()
    history = trainer.state.log_history
    metrics = {
        "steps": trainer.state.global_step,
        "train_loss": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "validation_loss": [[e["step"], e["validation_loss"]] for e in history if "validation_loss" in e],
        "trainable_parameters": trainable,
        "trainable_share": trainable / total,
        **extra,
    }
    model.save_pretrained(settings.output)
    replace(settings.output / "metrics.json", json.dumps(metrics, indent=2).encode())
    plot(metrics, settings.output / "loss.png")
    return metrics


def _arguments(model: PrefixModel, settings: TrainingSettings) -> TrainingArguments:
    config = model.prefix_configs[model.active_prefix or "default"]
    rate = settings.learning_rate
    return TrainingArguments(
        output_dir=str(settings.output),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=default_learning_rate(config) if rate is None else rate,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        warmup_steps=min(WARMUP, settings.steps // 4),
        logging_steps=1,
        save_steps=settings.validate_every,
        save_total_limit=2,
        seed=settings.seed,
        bf16=has_bfloat16(model.device),
        use_cpu=model.device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type == "cuda",
        report_to="none",
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has bfloat16 units. Emulated bfloat16 is several times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _checkpoint(settings: TrainingSettings) -> str | None:
    """The checkpoint to resume from. None for a new training."""
    complete = {path: step for path in settings.output.glob("checkpoint-*") if (step := _step(path)) is not None}
    if settings.resume and not complete:
        raise ValueError(f"{settings.output}: no checkpoint to resume from")
    if complete and not settings.resume:
        # They would stay among those of the new training, and a later resume could pick one of them.
        raise ValueError(f"{settings.output}: holds checkpoints of another training; resume it, or take another folder")
    return str(max(complete, key=complete.__getitem__)) if complete else None


def _keep(prompt: Prompt, settings: TrainingSettings) -> None:
    """Save ``prompt`` before the first checkpoint, with which it is used too. A resumed training has what it had."""
    before = Prompt.load(settings.output) if (settings.output / FILE).exists() else prompt
    if settings.resume and before != prompt:
        raise ValueError(f"{settings.output}: was trained with {before}, and cannot go on with {prompt}")
    prompt.save(settings.output)


def _step(checkpoint: Path) -> int | None:
    """Step of a complete checkpoint. The Trainer writes this file last, so a killed one lacks it or has part of it."""
    try:
        return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError):
        return None


class _Trainer(Trainer):
    """A Trainer with our loss."""

    objective: Objective | None = None

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        if self.objective is not None:
            return self.objective(model, inputs)
        if model is self.model:
            return target_loss(model, inputs)
        # A wrapper that spreads the model over several devices.
        return super().compute_loss(model, inputs, *args, **kwargs)


class _Validation(TrainerCallback):
    """Measures the validation loss at step 0, before every checkpoint and at the end.

    The loss goes into the Trainer's log. Checkpoints contain the log, so a resumed training has the whole curve.
    """

    def __init__(self, measure: Callable[[], float | None]) -> None:
        self.measure = measure

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % args.save_steps == 0 or state.global_step == state.max_steps:
            self._measure(state)

    def _measure(self, state: Any) -> None:
        if (loss := self.measure()) is not None:
            state.log_history.append({"step": state.global_step, "validation_loss": loss})


class _Bar(TrainerCallback):
    """A progress bar that shows the loss of the last step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def plot(metrics: dict[str, Any], path: Path) -> None:
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
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
