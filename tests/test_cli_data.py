"""The command line on data as people have them: a messy table, conversations, templates that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hf.models import tiny
from tests.numerics import ROUNDED, close
from tests.test_cli import run
from tests.training.test_chat import PLAIN, tokenizer

MESSY = 'id;Frage;Antwort\n1;"müde;\n\nnun";"  x = 1\n"\n2;;leer\n3;ab;"c</s><stop>"\n4;ab\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, and without, a table and conversations."""
    folder = tmp_path_factory.mktemp("data")
    for name, template in (("model", PLAIN), ("plain", None)):
        tiny("llama", vocab_size=258, max_position_embeddings=256).save_pretrained(folder / name)
        tokenizer(template).save_pretrained(folder / name)
    (folder / "t.csv").write_bytes(MESSY.encode("cp1252"))
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, ("a", "b\nc", "d", "e"))]
    (folder / "chat.jsonl").write_text(
        json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[2:]}) + "\n"
    )
    return folder


TRAIN = ("--steps", 2, "--batch-size", 2, "--virtual-tokens", 2, "--json")
COLUMNS = ("--source-column", "Frage", "--target-column", "Antwort")


def test_a_messy_table(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing trains before all bad rows are named; then the template goes with the adapter."""
    monkeypatch.chdir(folder)
    options = ("train", "--model", "model", "--data", "t.csv", *COLUMNS, "--output", "run", *TRAIN)
    assert run(monkeypatch, *options) == 1
    error = capsys.readouterr().err
    assert "2 of 4 rows cannot be used: 1 x 'Frage' is empty (line 6), 1 x 'Antwort' is empty (line 8)" in error
    assert not Path("run").exists()
    assert run(monkeypatch, *options, "--skip-bad-rows", "--template", r"Q: {source}\nA:\n") == 0
    capsys.readouterr()
    prompt = json.loads(Path("run/prompt.json").read_text())
    assert prompt["template"] == "Q: {source}\nA:\n"
    assert run(monkeypatch, "generate", "run", "ab", "--max-new-tokens", 2, "--json") == 0
    capsys.readouterr()
    shared = ("--skip-bad-rows", "--validation-share", 0.5, "--output", "shared")
    assert run(monkeypatch, *options, *shared) == 0
    assert len(json.loads(capsys.readouterr().out)["validation_loss"]) == 2
    assert run(monkeypatch, *options, "--skip-bad-rows", "--resume") == 1
    assert "cannot go on with" in capsys.readouterr().err


def test_conversations(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of messages need no option. All answers are trained, and the loss that is evaluated is theirs."""
    monkeypatch.chdir(folder)
    data = ("--data", "chat.jsonl", "--validation", "chat.jsonl")
    assert run(monkeypatch, "train", "--model", "model", *data, "--output", "talk", "--system", "s", *TRAIN) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert json.loads(Path("talk/prompt.json").read_text())["template"] == "chat"
    answer = ("--no-frozen", "--max-new-tokens", 2, "--json")
    assert run(monkeypatch, "evaluate", "talk", "--data", "chat.jsonl", *answer) == 0
    results = json.loads(capsys.readouterr().out)
    close(results["prefix"]["loss"], metrics["validation_loss"][-1][1], ROUNDED)
    assert run(monkeypatch, "evaluate", "talk", "--data", "chat.jsonl", *answer, "--system", "other") == 0
    assert json.loads(capsys.readouterr().out)["prefix"]["loss"] != results["prefix"]["loss"]
    assert run(monkeypatch, "generate", "talk", "a", "--max-new-tokens", 2, "--json") == 0
    assert [row["source"] for row in json.loads(capsys.readouterr().out)] == ["a"]


ERRORS: dict[str, tuple[tuple[object, ...], str]] = {
    "no chat template": (("--model", "plain", "--data", "chat.jsonl"), "has no chat template, .* --template"),
    "messages in a text": (
        ("--data", "chat.jsonl", "--template", "{source}"),
        "no row can be used .* need --template chat",
    ),
    "a template without a source": (("--data", "t.csv", *COLUMNS, "--template", "Q:"), "name {source} once"),
    "a system text without a place": (("--data", "t.csv", *COLUMNS, "--system", "s"), "a template that names {system}"),
    "columns": (("--data", "t.csv"), r"no column 'source'; there are \['id', 'Frage', 'Antwort'\], with ';' between"),
    "delimiter": (("--data", "t.csv", *COLUMNS, "--delimiter", ","), r"there are \['id;Frage;Antwort'\], with ','"),
    "encoding": (("--data", "t.csv", *COLUMNS, "--encoding", "utf-8"), "t.csv: not utf-8 text .* --encoding says"),
    "two validations": (
        ("--data", "t.csv", *COLUMNS, "--validation", "t.csv", "--validation-share", 0.5),
        "--validation and --validation-share exclude one another",
    ),
    "a share of nothing": (("--data", "t.csv", *COLUMNS, "--validation-share", 1e-6), "holds out 0 of 2 rows; take"),
    "a share of aws": (("--data", "aws", "--validation-share", 0.5), "'aws' has a split of its own"),
    "a share of a document": (("--distill-from", "t.csv", "--validation-share", 0.5), "--distill-from has none: give"),
    "too long": (
        ("--data", "t.csv", *COLUMNS, "--skip-bad-rows", "--max-length", 8),
        r"no row can be used \(2 x max_length=8 is too short for the target",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    monkeypatch.chdir(folder)
    options, message = ERRORS[case]
    skip = () if "messages" in message or "--encoding" in options else ("--skip-bad-rows",)
    assert run(monkeypatch, "train", "--model", "model", "--output", "x", *TRAIN, *skip, *options) == 1
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert not Path("x").exists()


TABLE = ("--data", "t.csv", *COLUMNS, "--skip-bad-rows", "--dry-run")
WARNED: dict[str, tuple[object, ...]] = {
    "a table": (*TABLE, "--validation", "t.csv"),
    "a share": (*TABLE, "--validation-share", 0.5),
    "a document": ("--distill-from", "d.txt", "--validation", "d.txt", "--max-length", 8),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_is_odd_about_a_file_is_said_once(
    case: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """However often it is read, and under however many options."""
    monkeypatch.chdir(folder)
    Path("d.txt").write_bytes("müde und froh".encode("cp1252"))
    assert run(monkeypatch, "train", *WARNED[case], "--model", "model", "--output", "once", *TRAIN) == 0
    capsys.readouterr()
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("read as cp1252" in text for text in said) == 1
    assert sum("2 of 4 rows are left out" in text for text in said) == (case != "a document")
    assert len(said) == len(set(said))
