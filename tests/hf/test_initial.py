"""Where a prefix starts: at step 0 the model does what the source of its start does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf import initial
from prefix_attn.hf.encoder import ACTIVATIONS
from tests.hf.models import tiny, tokens
from tests.hf.test_banks import QUIET
from tests.numerics import DRAWS, LONG, MODEL, close
from tests.tokens import byte_tokenizer

P = 6
MLP = {"prefix_projection": True, "encoder_hidden_size": 16}
FORMS: dict[str, dict[str, Any]] = {"flat": {}, "mlp": MLP, "embedding": {"mode": "embedding"}}


def prefixed(**options: Any) -> PrefixModel:
    return get_prefix_model(tiny("llama"), config(**options)).eval()


def config(**options: Any) -> PrefixConfig:
    return PrefixConfig(**{"num_virtual_tokens": P} | options)


def in_context(prompt: list[int], ids: Tensor) -> Tensor:
    """Logits of the plain model for ``ids`` after ``prompt``."""
    with torch.no_grad():
        return tiny("llama")(torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], dim=1)).logits[
            :, len(prompt) :
        ]


@pytest.mark.parametrize("mode", ["kv", "embedding"])
def test_random_is_the_start_token_and_random_ones_in_context(mode: str) -> None:
    torch.manual_seed(1)
    drawn = torch.randint(97, (P,)).tolist()
    base = tiny("llama", bos_token_id=5)
    torch.manual_seed(1)
    made = get_prefix_model(base, config(mode=mode)).eval()
    torch.testing.assert_close(made(tokens()).logits, in_context([5, *drawn[1:]], tokens()))


@pytest.mark.parametrize("form", FORMS)
def test_document(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start token and pieces of the document in its order, by name in the configuration; at step 0 a prompt."""
    monkeypatch.setattr(initial, "PIECE", 2)
    document = [9, *range(20, 90)]
    base = tiny("llama", bos_token_id=5)
    model = get_prefix_model(base, config(init="document", init_token_ids=document, **FORMS[form])).eval()
    kept = model.prefix_configs["default"].init_token_ids
    assert model.prefix_configs["default"].init_text is None
    places = [document.index(token) for token in kept]
    assert len(places) == P
    steps = [b - a for a, b in pairwise(places)]
    assert steps[::2] == [1, 1, 1]
    assert min(steps) > 0
    assert max(steps) > 1
    expected = in_context([5, *kept[1:]], tokens())
    close(model(tokens()).logits, expected, MODEL)
    model.add_prefix("other", model.prefix_configs["default"])
    assert model.prefix_configs["other"].init_token_ids == kept


def test_pieces_come_from_all_of_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place is drawn, the first and the last included, and none twice in one prefix."""
    monkeypatch.setattr(initial, "PIECE", 2)
    document, seen = list(range(12)), set()
    for _ in range(200):
        kept = initial.draw_pieces(config(init="document", init_token_ids=document), None).init_token_ids
        assert sorted(set(kept)) == kept
        seen |= set(kept)
    assert seen == set(document)


def test_a_short_document_stays_whole_and_a_text_is_tokenized() -> None:
    tokenizer = byte_tokenizer()
    made = initial.draw_pieces(config(init="document", init_text="abcd"), tokenizer)
    assert made.init_token_ids == tokenizer("abcd")["input_ids"]
    long = initial.draw_pieces(config(init="document", init_text="abcdefghij" * 30), tokenizer)
    assert len(long.init_token_ids) == P
    assert tokenizer.decode(long.init_token_ids) in "abcdefghij" * 2
    with pytest.raises(ValueError, match="init_text needs the tokenizer"):
        get_prefix_model(tiny("llama"), config(init="document", init_text="a"))
    with pytest.raises(ValueError, match=r"must have tokens in 0..96"):
        get_prefix_model(tiny("llama"), config(init="document", init_token_ids=[]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["name", "folder"])
def test_another_prefix(place: str, form: str, tmp_path: Path) -> None:
    """By its name or from its files; the first tokens of a longer one."""
    options = {"num_virtual_tokens": 8} | ({"mode": "embedding"} if form == "embedding" else {})
    model = get_prefix_model(tiny("llama"), PrefixConfig(**options)).eval()
    source: dict[str, Any] = {"init_prefix": "default"}
    if place == "folder":
        model.save_pretrained(tmp_path, training_state=True)
        source = {"init_path": tmp_path}
    expected = model(tokens()).logits
    model.add_prefix("same", PrefixConfig(init="prefix", **source, num_virtual_tokens=8, **FORMS[form]))
    got = model(tokens()).logits
    model.add_prefix("cut", config(init="prefix", **source, **FORMS[form]))
    first, whole = (model.prefixes[name].eval().prompt_embeddings() for name in ("cut", "default"))
    if form == "flat":
        assert torch.equal(got, expected)
        assert torch.equal(first, whole[:P])
    else:  # of six embeddings the model makes other last bits
        close(got, expected, MODEL)
        close(first, whole[:P], MODEL)
    assert model.prefixes["same"].embedding.data_ptr() != model.prefixes["default"].embedding.data_ptr()


def test_another_prefix_of_more_layers_and_with_frozen_tokens() -> None:
    model = prefixed()
    model.add_prefix("two", config(init="prefix", init_prefix="default", layers=[2, 0], num_frozen_tokens=2))
    assert torch.equal(model.prefixes["two"](), model.prefixes["default"]()[[0, 1, 4, 5]])
    with pytest.raises(ValueError, match="two has nothing for layers decoder 1"):
        model.add_prefix("all", config(init="prefix", init_prefix="two"))
    with pytest.raises(ValueError, match="two has 6 tokens, num_virtual_tokens=7 needs more"):
        model.add_prefix("long", PrefixConfig(num_virtual_tokens=7, init="prefix", init_prefix="two", layers=[0]))
    with pytest.raises(ValueError, match="has keys and values, of which mode='embedding' cannot start"):
        model.add_prefix("words", config(init="prefix", init_prefix="two", mode="embedding"))
    with pytest.raises(ValueError, match="nowhere"):
        model.add_prefix("none", config(init="prefix", init_path="/nowhere/at/all"))
    with pytest.raises(ValueError, match=r"init_prefix: no prefix named 'a/b'; .* a Hub id is given as init_path"):
        model.add_prefix("none", config(init="prefix", init_prefix="a/b"))
    assert model.prefix_names == ["default", "two"]


@pytest.mark.parametrize("form", FORMS)
def test_numbers(form: str) -> None:
    """The paper's "random": uniform in [0, 1). An MLP is fitted to them; and zeros."""
    made = prefixed(init="uniform", **FORMS[form]).prefixes["default"]
    numbers = made.embedding if form == "embedding" else made.prompt_embeddings()
    if form == "mlp":
        torch.testing.assert_close(numbers, numbers.clamp(0, 1))
    else:
        assert torch.equal(numbers, numbers.clamp(0, 1))
    assert abs(numbers.mean() - 0.5) < 4 * (12 * numbers.numel()) ** -0.5  # standard errors
    close(numbers.std().item(), 12**-0.5, DRAWS)
    zeros = prefixed(init="zero", **FORMS[form]).prefixes["default"]
    numbers = zeros.embedding if form == "embedding" else zeros.prompt_embeddings()
    if form == "mlp":
        torch.testing.assert_close(numbers, torch.zeros_like(numbers))
    else:
        assert not numbers.any()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_mlps_of_any_activation(activation: str, depth: int, tmp_path: Path) -> None:
    """Each starts from a text exactly, learns, and goes on from its files."""
    prompt = tokens(1, P)[0].tolist()
    options: dict[str, Any] = {"init": "text", "init_token_ids": prompt, "encoder_activation": activation}
    model = prefixed(**options | {"prefix_projection": True, "encoder_hidden_size": 32, "encoder_depth": depth})
    encoder = model.prefixes["default"]
    kinds = [type(module) for module in encoder.mlp]
    assert kinds.count(ACTIVATIONS[activation]) == depth
    expected = in_context(prompt, tokens())
    close(model(tokens()).logits, expected, LONG)
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in encoder.parameters())
    model.save_pretrained(tmp_path, training_state=True)
    again = PrefixModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_generation_from_a_start_is_that_in_context() -> None:
    prompt = tokens(1, P)[0].tolist()
    model = prefixed(init="text", init_token_ids=prompt)
    ids = tokens(2, 5)
    whole = torch.cat([torch.tensor(prompt).expand(2, -1), ids], dim=1)
    assert torch.equal(model.generate(ids, **QUIET), tiny("llama").generate(whole, **QUIET)[:, P:])


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no document": ({"init": "document"}, "init='document' needs either init_text or init_token_ids"),
    "two": ({"init": "document", "init_text": "a", "init_token_ids": [1]}, "needs either"),
    "no prefix": ({"init": "prefix"}, "init='prefix' needs either init_prefix, a name in the model, or init_path"),
    "two prefixes": ({"init": "prefix", "init_prefix": "a", "init_path": "b"}, "needs either init_prefix"),
    "path for nothing": ({"init_path": "b"}, "init='random' reads no init_path"),
    "text for nothing": ({"init_text": "a"}, "init='random' reads no init_text"),
    "prefix for nothing": ({"init": "zero", "init_prefix": "a"}, "init='zero' reads no init_prefix"),
    "activation": ({"encoder_activation": "prelu"}, r"encoder_activation must be one of \('elu', .* got 'prelu'"),
}


@pytest.mark.parametrize(("fields", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixConfig(**fields)
