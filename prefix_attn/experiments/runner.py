"""Execute one run. Data, steps, validation and generation are the same for every method."""

from __future__ import annotations

import platform
import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from prefix_attn.experiments.loop import train
from prefix_attn.experiments.methods import sizes, wrap
from prefix_attn.experiments.plan import Run
from prefix_attn.experiments.results import Result
from prefix_attn.hf.load import load_base
from prefix_attn.training.aws import AWS_TASKS
from prefix_attn.training.data import is_held_out, read_examples
from prefix_attn.training.evaluate import validation_loss
from prefix_attn.training.examples import Example
from prefix_attn.training.generate import generate_text
from prefix_attn.training.metrics import score
from prefix_attn.training.positions import check_new_tokens, check_rows
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.tokens import Row, batches, encode
from prefix_attn.training.train import VALIDATION_BATCH, has_bfloat16

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TENTH, FIFTH = 26, 51  # of 256
HELD_OUT_ROWS = 160
LOW_DATA_HELD_OUT = 0.3  # rows for stopping early, as a share of the training rows
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
    check_rows(model, run.max_length)  # what is too long is said before hours of training
    if run.test is not None and run.max_new_tokens is not None:
        check_new_tokens(model, run.max_new_tokens, 1)
    validation, stop_by = (
        batches(rows, VALIDATION_BATCH, tokenizer.pad_token_id) for rows in (data.validation, data.stop_by)
    )
    half = has_bfloat16(base.device)
    result: Result = {
        "run": run.to_dict(),
        "versions": _versions(),
        "device": _device_name(base.device),
        "threads": torch.get_num_threads(),
        "precision": "bfloat16 autocast" if half else "float32",
        "train_rows": len(data.train),
        "train_rows_cut": data.cut,
        "validation_rows": len(data.validation),
        **sizes(model, run, total),
    }
    if run.is_trained:
        names = ("steps", "batch_size", "learning_rate", "validate_every", "seed")
        options = {name: getattr(run, name) for name in names}
        best = {"keeps_best": bool(stop_by)}
        result |= train(model, data.train, tokenizer.pad_token_id, stop_by or validation, **options, **best)
    if stop_by or not run.is_trained:
        with autocast(base.device):
            loss = validation_loss(model, validation)
        result |= {"held_out_loss": loss} if stop_by else {"validation": [[0, loss]]}
    if data.test:
        result |= _generate(model, tokenizer, data, run)
    return result | {"wall_seconds": time.perf_counter() - start}


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute products in bfloat16 where the device can, as the Trainer does. Trained parameters stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if has_bfloat16(device) else nullcontext()


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


# Generation -----------------------------------------------------------------------------------------------------------


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, data: Data, run: Run) -> Result:
    """Generate for the test examples. Return metrics against all references, and a few of the texts."""
    from tqdm.auto import tqdm

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
