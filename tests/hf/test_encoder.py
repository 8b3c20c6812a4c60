"""Encoders with a head: a prefix for each layer's self-attention, and a copy of the head that is trained with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from tests.hf.concatenation import concatenation
from tests.hf.models import ENCODERS, tiny, tokens
from tests.numerics import GRADIENT, MODEL, close, close_in_norm

P = 4
PATHS = {
    "bert": "bert.encoder.layer.{}.attention.self",
    "roberta": "roberta.encoder.layer.{}.attention.self",
    "xlm-roberta": "roberta.encoder.layer.{}.attention.self",
    "electra": "electra.encoder.layer.{}.attention.self",
    "distilbert": "distilbert.transformer.layer.{}.attention",
    "modernbert": "model.layers.{}.attn",
}
FIRST = {"roberta": 2, "xlm-roberta": 2}  # position of the first token
LABELS = torch.tensor([0, 2, 1])


def inputs() -> dict[str, Tensor]:
    """Three rows of 11 tokens, the ends of two of them padding; none is RoBERTa's padding token, 1."""
    ids = tokens(3, 11).clamp(min=2)
    mask = torch.ones_like(ids)
    mask[1, 8:], mask[2, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("mode", ["shift", "none"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_layer_against_concatenation(name: str, mode: str) -> None:
    base, given = tiny(name), inputs()
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P, position_mode=mode))
    leaf = model.prefixes["default"].embedding
    logits = model(**given).logits
    weight = torch.randn_like(logits)
    (grad,) = torch.autograd.grad((logits * weight).sum(), leaf)

    kv = model.prefixes["default"]()
    prefixes = {base.get_submodule(PATHS[name].format(i)): (kv[2 * i], kv[2 * i + 1], None) for i in range(3)}
    positions = torch.arange(11)[None] + (P if mode == "shift" else 0) + FIRST.get(name, 0)
    with model.disable_prefix(), concatenation(base, prefixes):
        expected = base(**given, position_ids=positions).logits
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), leaf)
    close(logits, expected, MODEL)
    for got, wanted in zip(*(g.view(P, 6, -1).unbind(1) for g in (grad, expected_grad))):
        close_in_norm(got, wanted, MODEL)


@pytest.mark.peft
@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "electra"])
def test_peft_s_prefixes_and_heads(name: str, tmp_path: Path) -> None:
    """What PEFT saved gives the same logits here, and what is saved here gives them in PEFT."""
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    peft = get_peft_model(tiny(name), config).eval()
    for parameter in peft.parameters():  # the head too: its copy is not the base model's any more
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    peft.save_pretrained(tmp_path / "theirs")
    ours = PrefixModel.from_pretrained(tiny(name), tmp_path / "theirs").eval()
    expected = peft(**inputs()).logits
    torch.testing.assert_close(ours(**inputs()).logits, expected)
    with ours.disable_prefix():
        assert (ours(**inputs()).logits - expected).abs().max() > 0.1
    ours.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny(name), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(**inputs()).logits, expected)


HEADS = {
    "bert": ("classifier",),
    "roberta": ("classifier",),
    "distilbert": ("pre_classifier", "classifier"),
    "modernbert": ("head", "classifier"),
}


@pytest.mark.parametrize("name", HEADS)
def test_training_moves_the_prefix_and_a_copy_of_the_head(name: str, tmp_path: Path) -> None:
    base = tiny(name)
    before = {n: p.clone() for n, p in base.state_dict().items()}
    expected = base(**inputs()).logits
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P)).train()
    assert model.prefix_configs["default"].task_type == "SEQ_CLS"
    assert model.prefix_configs["default"].modules_to_save == HEADS[name]
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[2] for n in trainable} == {"embedding", *HEADS[name]}
    assert model.state_dict().keys() == trainable.keys()
    start = {n: p.detach().clone() for n, p in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=3e-2)
    losses = []
    for _ in range(10):
        loss = model(**inputs(), labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(not torch.equal(p, start[n]) for n, p in trainable.items())
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in base.state_dict().items())
    with model.eval().disable_prefix():
        close(model(**inputs()).logits, expected, MODEL)
    model.save_pretrained(tmp_path)
    again = PrefixModel.from_pretrained(tiny(name), tmp_path).eval()
    assert torch.equal(again(**inputs()).logits, model(**inputs()).logits)
    assert not any(p.requires_grad for p in again.parameters())


def test_each_prefix_has_its_own_head() -> None:
    model = get_prefix_model(tiny("bert"), PrefixConfig(num_virtual_tokens=P)).eval()
    first = model(**inputs()).logits
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=P))
    model.prefixes["other"].load_state_dict(model.prefixes["default"].state_dict())
    assert torch.equal(model(**inputs()).logits, first)
    torch.nn.init.normal_(model.heads["other"]["classifier"].bias)
    assert not torch.equal(model(**inputs()).logits, first)
    saved = {n: t.clone() for n, t in model.state_dict().items()}
    model.set_prefix("default")
    assert torch.equal(model(**inputs()).logits, first)
    torch.nn.init.normal_(model.heads["default"]["classifier"].bias)
    model.load_state_dict(saved)
    assert torch.equal(model(**inputs()).logits, first)
    model.delete_prefix("default")
    assert list(model.heads) == ["other"]


def test_head_that_stays_frozen() -> None:
    config = PrefixConfig(num_virtual_tokens=P, modules_to_save=())
    model = get_prefix_model(tiny("bert"), config)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prefixes.default.embedding"]
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no head \['score'\]; .* \['classifier'\]"):
        get_prefix_model(tiny("bert"), PrefixConfig(modules_to_save=["score"]))
    with pytest.raises(ValueError, match="modules_to_save must be a list of names, got 'classifier'"):
        PrefixConfig(modules_to_save="classifier")


def test_head_of_another_size(tmp_path: Path) -> None:
    get_prefix_model(tiny("bert"), PrefixConfig(num_virtual_tokens=P)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"need .*\(5, 32\).* has .*\(3, 32\)"):
        PrefixModel.from_pretrained(tiny("bert", num_labels=5), tmp_path)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_gradient_checkpointing_changes_no_gradient(name: str, use_reentrant: bool) -> None:
    """In RoBERTa through embeddings that no longer know where padding is."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, prefix_projection=True))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def grads() -> list[Any]:
        model.train().zero_grad()
        model(**inputs(), labels=LABELS).loss.backward()
        return [p.grad.clone() for p in parameters]

    expected = grads()
    set_checkpointing(model, use_reentrant=use_reentrant)
    for _ in range(2):
        close(grads(), expected, GRADIENT)


def test_second_sentence_of_a_pair() -> None:
    model = get_prefix_model(tiny("bert"), PrefixConfig(num_virtual_tokens=P)).eval()
    kinds = torch.ones_like(inputs()["input_ids"])
    assert (model(**inputs(), token_type_ids=kinds).logits - model(**inputs()).logits).abs().max() > 1e-3
