"""Self-study: the model writes conversations about a text, and a prefix learns what the text in front would do."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.training.comparison import recovered
from prefix_attn.training.conversations import QUESTION, SEEDS, prompt_for, written
from prefix_attn.training.distill import chunks, distill, ids_of
from prefix_attn.training.evaluate import validation_loss
from prefix_attn.training.examples import Example
from prefix_attn.training.generate import Generator
from prefix_attn.training.interrupt import Interrupted
from prefix_attn.training.self_study import self_study
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.teacher import Context, Lesson, TaughtCollator, Teacher, target_of, taught
from prefix_attn.training.tokens import IGNORED, batches, encode
from tests.hf.models import tiny
from tests.numerics import FLOAT, close
from tests.test_cli import run as prefix_attn
from tests.tokens import END, byte_tokenizer

DOCUMENT = "The inn is north of the river. The river is cold. North of the inn is a hill. " * 2
LENGTH = 64


def base() -> Any:
    return tiny("llama", vocab_size=257, max_position_embeddings=512)


def student(P: int = 6) -> PrefixModel:
    torch.manual_seed(0)
    config = PrefixConfig(num_virtual_tokens=P, init="document", init_text=DOCUMENT)
    return get_prefix_model(base(), config, byte_tokenizer())


def settings(folder: Path, **changes: Any) -> TrainingSettings:
    small = {"steps": 4, "batch_size": 3, "max_length": LENGTH, "validate_every": 2, "learning_rate": 3e-2}
    return TrainingSettings(folder, **small | changes)


def run(folder: Path, of: PrefixModel | None = None, document: Any = DOCUMENT, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"conversations": 8, "chunk_tokens": 80}
    options |= {name: changes.pop(name) for name in ("conversations", "chunk_tokens", "validation") if name in changes}
    return self_study(of or student(), byte_tokenizer(), document, settings(folder, **changes), **options)


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "conversations.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table at the end takes little time."""
    for name, value in {"ANSWER": 4, "REQUEST": 2, "RUNS": 1}.items():
        monkeypatch.setattr(f"prefix_attn.training.comparison.{name}", value)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two conversations are written together, and the teacher reads two rows."""
    monkeypatch.setattr("prefix_attn.training.conversations.BATCH", 2)
    monkeypatch.setattr("prefix_attn.training.teacher.BATCH", 2)


def write(folder: Path, **changes: Any) -> list[tuple[int | None, Example]]:
    tokenizer = byte_tokenizer()
    texts = chunks([tokenizer(DOCUMENT)["input_ids"]], 80, None)
    teacher = Teacher(base(), texts[0], LENGTH, 5)
    asked = {"prompt": prompt_for(tokenizer), "task": {"document": "a hash"}}
    return written(teacher, tokenizer, texts, 10, settings(folder, **changes), **asked)


def test_what_is_written_depends_on_the_seed_alone(tmp_path: Path) -> None:
    found = write(tmp_path / "a")
    assert write(tmp_path / "b") == found
    assert write(tmp_path / "c", seed=1) != found
    rows = told(tmp_path / "a")
    assert [row["kind"] for row in rows] == [*SEEDS, *SEEDS]
    assert [row["chunk"] for row in rows] == [0] * 5 + [1] * 5
    assert len({row["source"] for row in rows}) == 10
    assert found == [(row["chunk"], Example(row["source"], (row["target"],))) for row in rows if row["target"]]


class Stop(Exception):
    """Where a process is killed."""


def stopping(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, then: Callable[[], None]) -> None:
    """In the call number ``at`` of ``owner.name``, do something first."""
    usual, calls = getattr(owner, name), iter(range(1, 1000))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            then()
        return usual(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


def stop() -> None:
    raise Stop


@pytest.mark.usefixtures("small_batches")
def test_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the writing, in the teacher and in the training, it ends with the bits of a run without a pause."""
    straight = student()
    wanted = run(tmp_path / "a", straight)
    again = {"resume": True}
    with monkeypatch.context() as patch:
        stopping(patch, Generator, "texts", 4, stop)  # the answers of the second part
        with pytest.raises(Stop):
            run(tmp_path / "b")
    first = tmp_path / "b" / "conversations" / "00000.jsonl"
    before = first.stat().st_mtime_ns
    assert [path.name for path in first.parent.iterdir()] == ["00000.jsonl"]
    with monkeypatch.context() as patch:
        stopping(patch, Teacher, "__call__", 3, stop)
        with pytest.raises(Stop):
            run(tmp_path / "b", **again)
    assert len(list((tmp_path / "b" / "teacher").iterdir())) == 2
    with monkeypatch.context() as patch:
        stopping(patch, torch.nn.utils, "clip_grad_norm_", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            run(tmp_path / "b", **again)
    resumed = student()
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "__call__", lambda *_: stop())
        got = run(tmp_path / "b", resumed, **again)
    assert first.stat().st_mtime_ns == before
    assert (tmp_path / "a" / "conversations.jsonl").read_bytes() == (
        tmp_path / "b" / "conversations.jsonl"
    ).read_bytes()
    assert torch.equal(resumed.prefixes["default"].embedding, straight.prefixes["default"].embedding)
    for name in ("train_loss", "validation_loss", "steps"):
        assert got[name] == wanted[name]
    assert {**got["comparison"], "seconds": 0} == {**wanted["comparison"], "seconds": 0}


def test_the_teacher_reads_each_row_behind_its_chunk(tmp_path: Path) -> None:
    """What is kept on disk are the likeliest tokens of the frozen model, which reads the chunk and the row as one."""
    tokenizer = byte_tokenizer()
    texts = chunks([tokenizer(DOCUMENT)["input_ids"]], 60, None)
    rows = [tokenizer(text)["input_ids"] for text in ("Is it cold?", "North", "A hill, an inn.", "The river")]
    lesson = Lesson([{"input_ids": ids} for ids in rows], [0, 0, 1, 2], texts)
    assert [list(some) for some in lesson.batches()] == [[0, 1], [2], [3]]
    found = taught(Teacher(base(), texts[0], LENGTH, 5), lesson, END, tmp_path, shown="teacher")
    plain = base()
    for row, context, ids in zip(found, lesson.contexts, rows, strict=True):
        logits = plain(input_ids=torch.tensor([[*texts[context], *ids]])).logits[0, len(texts[context]) :]
        values, tokens = logits.log_softmax(-1).topk(5)
        assert torch.equal(row["top_ids"].long(), tokens)
        torch.testing.assert_close(row["top_log_probs"], values)
    target = target_of(TaughtCollator(END)(found[:3]))
    assert torch.equal(target.ids, torch.cat([row["top_ids"] for row in found[:3]]).long())
    assert torch.equal(target.log_probs, torch.cat([row["top_log_probs"] for row in found[:3]]))


class Largest(TorchDispatchMode):
    """The most elements of a tensor with a dimension of at least ``T`` that an operation makes."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T, self.found = T, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and max(tensor.shape, default=0) >= self.T:
                self.found = max(self.found, tensor.numel())
        return out


def test_a_chunk_is_read_once_and_shared_by_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is made while rows are written is as large as the chunk's keys would be, once for each row."""
    B, T, tokenizer = 8, 1009, byte_tokenizer()
    model = tiny("llama", vocab_size=257, max_position_embeddings=2048)
    context, read = Context(model), []
    monkeypatch.setattr(PrefixModel, "add_prefix", lambda *args: read.append(1) or usual(*args))
    ids = tokenizer(DOCUMENT * 10)["input_ids"][:T]
    for _ in range(3):
        context.put(ids)
    assert len(read) == 1
    texts = ["A question?"] * B
    generator = Generator(context.model, tokenizer, batch_size=B, max_new_tokens=4, temperature=1.0)
    with Largest(T) as largest:
        assert len(set(generator.texts(texts))) > 1
    keys = model.config.num_key_value_heads * T * (model.config.hidden_size // model.config.num_attention_heads)
    layers = 2 * model.config.num_hidden_layers
    assert largest.found <= layers * keys  # those of the chunk, in all layers
    assert largest.found < B * keys


usual = PrefixModel.add_prefix


def test_it_learns(tmp_path: Path) -> None:
    """The loss falls, and the table has the losses of the base model, of the saved prefix, and of the text in front."""
    own = [(i % 2, Example(f"Which is hill number {i}?", (f"The hill north of inn {i}.",))) for i in range(18)]
    metrics = run(tmp_path, steps=20, conversations=own, validation=own[:4], batch_size=6, validate_every=10)
    curve = [loss for _, loss in metrics["validation_loss"]]
    assert curve[-1] < 0.8 * curve[0]
    assert (metrics["document_tokens"], metrics["chunks"], metrics["rows"]) == (len(DOCUMENT), 2, 18)
    found = metrics["comparison"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    loss = found["loss"]
    tokenizer = byte_tokenizer()
    rows, _ = encode(tokenizer, [example for _, example in own[:4]], LENGTH, prompt=prompt_for(tokenizer))
    plain, text = base(), tokenizer(DOCUMENT)["input_ids"]
    longer = [{n: [(IGNORED if n == "labels" else i) for i in text] + ids for n, ids in row.items()} for row in rows]
    for name, given in (("nothing", rows), ("text", longer)):
        close(loss[name], validation_loss(plain, batches(given, 4, END)), FLOAT)
    saved = PrefixModel.from_pretrained(base(), tmp_path)
    close(loss["prefix"], validation_loss(saved, batches(rows, 4, END)), FLOAT)
    assert found["recovered"] == recovered(loss)
    assert found["tokens"] == {"prefix": 6, "text": len(DOCUMENT)}
    assert found["bytes"]["text"] * 6 == found["bytes"]["prefix"] * len(DOCUMENT)
    assert found["compression"] == len(DOCUMENT) / 6
    assert [set(entry) for entry in found["answers"]] == [{"question", "nothing", "start", "prefix", "text"}] * 3
    assert min(found["seconds"].values()) > 0


def test_the_share_of_the_gain() -> None:
    assert recovered({"nothing": 4.0, "prefix": 2.5, "text": 2.0}) == 0.75
    assert recovered({"nothing": 4.0, "prefix": 5.0, "text": 2.0}) == -0.5
    assert recovered({"nothing": 2.0, "prefix": 1.0, "text": 2.0}) is None


def test_chunks_are_of_one_length() -> None:
    assert [len(ids) for ids in chunks([range(10), range(3)], 4, None)] == [3, 3, 4, 3]
    assert chunks([range(10)], None, None) == [list(range(10))]
    assert [len(ids) for ids in chunks([range(10)], None, 4)] == [3, 3, 4]


def test_a_long_text_is_distilled_in_chunks(tmp_path: Path) -> None:
    """Without conversations, too: its pieces are read behind their chunk."""
    text = DOCUMENT * 4
    metrics = distill(student(), byte_tokenizer(), [text, DOCUMENT], settings(tmp_path, steps=1))
    assert (metrics["chunks"], metrics["document_tokens"]) == (3, 5 * len(DOCUMENT))


OWN = [(0, Example("Is it cold?", ("The river is.",))), (None, Example("What is north?", ("The inn.",)))]
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "fewer than chunks": ({"conversations": 1}, "1 conversations about 2 chunks leave some unread: take at least as"),
    "a short document": ({"chunk_tokens": 500}, "chunk_tokens=500: the document has 156 tokens; take fewer"),
    "a large chunk": ({"document": DOCUMENT * 4, "chunk_tokens": 400}, "the model's window leaves room for 384 tokens"),
    "a small chunk": ({"chunk_tokens": 1}, "chunk_tokens must be at least 2, got 1"),
    "no room": ({"max_length": 400}, "max_length leaves the text no room in the model's window"),
    "empty": ({"document": ""}, "the document must have at least 2 tokens, got 0"),
    "one empty": ({"document": [DOCUMENT, ""]}, "the document must have at least 2 tokens, got 0"),
    "no such chunk": ({"conversations": [(7, OWN[0][1])] * 2}, "a conversation is about chunk 7, and there are 2"),
    "one conversation": ({"conversations": OWN[:1]}, "1 conversations leave none to train on or to validate on"),
    "a text beyond the window": ({"document": DOCUMENT * 4, "conversations": OWN}, "the conversations need a 'chunk'"),
    "nothing to validate on": ({"conversations": OWN, "validation": []}, "there are no conversations to validate on"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_refuses_before_anything_is_written(case: str, tmp_path: Path) -> None:
    changes, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_refuses_without_a_tokenizer(tmp_path: Path) -> None:
    model: Any = student()
    with pytest.raises(ValueError, match="takes the base model's tokenizer: it has none"):
        self_study(model, None, DOCUMENT, settings(tmp_path), conversations=8)  # type: ignore[arg-type]


def test_refuses_packing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="packing takes rows with labels"):
        run(tmp_path / "out", packing=True)


def test_names_of_special_tokens_are_text() -> None:
    assert len(ids_of(byte_tokenizer(), "the <end>")[0]) == 9


def test_refuses_another_self_study(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match="holds conversations of another run; resume it, or take another"):
        write(tmp_path)
    with pytest.raises(ValueError, match="cannot go on with other settings: seed was 0 and is 1"):
        write(tmp_path, resume=True, seed=1)


def test_conversations_of_ones_own(tmp_path: Path) -> None:
    """Those about a chunk are behind it, others behind all of the text, and each is trained on or validated on."""
    metrics = run(tmp_path, conversations=OWN * 2, validation=OWN, steps=1)
    assert metrics["rows"] == 4
    long = [(1, Example("Why?", ("Because. " * 20,)))]
    with pytest.raises(ValueError, match=r"conversations, example 4: max_length=64 is too short for the target"):
        run(tmp_path / "b", conversations=[*OWN, OWN[1], *long, *OWN], validation=OWN, steps=1)
    assert not (tmp_path / "conversations.jsonl").exists()
    assert len(metrics["comparison"]["answers"]) == 2


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a folder of texts, then with the conversations that it wrote."""
    monkeypatch.chdir(tmp_path)
    base().save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    Path("texts").mkdir()
    for name, text in (("a.txt", DOCUMENT), ("b.md", DOCUMENT[:60])):
        (Path("texts") / name).write_text(text)
    command = ("train", "--model", "model", "--distill-from", "texts", "--virtual-tokens", 4, "--steps", 1)
    small = ("--batch-size", 2, "--max-length", LENGTH, "--chunk-tokens", 80)
    assert prefix_attn(monkeypatch, *command, *small, "--self-study", 6, "--output", "a") == 0
    shown = capsys.readouterr()
    assert "in front " in shown.out
    assert "tokens of text per virtual token" in shown.out
    assert "writing conversations: 100%" in shown.err
    assert "teacher: 100%" in shown.err
    assert {row["chunk"] for row in told(tmp_path / "a")} == {0, 1, 2}
    own = ("--distill-data", "a/conversations.jsonl", "--skip-bad-rows", "--output", "b", "--json")
    assert prefix_attn(monkeypatch, *command, *small, *own) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["chunks"] == 3
    assert metrics["comparison"]["tokens"]["prefix"] == 4


COMMAND_ERRORS: dict[str, tuple[tuple[object, ...], str]] = {
    "no text": (("--data", "rows.jsonl", "--self-study", 4), "--self-study needs --distill-from"),
    "chunks of no text": (("--data", "rows.jsonl", "--chunk-tokens", 4), "--chunk-tokens needs --distill-from"),
    "own without a text": (
        ("--data", "rows.jsonl", "--distill-data", "x.jsonl"),
        "--distill-data needs --distill-from",
    ),
    "both": (
        ("--distill-from", "text.txt", "--self-study", 4, "--distill-data", "rows.jsonl"),
        "--self-study and --distill-data exclude one another",
    ),
    "none": (
        ("--distill-from", "text.txt", "--self-study", 0),
        "Input should be greater than or equal to 2, got '0'",
    ),
    "negative": (
        ("--distill-from", "text.txt", "--chunk-tokens", -5),
        "should be greater than or equal to 2, got '-5'",
    ),
    "an empty text": (("--distill-from", "empty.txt", "--self-study", 4), "holds no text"),
    "a folder without texts": (("--distill-from", "model", "--self-study", 4), "the folder has no texts (*.txt"),
    "no tokenizer": (("--model", "bare", "--distill-from", "text.txt", "--self-study", 4), "tokenizer"),
    "no such data": (("--distill-from", "text.txt", "--distill-data", "x.jsonl"), "x.jsonl: no such file"),
    "no number": (("--distill-from", "text.txt", "--distill-data", "bad.jsonl"), "'chunk' must be the number of"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    base().save_pretrained(path / "model")
    base().save_pretrained(path / "bare")
    byte_tokenizer().save_pretrained(path / "model")
    (path / "text.txt").write_text(DOCUMENT)
    (path / "empty.txt").write_text(" \n")
    row = {"source": "a", "target": "b"}
    (path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (path / "bad.jsonl").write_text(json.dumps(row | {"chunk": "two"}) + "\n")
    return path


@pytest.mark.parametrize("case", COMMAND_ERRORS)
def test_errors_of_the_command(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    options, message = COMMAND_ERRORS[case]
    assert prefix_attn(monkeypatch, "train", "--model", "model", "--output", "out", *options) in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not Path("out").exists()


def test_every_seed_is_a_text_of_its_own() -> None:
    assert list(SEEDS) == ["summary", "structure", "question", "use case", "creative"]
    seeds = [seed for some in SEEDS.values() for seed in some]
    assert len(set(seeds)) == len(seeds)
    assert QUESTION.one_line
