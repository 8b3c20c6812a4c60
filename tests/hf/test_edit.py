"""Prefixes put together, cut and moved: keys are those that the model itself makes at the new positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, compose_cartridge_adapters, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf.edit import concatenate, move, move_kv, truncate
from tests.hf.by_hand import causal, relative
from tests.hf.models import tiny, tokens
from tests.numerics import GRADIENT, HALF, MODEL, close, close_in_norm

A, B = [5, 60, 7, 33, 8], [41, 9, 77]  # texts, as ids
SCALED = {
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
}
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "partial": ("gpt_neox", {}),
    "two speeds": ("gemma3_text", {}),
    "some layers without": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1]}),
    "interleaved": ("cohere", {"logit_scale": 1.0}),
    "partial, interleaved": ("glm", {"head_dim": 8, "pad_token_id": 0}),
    "gpt-oss": ("gpt_oss", {}),
}
for scaling, rope in SCALED.items():
    rope = rope | {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
    ROTARY[scaling] = "llama", {"rope_parameters": rope}


def model_of(texts: dict[str, list[int]], base: PreTrainedModel, **config: Any) -> PrefixModel:
    """``base`` with a prefix for each of ``texts``, made of it."""
    names = list(texts)
    configs = [PrefixConfig(num_virtual_tokens=len(t), init="text", init_token_ids=t, **config) for t in texts.values()]
    model = get_prefix_model(base, configs[0]).eval()
    model.add_prefix(names[0], configs[0])
    model.delete_prefix("default")
    for name, other in zip(names[1:], configs[1:]):
        model.add_prefix(name, other)
    return model


def kv(model: PrefixModel, name: str) -> Tensor:
    """(2 * L, H, P, D)."""
    return model.prefixes[name]().detach()


@torch.no_grad()
def logits(model: PrefixModel, name: str) -> Tensor:
    model.set_prefix(name)
    return model(tokens(2, 9)).logits


@pytest.mark.parametrize("case", ROTARY)
def test_keys_of_a_text_behind_another(case: str) -> None:
    """In layer 0, where context does not matter, those of the whole text; in all layers, those at later positions."""
    name, changes = ROTARY[case]
    model = model_of({"a": A, "b": B, "both": A + B}, causal(name, **changes))
    concatenate(model, ["a", "b"], "ab")
    assert model.active_prefix == "ab"
    got, whole = kv(model, "ab"), kv(model, "both")
    close(got[:2], whole[:2], MODEL)
    assert torch.equal(got[:, :, : len(A)], kv(model, "a"))
    calls = {call.module: call for call in model.attachment.probe.capture(torch.tensor(B), shift=len(A))}
    slots = model.attachment.resolver.layout(model.prefix_configs["ab"]).slots
    for number, slot in enumerate(slots):
        key, value = got[2 * number, :, len(A) :], got[2 * number + 1, :, len(A) :]
        close_in_norm(key, calls[slot.module].key[0], MODEL)
        close_in_norm(value, calls[slot.module].value[0], MODEL)
    concatenate(model, ["a", "b"], "plain", rotate=False)
    assert relative(kv(model, "plain")[:1], whole[:1]) > 0.1


@pytest.mark.parametrize("case", ROTARY)
def test_moved_prefixes_give_the_same_outputs(case: str) -> None:
    """Before the text at positions from 0 on, or at positions 0.. before a text behind it: distances are the same."""
    name, changes = ROTARY[case]
    model = model_of({"a": A}, causal(name, **changes))
    move(model, "a", "before", position_mode="none")
    assert model.prefix_configs["before"].shift == 0
    expected, random = logits(model, "a"), torch.get_rng_state()
    close(move_kv(kv(model, "before"), model.base_model.config, len(A)), kv(model, "a"), MODEL)  # without the weights
    assert torch.equal(torch.get_rng_state(), random)
    close_in_norm(logits(model, "before"), expected, MODEL)
    move(model, "before", "again", position_mode="shift")
    close(kv(model, "again"), kv(model, "a"), MODEL)
    model.add_prefix("unmoved", PrefixConfig(position_mode="none", init="text", init_token_ids=A, num_virtual_tokens=5))
    assert relative(logits(model, "unmoved"), expected) > 1e-3


def test_a_cut_text_is_the_text_that_is_left() -> None:
    model = model_of({"both": A + B, "a": A, "b": B}, tiny("llama"))
    truncate(model, "both", "first", stop=len(A))
    assert torch.equal(kv(model, "first"), kv(model, "both")[:, :, : len(A)])
    close(kv(model, "first"), kv(model, "a"), GRADIENT)  # a causal model
    truncate(model, "both", "last", start=-len(B))
    close(kv(model, "last")[:2], kv(model, "b")[:2], MODEL)
    truncate(model, "both", "plain", start=-len(B), rotate=False)
    assert torch.equal(kv(model, "plain"), kv(model, "both")[:, :, -len(B) :])
    concatenate(model, ["first", "last"], "again")
    close(kv(model, "again"), kv(model, "both"), MODEL)
    with pytest.raises(ValueError, match="nothing is left of 8 tokens"):
        truncate(model, "both", "nothing", start=8)


def test_frozen_tokens_and_mlps(tmp_path: Path) -> None:
    """Of frozen tokens those stay so that are left at the beginning; MLPs are folded; the result saves and trains."""
    base = tiny("llama")
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4, num_frozen_tokens=2, prefix_projection=True))
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=3, num_frozen_tokens=1))
    concatenate(model, ["default", "other"], "both", is_trainable=True)
    truncate(model, "both", "cut", start=1)
    frozen = {name: model.prefixes[name].num_frozen_tokens for name in ("both", "cut")}
    assert frozen == {"both": 2, "cut": 1}
    assert [p.shape for p in model.prefixes["both"].parameters() if p.requires_grad] == [(5, 96)]
    model.save_pretrained(tmp_path)
    again = PrefixModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(again.prefixes["default"](), model.prefixes["cut"]())


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_learned_positions_stay(name: str) -> None:
    """The model says that it cannot; a plain concatenation still works, and cutting the end off needs no move."""
    model = model_of({"a": A, "b": B}, tiny(name))
    for edit in (
        lambda: concatenate(model, ["a", "b"], "ab"),
        lambda: truncate(model, "a", "ab", start=1),
    ):
        with pytest.raises(NotImplementedError, match=r"positions of .* cannot be moved; rotate=False leaves"):
            edit()
    with pytest.raises(NotImplementedError, match=r"positions of .* cannot be moved \(decoder layer 0: keys differ"):
        move(model, "a", "ab", position_mode="none")
    assert model.prefix_names == ["a", "b"]
    concatenate(model, ["a", "b"], "ab", rotate=False)
    assert torch.equal(kv(model, "ab"), torch.cat([kv(model, "a"), kv(model, "b")], dim=2))
    truncate(model, "ab", "first", stop=len(A))
    assert torch.equal(logits(model, "first"), logits(model, "a"))


def test_distances_move_by_themselves() -> None:
    """T5's bias counts from where a token of the prefix stands in it; keys are the same at every position."""
    model = model_of({"a": A, "b": B}, tiny("t5"), sites=("decoder",), position_mode="shift")
    concatenate(model, ["a", "b"], "ab")
    assert torch.equal(kv(model, "ab"), torch.cat([kv(model, "a"), kv(model, "b")], dim=2))
    with pytest.raises(NotImplementedError, match="no rotary embeddings"):
        move(model, "a", "before", position_mode="none")
    model = model_of({"a": A, "b": B}, tiny("bart"), sites=("decoder",), position_mode="shift")
    with pytest.raises(NotImplementedError, match="positions of BartForConditionalGeneration cannot be moved"):
        concatenate(model, ["a", "b"], "ab")


def test_angles_that_depend_on_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = model_of({"a": A}, tiny("llama", rope_parameters=rope))
    with pytest.raises(NotImplementedError, match="dynamic: they depend on the length"):
        concatenate(model, ["a", "a"], "twice")
    concatenate(model, ["a"], "one")  # nothing moves
    assert torch.equal(kv(model, "one"), kv(model, "a"))


def test_composed_as_peft_does(tmp_path: Path) -> None:
    """PEFT, and the Cartridges paper, put cartridges one behind the other as they are."""
    model = None
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=1)
        get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / name)
        if model is None:
            model = PrefixModel.from_pretrained(tiny("llama"), tmp_path / name, name=name)
        else:
            model.load_prefix(tmp_path / name, name)
    assert model is not None
    compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "ab")
    concatenate(model, ["a", "b"], "ab", rotate=False)
    theirs = load_file(tmp_path / "ab" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(model.prefixes["ab"].prompt_embeddings(), theirs)
    assert model.prefix_configs["ab"].num_frozen_tokens == 1


def test_what_does_not_go_together() -> None:
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=2))
    model.add_prefix("layers", PrefixConfig(num_virtual_tokens=2, layers=[1]))
    model.add_prefix("none", PrefixConfig(num_virtual_tokens=2, position_mode="none"))
    model.add_prefix("gate", PrefixConfig(num_virtual_tokens=2, position_mode="none", gate="zero"))
    model.add_prefix("infix", PrefixConfig(num_virtual_tokens=2, mode="infix"))
    wrong = {
        ("default", "layers"): r"one layers, got \{'default': 'all', 'layers': \(1,\)\}",
        ("default", "none"): "one position_mode",
        ("none", "gate"): "gates or task heads",
        ("none", "infix"): "an infix and a prefix",
        ("default", "nobody"): "no prefix named 'nobody'",
        (): "at least one prefix",
    }
    for sources, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            concatenate(model, sources, "new")
    with pytest.raises(ValueError, match="named 'none' already"):
        concatenate(model, ["default"], "none")
    assert model.prefix_names == ["default", "layers", "none", "gate", "infix"]
    model.prefixes["gate"].gate.data.fill_(0.5)
    truncate(model, "gate", "one", stop=1)
    assert torch.equal(model.prefixes["one"].gate, model.prefixes["gate"].gate)


def test_half_precision() -> None:
    """Keys of a bfloat16 model are as exact as its own; the prefix is float32 and loses nothing more."""
    model = model_of({"a": A, "b": B, "both": A + B}, tiny("llama").bfloat16())
    concatenate(model, ["a", "b"], "ab")
    close_in_norm(kv(model, "ab")[:1], kv(model, "both")[:1], HALF)
