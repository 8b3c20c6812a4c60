"""Training with the Hugging Face Trainer on a tiny model: what it learns, what it writes, how it resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.training.data import Example
from prefix_attn.training.settings import LEARNING_RATES, TrainingSettings
from prefix_attn.training.train import train
from tests.hf.models import tiny
from tests.tokens import byte_tokenizer

EXAMPLES = [Example(f"name : {n}", (f"this is {n}.",)) for n in ("ann", "bob", "cid", "dee", "eve", "fay")]


def model(seed: int = 0, **options: Any) -> PrefixModel:
    torch.manual_seed(seed)
    config = PrefixConfig(num_virtual_tokens=4, encoder_hidden_size=8, **options)
    return get_prefix_model(tiny("llama", vocab_size=257, max_position_embeddings=128), config)


def settings(folder: Path, steps: int, **changes: object) -> TrainingSettings:
    return TrainingSettings(folder, steps=steps, batch_size=2, validate_every=2, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_learns_and_saves(tmp_path: Path, checkpointing: bool) -> None:
    trained = model()
    wanted = settings(tmp_path, 12, learning_rate=3e-2, gradient_checkpointing=checkpointing)
    metrics = train(trained, byte_tokenizer(), EXAMPLES[:4], EXAMPLES[4:], wanted)
    curve = metrics["validation_loss"]
    assert [step for step, _ in curve] == [0, 2, 4, 6, 8, 10, 12]
    assert curve[-1][1] < curve[0][1] - 0.2
    assert len(metrics["train_loss"]) == 12
    assert metrics["trainable_parameters"] == 4 * 2 * 3 * 2 * 8
    assert json.loads((tmp_path / "metrics.json").read_text())["validation_loss"] == curve
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    loaded = PrefixModel.from_pretrained(tiny("llama", vocab_size=257, max_position_embeddings=128), tmp_path)
    assert torch.equal(loaded.prefixes["default"].embedding, trained.prefixes["default"].embedding)


def test_a_learning_rate_of_zero_is_no_default(tmp_path: Path) -> None:
    trained = model()
    before = trained.prefixes["default"].embedding.detach().clone()
    train(trained, byte_tokenizer(), EXAMPLES, [], settings(tmp_path, 2, learning_rate=0.0))
    assert torch.equal(trained.prefixes["default"].embedding, before)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, "prefix"),
        ({"prefix_projection": True}, "prefix-mlp"),
        ({"mode": "embedding"}, "embedding"),
        ({"mode": "infix"}, "infix"),
        ({"mode": "infix", "prefix_projection": True}, "prefix-mlp"),
    ],
    ids=str,
)
def test_the_learning_rate_is_that_of_the_method(options: dict[str, Any], method: str, tmp_path: Path) -> None:
    """It is the rate that the experiments use."""
    trained = model(**options)
    train(trained, byte_tokenizer(), EXAMPLES, [], settings(tmp_path, 4))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert max(rates) == LEARNING_RATES[method]


MLP = {"prefix_projection": True, "dropout": 0.1}
FORMS: dict[str, dict[str, Any]] = {
    "mlp": MLP,
    "infix": MLP | {"mode": "infix", "gate": "zero", "num_frozen_tokens": 1},
}


@pytest.mark.parametrize("form", FORMS)
def test_resumes_bit_for_bit(form: str, tmp_path: Path) -> None:
    """The checkpoint is enough, whatever the new model started from. It contains gates and frozen tokens."""
    straight, first, second = (model(seed, **FORMS[form]) for seed in (0, 0, 1))
    train(straight, byte_tokenizer(), EXAMPLES, [], settings(tmp_path / "a", 4))
    train(first, byte_tokenizer(), EXAMPLES, [], settings(tmp_path / "b", 4))
    for checkpoint in (tmp_path / "b").glob("checkpoint-4"):
        checkpoint.rename(tmp_path / "gone")  # as if killed after step 2
    train(second, byte_tokenizer(), EXAMPLES, [], settings(tmp_path / "b", 4, resume=True))
    expected, got = (m.prefixes["default"].state_dict() for m in (straight, second))
    assert expected.keys() == got.keys()
    assert len(got) == (5 if form == "mlp" else 8)  # that it is an infix is in it too
    assert all(torch.equal(got[name], wanted) for name, wanted in expected.items())


@pytest.mark.parametrize("state", [None, '{"best'], ids=["none", "half"])
def test_a_kill_while_saving_costs_one_checkpoint(tmp_path: Path, state: str | None) -> None:
    """The newest folder was chosen by name, so a training killed while writing one could not be resumed."""
    straight, resumed = model(), model()
    wanted = train(straight, byte_tokenizer(), EXAMPLES[:4], EXAMPLES[4:], settings(tmp_path, 6))
    for name in ("optimizer.pt", "trainer_state.json"):
        (tmp_path / "checkpoint-6" / name).unlink()
    if state is not None:
        (tmp_path / "checkpoint-6" / "trainer_state.json").write_text(state)
    got = train(resumed, byte_tokenizer(), EXAMPLES[:4], EXAMPLES[4:], settings(tmp_path, 6, resume=True))
    assert torch.equal(resumed.prefixes["default"].embedding, straight.prefixes["default"].embedding)
    assert got["train_loss"] == wanted["train_loss"]
    assert got["validation_loss"] == wanted["validation_loss"]  # with the steps before the kill
    assert [step for step, _ in got["validation_loss"]] == [0, 2, 4, 6]


def test_resuming_a_finished_training_takes_no_step(tmp_path: Path) -> None:
    """If the steps were not a multiple of an epoch, each resumption did one more step."""
    done, resumed = model(), model(1)
    wanted = train(done, byte_tokenizer(), EXAMPLES, EXAMPLES, settings(tmp_path, 4))
    got = train(resumed, byte_tokenizer(), EXAMPLES, EXAMPLES, settings(tmp_path, 4, resume=True))
    assert got == wanted
    assert torch.equal(resumed.prefixes["default"].embedding, done.prefixes["default"].embedding)


def test_a_new_training_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    """Checkpoints of an earlier, longer training stayed, and a later resume took the last of them."""
    train(model(), byte_tokenizer(), EXAMPLES, [], settings(tmp_path, 2))
    with pytest.raises(ValueError, match="holds checkpoints of another training"):
        train(model(), byte_tokenizer(), EXAMPLES, [], settings(tmp_path, 2))
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert train(model(), byte_tokenizer(), EXAMPLES, [], settings(tmp_path, 2))["steps"] == 2


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no examples to train on"):
        train(model(), byte_tokenizer(), [], [], settings(tmp_path, 2))


def test_resuming_with_another_prefix_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    """Also a training that was finished."""
    train(model(), byte_tokenizer(), EXAMPLES, [], settings(tmp_path, 2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for fields, message in (({"num_virtual_tokens": 6}, "tokens was 4 and is 6"), ({"gate": "zero"}, "gate was None")):
        for steps in (2, 4):
            other = get_prefix_model(model().base_model, PrefixConfig(**{"num_virtual_tokens": 4} | fields))
            with pytest.raises(ValueError, match=message):
                train(other, byte_tokenizer(), EXAMPLES, [], settings(tmp_path, steps, resume=True))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
