"""PEFT's words do what they do in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from tests.hf.models import tiny, tokens
from tests.numerics import MODEL, close

P = 4


def prefixed(**config: Any) -> PrefixModel:
    return get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P, **config)).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(tokens()).logits


@pytest.mark.peft
def test_peft_s_configurations_are_taken() -> None:
    from peft import CartridgeConfig, LoraConfig, PrefixTuningConfig, TaskType

    peft = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=16
    )
    model = get_prefix_model(tiny("llama"), peft)
    config = model.peft_config["default"]
    assert (config.task_type, config.num_virtual_tokens, config.encoder_hidden_size) == ("CAUSAL_LM", P, 16)
    assert (config.peft_type, config.position_mode, config.init) == ("PREFIX_TUNING", "shift", "random")
    model.add_adapter("c", CartridgeConfig(num_virtual_tokens=P, num_frozen_tokens=2))
    assert model.prefixes["c"].num_frozen_tokens == 2
    zero = PrefixTuningConfig(num_virtual_tokens=P, init_weights="zero", inference_mode=True)
    model.add_adapter("zero", zero)
    assert not model.prefixes["zero"].embedding.any()
    assert not model.prefixes["zero"].embedding.requires_grad
    classifier = get_prefix_model(tiny("bert"), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P))
    assert list(classifier.heads["default"]) == ["classifier"]
    for wrong in (LoraConfig(), {"num_virtual_tokens": P}):
        with pytest.raises(ValueError, match="PrefixTuningConfig or CartridgeConfig of PEFT, got"):
            get_prefix_model(tiny("llama"), wrong)
    with pytest.raises(ValueError, match="num_virtual_tokens must be a positive int, got None"):
        get_prefix_model(tiny("llama"), PrefixTuningConfig())


def test_adapters_are_prefixes(tmp_path: Path) -> None:
    """As in PEFT, an adapter that is added or loaded does not become the active one."""
    model = prefixed()
    first = logits(model)
    model.add_adapter("b", PrefixConfig(num_virtual_tokens=3, inference_mode=True))
    assert (model.active_adapter, model.active_adapters, list(model.peft_config)) == (
        "default",
        ["default"],
        ["default", "b"],
    )
    assert not any(p.requires_grad for p in model.prefixes["b"].parameters())
    assert torch.equal(logits(model), first)
    model.set_adapter("b")
    assert model.active_peft_config.num_virtual_tokens == 3
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "c", is_trainable=True)
    assert model.active_adapter == "b"
    assert model.peft_config["c"].inference_mode is False
    assert model.prefixes["c"].embedding.requires_grad
    model.delete_adapter("b")
    assert model.active_adapter == "default"
    for name in ("default", "c"):
        model.delete_adapter(name)
    assert (model.active_adapter, model.active_adapters) == (None, [])
    model.load_adapter(tmp_path, "d")
    assert model.active_adapter == "d"
    with pytest.raises(ValueError, match="no prefix named 'b'"):
        model.set_adapter("b")


def test_unload_gives_the_base_model_back() -> None:
    base = tiny("llama")
    before, attention = logits(base), base.config._attn_implementation
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P))
    assert model.get_base_model() is base
    with model.disable_adapter():
        close(logits(model), before, MODEL)
    assert model.unload() is base
    assert torch.equal(logits(base), before)
    assert base.config._attn_implementation == attention
    assert all(p.requires_grad for p in base.parameters())
    with pytest.raises(RuntimeError, match="did not hand the prefix"):
        logits(model)


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_peft_s_own_adapters_go_below_the_prefix() -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(TypeError, match=r"base.add_adapter\(...\) the LoRA first"):
        get_peft_model(prefixed(), LoraConfig(target_modules=["q_proj"]))


@pytest.mark.peft
def test_peft_s_functions_of_states() -> None:
    """What PEFT's own model gives, goes in; what they cannot carry is refused."""
    from peft import PrefixTuningConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    theirs = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    saved = get_peft_model_state_dict(theirs)
    for config in ({}, {"inference_mode": True}, {"num_frozen_tokens": 1}):
        ours = prefixed(**config)
        set_peft_model_state_dict(ours, saved)
        torch.testing.assert_close(logits(ours), theirs(input_ids=tokens()).logits)
        again = get_peft_model_state_dict(ours)
        assert torch.equal(again["prompt_embeddings"], saved["prompt_embeddings"])
        assert again.keys() == saved.keys()
    mlp = prefixed(prefix_projection=True)
    assert get_peft_model_state_dict(mlp)["prompt_embeddings"].shape == saved["prompt_embeddings"].shape
    with pytest.raises(ValueError, match=r"an MLP makes this prefix: fold\(\) first"):
        set_peft_model_state_dict(mlp, saved)
    with pytest.raises(ValueError, match=r"must be \(4, 96\), got \(3, 96\)"):
        set_peft_model_state_dict(prefixed(), {"prompt_embeddings": saved["prompt_embeddings"][:3]})
    with pytest.raises(ValueError, match="PREFIX_ATTN"):
        get_peft_model_state_dict(prefixed(gate="zero"))
    classifier = get_prefix_model(tiny("bert"), PrefixConfig(num_virtual_tokens=P))
    with pytest.raises(ValueError, match=r"has task heads \['classifier'\]"):
        get_peft_model_state_dict(classifier)
