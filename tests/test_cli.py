"""The command line, end to end on a tiny model: train, generate, evaluate, inspect, and errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PrefixTuningConfig, get_peft_model

from prefix_attn import PrefixConfig, cli, get_prefix_model
from prefix_attn.cli import shared
from tests.hf.models import tiny
from tests.numerics import ROUNDED, close
from tests.tokens import byte_tokenizer

ROWS = [{"source": f"name : {n}", "target": f"this is {n}."} for n in ("ann", "bob", "cid", "dee")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer and data."""
    folder = tmp_path_factory.mktemp("cli")
    tiny("llama", vocab_size=257, max_position_embeddings=128).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit status of ``prefix-attn arguments``."""
    monkeypatch.setattr(sys, "argv", ["prefix-attn", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_train_generate_evaluate_inspect(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, model, data = files / "adapter", files / "model", files / "data.jsonl"
    options = ("--model", model, "--data", data, "--validation", data, "--steps", 4, "--virtual-tokens", 3)
    assert run(monkeypatch, "train", "--output", adapter, *options, "--batch-size", 2, "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["steps"] == 4
    assert metrics["validation_loss"][-1][1] < metrics["validation_loss"][0][1]

    assert run(monkeypatch, "inspect", adapter, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_virtual_tokens"] == 3
    assert found["parameters"] == 3 * 2 * 3 * 2 * 8
    assert found["base_model_name_or_path"] == str(model)

    assert run(monkeypatch, "generate", adapter, "name : ann", "name : bob", "--max-new-tokens", 4, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["source"] for row in rows] == ["name : ann", "name : bob"]

    assert run(monkeypatch, "evaluate", adapter, "--data", data, "--max-new-tokens", 4, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert set(results) == {"frozen", "prefix"}
    # Where a processor has bfloat16 units, training validates in bfloat16 and this command in float32.
    close(results["prefix"]["loss"], metrics["validation_loss"][-1][1], ROUNDED)
    assert results["prefix"]["loss"] < results["frozen"]["loss"] + 1


WAYS: dict[str, tuple[tuple[object, ...], dict[str, object]]] = {
    "infix": (("--mode", "infix", "--frozen-tokens", 1), {"mode": "infix", "num_frozen_tokens": 1}),
    "deep": (
        ("--mlp", 8, "--mlp-depth", 2, "--mlp-activation", "gelu", "--dropout", 0.1, "--init-text", "this is"),
        {"encoder_depth": 2, "encoder_activation": "gelu", "dropout": 0.1, "init": "text"},
    ),
    "gate": (("--gate", "zero", "--init-document", "data.jsonl"), {"gate": "zero", "init": "document"}),
    "embedding": (("--mode", "embedding", "--init", "uniform"), {"mode": "embedding", "init": "uniform"}),
    "from another": (("--init-path", "other", "--position-mode", "none"), {"init": "prefix", "init_path": "other"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_training(
    way: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter has what the options say, and evaluates to the loss at the end of its training."""
    monkeypatch.chdir(files)
    options, fields = WAYS[way]
    if "--init-path" in options:
        get_prefix_model(tiny("llama", vocab_size=257, max_position_embeddings=128), PrefixConfig()).save_pretrained(
            "other"
        )
    data = ("--model", "model", "--data", "data.jsonl", "--validation", "data.jsonl", "--virtual-tokens", 3)
    assert run(monkeypatch, "train", "--output", way, *data, *options, "--steps", 2, "--batch-size", 2, "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert run(monkeypatch, "inspect", way, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in fields} == fields
    assert (
        run(monkeypatch, "evaluate", way, "--data", "data.jsonl", "--no-frozen", "--max-new-tokens", 2, "--json") == 0
    )
    results = json.loads(capsys.readouterr().out)
    # A processor with bfloat16 trains in it, and measures then too.
    close(results["prefix"]["loss"], metrics["validation_loss"][-1][1], ROUNDED)


def test_an_encoder_decoder(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source goes to the encoder, prefixes go where --sites says. Distillation has no place for a document."""
    monkeypatch.chdir(files)
    tiny("bart", vocab_size=257).save_pretrained(tmp_path / "bart")
    byte_tokenizer().save_pretrained(tmp_path / "bart")
    options = ("--model", tmp_path / "bart", "--virtual-tokens", 3, "--steps", 8, "--batch-size", 2, "--json")
    data = ("--data", "data.jsonl", "--validation", "data.jsonl", "--sites", "encoder,cross")
    assert run(monkeypatch, "train", "--output", tmp_path / "adapter", *data, *options) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["trainable_parameters"] == 3 * 2 * 32 * (3 + 2)  # tokens, key and value, width, layers
    assert metrics["validation_loss"][-1][1] < metrics["validation_loss"][0][1]
    short = ("--data", "data.jsonl", "--max-new-tokens", 3, "--json")
    assert run(monkeypatch, "evaluate", tmp_path / "adapter", *short) == 0
    results = json.loads(capsys.readouterr().out)
    close(results["prefix"]["loss"], metrics["validation_loss"][-1][1], ROUNDED)
    assert results["prefix"]["loss"] < results["frozen"]["loss"]
    distill = ("--output", tmp_path / "other", "--distill-from", "data.jsonl")
    assert run(monkeypatch, "train", *distill, *options) == 1
    assert "takes a causal model" in capsys.readouterr().err


def test_convert(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """For PEFT's prefix of a BART the report names dead and shared slots. Errors leave no folder behind."""
    base, theirs, converted = files / "bart", files / "theirs", files / "converted"
    tiny("bart").save_pretrained(base)
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    get_peft_model(tiny("bart"), config).save_pretrained(theirs)
    assert run(monkeypatch, "convert", theirs, converted, "--model", base, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["slot_of_layer"], report["dead_slots"]) == ([0, 2], [1])
    assert run(monkeypatch, "convert", theirs, converted) == 0
    shown = capsys.readouterr()
    assert "slot_of_layer" in shown.out
    assert "note: taken for granted: a decoder of 3 layers" in shown.err
    for arguments in ((theirs, "x", "--to", "lora"), (files / "data.jsonl", "x"), (theirs, "x", "--model", files)):
        assert run(monkeypatch, "convert", *arguments) == (2 if "--to" in arguments else 1)
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not Path("x").exists()


def test_inspect_mass(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """JSON, table and heat map show the same numbers. Files are read as by train."""
    monkeypatch.chdir(files)
    data = ("--model", "model", "--data", "data.jsonl", "--virtual-tokens", 3, "--steps", 1, "--batch-size", 1)
    assert run(monkeypatch, "train", "--output", "watched", *data) == 0
    capsys.readouterr()
    look = ("inspect", "watched", "--mass", "data.jsonl", "--limit", 2, "--batch-size", 1)
    assert run(monkeypatch, *look, "--plot", "new/mass.png", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (site,) = found["prefix_mass"].items()
    assert (site[0], site[1]["layers"]) == ("decoder", [0, 1, 2])
    assert all(len(row) == 4 and all(0 < share < 1 for share in row) for row in site[1]["heads"])
    assert (files / "new" / "mass.png").read_bytes().startswith(b"\x89PNG")
    Path("messy.csv").write_text("source;target\na;b\nc;\n")
    messy = ("--mass", "messy.csv", "--delimiter", ";", "--encoding", "utf-8", "--skip-bad-rows")
    assert run(monkeypatch, *look, *messy, "--template", "Q: {source} A:") == 0
    assert "1 of 2 rows are left out" in caplog.text
    capsys.readouterr()
    assert run(monkeypatch, *look) == 0
    out = capsys.readouterr().out
    for row in site[1]["heads"]:
        assert f"{sum(row) / 4:.3f}" in out
        assert "".join("▁▂▃▄▅▆▇█"[int(share * 8)] for share in row) in out
    assert run(monkeypatch, "inspect", "watched") == 0
    assert re.search(r"prefix_projection +│ False", capsys.readouterr().out)


ERRORS = {
    "no adapter": (("inspect", "missing"), "missing: not a folder|missing: neither a folder"),
    "no data": (("train", "--output", "x", "--data", "none.csv"), "none.csv: no such file"),
    "kind of data": (("train", "--output", "x", "--data", "data.txt"), "must be one of"),
    "no text": (
        ("train", "--output", "x", "--data", "{data}", "--position-mode", "rope"),
        "position_mode must be one of",
    ),
    "a plot of nothing": (("inspect", "missing", "--plot", "x.png"), "--plot is the heat map of --mass"),
    "two starts": (
        ("train", "--output", "x", "--data", "{data}", "--init-text", "a", "--init-document", "{data}"),
        "one start, got --init-text and --init-document",
    ),
    "a start beside its source": (
        ("train", "--output", "x", "--data", "{data}", "--init", "zero", "--init-text", "a"),
        "one start, got --init zero and --init-text",
    ),
    "no document": (
        ("train", "--output", "x", "--data", "{data}", "--init-document", "none.txt"),
        "--init-document none.txt: no such file or directory; give one that is there",
    ),
    "a gate that moves": (
        ("train", "--output", "x", "--data", "{data}", "--gate", "zero", "--position-mode", "shift"),
        "position_mode='none'",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    monkeypatch.chdir(files)
    model = ("--model", "model") if arguments[0] == "train" else ()
    status = run(monkeypatch, *(a.format(data=files / "data.jsonl") for a in arguments), *model)
    error = capsys.readouterr().err
    assert status == 1
    assert re.search(message, error)
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("message", ["any of [encoder, cross]", "[/a]b.csv, :x:", "one\n  two"])
def test_errors_are_printed_as_they_are(
    message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets in a message were read as markup. They vanished, or the command ended with a traceback."""

    def fail(**_: object) -> None:
        raise ValueError(message)

    monkeypatch.setattr("prefix_attn.cli.app.app", fail)
    assert run(monkeypatch) == 1
    assert capsys.readouterr().err == f"error: {' '.join(message.split())}\n"


def test_texts_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a :x: [/b] " + "c" * 200
    shared.show([], False, text)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra(package: str) -> None:
    """With only the operator installed, the script ended with a traceback."""
    code = f"import sys; sys.modules[{package!r}] = None; from prefix_attn.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("pip install 'prefix-attn[train]'")


@pytest.mark.parametrize(("package", "extra"), [("sacrebleu", "train"), ("rouge_score", "train"), ("gguf", "hf")])
def test_a_missing_package_names_its_extra(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        __import__(f"{package}.part")

    monkeypatch.setattr("prefix_attn.cli.app.app", fail)
    monkeypatch.setitem(sys.modules, package, None)
    assert run(monkeypatch) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f": pip install 'prefix-attn[{extra}]'")
    assert package in line


def test_a_missing_package_of_no_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(**_: object) -> None:
        __import__("no_such_package")

    monkeypatch.setattr("prefix_attn.cli.app.app", fail)
    assert run(monkeypatch) == 1
    assert capsys.readouterr().err == "error: No module named 'no_such_package'\n"


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "prefix_attn.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for name in ("train", "generate", "evaluate", "inspect", "convert", "check", "reproduce", "ablate", "report"):
        assert f" {name} " in done.stdout


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["prefix-attn", "--debug", "train", "--model", "m", "--output", "x", "--data", "none.csv"]
    )
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        cli.main()


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "inspect", "convert"])
def test_help_teaches(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, command, "--help") == 0
    out = capsys.readouterr().out
    assert "Usage:" in out
    assert len(out) > 400


def test_unknown_option_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "inspect", "--nothing") == 2


def test_check(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "check", "--model", files / "model", "--json") == 0
    assert all(finding["holds"] for finding in json.loads(capsys.readouterr().out))
    monkeypatch.setattr("prefix_attn.hf.check.LOGITS", -1.0)
    assert run(monkeypatch, "check", "--model", files / "model") == 1
    assert "FAILS" in capsys.readouterr().err
