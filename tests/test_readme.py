"""The Python of README.md and of every page of docs runs, from the top of a page to its end."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from packaging.version import Version

import prefix_attn
import prefix_attn.hf
from prefix_attn.hf import edit
from tests.pages import PAGES, blocks

PYTHON = {name: blocks(text, "python") for name, text in PAGES.items() if blocks(text, "python")}
# Later ones run continuous batching with their own attention functions alone.
RUNS_BATCHES = Version(transformers.__version__) < Version("5.18")


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
        exec(compile(source, f"example {number}", "exec"), names)
    return names


def changes_nothing_else(base: Any, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())


def test_readme_example(small: Any) -> None:
    """It trains, and what it saves loads."""
    from prefix_attn import PrefixModel

    weights = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    names = run(PYTHON["README.md"])
    batch, model = names["batch"], names["model"]
    with torch.no_grad():
        trained = model(**batch, labels=batch["input_ids"])
        with model.disable_prefix():
            frozen = model(**batch, labels=batch["input_ids"])
        assert trained.loss < frozen.loss
        again = PrefixModel.from_pretrained(small, "my-prefix")
        assert torch.equal(again(**batch).logits, trained.logits)
    assert changes_nothing_else(small, weights)


def test_training_example(small: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It trains, and what it reloads is what it saved."""
    weights = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    names = run(PYTHON["docs/start.md"])
    batch, model, again = names["batch"], names["model"], names["again"]
    with torch.no_grad(), model.disable_prefix():
        frozen = model(**batch, labels=batch["input_ids"]).loss
    assert names["loss"] < frozen
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert changes_nothing_else(small, weights)
    assert "trainable params: 960 ||" in capsys.readouterr().out  # 10 tokens * 2 * 3 layers * 2 heads * 8


def test_batch_example(small: Any) -> None:
    """Every row is what its prefix alone generates."""
    mixed, edited = PYTHON["docs/guides/many-prefixes.md"]
    names = run([mixed])
    model, batch, tokenizer = names["model"], names["batch"], names["tokenizer"]
    for row, prefix in enumerate(names["names"]):
        prompt = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        out = model.generate(**prompt, prefix_names=[prefix], max_new_tokens=20)
        assert tokenizer.decode(out[0], skip_special_tokens=True) == names["texts"][row]
    grads = [model.prefixes[prefix].embedding.grad for prefix in ("default", "dart")]
    assert all(grad.abs().max() > 0 for grad in grads)
    run([edited], **names)
    assert [model.find_prefix(name)[1].num_virtual_tokens for name in ("both", "short")] == [30, 12]


@pytest.mark.peft
def test_migration_example(small: Any) -> None:
    """Both sides run, and train as many parameters."""
    before, after, keep = PYTHON["docs/guides/peft.md"]
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
    names = run(PYTHON["docs/guides/modules.md"])
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
    model = run(PYTHON["docs/guides/forms.md"], base=small, batch=batch)["model"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["prefix"]
    assert torch.equal(PrefixTuning.from_pretrained(small, "my-prompt").prefix, model.prefix)


def test_operator_example(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(PYTHON["docs/guides/operator.md"])
    assert names["out"].shape == names["query"].shape
    assert names["prefix_key"].grad.shape == (4, 20, 64)
    assert capsys.readouterr().out.startswith("auto -> ")


def test_refusal_example(capsys: pytest.CaptureFixture[str]) -> None:
    """The page shows lines that are printed, and the error has the reason."""
    run(PYTHON["docs/guides/backends.md"])
    printed = capsys.readouterr().out.splitlines()
    (shown,) = re.findall(r"^auto -> (?:.+\n)+?(?=```)", PAGES["docs/guides/backends.md"], re.MULTILINE)
    assert [line for line in shown.splitlines() if line not in printed] == []
    assert printed[-1] == "backend='cpu' cannot run this call: the kernels have no dropout"


def test_trainers_example(small: Any) -> None:
    model = run(PYTHON["docs/trainers.md"], base=small)["model"]
    assert model.get_nb_trainable_parameters()[0] == 1920  # 20 tokens * 2 * 3 layers * 2 heads * 8


def test_serving_example(small: Any) -> None:
    """Each request is answered as if it were alone. Newer versions of transformers refuse, as the page says."""
    from prefix_attn import PrefixConfig, get_prefix_model

    _, batches = PYTHON["docs/guides/serving.md"]
    model = get_prefix_model(small, PrefixConfig(num_virtual_tokens=4)).eval()
    model.add_prefix("e2e", PrefixConfig(num_virtual_tokens=4))
    names = {"model": model, "ids": [5, 6, 7], "other_ids": [8, 9]}
    if not RUNS_BATCHES:
        with pytest.raises(NotImplementedError):
            run([batches], **names)
        return
    tokens = run([batches], **names)["tokens"]
    for ids, prefix, found in zip(([5, 6, 7], [8, 9]), ("e2e", None), tokens):
        out = model.generate(torch.tensor([ids]), prefix_names=[prefix], max_new_tokens=48)
        assert out[0, len(ids) :].tolist() == found


def test_prompt_embeds_example(small: Any) -> None:
    """vLLM, which is not installed here, is given the table and the embeddings of the text."""
    from prefix_attn import PrefixTuning

    PrefixTuning(small, prefix_length=4, hidden_size=32).save_pretrained("runs/table")
    vllm = MagicMock()
    embeds, _ = PYTHON["docs/guides/serving.md"]
    ids = torch.tensor([5, 6, 7])
    prompt = run([embeds], PrefixTuning=PrefixTuning, torch=torch, LLM=vllm, BASE="base", base=small, ids=ids)["prompt"]
    assert torch.equal(prompt[4:], small.get_input_embeddings()(ids))
    vllm.return_value.generate.assert_called_once_with({"prompt_embeds": prompt})


def test_backend_example() -> None:
    """The backend of the page gives what the specification gives, and each gradient, also of what sees nothing."""
    from prefix_attn.backends import eager
    from prefix_attn.call import Call

    names = run(PYTHON["docs/contributing/backend.md"], __name__="plain")
    shapes = (2, 4, 5, 8), (2, 2, 3, 8), (2, 2, 3, 8), (2, 6, 8), (2, 6, 8)
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    for tensors in (given[:3], given):
        call = Call(*tensors, scale=0.5)
        assert list(names["refuse"](call)) == []
        out, lse = names["forward"](call)
        expected = eager.forward(call)
        torch.testing.assert_close((out, lse), expected)
        assert (lse == -torch.inf).any() == (len(tensors) == 3)
        needs = [t is not None for t in call[:7]]
        got = names["backward"](call, out, lse, torch.ones_like(out), None, needs)
        wanted = torch.autograd.grad(expected[0].sum(), tensors)
        torch.testing.assert_close(got[: len(tensors)], list(wanted))
    assert list(names["refuse"](call._replace(window=3, dropout_p=0.1))) == ["it has no dropout", "it has no window"]


def test_file_format_example(tmp_path: Path) -> None:
    """The reader of the page gives the table that a model loads."""
    from prefix_attn import PrefixModel
    from prefix_attn.hf.io.stored import KEY
    from tests.hf.models import tiny

    read = run(PYTHON["docs/contributing/file-format.md"])["_stacked"]
    key, value = torch.randn(2, 3, 2, 4, 8)  # (layers, heads, tokens, head size), as of the tiny Llama
    torch.save({"prefix_keys": key, "prefix_values": value}, tmp_path / "a.pt")
    stored = read(tmp_path / "a.pt", torch.load(tmp_path / "a.pt"))
    model = PrefixModel(tiny("llama"))
    model.add_prefix("theirs", stored.config)
    table = stored.tensors[KEY].view(4, 6, 2, 8).permute(1, 2, 0, 3)
    assert model.prefixes["theirs"]().shape == table.shape
    assert torch.equal(table[::2], key) and torch.equal(table[1::2], value)
    with pytest.raises(ValueError, match=r"a\.pt: prefix_keys, prefix_values must be"):
        read(tmp_path / "a.pt", {"prefix_keys": key, "prefix_values": value[:1]})


def test_model_family_example(capsys: pytest.CaptureFixture[str]) -> None:
    run(PYTHON["docs/contributing/model-family.md"])
    assert capsys.readouterr().out == "torch.Size([1, 3, 97])\n"


def with_examples() -> Iterator[Any]:
    """The examples in docstrings of public names and of their methods, one test each."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in (*prefix_attn.__all__, *prefix_attn.hf.__all__, "concatenate", "truncate", "move"):
        owner = next(m for m in (prefix_attn, prefix_attn.hf, edit) if name in (*getattr(m, "__all__", ()), *vars(m)))
        for test in finder.find(getattr(owner, name), name):
            if test.examples:
                yield pytest.param(test, id=test.name, marks=[pytest.mark.peft] * ("peft" in test.docstring))


@pytest.mark.parametrize("test", list(with_examples()))
def test_docstring_example(small: Any, test: doctest.DocTest) -> None:
    """With a tiny model as ``base``, and three tokens as ``ids``."""
    from tests.tokens import byte_tokenizer

    test.globs |= {"base": small, "tokenizer": byte_tokenizer(), "ids": torch.tensor([[5, 6, 7]]), "torch": torch}
    test.globs |= {name: getattr(prefix_attn, name) for name in prefix_attn.__all__}
    assert doctest.DocTestRunner().run(test).failed == 0


def test_every_python_example_is_run() -> None:
    """A page with Python has a test above, which runs all of it."""
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in PYTHON if f'PYTHON["{name}"]' not in source] == []
