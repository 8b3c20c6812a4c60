"""Every example runs as its docstring says, and what it prints shows what it promises."""

from __future__ import annotations

import csv
import json
import re
import runpy
import socket
import sys
import tempfile
from pathlib import Path

import pytest
from torch.optim import AdamW

from prefix_attn.training.examples import Example
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.tokens import collate, encode
from tests.hf.models import tiny
from tests.numerics import MODEL
from tests.scripts import run_script
from tests.tokens import END, byte_tokenizer
from tests.training.test_chat import tokenizer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CLOSE = MODEL.atol  # of what is the same computation in another order, in float32


def run(name: str, *arguments: object) -> str:
    """What ``python examples/NAME.py`` prints."""
    with tempfile.TemporaryDirectory() as output:
        return run_script(ROOT / "examples" / f"{name}.py", [*map(str, arguments)], ROOT, Path(output))


def changes(text: str) -> list[tuple[float, float]]:
    """Every "before -> after"."""
    return [(float(a), float(b)) for a, b in re.findall(r"([\d.]+)%? -> ([\d.]+)", text)]


def test_prefix_attention() -> None:
    lines = run("prefix_attention").splitlines()
    assert 0 < float(re.findall(r"at most (\S+) from", lines[0])[0]) < CLOSE
    ((first, last),) = changes(lines[1])
    assert last < 0.7 * first
    assert lines[1].endswith("query has no gradient")
    assert float(re.findall(r"at most (\S+) from", lines[2])[0]) < CLOSE
    assert lines[3].startswith("4. auto -> ")


def test_vit() -> None:
    """The frozen trunk knows another task: prefixes reach in it what a head alone does not."""
    text = run("vit")
    everything, head, prefixes = changes(text)
    assert everything[1] > 95
    assert prefixes[0] < 65
    assert prefixes[1] > max(95, head[1])
    count = [int(number) for number in re.findall(r"(\d+) parameters", text)]
    assert count[2] - count[1] == 2 * 2 * 8 * 32  # two layers, keys and values, eight tokens of width 32
    assert count[2] < 0.1 * count[0]


def test_many_prefixes() -> None:
    """Each row counts as its prefix says, in one batch as alone."""
    text = run("many_prefixes")
    ((first, last),) = changes(text)
    assert last < 0.1 * first
    rows = re.findall(r"^(\w[\w ]*?) +(5(?: \d+)+)$", text, re.MULTILINE)
    assert [name for name, _ in rows] == ["threes", "ones", "no prefix", "twos", "threes"]
    for name, counted in rows:
        if name != "no prefix":
            step = ("ones", "twos", "threes").index(name) + 1
            assert counted == " ".join(str((5 + step * i) % 16) for i in range(6))
    assert text.endswith("5 of 5 rows are the same alone\n")


def test_vision_language() -> None:
    """The frozen model cannot know the language, and rows without their padding are answered as in the batch."""
    text = run("vision_language")
    loss, right = changes(text)
    assert loss[1] < 0.2 * loss[0]
    assert right[0] < 70
    assert right[1] > 95
    assert text.endswith("8 of 8 rows are the same alone\n")


def test_trainer() -> None:
    """The prefix counts in threes, and what was resumed and saved is what is loaded."""
    text = run("trainer")
    ((first, last),) = changes(text)
    assert last < 0.6 * first
    assert float(re.findall(r"logits differ by (\S+)", text)[0]) < CLOSE
    assert text.endswith("it counts: 5 8 11 14 1 4\n")


@pytest.mark.peft
def test_peft_migration() -> None:
    text = run("peft_migration")
    trained = changes(text)
    assert len(trained) == 2
    assert all(last < first - 0.5 for first, last in trained)
    differences = [float(number) for number in re.findall(r"differ by (\S+)", text)]
    assert len(differences) == 3
    assert all(difference < CLOSE for difference in differences)


def test_accelerate_loop() -> None:
    """A break changes no bit, and the norms that were trained beside the prefix are in its files."""
    text = run("accelerate_loop")
    (first, middle), (again, last) = changes(text)
    assert middle == again < first - 0.1
    assert last < middle - 0.1
    assert "without a break: the same bits\n" in text
    assert float(re.findall(r"differ by (\S+)", text)[0]) < CLOSE


def test_context_parallel() -> None:
    """The output and the gradients of one process, the prefix counted once."""
    lines = run("context_parallel").splitlines()
    assert [line.split()[0] for line in lines] == ["out", "query", "key", "value", "prefix_key", "prefix_value"]
    assert all(0 < float(line.split()[-1]) < CLOSE for line in lines)


@pytest.mark.trl
def test_trl_sft() -> None:
    text = run("trl_sft")
    ((first, last),) = changes(text)
    assert last < first - 0.1
    assert float(re.findall(r"differ by (\S+)", text)[0]) < CLOSE


@pytest.mark.trl
def test_trl_dpo() -> None:
    """The prefix learns the preferences; the reference stays the frozen model."""
    text = run("trl_dpo")
    loss, margin = changes(text)
    assert loss[1] < loss[0] - 0.05
    assert margin[1] > margin[0] + 0.2
    assert float(re.findall(r"the frozen model: logits differ by (\S+)", text)[0]) < CLOSE
    assert float(re.findall(r"moves them by (\S+)", text)[0]) > 0.1


def chat_model(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    """A tiny chat model that has learnt to answer as these tickets are answered."""
    tokens = tokenizer("{% for m in messages %}{{ m['content'] }}<stop>{% endfor %}")
    model = tiny("llama", vocab_size=258, max_position_embeddings=512, hidden_size=64, intermediate_size=128).train()
    pairs = [Example(ticket, (reply,)) for _, ticket, reply in rows if ticket.strip() and reply and len(ticket) < 99]
    batch, optimizer = encode(tokens, pairs, 512, prompt=Prompt("chat"))[0], AdamW(model.parameters(), 5e-3)
    for step in range(40):
        model(**collate([batch[(8 * step + i) % len(batch)] for i in range(8)], END)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)


def test_tickets(tmp_path: Path) -> None:
    """Ctrl-C before the first checkpoint loses nothing, and answers have the lines that replies have."""
    chat_model(tmp_path / "model", runpy.run_path(str(ROOT / "examples" / "tickets.py"))["tickets"](99, 9))
    text = run("tickets", tmp_path / "out", tmp_path / "model", 120, 60)
    assert re.findall(r"status (\d+)", text) == ["130", "0", "0"]
    assert "tickets.csv: 3 of 120 rows are left out: 2 x 'reply' is empty" in text
    (stopped,) = re.findall(r"stopped by SIGINT after step (\d+)\. To go on: .* --resume", text)
    assert 6 <= int(stopped) < 60
    first, *_, last = re.findall(r"validation loss (.*)$", text, re.MULTILINE)
    assert first.endswith(" at step 0")
    assert " -> " in last
    metrics = json.loads((tmp_path / "out" / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 60
    with (tmp_path / "out" / "answers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"{i:05}" for i in range(20) if i != 3]
    assert sum("\n" in row["ticket"] for row in rows) == 19
    assert sum(row["output"].startswith("Hello,\n\nplease try this:\n\n    reset --code") for row in rows) > 15


def of_training(text: str) -> tuple[tuple[float, float], float, str, list[str]]:
    """What examples/peft_training.py prints: loss before and after, error of the files, text, requests."""
    ((first, last),) = changes(text)
    off = float(re.findall(r"differ by (\S+)", text)[0])
    return (
        (first, last),
        off,
        re.findall(r"^the prefix \.\.\. *(.*)$", text, re.M)[0],
        re.findall(r"^push: (.*)$", text, re.M),
    )


@pytest.mark.peft
def test_peft_training(tmp_path: Path) -> None:
    """With PEFT, and with the two lines that README.md changes. Both learn the line, and upload the same files."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    old, new = ([line[1:] for line in diff.splitlines() if line[0] == sign] for sign in "-+")
    assert len(old) == len(new) == 2
    script = (ROOT / "examples" / "peft_training.py").read_text(encoding="utf-8").splitlines()
    assert all(script.count(line) == 1 for line in old)
    moved = [dict(zip(old, new)).get(line, line) for line in script]
    assert "peft" not in re.findall(r"^(?:from|import) (\w+)", "\n".join(moved), re.MULTILINE)
    (tmp_path / "moved.py").write_text("\n".join(moved), encoding="utf-8")
    theirs, ours = of_training(run("peft_training")), of_training(run(str(tmp_path / "moved")))
    for (first, last), off, text, requests in (theirs, ours):
        assert last < first - 0.5
        assert off < CLOSE
        assert text == "is trained and the model is"
        assert sorted(requests) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "private"]


def test_classification() -> None:
    """The head is trained, and comes back with the prefix."""
    text = run("classification")
    assert "trained beside the prefix: classifier" in text
    ((before, after),) = changes(text)
    assert after > before + 20
    assert float(re.findall(r"differ by (\S+)", text)[0]) == 0


def test_serve(tmp_path: Path) -> None:
    """With a model and a prefix that are made here, and the engine of this environment."""
    base = tiny("llama", vocab_size=257, max_position_embeddings=256, eos_token_id=END, pad_token_id=END)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ("--model", tmp_path / "base", "--prefix", tmp_path / "run", "--engine", "transformers")
    command, demo, bare = run("serve", *arguments, "--port", port).splitlines()
    assert command.startswith("$ prefix-attn serve ") and command.endswith(f"--engine transformers --port {port}")
    assert re.match(r"demo \(\d+ s after the start\): .*{'prompt_tokens': 51,", demo)
    assert "'prompt_tokens': 51," in bare


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_hides_no_standard_module(path: Path) -> None:
    assert path.stem not in sys.stdlib_module_names
    text = path.read_text(encoding="utf-8")
    assert f"``python examples/{path.name}``" in text
    assert len(text.splitlines()) <= (80 if path.stem != "demo" else 120)


def test_every_example_is_in_the_list_and_run() -> None:
    listed = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(\.\./examples/(\w+)\.py\)", listed))
    assert named == {path.stem for path in EXAMPLES}
    assert {f"test_{name}" for name in named - {"demo"}} <= globals().keys()  # .ci/run runs the demo
