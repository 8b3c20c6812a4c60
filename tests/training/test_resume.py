"""Ctrl-C and what comes after it: a run that goes on, from the start or with the settings that it had."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_attn import PrefixModel
from prefix_attn.training import evaluate
from prefix_attn.training.distill import distill
from prefix_attn.training.interrupt import Interrupted
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.resume import last_checkpoint
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.train import train
from tests.hf.models import tiny
from tests.test_cli import run as prefix_attn
from tests.tokens import byte_tokenizer
from tests.training.test_train import EXAMPLES, MLP, model

TRAINER = "prefix_attn.training.trainer"


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a third of the time of these tests."""
    monkeypatch.setattr("prefix_attn.training.train.plot", lambda *_: None)


def settings(folder: Path, **changes: Any) -> TrainingSettings:
    return TrainingSettings(folder, **{"steps": 6, "batch_size": 2, "validate_every": 2} | changes)


def run(folder: Path, of: PrefixModel | None = None, **changes: Any) -> dict[str, Any]:
    return train(of or model(), byte_tokenizer(), EXAMPLES[:4], EXAMPLES[4:], settings(folder, **changes))


def lasting(metrics: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the machine."""
    machine = ("seconds", "seconds_per_step", "tokens_per_second", "peak_memory_bytes")
    return {name: value for name, value in metrics.items() if name not in machine}


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sends signals to this process in the batch of this number."""
    usual = evaluate.target_loss

    def send(at: int, *numbers: int) -> None:
        batches = iter(range(1, 100))

        def loss(of: PrefixModel, batch: dict[str, Tensor]) -> Tensor:
            for number in numbers if next(batches) == at else ():
                os.kill(os.getpid(), number)
            return usual(of, batch)

        monkeypatch.setattr(f"{TRAINER}.target_loss", loss)

    return send


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_training_after_its_step(
    number: signal.Signals, signals: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also between validations and within accumulation. Resumed, it ends with the bits of a run without a pause."""
    same = {"gradient_accumulation_steps": 2}
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    straight = model(**MLP)
    wanted = run(tmp_path / "a", straight, **same)
    signals(5, number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after step 3") as stop:
        run(tmp_path / "b", model(**MLP), **same)
    assert "finishing this step" in caplog.text
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (stop.value.signal, stop.value.metrics["interrupted"]) == (number, number.name)
    assert json.loads((tmp_path / "b" / "metrics.json").read_text()) == stop.value.metrics
    base = tiny("llama", vocab_size=257, max_position_embeddings=128)
    assert PrefixModel.from_pretrained(base, tmp_path / "b").prefixes["default"].embedding.isfinite().all()
    resumed = model(1, **MLP)
    got = run(tmp_path / "b", resumed, resume=True, **same)
    assert lasting(got) == lasting(wanted)
    # Costs add up: those of the steps before the pause are there.
    assert got["seconds"] > stop.value.metrics["seconds"]
    assert got["peak_memory_bytes"] >= stop.value.metrics["peak_memory_bytes"]
    expected = straight.prefixes["default"].state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in resumed.prefixes["default"].state_dict().items())


def test_a_second_signal_stops_at_once(signals: Callable[..., None], tmp_path: Path) -> None:
    signals(3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stop:
        run(tmp_path)
    assert not isinstance(stop.value, Interrupted)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_signal_in_the_last_step_changes_nothing(signals: Callable[..., None], tmp_path: Path) -> None:
    signals(6, signal.SIGINT)
    assert run(tmp_path)["interrupted"] is None


def test_in_a_thread_and_where_signals_are_ignored(tmp_path: Path) -> None:
    """Python lets no thread set handlers. What nohup ignores stays ignored."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path / "a", steps=1)["steps"]))
    thread.start()
    thread.join()
    assert found == [1]
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert run(tmp_path / "b", steps=1)["steps"] == 1
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("half", [False, True], ids=["nothing", "a killed half"])
def test_resuming_begins_where_there_is_nothing_yet(
    half: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With whatever settings: there is nothing that they could differ from."""
    if half:
        run(tmp_path / "b", steps=2, seed=3, batch_size=1)
        (tmp_path / "b" / "checkpoint-2" / "trainer_state.json").unlink()
    straight, resumed = model(), model()
    wanted = run(tmp_path / "a", straight)
    assert lasting(run(tmp_path / "b", resumed, resume=True)) == lasting(wanted)
    assert torch.equal(resumed.prefixes["default"].embedding, straight.prefixes["default"].embedding)
    assert "b: no checkpoint to resume from: training begins from the start" in caplog.text


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "seed was 0 and is 1"),
    "rate": ({"learning_rate": 1e-2}, "learning_rate was 0.1 and is 0.01"),
    "batch": ({"batch_size": 3, "packing": True}, "batch_size was 2 and is 3; packing was False and is True"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
    "length": ({"max_length": 90}, "max_length was 27 and is 90"),
    "fewer": ({"steps": 3}, "4 steps are done, and 3 are asked for"),
    "fewer epochs": ({"steps": None, "epochs": 1}, "4 steps are done, and 2 are asked for"),
    "dropout": ({"prefix": {"dropout": 0.5}}, "dropout was 0.0 and is 0.5"),
    "mode": ({"prefix": {"mode": "infix"}}, "mode was 'kv' and is 'infix'; position_mode was 'shift' and is 'none'"),
    "start": ({"prefix": {"init": "zero"}}, "init was 'random' and is 'zero'"),
    "data": ({"examples": EXAMPLES[:3]}, "training_data was '"),
    "order": ({"examples": EXAMPLES[:4][::-1]}, "training_data was '"),
    "validation": ({"validation": EXAMPLES[5:]}, "validation_data was '"),
    "no validation": ({"validation": []}, "validation_data was '.*' and is None"),
    "template": ({"prompt": Prompt(template="{source}: ")}, r"template was '{source}\\n=>' and is '{source}: '; train"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(folder, steps=4)
    return folder


@pytest.mark.parametrize("case", OTHERS)
def test_another_training_is_refused_by_name(case: str, trained: Path) -> None:
    """It went on with the new settings, and the result was that of neither."""
    changes, message = OTHERS[case]
    given: dict[str, Any] = {"examples": EXAMPLES[:4], "validation": EXAMPLES[4:], "prompt": Prompt(), "prefix": {}}
    given |= {name: value for name, value in changes.items() if name in given}
    chosen = settings(trained, resume=True, **{n: v for n, v in changes.items() if n not in given})
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        train(
            model(**given["prefix"]), byte_tokenizer(), given["examples"], given["validation"], chosen,
            prompt=given["prompt"], options={"steps": None, "seed": None},
        )  # fmt: skip
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("case", ["another base model", "quantised"])
def test_other_weights_are_refused(case: str, tmp_path: Path) -> None:
    """And nothing is written: run.yaml was, with the model that was refused. Quantised weights were taken."""
    run(tmp_path, model(base_model_name_or_path="tiny"), steps=2)
    of = model(base_model_name_or_path="another" if case == "another base model" else "tiny")
    message = "the training to resume is of tiny, and this base model is another"
    if case == "quantised":
        of.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
        message = "quantization was None and is 'bitsandbytes 4bit'"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    chosen = settings(tmp_path, resume=True)
    with pytest.raises(ValueError, match=message):
        train(of, byte_tokenizer(), EXAMPLES[:4], EXAMPLES[4:], chosen, options={"steps": None})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_changes_no_step_may_change(trained: Path) -> None:
    """More steps, other intervals, what is kept, and memory saved."""
    metrics = run(trained, steps=None, epochs=3, validate_every=3, resume=True, early_stopping=5)
    assert metrics["steps"] == 6
    metrics = run(trained, steps=7, resume=True, gradient_checkpointing=True)
    assert metrics["steps"] == 7
    assert len(metrics["train_loss"]) == 7


def test_a_distillation_keeps_its_document(tmp_path: Path) -> None:
    text = "The inn is north of the river. " * 2
    chosen = TrainingSettings(tmp_path, steps=1, batch_size=2, max_length=14)
    distill(model(), byte_tokenizer(), text, chosen)
    with pytest.raises(ValueError, match="top_k was 20 and is 3"):
        distill(model(), byte_tokenizer(), text, replace(chosen, resume=True, steps=2), top_k=3)
    with pytest.raises(ValueError, match=r"training_data was .* document was"):
        distill(model(), byte_tokenizer(), text[:-9], replace(chosen, resume=True, steps=2))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"global_step": null}', '{"global_step": "x"}', "\x00"])
def test_what_is_no_checkpoint(content: str, tmp_path: Path) -> None:
    for step, state in ((2, '{"global_step": 2}'), (4, content)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_folder_of_before_settings_were_kept(tmp_path: Path) -> None:
    """It is resumed, and has them from then on."""
    run(tmp_path, steps=2)
    (tmp_path / "settings.json").unlink()
    run(tmp_path, steps=4, resume=True)
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 0


def test_the_command_goes_on_as_it_says(
    signals: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny("llama", vocab_size=257, max_position_embeddings=128).save_pretrained("a model")
    byte_tokenizer().save_pretrained("a model")
    rows = [{"source": example.source, "target": example.references[0]} for example in EXAMPLES]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--model", "a model", "--data", "rows.jsonl", "--output", "run", "--steps", 5, "--batch-size", 2)
    signals(3, signal.SIGTERM)
    assert prefix_attn(monkeypatch, "train", *options) == 143
    shown = capsys.readouterr()
    assert "trained, saved in run" in shown.out
    line = next(line for line in shown.err.splitlines() if "To go on: " in line)
    assert line.startswith("stopped by SIGTERM after step 3. To go on: prefix-attn train --model 'a model' ")
    command = shlex.split(line.partition("To go on: ")[2])
    assert command[-1] == "--resume"
    signals(1, signal.SIGINT, signal.SIGINT)
    assert prefix_attn(monkeypatch, *command[1:]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"stopped at once; the last checkpoint is run/checkpoint-3. To go on: {shlex.join(command)}"
    signals(0)
    assert prefix_attn(monkeypatch, *command[1:], "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 5
    assert prefix_attn(monkeypatch, *command[1:], "--seed", 1) == 1
    assert "run: cannot go on with other settings: seed was 0 and is 1" in capsys.readouterr().err
