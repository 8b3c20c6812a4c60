"""``prefix-attn check`` finds what is right, and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_attn import PrefixConfig, get_prefix_model
from prefix_attn.hf.check import LOGITS, MEASURES, ROWS, TOKENS, VIRTUAL, examine
from tests.hf.models import tiny, tokens

DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},  # as released
    "opt": {"dropout": 0.1, "attention_dropout": 0.1},
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_no_finding(name: str) -> None:
    """Of attention and of layers, which is no module that could be switched off."""
    assert [f.name for f in examine(tiny(name, **DROPOUT[name])) if not f.holds] == []


def test_generation_that_parts_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens that are equally likely: what comes after them is not compared, though a token may be the same."""
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=VIRTUAL))
    own, parted = model.base_model.generate, TOKENS + 2

    def generate(ids: Tensor, **options: Any) -> Any:
        out = own(ids, **options)
        if not options["use_cache"]:
            out.sequences[:, parted] += 1
            out.logits = tuple(t if i <= 2 else t + t.argmax(-1, True) for i, t in enumerate(out.logits))
        return out

    monkeypatch.setattr(model.base_model, "generate", generate)
    assert MEASURES["generation with and without a cache"](model, tokens(ROWS, TOKENS)) <= LOGITS


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_model_that_is_served(name: str) -> None:
    base = tiny(name)
    before = {n: p.clone() for n, p in base.named_parameters()}
    findings = list(examine(base))
    assert len(findings) == len(MEASURES) + 2
    assert [f.name for f in findings if not f.holds] == []
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())


ADAPTERS: dict[str, dict[str, Any]] = {
    "mlp": {"prefix_projection": True, "encoder_hidden_size": 8},
    "infix": {"mode": "infix", "num_frozen_tokens": 1},
    "frozen": {"num_frozen_tokens": 3},
    "gate": {"gate": "zero"},
    "embedding": {"mode": "embedding"},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter(kind: str, tmp_path: Path) -> None:
    config = PrefixConfig(num_virtual_tokens=3, **ADAPTERS[kind])
    get_prefix_model(tiny("llama"), config).save_pretrained(tmp_path, training_state=True)
    assert [f.name for f in examine(tiny("llama"), str(tmp_path)) if not f.holds] == []


def test_a_model_that_looks_ahead() -> None:
    base = tiny("llama")
    base.lm_head.register_forward_hook(lambda module, inputs, out: out + out.mean(1, keepdim=True))
    failed = {f.name.split(":")[0] for f in examine(base) if not f.holds}
    assert "causality" in failed
    assert "left padding changes no logits" in failed


def test_weights_that_move() -> None:
    base = tiny("llama")
    weight = base.lm_head.weight

    def drift(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            weight.data.add_(1e-3)

    base.lm_head.register_forward_pre_hook(drift)
    *_, last = examine(base)
    assert not last.holds
    assert last.value == 1


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="causal"):
        next(examine(tiny("t5")))
