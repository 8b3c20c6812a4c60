"""``prefix-attn train --config``: every option from a file, and the file of every run."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prefix_attn.cli.train import train
from tests.hf.models import tiny
from tests.test_cli import ROWS, run
from tests.tokens import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    tiny("llama", vocab_size=257, max_position_embeddings=128).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "manual.txt").write_text("what to do, and what to leave, in a few words")
    return folder


SMALL = ("--model", "model", "--virtual-tokens", 2, "--steps", 2, "--batch-size", 2)
RUNS: dict[str, tuple[object, ...]] = {
    "data": (
        *("--data", "data.jsonl", "--validation-share", 0.5, "--template", r"Q: {source}\nA:\n", "--mlp", 4),
        *("--dropout", 0.1, "--learning-rate", 1e-5, "--seed", 3, "--skip-bad-rows", "--gradient-checkpointing"),
    ),
    "document": ("--distill-from", "manual.txt", "--max-length", 8),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_is_repeated_by_its_file(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit, and its own file says the same."""
    monkeypatch.chdir(folder)
    assert run(monkeypatch, "train", *SMALL, *RUNS[case], "--output", f"runs/{case}") == 0
    first = Path("runs", case)
    assert run(monkeypatch, "train", "--config", first / "run.yaml", "--output", f"again/{case}") == 0
    again = Path("again", case)
    tensors, others = (load_file(run / "adapter_model.safetensors") for run in (first, again))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert (first / "adapter_config.json").read_bytes() == (again / "adapter_config.json").read_bytes()
    kept = yaml.safe_load((first / "run.yaml").read_text())
    assert yaml.safe_load((again / "run.yaml").read_text()) == kept | {"output": f"again/{case}"}
    capsys.readouterr()


def test_the_file_has_every_option_and_what_was_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults that depend on other options are there as values, so a run is the same should they change."""
    monkeypatch.chdir(folder)
    assert run(monkeypatch, "train", *SMALL, "--data", "data.jsonl", "--output", "all") == 0
    kept = yaml.safe_load(Path("all/run.yaml").read_text())
    names = {"json" if name == "as_json" else name for name in inspect.signature(train).parameters}
    assert kept.keys() == names - {"config", "context"}
    found = {"learning_rate": 0.1, "template": "{source}\n=>", "steps": 2, "model": "model", "mlp": None, "mode": "kv"}
    assert {name: kept[name] for name in found} == found


def test_the_command_line_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are written with - or _, values as in a shell."""
    monkeypatch.chdir(folder)
    lines = ("model: model", "data: data.jsonl", "output: taken", "virtual-tokens: 3", "steps: 1", "batch_size: 2")
    Path("a.yaml").write_text("\n".join((*lines, "learning-rate: 1e-3", "packing: yes", "gate: null", "init: 'zero'")))
    assert run(monkeypatch, "train", "--config", "a.yaml", "--virtual-tokens", 4, "--output", "given") == 0
    kept = yaml.safe_load(Path("given/run.yaml").read_text())
    found = {"virtual_tokens": 4, "learning_rate": 1e-3, "packing": True, "gate": None, "init": "zero", "seed": 0}
    assert {name: kept[name] for name in found} == found
    assert not Path("taken").exists()


def test_a_dry_run_shows_and_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    options = ("train", *SMALL, "--data", "data.jsonl", "--output", "dry", "--dry-run", "--max-length", 26)
    monkeypatch.setattr("prefix_attn.training.train.fit", None)
    assert run(monkeypatch, *options) == 0
    shown = capsys.readouterr().out
    assert "row 1\nname : ann\n=>⟦ this is ann.<end>⟧\n" in shown
    assert run(monkeypatch, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    lengths = [len(f"{row['source']}\n=> {row['target']}") + 1 for row in ROWS]
    targets = [len(f" {row['target']}") + 1 for row in ROWS]
    assert (found["rows"], found["tokens"], found["longest"]) == (len(ROWS), sum(lengths), max(lengths))
    assert (found["trained_tokens"], found["cut"]) == (sum(targets), sum(length > 26 for length in lengths))
    assert [part["trained"] for part in found["shown"][2]] == [False, True]
    assert found["memory"] > 10_000_000
    assert not Path("dry").exists()


ERRORS = {
    "unknown": ("stps: 3", "c.yaml, line 1: no option is called 'stps'; the nearest is 'steps'"),
    "far": ("\nzzz: 3", "c.yaml, line 2: no option is called 'zzz'; the nearest is "),
    "another file": ("config: b.yaml", "no option is called 'config'"),
    "word": ("steps: many", "line 1: 'steps' cannot be 'many': Input should be a valid integer"),
    "fraction": ("steps: 2.5", "'steps' cannot be '2.5': Input should be a valid integer"),
    "flag": ("packing: perhaps", "'packing' cannot be 'perhaps': Input should be a valid boolean"),
    "range": ("batch-size: 0", "'batch-size' cannot be '0': Input should be greater than or equal to 1"),
    "list": ("sites: [encoder, cross]", "'sites' takes one value, not a list or a mapping"),
    "mapping": ("data:\n  file: x", "'data' takes one value"),
    "nothing": ("batch-size:", "'batch-size' needs a value; leave it out for the default"),
    "twice": ("mlp-depth: 1\nmlp_depth: 2", "c.yaml, line 2: 'mlp_depth' is there twice"),
    "not a mapping": ("- steps", "c.yaml: must be lines of 'option: value'"),
    "not YAML": ("a: b\nsteps: [", "c.yaml, line 2: not YAML"),
    "bytes": ("\udcff", "c.yaml: not UTF-8 text"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = ERRORS[case]
    Path("c.yaml").write_text(text, errors="surrogateescape")
    assert run(monkeypatch, "train", "--model", "m", "--output", "x", "--config", "c.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("x").exists()


def test_what_the_command_line_excludes_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.yaml has steps, of a share of the rows: --epochs and --validation take their places."""
    monkeypatch.chdir(folder)
    lines = ("model: model", "data: data.jsonl", "output: once", "virtual_tokens: 2", "batch_size: 4", "steps: 3")
    Path("b.yaml").write_text("\n".join((*lines, "validation_share: 0.5", "dtype: bfloat16")))
    given = ("--epochs", 1, "--validation", "data.jsonl")
    assert run(monkeypatch, "train", "--config", "b.yaml", *given) == 0
    kept = yaml.safe_load(Path("once/run.yaml").read_text())
    found = {"steps": None, "epochs": 1.0, "validation_share": None, "validation": "data.jsonl", "dtype": "bfloat16"}
    assert {name: kept[name] for name in found} == found
    assert json.loads(Path("once/metrics.json").read_text())["steps"] == 1
