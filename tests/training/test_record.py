"""What a run leaves to read: metrics.json, the bar, the losses in text, and reports to others."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import prefix_attn
from prefix_attn.training import record
from prefix_attn.training.row_file import RowFile, digest
from prefix_attn.training.settings import REPORTERS, TrainingSettings
from prefix_attn.training.tokens import encode
from prefix_attn.training.train import train
from tests.test_cli import run as prefix_attn_command
from tests.tokens import byte_tokenizer
from tests.training.test_train import EXAMPLES, model


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a third of the time of these tests."""
    monkeypatch.setattr("prefix_attn.training.train.plot", lambda *_: None)


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = TrainingSettings(folder, **{"steps": 6, "batch_size": 2, "validate_every": 2} | changes)
    return train(model(), byte_tokenizer(), EXAMPLES, EXAMPLES[4:], settings)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_metrics_say_what_was_done(packing: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run(tmp_path, packing=packing)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    rows, _ = encode(byte_tokenizer(), EXAMPLES)
    assert metrics["tokens"] == 2 * sum(len(row["input_ids"]) for row in rows)  # two epochs, without padding
    assert metrics["seconds_per_step"] * 6 == pytest.approx(metrics["seconds"])
    assert metrics["tokens_per_second"] * metrics["seconds"] == pytest.approx(metrics["tokens"])
    assert 2**27 < metrics["peak_memory_bytes"] < 2**36
    assert metrics["seed"] == 0
    assert (metrics["settings"]["learning_rate"], metrics["settings"]["packing"]) == (0.1, packing)
    assert metrics["prefix"]["num_virtual_tokens"] == 4
    assert metrics["prompt"]["template"] == "{source}\n=>"
    assert metrics["data_hashes"] == {"training_data": digest(rows), "validation_data": digest(rows[4:])}
    assert metrics["versions"] == {
        "prefix_attn": prefix_attn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    bar = capsys.readouterr().err
    for word in ("reading and tokenising", "validating", "training: 100%", "6/6", "loss=", "validation=", "tokens/s="):
        assert word in bar


def test_costs_are_those_of_the_steps_that_count() -> None:
    history: Sequence[dict[str, Any]] = [
        {"step": 0, "eval_loss": 3.0, "num_input_tokens_seen": 0},
        {"step": 1, "loss": 2.0, "seconds": 3.0, "num_input_tokens_seen": 40, "peak_memory_bytes": 7},
        {"step": 2, "loss": 1.0, "seconds": 1.0, "num_input_tokens_seen": 100, "peak_memory_bytes": 5},
    ]
    assert record.costs(history) == {
        "seconds": 4.0,
        "seconds_per_step": 2.0,
        "tokens": 100,
        "tokens_per_second": 25.0,
        "peak_memory_bytes": 7,
    }
    assert record.costs([])["tokens_per_second"] is None
    assert record.losses(history) == {"train_loss": [[1, 2.0], [2, 1.0]], "validation_loss": [[0, 3.0]]}


def test_time_is_that_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation and checkpoints take no time of theirs. The clock ticks once each time that it is read."""
    now = iter(range(1000))
    monkeypatch.setattr("prefix_attn.training.trainer.time.perf_counter", lambda: float(next(now)))
    run(tmp_path)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert {entry["seconds"] for entry in state["log_history"] if "seconds" in entry} == {1.0}


def test_a_digest_is_that_of_the_rows_in_a_file(tmp_path: Path) -> None:
    """It depends on each token, on where a row ends and on the order."""
    rows, _ = encode(byte_tokenizer(), EXAMPLES)
    assert digest(RowFile(rows, tmp_path)) == digest(rows)
    changed = [rows[::-1], rows[:-1], [*rows[:-1], rows[-1] | {"labels": rows[-1]["input_ids"]}]]
    moved = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}]
    other = [{"input_ids": [1], "labels": [1]}, {"input_ids": [2, 3], "labels": [2, 3]}]
    assert len({digest(some) for some in (rows, *changed, moved, other)}) == 6


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([2.0], "▁"),
        ([3, 3], "▁▁"),
        ([8, 1, 2, 3, 4, 5, 6, 7], "█▁▂▃▄▅▆▇"),
        ([7.0] * 70 + [0.0] * 30, "█" * 35 + "▁" * 15),
    ],
    ids=["none", "one", "flat", "all heights", "means"],
)
def test_a_curve_of_text(values: Sequence[float], expected: str) -> None:
    assert record.curve(values) == expected


WRITER = """
import json, pathlib
class SummaryWriter:
    def __init__(self, log_dir):
        pathlib.Path(log_dir).mkdir(parents=True)
        self.file = open(pathlib.Path(log_dir) / "scalars", "w")
    def add_scalar(self, name, value, step):
        self.file.write(json.dumps([name, step, value]) + "\\n")
    def add_text(self, name, text): json.loads(text)
    def flush(self): self.file.flush()
    def close(self): self.file.close()
"""


def test_reports_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer's own callback gets losses and costs. A stand-in for tensorboardX writes them down."""
    (tmp_path / "tensorboardX.py").write_text(WRITER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    metrics = run(tmp_path / "run", report_to="tensorboard")
    (file,) = (tmp_path / "run" / "runs").glob("*/scalars")
    scalars = [json.loads(line) for line in file.read_text().splitlines()]
    assert [[step, loss] for name, step, loss in scalars if name == "train/loss"] == metrics["train_loss"]
    assert [[step, loss] for name, step, loss in scalars if name == "eval/loss"] == metrics["validation_loss"]
    assert {"train/seconds", "train/peak_memory_bytes"} <= {name for name, *_ in scalars}


def test_what_cannot_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before anything is loaded."""
    assert set(REPORTERS) <= set(transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK)
    monkeypatch.setattr("prefix_attn.training.settings.find_spec", lambda name: name == "tensorboard")
    with pytest.raises(ValueError, match=r"report_to must be some of \['tensorboard', .*got 'tensorbord'"):
        run(tmp_path, report_to="tensorboard,tensorbord")
    monkeypatch.setattr("prefix_attn.training.settings.find_spec", lambda name: None)
    options = ("--output", tmp_path / "run", "--model", "none", "--data", "none.csv", "--report-to", "tensorboard")
    assert prefix_attn_command(monkeypatch, "train", *options) == 1
    error = capsys.readouterr().err
    assert "report_to 'tensorboard' needs a package that is not installed: pip install tensorboard" in error
