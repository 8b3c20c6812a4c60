"""Train a prefix with the Hugging Face Trainer."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from prefix_attn.hf.attach.ranks import is_first
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.io.writing import replace
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.evaluate import validation_loss
from prefix_attn.training.examples import Example
from prefix_attn.training.interrupt import Interrupted, signals_noted
from prefix_attn.training.memory import longest_rows
from prefix_attn.training.packing import check_packing, pack
from prefix_attn.training.positions import check_rows
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.record import configuration, costs, losses, plot
from prefix_attn.training.resume import (
    Facts,
    facts_of_settings,
    facts_of_training,
    find_checkpoint,
    keep,
    with_length_of_before,
)
from prefix_attn.training.row_file import RowFile
from prefix_attn.training.settings import TrainingSettings, default_learning_rate
from prefix_attn.training.tokens import DEFAULT, Batch, Collator, Encoder, Row, batches
from prefix_attn.training.trainer import (
    EarlyStopping,
    Intervals,
    Objective,
    PrefixTrainer,
    StopWhenTold,
    WhenItBegins,
)

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
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the active prefix of ``model`` and save it into ``settings.output``.

    It uses AdamW without weight decay, with linear warm-up and decay, and bfloat16 autocast on devices with bfloat16
    units. The folder also gets prompt.json, metrics.json and loss.png. ``skip_bad_rows`` leaves out rows whose target
    does not fit. ``options`` are kept in run.yaml, those of ``settings`` with the values that were used.

    Returns:
        What metrics.json has: ``train_loss`` [[step, loss], ...], ``validation_loss`` in the same form from step 0 on
        (nats per target token), ``cut`` (rows whose source was too long), ``steps``, ``best_step`` (of the lowest
        validation loss after step 0), ``kept_step`` (that of the saved prefix), ``trainable_parameters`` and their
        ``trainable_share``, and what ``record.costs`` and ``record.configuration`` say.

    Raises:
        ValueError: there are no examples, or none to validate on where the best prefix is to be kept; nothing of the
            prefix is trainable, or no gradient reaches it; a target does not
            fit into ``max_length``; ``settings.output`` holds checkpoints of another training, or of one with other
            settings or data.
        FloatingPointError: a loss, a gradient or the prefix is not finite. What was saved before is left as it is.
        OSError: a checkpoint cannot be written.
        Interrupted: SIGINT or SIGTERM came. The step was finished, and a checkpoint and the prefix were saved.
    """
    from tqdm.auto import tqdm

    settings = with_length_of_before(settings)
    find_checkpoint(settings, facts_of_settings(settings, _config(model)))  # early: what follows takes time
    longest, why = _longest(model, settings)
    chosen = {"prompt": prompt, "encoder_decoder": model.config.is_encoder_decoder}
    encoder, other = (Encoder(tokenizer, longest, **chosen) for _ in range(2))
    shown = tqdm(examples, desc="reading and tokenising", unit=" rows", leave=False)
    rows = RowFile(encoder.rows(shown, skip_bad_rows=skip_bad_rows), settings.output)
    if not rows:
        raise ValueError("no examples to train on")
    held_out = list(other.rows(validation, skip_bad_rows=skip_bad_rows, name="validation data"))
    settings = dataclasses.replace(settings, max_length=settings.max_length or max(encoder.longest, other.longest))
    _say_length(encoder, len(rows), settings, why)
    if settings.packing:
        check_packing(model, rows)
    pad_id = tokenizer.pad_token_id
    measure = partial(validation_loss, model, batches(held_out, VALIDATION_BATCH, pad_id)) if held_out else None
    kept = {"held_out": held_out, "prompt": prompt, "options": options}
    return fit(model, rows, pad_id, measure, settings, **kept, extra={"cut": encoder.cut})


def _longest(model: PrefixModel, settings: TrainingSettings) -> tuple[int, str]:
    """How many tokens a row may have, and what says so."""
    if settings.max_length is not None:
        check_rows(model, settings.max_length)
        return settings.max_length, "max_length"
    return longest_rows(
        model,
        settings.batch_size,
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=has_bfloat16(model.device),
    )


def _say_length(encoder: Encoder, count: int, settings: TrainingSettings, why: str) -> None:
    """Say how long rows are, and what is cut."""
    _log.info("%d rows, the longest of %d tokens; max_length=%d", count, encoder.longest, settings.max_length)
    if encoder.cut:
        _log.warning(
            "%d of %d rows have a source that is too long for max_length=%d, by up to %d tokens: its end is cut%s",
            *(encoder.cut, count, settings.max_length, encoder.cut_most),
            "" if why == "max_length" else f" ({why})",
        )


def fit(
    model: PrefixModel,
    rows: Sequence[Row],
    pad_id: int,
    measure: Callable[[], float] | None,
    settings: TrainingSettings,
    *,
    held_out: Sequence[Row] = (),
    task: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
    collator: Callable[[Sequence[Any]], Batch] | None = None,
    prompt: Prompt | None = None,
    options: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Run the Trainer, then save the prefix, metrics and plot. ``train`` and ``distill`` share this.

    Args:
        model: its active prefix is trained and saved.
        rows: the training data.
        pad_id: token that pads the rows of a batch.
        measure: returns the current validation loss. None: there is nothing to measure it on.
        settings: how to train.
        held_out: what ``measure`` looks at. A resumed training must have the same.
        task: what else it must have.
        objective: the loss of the model on a batch. Default: ``target_loss``.
        collator: makes a batch of rows. Default: ``Collator``, or ``pack``.
        prompt: what stands around the inputs in ``rows``. It is saved beside the prefix.
        options: of the command line. They are saved beside the prefix, as run.yaml.
        extra: added to the metrics.
    """
    if settings.keeps_best and measure is None:
        name = "early_stopping" if settings.early_stopping else "load_best_model_at_end"
        raise ValueError(f"{name} needs rows to validate on, and there are none")
    if not model.get_nb_trainable_parameters()[0]:
        raise ValueError(f"nothing to train: all {_config(model).num_virtual_tokens} virtual tokens are frozen")
    ranks = PartialState(cpu=model.device.type == "cpu")  # joins the other processes of torchrun
    facts = facts_of_training(settings, _config(model), rows, held_out, prompt)
    facts |= {"dtype": str(model.dtype).removeprefix("torch."), "quantization": _quantization(model), **(task or {})}
    facts["processes"] = ranks.num_processes
    checkpoint = find_checkpoint(settings, facts)
    if checkpoint is None and settings.resume:
        _log.warning("%s: no checkpoint to resume from: training begins from the start", settings.output)
    if settings.gradient_checkpointing:
        set_checkpointing(model, use_reentrant=False)
    record = partial(_record, settings, facts, prompt, options)
    with signals_noted() as noted:
        callbacks = [WhenItBegins(record), StopWhenTold(noted)]
        trainer = make_trainer(model, rows, pad_id, measure, settings, objective, callbacks, collator)
        trainer.args.eval_on_start = measure is not None and checkpoint is None
        finished = _run(trainer, settings, checkpoint, record)
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # or it would stay under autocast
        stopped = signal.Signals(noted[0]).name if noted and not finished else None
        metrics = {**_metrics(trainer, model, settings, facts), "interrupted": stopped, **extra}
        model.save_pretrained(settings.output)
        if is_first():
            replace(settings.output / "metrics.json", json.dumps(metrics, indent=2).encode())
            plot(metrics, settings.output / "loss.png")
    if stopped is not None:
        raise Interrupted(noted[0], metrics)
    return metrics


def make_trainer(
    model: Any,
    rows: Sequence[Row],
    pad_id: int,
    measure: Callable[[], float] | None,
    settings: TrainingSettings,
    objective: Objective | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    collator: Callable[[Sequence[Any]], Batch] | None = None,
) -> PrefixTrainer:
    """The Trainer of ``fit``, which the experiments run for every method. Arguments are those of ``fit``."""
    callbacks = [Intervals(), *callbacks]
    if settings.early_stopping is not None:
        callbacks.append(EarlyStopping(settings.early_stopping))
    trainer = PrefixTrainer(
        objective=objective,
        measure=measure,
        model=model,
        args=_arguments(model, settings, validates=measure is not None),
        train_dataset=rows,
        data_collator=collator or (pack if settings.packing else Collator(pad_id)),
        callbacks=callbacks,
    )
    steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    trainer.state.max_steps = steps
    trainer.args.warmup_steps = min(WARMUP, steps // 4)
    return trainer


def _record(settings: TrainingSettings, facts: Facts, prompt: Prompt | None, options: Mapping[str, Any] | None) -> None:
    """Write what is trained, once nothing refuses it: files of a training that goes on stay as they are until then."""
    if not is_first():
        return
    keep(settings.output, facts)
    if prompt is not None:
        prompt.save(settings.output)
    if options is not None:
        dataclasses.replace(settings, learning_rate=facts["learning_rate"]).keep(options)


def _run(
    trainer: PrefixTrainer, settings: TrainingSettings, checkpoint: Path | None, record: Callable[[], None]
) -> bool:
    """Train, from ``checkpoint`` on if there is one. Return whether it came to its end."""
    steps = trainer.state.max_steps
    if checkpoint is None:
        trainer.train()
        return _is_over(trainer.state, steps, settings)
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step > steps:
        raise ValueError(f"{settings.output}: {state.global_step} steps are done, and {steps} are asked for: take more")
    if not _is_over(state, steps, settings):
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return _is_over(trainer.state, steps, settings)
    # It was killed after its last step. The Trainer would do one more step before it notices.
    trainer.state = state
    best = settings.output / f"checkpoint-{state.best_global_step}"
    trainer._load_from_checkpoint(str(best if settings.keeps_best and best.is_dir() else checkpoint))
    record()
    return True


def _is_over(state: TrainerState, steps: int, settings: TrainingSettings) -> bool:
    patience = settings.early_stopping
    return state.global_step >= steps or (patience is not None and EarlyStopping(patience).is_over(state))


def _quantization(model: PrefixModel) -> str | None:
    """Of the weights, which have the dtype of the activations."""
    found = getattr(model.config, "quantization_config", None)
    if found is None:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    on = [name.removeprefix("load_in_") for name, value in values.items() if name.startswith("load_in_") and value]
    return " ".join([str(values.get("quant_method")), *on])


def _config(model: PrefixModel) -> PrefixConfig:
    return model.prefix_configs[model.active_prefix or "default"]


def _metrics(trainer: PrefixTrainer, model: PrefixModel, settings: TrainingSettings, facts: Facts) -> dict[str, Any]:
    trainable, total = model.get_nb_trainable_parameters()
    state = trainer.state
    return {
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "kept_step": state.best_global_step if settings.keeps_best else state.global_step,
        **losses(state.log_history),
        **costs(state.log_history),
        "trainable_parameters": trainable,
        "trainable_share": trainable / total,
        "device": str(model.device),
        "dtype": facts["dtype"],
        **configuration(settings, _config(model), facts),
    }


def _arguments(model: Any, settings: TrainingSettings, *, validates: bool) -> TrainingArguments:
    rate = settings.learning_rate
    if rate is None:
        rate = default_learning_rate(_config(model))
    return TrainingArguments(
        output_dir=str(settings.output),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=rate,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        logging_steps=1,
        include_num_input_tokens_seen="all" if settings.packing else "non_padding",  # packed rows have no padding
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
        report_to=settings.reporters or "none",
        ddp_find_unused_parameters=False,
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has bfloat16 units. Emulated bfloat16 is several times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
