"""``prefix-attn generate`` on tables, its files after a kill, and ``prefix-attn chat`` through a pipe."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from prefix_attn import PrefixConfig, get_prefix_model
from prefix_attn.training import conversation
from prefix_attn.training.generate import Generator
from prefix_attn.training.metrics import score
from prefix_attn.training.prompts import Prompt
from tests.hf.models import spread, tiny
from tests.test_cli import run
from tests.tokens import END
from tests.training.test_chat import PLAIN, tokenizer

TABLE = 'id;Frage;Notiz\n1;"müde;\n\nnun";\n2;;leer\n3;"ab ""c""";"x\ny"\n4;lang lang lang;\n5;ab;d\n6;e;"f;g"\n'
SIZES = {"vocab_size": 258, "max_position_embeddings": 256, "eos_token_id": END, "pad_token_id": END}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with prefixes, for chats and for lines, and inputs."""
    folder = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    model = spread(tiny("llama", **SIZES))
    model.save_pretrained(folder / "model")
    tokenizer(PLAIN).save_pretrained(folder / "model")
    for name, prompt in (("talk", Prompt("chat")), ("line", Prompt())):
        base = type(model).from_pretrained(folder / "model")
        config = PrefixConfig(num_virtual_tokens=3, base_model_name_or_path=str(folder / "model"))
        get_prefix_model(base, config).save_pretrained(folder / name)
        prompt.save(folder / name)
    (folder / "t.csv").write_bytes(TABLE.encode("cp1252"))
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, ("a", "b", "d", "e"))]
    rows = [{"id": 1, "messages": turns}, {"id": 2, "messages": turns[:3]}, {"id": 3, "messages": turns[2:]}]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


TAKE = ("--data", "t.csv", "--source-column", "Frage", "--skip-bad-rows", "--max-new-tokens", 6)
DRAW = ("--temperature", 2, "--top-k", 50, "--seed", 3)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def test_a_table_and_one_more_column(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All cells come back, in their order, and outputs are the same whatever the batch and the format."""
    monkeypatch.chdir(folder)
    assert run(monkeypatch, "generate", "talk", *TAKE[:-3], "--output", "no.csv") == 1
    assert "t.csv, line 5: 'Frage' is empty; mend it, or pass --skip-bad-rows" in capsys.readouterr().err
    assert not Path("no.csv").exists()
    assert run(monkeypatch, "generate", "talk", *TAKE, *DRAW, "--output", "out.csv", "--batch-size", 1) == 0
    assert capsys.readouterr().out == "5 rows in out.csv\n"
    rows = read(Path("out.csv"))
    given = [row for row in csv.DictReader(io.StringIO(TABLE), delimiter=";") if row["Frage"]]
    assert [{name: row[name] for name in ("id", "Frage", "Notiz")} for row in rows] == given
    assert len({row["output"] for row in rows}) == 5
    assert run(monkeypatch, "generate", "talk", *TAKE, *DRAW, "--output", "o.jsonl", "--output-column", "said") == 0
    lines = [json.loads(line) for line in Path("o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{**line, "said": None} for line in lines] == [{**row, "said": None} for row in given]
    assert [line["said"] for line in lines] == [row["output"] for row in rows]
    capsys.readouterr()
    assert run(monkeypatch, "generate", "talk", *TAKE, *DRAW, "--json") == 0
    assert json.loads(capsys.readouterr().out) == rows


def test_a_kill_loses_no_row(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What was written is not written again; the rest is drawn as it would have been."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("prefix_attn.cli.generate.BATCHES", 1)
    options = ("generate", "talk", *TAKE, *DRAW, "--batch-size", 2, "--output")
    assert run(monkeypatch, *options, "whole.csv") == 0
    whole, inner, calls = Path("whole.csv").read_bytes(), Generator.texts, list[int]()

    def texts(self: Generator, sources: list[str], *rest: object) -> list[str]:
        calls.append(len(sources))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(self, sources, *rest)

    monkeypatch.setattr(Generator, "texts", texts)
    capsys.readouterr()
    assert run(monkeypatch, *options, "part.csv", "--resume") == 130  # begins where there is nothing
    assert "stopped: part.csv has 2 of 5 rows; --resume goes on" in capsys.readouterr().err
    assert len(read(Path("part.csv"))) == 2
    assert run(monkeypatch, *options, "part.csv") == 1
    assert "part.csv: exists already; go on with it by --resume" in capsys.readouterr().err
    other = ("generate", "line", *options[2:])
    for arguments, message in (((*options, "part.csv", "--seed", 4), "seed 3"), ((*other, "part.csv"), "adapter '")):
        assert run(monkeypatch, *arguments, "--resume") == 1
        assert f"part.csv: was begun with {message}" in capsys.readouterr().err
    calls.clear()
    calls.append(0)  # so that no call is the second
    calls.append(0)
    Path("part.csv").write_bytes(whole[: len(Path("part.csv").read_bytes()) - 3])  # killed within the second row
    assert run(monkeypatch, *options, "part.csv", "--resume") == 0
    assert Path("part.csv").read_bytes() == whole
    assert calls[2:] == [2, 2, 0] or calls[2:] == [2, 2]
    assert run(monkeypatch, *options, "part.csv", "--resume") == 0
    assert Path("part.csv").read_bytes() == whole


def test_conversations_are_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the last message is an answer, it is answered anew: the first two rows ask the same."""
    monkeypatch.chdir(folder)
    short = ("--max-new-tokens", 6, "--output")
    assert run(monkeypatch, "generate", "talk", "--data", "chat.jsonl", *short, "chat.csv") == 0
    rows = read(Path("chat.csv"))
    assert [row["id"] for row in rows] == ["1", "2", "3"]
    assert json.loads(rows[1]["messages"])[-1] == {"role": "user", "content": "d"}
    assert rows[0]["output"] == rows[1]["output"] != rows[2]["output"]
    capsys.readouterr()
    assert run(monkeypatch, "generate", "talk", "d", "--max-new-tokens", 6) == 0
    shown = capsys.readouterr()
    assert shown.out == rows[2]["output"] + "\n"
    if "cut at" in shown.err:
        assert "note: 1 of 1 outputs were cut at 6 tokens; --max-new-tokens says otherwise" in shown.err


ERRORS: dict[str, tuple[tuple[object, ...], str]] = {
    "two places": (("a", "--data", "t.csv"), "inputs come from one place, got arguments and --data"),
    "nothing": ((), "nothing to generate from: give inputs as arguments, with --data or --file, or on stdin"),
    "a column that is not": (("--data", "t.csv"), "no column 'source'; there are .* --source-column"),
    "a column that is": (
        ("--data", "t.csv", *TAKE[2:5], "--output", "x.csv", "--output-column", "id"),
        "have a column 'id' already: give another --output-column",
    ),
    "a format": (("a", "--output", "x.xlsx"), "x.xlsx: an output must end in .csv, .tsv or .jsonl"),
    "resuming nothing": (("a", "--resume"), "--resume goes on with a file: give its --output"),
    "options of a table": (
        ("a", "--delimiter", ";"),
        "--delimiter and --skip-bad-rows are for --data",
    ),
    "options of a file": (("a", "--encoding", "utf-8"), "--encoding is for --data and --file"),
    "beams that draw": (("a", "--num-beams", 2, "--top-p", 0.5), "temperature, top_p and top_k need num_beams 1"),
    "a probability": (("a", "--top-p", 90), "top_p must be between 0 and 1, such as 0.9, got 90"),
    "no adapter": (("--data", "t.csv", *TAKE[2:5], "--output", "x.csv"), "nowhere: neither a folder"),
    "too long": (("a", "--max-new-tokens", 254), "256 positions, of which outputs and prefix take 257: too many"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    arguments, message = ERRORS[case]
    assert run(monkeypatch, "generate", "nowhere" if case == "no adapter" else "talk", *arguments) == 1
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert not list(Path().glob("x.*"))


# Evaluate -------------------------------------------------------------------------------------------------------------


def test_the_metrics_and_texts_that_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The texts are those of generate, and as long as the longest reference; the scores are theirs."""
    monkeypatch.chdir(folder)
    Path("pairs.jsonl").write_text('{"source": "a", "target": "b\\nc"}\n{"source": "d", "target": "abcdef"}\n')
    pairs = ("talk", "--data", "pairs.jsonl")
    options = ("--metrics", "F1,exact, loss", "--output", "texts.jsonl", "--json")
    assert run(monkeypatch, "evaluate", *pairs, *options) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == ["frozen", "prefix"]
    assert [list(values) for values in scores.values()] == [["f1", "exact", "loss"]] * 2
    rows = [json.loads(line) for line in Path("texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["source"], row["reference"]) for row in rows] == [("a", "b\nc"), ("d", "abcdef")]
    assert run(monkeypatch, "generate", "talk", "a", "d", "--max-new-tokens", 8, "--json") == 0
    outputs = [row["output"] for row in json.loads(capsys.readouterr().out)]
    assert [row["output"] for row in rows] == outputs
    assert score(outputs, [["b\nc"], ["abcdef"]], ["f1"])["f1"] == scores["prefix"]["f1"]
    assert {row["output without prefix"] for row in rows}.isdisjoint(outputs)
    monkeypatch.setattr(Generator, "texts", None)  # which the loss does not need
    assert run(monkeypatch, "evaluate", *pairs, "--metrics", "loss", "--no-frozen", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"prefix": {"loss": scores["prefix"]["loss"]}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metrics", "bleu,bleurt"), "no metric 'bleurt'; there are bleu, nist, meteor, rougeL, .* exact, f1, loss"),
        (("--metrics", ""), "no metric ''; there are"),
        (("--metrics", "loss", "--output", "x.csv"), "--metrics loss writes none: leave one out"),
        (("--output", "x.txt"), r"must end in \.csv, \.tsv or \.jsonl"),
        (("--metrics", "bleu"), "the metric bleu needs the package sacrebleu: pip install 'prefix-attn"),
    ],
)
def test_what_cannot_be_evaluated(
    options: tuple[str, ...],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is said before data or model are read."""
    monkeypatch.chdir(folder)
    if "package" in message:
        monkeypatch.setattr("prefix_attn.training.metrics.find_spec", lambda package: None)
    assert run(monkeypatch, "evaluate", "nowhere", "--data", "nothing.csv", *options) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line)


# Chat -----------------------------------------------------------------------------------------------------------------


def test_chat_through_a_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    short = ("--max-new-tokens", 5)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb\n/reset\na\n/quit\nnever\n"))
    assert run(monkeypatch, "chat", "talk", *short, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [message["content"] for message in said[::2]] == ["a", "b", "a"]
    answers = [message["content"] for message in said[1::2]]
    assert answers[0] == answers[2] != answers[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb"))  # ends without a line break
    assert run(monkeypatch, "chat", "talk", *short) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{answers[0]}\n{answers[1]}\n"
    assert "/reset forgets the conversation, /quit or ctrl-D ends it, ctrl-C stops an answer" in shown.err
    assert "note:" not in shown.err


def test_chat_with_a_prefix_that_was_not_trained_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each input is answered by itself, as generate does, after a note. Without a chat template it cannot chat."""
    monkeypatch.chdir(folder)
    short = ("--max-new-tokens", 5)
    assert run(monkeypatch, "generate", "line", "a", "b", *short) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    assert run(monkeypatch, "chat", "line", *short) == 0
    shown = capsys.readouterr()
    assert shown.out == expected
    assert "not to chat: it answers each input" in shown.err
    tokenizer(None).save_pretrained(folder / "plain")
    tiny("llama", **SIZES).save_pretrained(folder / "plain")
    assert run(monkeypatch, "chat", "line", "--template", "chat", "--model", "plain") == 1
    assert "error: the tokenizer has no chat template" in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer ends after the token that is being written, and the next line is answered."""
    monkeypatch.chdir(folder)
    asked, inner, before = list[int](), conversation._Stopped.__call__, signal.getsignal(signal.SIGINT)

    def interrupt(self: conversation._Stopped, *arguments: object, **options: object) -> torch.Tensor:
        asked.append(1)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, *arguments, **options)

    monkeypatch.setattr(conversation._Stopped, "__call__", interrupt)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n/reset\na\n/quit\n"))
    assert run(monkeypatch, "chat", "talk", "--max-new-tokens", 9, "--json") == 0
    _, stopped, _, whole = (message["content"] for message in json.loads(capsys.readouterr().out))
    assert len(asked) > 6
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)
    assert signal.getsignal(signal.SIGINT) is before
