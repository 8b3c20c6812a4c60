"""README.md: its Python runs, its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading."""
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    return found


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``load_base`` gives a tiny random Llama; files go to a temporary folder."""
    from tests.hf.models import tiny
    from tests.tokens import byte_tokenizer

    monkeypatch.chdir(tmp_path)
    base = tiny("llama", vocab_size=257, max_position_embeddings=256)
    monkeypatch.setattr("prefix_attn.hf.load.load_base", lambda name: (base, byte_tokenizer()))
    return base


def run(sources: list[str], **names: Any) -> dict[str, Any]:
    for number, source in enumerate(sources):
        exec(compile(source, f"README.md, example {number}", "exec"), names)
    return names


def test_training_example(small: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It trains, and what it reloads is what it saved."""
    weights = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    names = run(blocks(section("Train a prefix"), "python"))
    batch, model, again = names["batch"], names["model"], names["again"]
    with torch.no_grad(), model.disable_prefix():
        frozen = model(**batch, labels=batch["input_ids"]).loss
    assert names["loss"] < frozen
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in small.state_dict().items())
    assert "trainable params: 960 ||" in capsys.readouterr().out  # 10 tokens * 2 * 3 layers * 2 heads * 8


def test_batch_example(small: Any) -> None:
    """Every row is what its prefix alone generates."""
    names = run(blocks(section("Many prefixes in one batch"), "python"))
    model, batch, tokenizer = names["model"], names["batch"], names["tokenizer"]
    for row, prefix in enumerate(names["names"]):
        prompt = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        out = model.generate(**prompt, prefix_names=[prefix], max_new_tokens=20)
        assert tokenizer.decode(out[0], skip_special_tokens=True) == names["texts"][row]
    grads = [model.prefixes[prefix].embedding.grad for prefix in ("default", "dart")]
    assert all(grad.abs().max() > 0 for grad in grads)


@pytest.mark.peft
def test_migration_example(small: Any) -> None:
    """Both sides run, and train as many parameters."""
    before, after, keep = blocks(section("From PEFT"), "python")
    peft_model = run([before], base=small)["model"]
    ours = run([after], base=small)["model"]
    assert ours.get_nb_trainable_parameters()[0] == peft_model.get_nb_trainable_parameters()[0]
    ours.attachment.remove()
    ids = torch.tensor([[5, 6, 7]])
    expected = peft_model(input_ids=ids).logits
    undo = run([keep], peft_model=peft_model)["undo"]
    torch.testing.assert_close(peft_model(input_ids=ids).logits, expected)
    undo()


def test_module_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It learns, prefixes and head alone, and the file holds them."""
    monkeypatch.chdir(tmp_path)
    names = run(blocks(section("A model of nn.MultiheadAttention"), "python"))
    assert names["loss"] < 0.1
    state = names["optimizer"].state
    assert all(state[p]["exp_avg"].any() for p in names["trained"].values())
    saved = torch.load("task.pt")
    assert [tuple(p.shape) for p in saved.values()] == [(4, 10, 16)] * 4 + [(2, 1024), (2,)]
    missing, unexpected = names["model"].load_state_dict(saved, strict=False)
    assert unexpected == []
    assert [name for name in missing if "prefix" in name] == []


def test_embedding_example(small: Any) -> None:
    """Its gradient is the table's alone, and what it saves loads."""
    from prefix_attn import PrefixTuning

    ids = torch.randint(1, 257, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = run(blocks(section("Embeddings alone"), "python"), base=small, batch=batch)["model"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["prefix"]
    assert torch.equal(PrefixTuning.from_pretrained(small, "my-prompt").prefix, model.prefix)


def test_operator_example(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(blocks(section("The operator alone"), "python"))
    assert names["out"].shape == names["query"].shape
    assert names["prefix_key"].grad.shape == (4, 20, 64)
    assert capsys.readouterr().out.startswith("auto -> ")


def test_every_python_example_is_run() -> None:
    tested = (
        "Train a prefix",
        "Embeddings alone",
        "Many prefixes in one batch",
        "From PEFT",
        "A model of nn.MultiheadAttention",
        "The operator alone",
    )
    assert sum(len(blocks(section(title), "python")) for title in tested) == len(blocks(README, "python"))


def test_commands_and_links_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+) +#", README)) == {"demo", "test"} <= targets
    anchors = {f"#{title.lower().replace(' ', '-')}" for title in re.findall(r"^## (.*)$", README, re.MULTILINE)}
    links = set(re.findall(r"\]\(([^)]+)\)", README))
    assert [link for link in links - anchors if not (ROOT / link).is_file()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_documents_name_what_exists(path: Path) -> None:
    """Their links, and the files of the repository that they name."""
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (path.parent / link).is_file()] == []
    ours = re.sub(r"\]\(http[^)]*\)", "]()", text)  # other projects have folders of these names too
    named = re.findall(r"\b(?:benchmarks|csrc|docs|examples|prefix_attn|tests)(?:/[\w.-]+)+\.\w+", ours)
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_file_tree_is_the_repository() -> None:
    """Every module and room is in the tree, and the tree names no other. A folder stands for the modules in it."""
    (tree,) = blocks(section("Files"), "")
    listed: set[str] = set()
    above: list[str] = []  # the folders around a line, by its indentation
    for indent, name in re.findall(r"^( *)(\S+)", tree, re.MULTILINE):
        above[len(indent) // 2 :] = [name]
        listed.add("".join(above))
    assert {name for name in listed if not (ROOT / name).exists()} == set()
    package = {
        path for path in (ROOT / "prefix_attn").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    expected = {f"prefix_attn/{path.name}" + "/" * path.is_dir() for path in package} - {"prefix_attn/__init__.py"}
    assert expected - listed == set()
    tops = {f"{path.parent.name}/" for path in ROOT.glob("[a-z]*/*") if path.suffix in (".py", ".cpp", ".md")}
    assert tops - listed == set()
