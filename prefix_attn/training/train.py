"""Train a prefix with the Hugging Face Trainer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from prefix_attn.hf.io.writing import replace
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.evaluate import validation_loss
from prefix_attn.training.examples import Example
from prefix_attn.training.packing import check_packing, pack
from prefix_attn.training.prompts import FILE, Prompt
from prefix_attn.training.resume import last_checkpoint
from prefix_attn.training.row_file import RowFile
from prefix_attn.training.settings import TrainingSettings, default_learning_rate
from prefix_attn.training.tokens import DEFAULT, Collator, Encoder, Row, batches, encode
from prefix_attn.training.trainer import EarlyStopping, Intervals, Objective, PrefixTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WARMUP = 20  # steps
VALIDATION_BATCH = 16
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
        ``cut`` (rows whose source was too long), ``steps``, ``best_step`` (of the lowest validation loss after step 0),
        ``kept_step`` (that of the saved prefix), ``trainable_parameters`` and their ``trainable_share``.

    Raises:
        ValueError: there are no examples, or none to validate on where the best prefix is to be kept; a target does not
            fit into ``max_length``; there is nothing to resume from, or ``settings.output`` holds checkpoints of
            another training.
        FloatingPointError: a loss, a gradient or the prefix is not finite. What was saved before is left as it is.
        OSError: a checkpoint cannot be written.
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
    measure = partial(validation_loss, model, batches(held_out, VALIDATION_BATCH, pad_id)) if held_out else None
    return fit(model, rows, pad_id, measure, settings, prompt=prompt, extra={"cut": cut})


def fit(
    model: PrefixModel,
    rows: Sequence[Row],
    pad_id: int,
    measure: Callable[[], float] | None,
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
        measure: returns the current validation loss. None: there is nothing to measure it on.
        settings: how to train.
        objective: the loss of the model on a batch. Default: ``target_loss``.
        prompt: what stands around the inputs in ``rows``. It is saved beside the prefix.
        extra: added to the metrics.
    """
    if settings.keeps_best and measure is None:
        name = "early_stopping" if settings.early_stopping else "load_best_model_at_end"
        raise ValueError(f"{name} needs rows to validate on, and there are none")
    checkpoint = _checkpoint(settings)
    if prompt is not None:
        _keep(prompt, settings)
    if settings.gradient_checkpointing:
        set_checkpointing(model, use_reentrant=False)
    trainer = _trainer(model, rows, pad_id, measure, settings, objective)
    trainer.args.eval_on_start = measure is not None and checkpoint is None
    _run(trainer, settings, checkpoint)
    metrics = {**_metrics(trainer, model, settings), **extra}
    model.save_pretrained(settings.output)
    replace(settings.output / "metrics.json", json.dumps(metrics, indent=2).encode())
    plot(metrics, settings.output / "loss.png")
    return metrics


def _trainer(
    model: PrefixModel,
    rows: Sequence[Row],
    pad_id: int,
    measure: Callable[[], float] | None,
    settings: TrainingSettings,
    objective: Objective | None,
) -> PrefixTrainer:
    callbacks: list[TrainerCallback] = [Intervals()]
    if settings.early_stopping is not None:
        callbacks.append(EarlyStopping(settings.early_stopping))
    trainer = PrefixTrainer(
        objective=objective,
        measure=measure,
        model=model,
        args=_arguments(model, settings, validates=measure is not None),
        train_dataset=rows,
        data_collator=pack if settings.packing else Collator(pad_id),
        callbacks=callbacks,
    )
    steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    trainer.state.max_steps = steps
    trainer.args.warmup_steps = min(WARMUP, steps // 4)
    return trainer


def _run(trainer: PrefixTrainer, settings: TrainingSettings, checkpoint: Path | None) -> None:
    """Train, from ``checkpoint`` on if there is one."""
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    stopped = settings.early_stopping is not None and EarlyStopping(settings.early_stopping).is_over(state)
    if state.global_step < trainer.state.max_steps and not stopped:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    # It was killed after its last step. The Trainer would do one more step before it notices.
    trainer.state = state
    best = settings.output / f"checkpoint-{state.best_global_step}"
    trainer._load_from_checkpoint(str(best if settings.keeps_best and best.is_dir() else checkpoint))


def _metrics(trainer: PrefixTrainer, model: PrefixModel, settings: TrainingSettings) -> dict[str, Any]:
    trainable, total = model.get_nb_trainable_parameters()
    state = trainer.state
    return {
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "kept_step": state.best_global_step if settings.keeps_best else state.global_step,
        "train_loss": [[entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry],
        "validation_loss": [[entry["step"], entry["eval_loss"]] for entry in state.log_history if "eval_loss" in entry],
        "trainable_parameters": trainable,
        "trainable_share": trainable / total,
    }


def _arguments(model: PrefixModel, settings: TrainingSettings, *, validates: bool) -> TrainingArguments:
    config = model.prefix_configs[model.active_prefix or "default"]
    rate = settings.learning_rate
    return TrainingArguments(
        output_dir=str(settings.output),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=default_learning_rate(config) if rate is None else rate,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide them from the log
        eval_strategy="steps" if validates else "no",
        eval_steps=settings.validate_every,
        save_steps=settings.validate_every,
        save_total_limit=2,
        metric_for_best_model="loss" if validates else None,
        greater_is_better=False,
        load_best_model_at_end=settings.keeps_best,
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


def _checkpoint(settings: TrainingSettings) -> Path | None:
    """The checkpoint to resume from. None for a new training."""
    found = last_checkpoint(settings.output)
    if settings.resume and found is None:
        raise ValueError(f"{settings.output}: no checkpoint to resume from")
    if found is not None and not settings.resume:
        # They would stay among those of the new training, and a later resume could pick one of them.
        raise ValueError(f"{settings.output}: holds checkpoints of another training; resume it, or take another folder")
    return found


def _keep(prompt: Prompt, settings: TrainingSettings) -> None:
    """Save ``prompt`` before the first checkpoint, with which it is used too. A resumed training has what it had."""
    before = Prompt.load(settings.output) if (settings.output / FILE).exists() else prompt
    if settings.resume and before != prompt:
        raise ValueError(f"{settings.output}: was trained with {before}, and cannot go on with {prompt}")
    prompt.save(settings.output)


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
