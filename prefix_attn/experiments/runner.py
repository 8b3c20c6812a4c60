"""Execute one run. Data, steps, validation and generation are the same for every method."""

from __future__ import annotations

import platform
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from prefix_attn.experiments.methods import sizes, wrap
from prefix_attn.experiments.plan import Run
from prefix_attn.experiments.results import Result
from prefix_attn.hf.load import load_base
from prefix_attn.training.aws import AWS_TASKS
from prefix_attn.training.data import is_held_out, read_examples
from prefix_attn.training.evaluate import target_loss, validation_loss
from prefix_attn.training.examples import Example
from prefix_attn.training.generate import generate_text
from prefix_attn.training.metrics import score
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.tokens import Batch, Row, batches, collate, encode
from prefix_attn.training.train import VALIDATION_BATCH, WARMUP, has_bfloat16

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TENTH, FIFTH = 26, 51  # of 256
HELD_OUT_ROWS = 160
LOW_DATA_HELD_OUT = 0.3  # rows for stopping early, as a share of the training rows
PATIENCE = 60  # steps without a lower loss on these rows
# How many batches are sorted by length together. Rows of E2E have 65 tokens on average, and this pads them to 66
# instead of 84. With few rows at most a quarter of them, or the same rows would share a batch in every epoch.
WINDOW = 16
GENERATION_BATCH = 64
SAMPLES = 5
PACKAGES = ("torch", "transformers", "peft", "prefix-attn", "sacrebleu")


class Data(NamedTuple):
    """The rows that a run trains and validates on, and the examples that it generates for."""

    train: list[Row]
    validation: list[Row]
    stop_by: list[Row]  # only with few examples
    test: list[Example]
    cut: int
    categories: frozenset[str]  # of ``train``


def execute(run: Run, folders: Mapping[str, Path], device: str | None = None) -> Result:
    """Train, validate, generate and score.

    Args:
        run: what to do.
        folders: the path of each file that ``run`` names.
        device: default: the GPU if there is one.

    Raises:
        ValueError: a file lacks what the run needs.
        NotImplementedError: the model is not supported.
    """
    start = time.perf_counter()
    base, tokenizer = load_base(run.model, dtype=torch.float32, device=device)
    data = load(run, folders, tokenizer, encoder_decoder=base.config.is_encoder_decoder)
    total = sum(p.numel() for p in base.parameters())
    if has_bfloat16(base.device) and run.method not in ("full", "top2"):
        weights_to_bfloat16(base)  # they are frozen, and autocast would cast them in every step
    torch.manual_seed(run.seed)
    model = wrap(base, tokenizer, run)
    with autocast(base.device) as casting:
        validation, stop_by = (
            batches(rows, VALIDATION_BATCH, tokenizer.pad_token_id) for rows in (data.validation, data.stop_by)
        )
        result: Result = {
            "run": run.to_dict(),
            "versions": _versions(),
            "device": _device_name(base.device),
            "threads": torch.get_num_threads(),
            "precision": "float32" if casting is None else "bfloat16 autocast",
            "train_rows": len(data.train),
            "train_rows_cut": data.cut,
            "validation_rows": len(data.validation),
            **sizes(model, run, total),
        }
        if run.is_trained:
            order = endless_batches(data.train, run.batch_size or 1, run.seed, tokenizer.pad_token_id)
            result |= train(model, order, stop_by or validation, run)
            if stop_by:
                result["held_out_loss"] = validation_loss(model, validation)
        else:
            result["validation"] = [[0, validation_loss(model, validation)]]
    if data.test:
        result |= _generate(model, tokenizer, data, run)
    return result | {"wall_seconds": time.perf_counter() - start}


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute products in bfloat16 where the device can. Trained parameters stay float32.

    The cache of autocast is off. It keeps cast weights until the context ends, so every step would see the first ones.
    """
    if not has_bfloat16(device):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def weights_to_bfloat16(model: torch.nn.Module) -> None:
    """Cast the parameters, not the buffers: bfloat16 would leave rotary frequencies three digits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


# Data -----------------------------------------------------------------------------------------------------------------


def load(
    run: Run, folders: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase, *, encoder_decoder: bool = False
) -> Data:
    """Load the data of ``run``. What is drawn depends only on ``run.subset`` and the texts, not on method or seed."""
    if run.train in AWS_TASKS:
        kept, held_out = read_examples(run.train), read_examples(run.train, split="dev")
        test = read_examples(run.train, split="test")
    else:
        kept = read_examples(folders[run.train])
        test = []
        if run.test == run.train:
            kept, test = hold_out(kept, 1, FIFTH)
        elif run.test is not None:
            test = read_examples(folders[run.test])
        kept, held_out = hold_out(kept, 0, TENTH)
    if run.unseen:
        if missing := set(run.unseen) - {example.category for example in (*kept, *test)}:
            raise ValueError(f"{run.train}: no example of the categories {sorted(missing)}")
        kept, held_out = ([e for e in examples if e.category not in run.unseen] for examples in (kept, held_out))
    for name, examples in {"train on": kept, "validate on": held_out, "test on": test or not run.test}.items():
        if not examples:
            raise ValueError(
                f"{run.train}: no example is left to {name}; what is held out is drawn by its input's hash"
            )
    if run.limit is not None:
        test = _spaced(test, run.limit)
    rows, cut = encode(tokenizer, kept, run.max_length, encoder_decoder=encoder_decoder)
    others = encode(tokenizer, held_out, run.max_length, encoder_decoder=encoder_decoder)[0]
    validation, stop_by = _spaced(others, HELD_OUT_ROWS), []
    if run.examples is not None:
        subset = run.subset or 0
        rows = _drawn(rows, run.examples, subset)
        stop_by = _drawn(others, max(1, round(run.examples * LOW_DATA_HELD_OUT)), subset)
    for some in (validation, stop_by):
        some.sort(key=lambda row: len(row["input_ids"]))  # less padding; the order does not change the mean over tokens
    return Data(rows, validation, stop_by, test, cut, frozenset(example.category for example in kept))


def hold_out(examples: Sequence[Example], byte: int, share: int) -> tuple[list[Example], list[Example]]:
    """Split into kept and held-out examples: ``share`` of 256, by one byte of the hash of the source."""
    out = [is_held_out(example.source, share / 256, byte) for example in examples]
    return [e for e, held in zip(examples, out) if not held], [e for e, held in zip(examples, out) if held]


def _spaced(items: list[Any], count: int) -> list[Any]:
    """Take at most ``count`` items, evenly spaced, because files are ordered by their sources."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def _drawn(rows: list[Row], count: int, subset: int) -> list[Row]:
    """Draw ``count`` rows. In one subset, a smaller draw is part of a larger one."""
    if len(rows) < count:
        raise ValueError(f"few examples: {count} rows are to be drawn, there are {len(rows)}")
    return random.Random(subset).sample(rows, len(rows))[:count]


def endless_batches(rows: Sequence[Row], size: int, seed: int, pad_id: int) -> Iterator[Batch]:
    """Yield batches of rows of similar length without end. Their order depends only on ``seed``."""
    shuffle = random.Random(seed).shuffle
    size = min(size, len(rows))
    while True:
        order = list(rows)
        shuffle(order)
        del order[len(order) // size * size :]
        for window in _chunks(order, size * min(WINDOW, max(1, len(rows) // (4 * size)))):
            window.sort(key=lambda row: len(row["input_ids"]))
            together = _chunks(window, size)
            shuffle(together)
            yield from (collate(some, pad_id) for some in together)


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    """Split ``items`` into lists of ``size``."""
    return [items[i : i + size] for i in range(0, len(items), size)]


# Training -------------------------------------------------------------------------------------------------------------


def train(model: Any, data: Iterator[Batch], validation: Sequence[Batch], run: Run) -> Result:
    """Train for ``run.steps`` steps. With few examples stop early and restore the step with the lowest loss.

    Returns:
        Losses, and the time per step without validation.
    """
    from tqdm import tqdm

    assert run.steps is not None and run.learning_rate is not None and run.validate_every is not None
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=0.0, fused=True)
    steps = run.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    losses: list[float] = []
    curve: list[list[float]] = [[0, validation_loss(model, validation)]]
    best = _Best(parameters, curve[0][1]) if run.examples is not None else None
    seconds = 0.0
    model.train()
    with tqdm(total=steps, desc=f"{run.method}, seed {run.seed}", file=sys.stderr, leave=False) as bar:
        for step in range(1, steps + 1):
            batch = {name: tensor.to(device) for name, tensor in next(data).items()}
            start = time.perf_counter()
            loss = target_loss(model, batch)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))  # waits for the device, so it must be timed
            seconds += time.perf_counter() - start
            if step % run.validate_every == 0 or step == steps:
                curve.append([step, validation_loss(model, validation)])
                if best is not None:
                    best.see(step, curve[-1][1])
            if best is not None and step - best.step >= PATIENCE:
                break
            bar.update()
            bar.set_postfix(train=f"{losses[-1]:.3f}", validation=f"{curve[-1][1]:.3f}")
    found = {"train_loss": losses, "validation": curve, "seconds_per_step": seconds / len(losses)}
    if best is not None:
        best.restore()
        found["best_step"] = best.step
    return found


class _Best:
    """A copy of the parameters with the lowest validation loss so far."""

    def __init__(self, parameters: list[Tensor], loss: float) -> None:
        self.parameters, self.loss, self.step = parameters, loss, 0
        self.saved = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def see(self, step: int, loss: float) -> None:
        if loss < self.loss:
            self.loss, self.step = loss, step
            for saved, parameter in zip(self.saved, self.parameters):
                saved.copy_(parameter)

    @torch.no_grad()
    def restore(self) -> None:
        for saved, parameter in zip(self.saved, self.parameters):
            parameter.copy_(saved)


def learning_rate_factor(step: int, steps: int) -> float:
    """Factor of a linear warm-up, then a linear decay to zero."""
    return min((step + 1) / WARMUP, max(steps - step, 0) / max(steps - WARMUP, 1))


# Generation -----------------------------------------------------------------------------------------------------------


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, data: Data, run: Run) -> Result:
    """Generate for the test examples. Return metrics against all references, and a few of the texts."""
    from tqdm import tqdm

    examples, start = data.test, time.perf_counter()
    if has_bfloat16(next(model.parameters()).device):
        weights_to_bfloat16(model)  # training is over, and autocast would cast them for every token
    with tqdm(total=len(examples), desc=f"{run.method}, generate", file=sys.stderr, leave=False) as bar:
        texts = generate_text(
            model,
            tokenizer,
            [example.source for example in examples],
            prompt=Prompt(one_line=run.task != "summary"),  # pairs of the user's own may have several lines
            num_beams=run.num_beams or 1,
            length_penalty=run.length_penalty or 1.0,
            max_new_tokens=run.max_new_tokens or 64,
            batch_size=GENERATION_BATCH,
            progress=bar.update,
        )
    seconds = time.perf_counter() - start
    shown = range(0, len(examples), max(1, len(examples) // SAMPLES))
    return {
        "test_inputs": len(examples),
        "generate_seconds": seconds,
        **_scores(examples, texts, data.categories),
        "samples": [{"source": examples[i].source, "output": texts[i]} for i in shown][:SAMPLES],
    }


def _scores(examples: Sequence[Example], texts: Sequence[str], trained: frozenset[str]) -> dict[str, dict[str, float]]:
    """Score all examples. If some categories were not in training, also score seen and unseen ones separately."""
    groups = {"metrics": list(range(len(examples)))}
    seen = [i for i, example in enumerate(examples) if example.category in trained]
    if 0 < len(seen) < len(examples):
        groups |= {"metrics_seen": seen, "metrics_unseen": sorted(set(groups["metrics"]) - set(seen))}
    return {
        name: score([texts[i] for i in chosen], [examples[i].references for i in chosen])
        for name, chosen in groups.items()
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # PackageNotFoundError too: a source tree that is not installed has no version
            continue
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
