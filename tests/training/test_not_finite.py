"""A training that meets a number that is not finite, or a folder that is gone, stops, says why, and keeps what is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from prefix_attn import PrefixModel
from prefix_attn.training.distill import distill
from prefix_attn.training.evaluate import target_loss
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.tokens import encode
from prefix_attn.training.train import fit
from tests.hf.models import tiny
from tests.test_cli import run as prefix_attn
from tests.tokens import END, byte_tokenizer
from tests.training.test_train import EXAMPLES, MLP, model

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a third of the time of these tests."""
    monkeypatch.setattr("prefix_attn.training.train.plot", lambda *_: None)


def objective(at: int, fault: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The usual loss, but what ``fault`` makes of it in the batch ``at``."""
    numbers = iter(range(1, 100))

    def loss(of: PrefixModel, batch: dict[str, Tensor]) -> Tensor:
        found = target_loss(of, batch)
        return fault(of, found) if next(numbers) == at else found

    return loss


def add(number: float) -> Callable[[Any, Tensor], Tensor]:
    return lambda _, loss: loss + number


def nan_gradient(of: PrefixModel, loss: Tensor) -> Tensor:
    """The loss stays as it is: the derivative of 0 * sqrt(0) is nan."""
    embedding = of.prefixes["default"].embedding
    return loss + 0 * (embedding - embedding.detach()).sum().sqrt()


def huge_gradient(of: PrefixModel, loss: Tensor) -> Tensor:
    """Each number is finite, but their norm is not. Clipped by it they were 0, and nothing was trained."""
    embedding = of.prefixes["default"].embedding
    return loss + 3e38 * (embedding - embedding.detach()).sum()


def run(folder: Path, of: PrefixModel | None = None, measure: Any = None, **changes: Any) -> dict[str, Any]:
    rows, _ = encode(byte_tokenizer(), EXAMPLES)
    task = changes.pop("objective", None)
    settings = TrainingSettings(folder, **{"steps": 8, "batch_size": 2, "validate_every": 2} | changes)
    return fit(of or model(), rows, END, measure, settings, objective=task, extra={})


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loads(adapter: Path) -> bool:
    base = tiny("llama", vocab_size=257, max_position_embeddings=128)
    return bool(PrefixModel.from_pretrained(base, adapter).prefixes["default"].embedding.isfinite().all())


def scripted(*losses: float) -> Callable[[], float]:
    found: Iterator[float] = iter(losses)
    return lambda: next(found)


STOPS: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"objective": objective(6, add(NAN))}, "step 6: the loss is nan, not finite; what is trained is finite"),
    "inf": ({"objective": objective(6, add(INF))}, "step 6: the loss is inf, not finite"),
    "gradient": ({"objective": objective(6, nan_gradient)}, "step 6: the norm of the gradient is nan, not finite"),
    "norm": ({"objective": objective(6, huge_gradient)}, "step 6: the norm of the gradient is inf, not finite"),
    "validation": ({"measure": scripted(3, 2, 1, NAN)}, "step 6: the validation loss is nan, not finite"),
    "accumulated": (
        {"objective": objective(8, add(NAN)), "gradient_accumulation_steps": 2},
        "step 5: the loss is nan, not finite",
    ),
    "best": ({"measure": scripted(3, 2, 1, INF), "early_stopping": 9}, "step 6: the validation loss is inf"),
}


@pytest.mark.parametrize(("changes", "message"), STOPS.values(), ids=STOPS)
def test_training_stops_and_keeps_the_last_checkpoint(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=f"{message}.*the last good prefix is .*checkpoint-4$"):
        run(tmp_path, **changes)
    assert loads(tmp_path / "checkpoint-4")
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint-2", "checkpoint-4", "settings.json"}


@pytest.mark.parametrize("form", [{}, MLP], ids=["flat", "mlp"])
def test_a_prefix_that_overflows_is_not_saved(form: dict[str, Any], tmp_path: Path) -> None:
    """The losses until then are finite. The first update is that of step 2: warm-up starts at a rate of 0."""
    with pytest.raises(
        FloatingPointError, match=r"step 2: the prefix is not finite; an update made .* overflow"
    ) as error:
        run(tmp_path, model(**form), learning_rate=1e39)
    assert "take a lower learning rate than 1e+39; no prefix was saved before" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_the_cause_is_named_in_the_step_after_too(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan, not finite; an update made .* overflow"):
        run(tmp_path, learning_rate=1e39, validate_every=8)


def test_a_model_that_is_not_finite_is_no_matter_of_the_rate(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="step 0: the validation loss is nan, not finite; nothing is trained"):
        run(tmp_path, measure=scripted(NAN))
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan, not finite; nothing is trained"):
        run(tmp_path, objective=objective(1, add(NAN)))


def test_no_gradient_is_no_training(tmp_path: Path) -> None:
    """It ended with "trained, saved": the optimizer had nothing to go by, or nothing to change."""
    with pytest.raises(ValueError, match="no gradient reaches the prefix: it is 0 in the first step"):
        run(tmp_path, objective=objective(1, lambda _, loss: 0 * loss))
    with pytest.raises(ValueError, match="nothing to train: all 4 virtual tokens are frozen"):
        run(tmp_path, model(num_frozen_tokens=4))
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_resuming_changes_nothing_of_what_is_there(tmp_path: Path) -> None:
    """Also the adapter that the run before has saved at its end."""
    run(tmp_path, steps=4)
    before = files(tmp_path)
    with pytest.raises(FloatingPointError, match=r"step 5: the loss is nan.*the last good prefix is .*checkpoint-4"):
        run(tmp_path, model(1), resume=True, objective=objective(1, add(NAN)))
    assert files(tmp_path) == before


def test_distillation_stops_too(tmp_path: Path) -> None:
    chosen = TrainingSettings(tmp_path, steps=8, batch_size=2, max_length=14, learning_rate=1e39, validate_every=8)
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan, not finite; an update made"):
        distill(model(), byte_tokenizer(), "The inn is north of the river. " * 2, chosen)


def test_a_folder_that_disappears(tmp_path: Path) -> None:
    """The Trainer made it anew and went on, without the template and what was saved before."""
    folder = tmp_path / "run"

    def remove(_: Any, loss: Tensor) -> Tensor:
        shutil.rmtree(folder)
        return loss

    with pytest.raises(FileNotFoundError, match="run: the folder disappeared during the training; stopped at step 4"):
        run(folder, objective=objective(3, remove))
    assert not folder.exists()


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").write_text("in the way")
    with pytest.raises(OSError, match="the checkpoint of step 4 cannot be written"):
        run(tmp_path)
    assert loads(tmp_path / "checkpoint-2")


def test_the_command_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It ended with "trained, saved", status 0 and an adapter that could not be loaded."""
    monkeypatch.chdir(tmp_path)
    tiny("llama", vocab_size=257, max_position_embeddings=128).save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    rows = [{"source": example.source, "target": example.references[0]} for example in EXAMPLES]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--model", "model", "--data", "rows.jsonl", "--steps", 6, "--learning-rate", 3e38)
    assert prefix_attn(monkeypatch, "train", "--output", "run", *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite" in error
    assert "take a lower learning rate than 3e+38" in error
    assert {path.name for path in Path("run").iterdir()} == {"prompt.json", "run.yaml", "settings.json"}
