"""How long a training is, what a step is, which prefix is kept, and when a training ends early."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_attn import PrefixModel
from prefix_attn.training.distill import distill
from prefix_attn.training.examples import Example
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.tokens import encode
from prefix_attn.training.train import fit, train
from tests.hf.models import tiny
from tests.numerics import FLOAT, close
from tests.test_cli import run as prefix_attn
from tests.tokens import END, byte_tokenizer
from tests.training.test_train import MLP, model

# Targets of unequal length: an average over batches is not the average over tokens.
NAMES = ("ann", "bob", "cid", "dee", "eve")
EXAMPLES = [Example(f"name : {name}", (f"this is {name * k}.",)) for k, name in enumerate(NAMES, start=1)]


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a third of the time of these tests, and test_train looks at it."""
    monkeypatch.setattr("prefix_attn.training.train.plot", lambda *_: None)


def settings(folder: Path, **changes: Any) -> TrainingSettings:
    return TrainingSettings(folder, **{"batch_size": 2, "validate_every": 2} | changes)


def state(folder: Path) -> dict[str, Any]:
    """Of the last checkpoint."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return json.loads((last / "trainer_state.json").read_text())


@pytest.mark.parametrize(("epochs", "accumulation", "steps"), [(0.5, 1, 2), (1, 8, 1), (1.5, 2, 3)], ids=str)
def test_epochs(epochs: float, accumulation: int, steps: int, tmp_path: Path) -> None:
    """Five rows in batches of two: three batches an epoch. The result is that of as many steps."""
    by_epochs, by_steps = model(), model()
    same: dict[str, Any] = {"gradient_accumulation_steps": accumulation}
    metrics = train(by_epochs, byte_tokenizer(), EXAMPLES, [], settings(tmp_path / "a", epochs=epochs, **same))
    train(by_steps, byte_tokenizer(), EXAMPLES, [], settings(tmp_path / "b", steps=steps, **same))
    assert metrics["steps"] == steps
    assert torch.equal(by_epochs.prefixes["default"].embedding, by_steps.prefixes["default"].embedding)


def one_step(folder: Path, batch_size: int, accumulation: int, task: Callable[..., Any]) -> tuple[float, float]:
    """Loss and norm of the gradient."""
    chosen = settings(folder, steps=1, batch_size=batch_size, gradient_accumulation_steps=accumulation, max_length=48)
    task(model(), byte_tokenizer(), chosen)
    (entry,) = (entry for entry in state(folder)["log_history"] if "loss" in entry)
    return entry["loss"], entry["grad_norm"]


def on_examples(of: PrefixModel, tokenizer: Any, chosen: TrainingSettings) -> None:
    train(of, tokenizer, EXAMPLES, [], chosen)


def on_a_document(of: PrefixModel, tokenizer: Any, chosen: TrainingSettings) -> None:
    document = "The inn is north of the river. " * 2
    distill(of, tokenizer, document, replace(chosen, max_length=14))  # four pieces of 14 tokens and one of 6


@pytest.mark.parametrize("task", [on_examples, on_a_document])
def test_accumulated_batches_are_one_batch(task: Callable[..., Any], tmp_path: Path) -> None:
    """Every target has the same weight, also in a last batch of fewer."""
    whole = one_step(tmp_path / "whole", 5, 1, task)
    parts = one_step(tmp_path / "parts", 2, 3, task)
    close(torch.tensor(parts), torch.tensor(whole), FLOAT)


def scripted(losses: Sequence[float]) -> Callable[[], float]:
    """A validation that finds these losses, one after the other."""
    found = iter(losses)
    return lambda: next(found)


def run(folder: Path, losses: Sequence[float], of: PrefixModel | None = None, **changes: Any) -> dict[str, Any]:
    rows, _ = encode(byte_tokenizer(), EXAMPLES)
    chosen = settings(folder, **{"learning_rate": 1e-2} | changes)
    return fit(of or model(), rows, END, scripted(losses), chosen, extra={})


def saved(folder: Path) -> torch.Tensor:
    """What a loaded adapter has."""
    base = tiny("llama", vocab_size=257, max_position_embeddings=128)
    return PrefixModel.from_pretrained(base, folder).prefixes["default"].embedding


@pytest.mark.parametrize("form", [{}, MLP], ids=["flat", "mlp"])
def test_the_best_prefix_is_kept(form: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint of step 4 is kept although three came after it. The start is no candidate."""
    folder = tmp_path / "run"
    metrics = run(folder, [0.5, 3, 1, 2, 2, 4], model(**form), steps=10, load_best_model_at_end=True)
    assert (metrics["best_step"], metrics["kept_step"], metrics["steps"]) == (4, 4, 10)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-4"]
    assert torch.equal(saved(folder), saved(folder / "checkpoint-4"))
    assert not torch.equal(saved(folder), saved(folder / "checkpoint-10"))
    # A kill after the last step, or only a resumption, ends with the same prefix; also in a folder that was moved.
    moved = folder.rename(tmp_path / "moved")
    before = saved(moved)
    (moved / "adapter_model.safetensors").unlink()
    assert run(moved, [], model(1, **form), steps=10, load_best_model_at_end=True, resume=True) == metrics
    assert torch.equal(saved(moved), before)


def test_the_last_prefix_is_kept_unless_told(tmp_path: Path) -> None:
    metrics = run(tmp_path, [5, 1, 2, 3], steps=6)
    assert (metrics["best_step"], metrics["kept_step"]) == (2, 6)
    assert torch.equal(saved(tmp_path), saved(tmp_path / "checkpoint-6"))


def test_early_stopping(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An equal loss is no lower one. The best prefix is kept."""
    metrics = run(tmp_path, [9, 5, 4, 4, 4.5], steps=20, early_stopping=2)
    assert (metrics["steps"], metrics["best_step"], metrics["kept_step"]) == (8, 4, 4)
    assert "no lower validation loss in 2 validations: ends at step 8" in caplog.text
    assert torch.equal(saved(tmp_path), saved(tmp_path / "checkpoint-4"))
    assert run(tmp_path, [], steps=20, early_stopping=2, resume=True) == metrics  # it is over
    longer = run(tmp_path, [6, 3, 3, 3, 3], steps=20, early_stopping=3, resume=True)
    assert [step for step, _ in longer["validation_loss"]] == [0, 2, 4, 6, 8, 10]
    assert (longer["steps"], longer["kept_step"]) == (10, 4)


@pytest.mark.parametrize("before", [2, None], ids=["with", "without"])
def test_a_resumed_run_goes_on_counting(before: int | None, tmp_path: Path) -> None:
    """transformers' own callback counted anew, or failed where the run before had none."""
    run(tmp_path, [9, 5, 6], steps=4, early_stopping=before)
    metrics = run(tmp_path, [7, 8, 8], steps=20, early_stopping=2, resume=True)
    assert (metrics["steps"], metrics["kept_step"]) == (6, 2)


def test_other_intervals_count_after_resuming(tmp_path: Path) -> None:
    """The Trainer went on with those of the checkpoint."""
    run(tmp_path, [9, 5, 4], steps=4)
    metrics = run(tmp_path, [3, 2, 1], steps=10, validate_every=3, resume=True)
    assert [step for step, _ in metrics["validation_loss"]] == [0, 2, 4, 6, 9, 10]


def test_the_best_needs_something_to_validate_on(tmp_path: Path) -> None:
    for name, value in (("early_stopping", 2), ("load_best_model_at_end", True)):
        with pytest.raises(ValueError, match=f"{name} needs rows to validate on"):
            train(model(), byte_tokenizer(), EXAMPLES, [], settings(tmp_path, **{name: value}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3, "epochs": 1}, "steps and epochs exclude one another"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"epochs": float("nan")}, "epochs must be positive, got nan"),
        ({"early_stopping": 0}, "early_stopping must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 3, "--epochs", 1), "--steps and --epochs exclude one another"),
        (("--epochs", -1), "epochs must be positive"),
        (("--early-stopping", 2), "--early-stopping needs data to validate on"),
        (("--load-best-model-at-end",), "--load-best-model-at-end needs data to validate on"),
        (("--early-stopping", 2, "--validation", "d.jsonl", "--validation-rows", 0), "needs data to validate on"),
    ],
)
def test_the_command_refuses_early(
    options: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither data nor model exist."""
    assert prefix_attn(monkeypatch, "train", "--output", "x", "--model", "none", "--data", "d.csv", *options) == 1
    assert message in capsys.readouterr().err
