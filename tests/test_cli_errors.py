"""Wrong inputs of the command line: one line each that says what is wrong and what to do."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import typer

from prefix_attn import PrefixConfig, get_prefix_model
from prefix_attn.cli.app import app
from tests.hf.models import tiny
from tests.test_cli import ROWS, run
from tests.tokens import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter for it, good data and bad data."""
    folder = tmp_path_factory.mktemp("errors")
    model = tiny("llama", vocab_size=257, max_position_embeddings=128)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    get_prefix_model(model, PrefixConfig(num_virtual_tokens=2)).save_pretrained(folder / "adapter")
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in FILES.items():
        (folder / name).write_bytes(text)
    for name in ("empty", "broken", "light"):
        (folder / name).mkdir()
    (folder / "broken" / "config.json").write_text("{")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / "light" / name).write_bytes((folder / "model" / name).read_bytes())
    return folder


FILES = {
    "empty.csv": b"",
    "empty.jsonl": b"",
    "head.csv": b"source,target\n",
    "twice.csv": b"source,target,source\na,b,c\n",
    "list.jsonl": b"[1]\n",
    "half.jsonl": b'{"source": "a", "target": "b"}\n{"source": "a", "tar',
    "other.jsonl": b'{"input": "a", "output": "b"}\n',
    "chat.jsonl": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    "asked.jsonl": b'{"messages": [{"role": "user", "content": "a"}]}\n',
    "quote.csv": b'source,target\na,"b\n',
    "not.parquet": b"source",
    "notes.docx": b"PK",
    "blank.txt": b" \n",
    "good.csv": b"source,target\na,b\n",
    "data.yaml": b"data: nowhere.csv\n",
    "empty.yaml": b"data: good.csv\nsites: ''\n",
    "nul.yaml": b'data: "a\\0b.csv"\n',
    "file": b"",
}
TRAIN = ("train", "--model", "model", "--output", "x")
GOOD = (*TRAIN, "--data", "good.jsonl")
EVALUATE = ("evaluate", "adapter", "--data", "good.jsonl")
NO_MODEL = "no model found; give 'smollm2', a .gguf file, a local folder or the name of a model on the Hub"

# The arguments and the message, which ends in ... where it goes on.
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": (("train", "--output", "x"), "Missing option '--model': A local folder, a .gguf..."),
    "no data": (TRAIN, "nothing to train on: give --data or --distill-from. --data takes 'aws', ..."),
    "no output": (("train", "--model", "model"), "Missing option '--output': Folder for the adapter, ..."),
    "option": ((*GOOD, "--epoch", "3"), "No such option: --epoch (Possible options: --epochs)..."),
    "command": (("traine",), "No such command 'traine'. Did you mean 'train', 'pretrain'?..."),
    "word": ((*GOOD, "--steps", "many"), "Invalid value for '--steps': Input should be a valid integer..."),
    "fraction": ((*GOOD, "--steps", "1.5"), "Invalid value for '--steps': Input should be a valid..."),
    "no rows": ((*GOOD, "--batch-size", "0"), "Invalid value for '--batch-size': Input should be greater..."),
    "rate": ((*GOOD, "--learning-rate", "nan"), "learning_rate must be positive, such as 0.01, got nan"),
    "share": ((*GOOD, "--validation-share", "5"), "--validation-share must be between 0 and 1, such as..."),
    "dropout": ((*GOOD, "--dropout", "1"), "dropout must lie in [0, 1), got 1.0"),
    "mode": ((*GOOD, "--mode", "kvs"), "mode must be one of ('kv', 'embedding', 'infix'), got 'kvs'"),
    "activation": (
        (*GOOD, "--mlp", "8", "--mlp-activation", "cubic"),
        "--mlp-activation must be one of ('elu', 'gelu', ...",
    ),
    "frozen": ((*GOOD, "--frozen-tokens", "11"), "--frozen-tokens must lie in 0..10 of 10, got 11"),
    "a folder of no data": ((*TRAIN, "--data", "empty"), "--data 'empty' is a folder without WebNLG's .xml..."),
    "a prefix too long": ((*GOOD, "--virtual-tokens", "128"), "the prefix leaves no room for rows in the model's..."),
    "scores written before": (
        ("evaluate", "adapter", "--data", "good.csv", "--metrics", "exact", "--output", "good.csv"),
        "good.csv: exists already; take another --output",
    ),
    "all frozen": ((*GOOD, "--frozen-tokens", "10"), "--frozen-tokens 10 of --virtual-tokens 10 leave nothing to..."),
    "template": ((*GOOD, "--template", "{source} {target}"), "template '{source} {target}' may name {source}..."),
    "brace": ((*GOOD, "--template", "{source"), "template '{source': expected '}' before end of string; write..."),
    "encoding": ((*GOOD, "--encoding", "latin-99"), "encoding must be one that Python knows, such as utf-8..."),
    "delimiter": ((*GOOD, "--delimiter", "::"), "delimiter must be one character, such as ';' or a tab, got '::'"),
    "dtype": ((*GOOD, "--dtype", "bf16"), "Invalid value for '--dtype': 'bf16' is not one of 'auto', ..."),
    "device": ((*GOOD, "--device", "gpu"), "device must be 'cpu', 'cuda', 'cuda:1', 'mps' or 'auto', got 'gpu'"),
    "no such device": ((*GOOD, "--device", "cpu:7"), "device 'cpu:7' is not there: torch finds 1 of its kind"),
    "bits": ((*GOOD, "--quantize", "5"), "quantize must be 4 or 8, for bits, got 5"),
    "two lengths": ((*GOOD, "--steps", "5", "--epochs", "2"), "--steps and --epochs exclude one another"),
    "nothing to stop by": ((*GOOD, "--early-stopping", "2"), "--early-stopping needs data to validate on: give..."),
    "no model folder": ((*GOOD, "--model", "./nowhere"), f"--model ./nowhere: {NO_MODEL} (there is no such folder)"),
    "empty model": ((*GOOD, "--model", "empty"), "--model empty: no model found: the folder has no config.json"),
    "broken model": ((*GOOD, "--model", "broken"), f"--model broken: {NO_MODEL} (It looks like the config file at..."),
    "no weights": ((*GOOD, "--model", "light"), f"--model light: {NO_MODEL} (Error no file named..."),
    "no GGUF": ((*GOOD, "--model", "a.gguf"), "--model a.gguf: no such file"),
    "a file for a folder": ((*GOOD, "--output", "file"), "Invalid value for '--output': dir 'file' is a file..."),
    "below a file": ((*GOOD, "--output", "file/x"), "--output file/x: cannot be written: ..."),
    "empty table": ((*TRAIN, "--data", "empty.csv"), "--data empty.csv: empty, at least one row is needed"),
    "a head alone": ((*TRAIN, "--data", "head.csv"), "--data head.csv: empty, at least one row is needed"),
    "column twice": ((*TRAIN, "--data", "twice.csv"), "twice.csv, line 1: more than one column is named 'source'..."),
    "a list": ((*TRAIN, "--data", "list.jsonl"), "list.jsonl, line 1: must be a JSON object, got list; mend it, ..."),
    "half a row": ((*TRAIN, "--data", "half.jsonl"), "half.jsonl, line 2: not JSON (Unterminated string..."),
    "other keys": ((*TRAIN, "--data", "other.jsonl"), "other.jsonl, line 1: no key 'source'; there are ['input', ..."),
    "no answer": ((*TRAIN, "--data", "asked.jsonl"), "asked.jsonl, line 1: 'messages' has no message of the role..."),
    "no chat template": ((*TRAIN, "--data", "chat.jsonl"), "the tokenizer has no chat template, which rows with..."),
    "open quote": ((*TRAIN, "--data", "quote.csv"), "quote.csv, line 2: not CSV: unexpected end of data; mend it..."),
    "no Parquet": ((*TRAIN, "--data", "not.parquet"), "--data not.parquet: not Parquet (Parquet file size is 6..."),
    "a document": ((*TRAIN, "--data", "notes.docx"), "--data notes.docx: data must be one of ('aws', ..."),
    "no validation": (
        (*GOOD, "--validation", "nowhere.csv"),
        "--validation nowhere.csv: no such file; give one that is there",
    ),
    "no start": ((*GOOD, "--init-path", "./nowhere"), "--init-path ./nowhere: not a folder with an adapter, nor..."),
    "blank text": (
        (*TRAIN, "--distill-from", "blank.txt"),
        "--distill-from blank.txt: holds no text; give a file that does",
    ),
    "no config": ((*GOOD, "--config", "nowhere.yaml"), "Invalid value for '--config': nowhere.yaml: no such file..."),
    "empty adapter": (("inspect", "empty"), "empty: the folder is empty, and holds no prefix"),
    "a model for an adapter": (("inspect", "model"), "model/model.safetensors: a state_dict of a PrefixModel has..."),
    "no adapter": (("generate", "no/where/else", "a"), "no/where/else: not a folder with an adapter, nor a file"),
    "no input": (("generate", "adapter"), "nothing to generate from: give inputs as arguments, with --data or..."),
    "temperature": (("generate", "adapter", "a", "--temperature", "-1"), "temperature must be 0 or more, got -1"),
    "no table": (
        ("generate", "adapter", "a", "--output", "a.doc"),
        "--output a.doc: an output must end in .csv...",
    ),
    "no test data": (("evaluate", "adapter"), "Missing option '--data': 'aws', 'aws-summary', or a file: ..."),
    "metric": ((*EVALUATE, "--metrics", "blue"), "there is no metric 'blue'; there are bleu, nist, meteor, ..."),
    "split": ((*EVALUATE, "--split", "testing"), "Invalid value for '--split': 'testing' is not one of 'train', ..."),
    "other format": (("convert", "adapter", "x", "--to", "lora"), "Invalid value for '--to': 'lora' is not one of..."),
    "in place": (("convert", "adapter", "adapter"), "adapter: must be a folder other than that of the source"),
    "no results": (("report", "empty.jsonl"), "empty.jsonl: holds no results"),
    "other results": (("report", "list.jsonl"), "list.jsonl, line 1: not a result, which is an object with 'run'"),
    "nothing to check": (("check", "--model", "./nowhere"), f"--model ./nowhere: {NO_MODEL} (there is no such folder)"),
    "no training file": (
        ("reproduce", "e2e", "--model", "model", "--out", "x", "--train", "nowhere.csv"),
        "--train nowhere.csv: no such file or directory; give one that is there",
    ),
    "no document": (
        (*TRAIN, "--distill-from", "nowhere"),
        "--distill-from nowhere: no such file or directory; give one that is there",
    ),
    "no document to start from": ((*GOOD, "--init-document", "nowhere"), "--init-document nowhere: no such file or..."),
    "a folder for a text": (
        (*TRAIN, "--distill-from", "good.csv", "--validation", "empty"),
        "--validation empty: is a directory; give a file",
    ),
    "no file to test on": (
        ("ablate", "mode", "--model", "model", "--out", "x", "--train", "good.csv", "--test", "nowhere"),
        "--test nowhere: no such file or directory; give one that is there",
    ),
    "no data for the mass": (("inspect", "adapter", "--mass", "nowhere.csv"), "--mass nowhere.csv: no such file..."),
    "no inputs": (("generate", "adapter", "--data", "nowhere.csv"), "--data nowhere.csv: no such file..."),
    "a plot below a file": (
        ("inspect", "adapter", "--mass", "good.csv", "--plot", "file/x.png"),
        "--plot file/x.png: cannot be written: ...",
    ),
    "outputs below a file": (("generate", "adapter", "a", "--output", "file/x.csv"), "--output file/x.csv: cannot..."),
    "a file of a file": ((*TRAIN, "--config", "data.yaml"), "--data nowhere.csv: no such file..."),
    "what to vary": (("ablate", "width", "--model", "model"), "Invalid value for 'kind': 'width' is not one of..."),
}


EMPTY: dict[str, tuple[str, ...]] = {
    "--output": ("train", "--model", "model", "--data", "good.csv", "--output", ""),
    "--model": ("train", "--model", " ", "--data", "good.csv", "--output", "x"),
    "--data": (*TRAIN, "--data", ""),
    "--validation": (*GOOD, "--validation", ""),
    "--sites": (*GOOD, "--sites", ""),
    "--report-to": (*GOOD, "--report-to", ""),
    "--init-path": (*GOOD, "--init-path", ""),
    "--init-text": (*GOOD, "--init-text", ""),
    "--distill-from": (*TRAIN, "--distill-from", ""),
    "--config": (*GOOD, "--config", ""),
    "'sites'": (*TRAIN, "--config", "empty.yaml"),
    "'data'": (*TRAIN, "--config", "nul.yaml"),
    "adapter": ("inspect", ""),
    "--file": ("generate", "adapter", "--file", ""),
    "target": ("convert", "adapter", ""),
    "base": ("serve", "", "--prefix", "a=adapter"),
    "--prefix": ("serve", "model", "--prefix", ""),
    "--out": ("reproduce", "e2e", "--model", "model", "--train", "good.csv", "--out", ""),
    "file": ("report", ""),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_is_not_the_current_folder(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path of no characters would be."""
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    assert run(monkeypatch, *EMPTY[name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    assert ("a name cannot hold a NUL" if name == "'data'" else "it is empty; give a value") in line
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("case", CASES)
def test_errors_are_one_line(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    arguments, message = CASES[case]
    assert run(monkeypatch, *arguments) in (1, 2)
    shown = capsys.readouterr()
    (line,) = (line for line in shown.err.splitlines() if line.strip())
    assert line.startswith("error: " + message.removesuffix("..."))
    assert message.endswith("...") or line == "error: " + message
    assert shown.out == ""
    assert not Path("x").exists()


# What is checked before anything is loaded ----------------------------------------------------------------------------

# A wrong value of each option of train, with what must stand beside it. Flags take no value.
WRONG: dict[str, tuple[str, ...]] = {
    "--output": ("file",),
    "--model": ("./nowhere",),
    "--config": ("nowhere.yaml",),
    "--dtype": ("bf16",),
    "--device": ("gpu",),
    "--quantize": ("3",),
    "--data": ("nowhere.csv",),
    "--distill-from": ("nowhere.txt",),
    "--self-study": ("1",),
    "--distill-data": ("good.csv",),
    "--chunk-tokens": ("1",),
    "--top-k": ("0",),
    "--validation": ("nowhere.csv",),
    "--validation-share": ("0",),
    "--source-column": ("nowhere", "--data", "good.csv"),
    "--target-column": ("nowhere", "--data", "good.csv"),
    "--delimiter": ("::",),
    "--encoding": ("latin-99",),
    "--template": ("Q:",),
    "--system": ("Be brief.", "--template", "{source}"),
    "--virtual-tokens": ("0",),
    "--mode": ("kvs",),
    "--sites": ("decoder,middle",),
    "--mlp": ("0",),
    "--mlp-depth": ("0",),
    "--mlp-activation": ("cubic", "--mlp", "8"),
    "--dropout": ("1",),
    "--gate": ("one",),
    "--frozen-tokens": ("11",),
    "--position-mode": ("rope",),
    "--init": ("ones",),
    "--init-text": ("a", "--init", "zero"),
    "--init-document": ("nowhere.txt",),
    "--init-path": ("./nowhere",),
    "--steps": ("0",),
    "--epochs": ("-1",),
    "--batch-size": ("0",),
    "--gradient-accumulation-steps": ("0",),
    "--learning-rate": ("0",),
    "--max-length": ("0",),
    "--validate-every": ("0",),
    "--validation-rows": ("-1",),
    "--early-stopping": ("0",),
    "--seed": ("-1",),
    "--report-to": ("tensorbord",),
}


COMMANDS = sorted(cast(Any, typer.main.get_command(app)).commands)


def command(name: str) -> Any:
    """A command as typer makes it."""
    group: Any = typer.main.get_command(app)
    return group.commands[name]


def options_of(name: str) -> list[Any]:
    """The options of a command, --help apart."""
    return [p for p in command(name).params if p.opts[0].startswith("--") and p.name != "help"]


def test_each_option_has_a_wrong_value() -> None:
    found = {parameter.opts[0]: parameter.is_flag for parameter in options_of("train")}
    assert {name for name, is_flag in found.items() if not is_flag} == set(WRONG)


@pytest.mark.parametrize("option", [*WRONG, "flags"])
def test_arguments_are_checked_first(
    option: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No model is loaded and no row or text is read when one of the options is wrong."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something is loaded")

    for name in ("hf.load.load_base", "training.data.Examples._read", "cli.train.read_text"):
        monkeypatch.setattr(f"prefix_attn.{name}", fail)
    monkeypatch.chdir(folder)
    flags = [p.opts[0] for p in options_of("train") if p.is_flag]
    for wrong in ((option, *WRONG[option]),) if option in WRONG else ((f"{flag}=1",) for flag in flags):
        good = TRAIN if option == "--distill-from" else GOOD
        assert run(monkeypatch, *good, *wrong) in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
    assert not Path("x").exists()


def test_errors_come_before_transformers(folder: Path) -> None:
    """It takes longer to import than all that a wrong command needs."""
    commands = [
        [*TRAIN],
        [*GOOD, "--model", "./nowhere"],
        [*TRAIN, "--data", "half.jsonl"],
        ["generate", "./nowhere", "a"],
        ["generate", "adapter"],
        ["chat", "./nowhere"],
        ["evaluate", "./nowhere", "--data", "good.jsonl"],
        ["evaluate", "adapter", "--data", "half.jsonl"],
        ["inspect", "./nowhere"],
        ["convert", "./nowhere", "x"],
        ["check", "--model", "./nowhere"],
        ["reproduce", "e2e", "--model", "./nowhere", "--train", "good.csv", "--out", "x"],
        ["ablate", "mode", "--model", "./nowhere", "--train", "good.csv", "--out", "x"],
        ["pretrain", "nowhere.csv", "--out", "x"],
        ["report", "empty.jsonl"],
        ["serve", "model", "--prefix", "a=nowhere"],
        *([name, "--help"] for name in COMMANDS),
    ]
    code = f"""
import sys
from prefix_attn import cli
for arguments in {commands!r}:
    sys.argv = ["prefix-attn", *arguments]
    try:
        cli.main()
    except SystemExit as stopped:
        assert bool(stopped.code) is (arguments[-1] != "--help"), arguments
    found = {{"transformers", "peft", "datasets", "matplotlib"}} & sys.modules.keys()
    assert not found, (arguments, found)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run_code = [sys.executable, "-c", code]
    done = subprocess.run(
        run_code, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("error: ") == len(commands) - len(COMMANDS)
