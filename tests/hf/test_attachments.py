"""Several attachments: models that share a base, or a configuration, do not disturb one another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefix_attn import PrefixConfig, PrefixTuning, accelerate, get_prefix_model
from tests.hf.models import tiny, tokens
from tests.numerics import MODEL, close

P, WIDTH = 4, 32
NAMES = ("llama", "gpt2", "t5")


def sibling(base: PreTrainedModel) -> Any:
    """A bare model of the same configuration object."""
    return type(base)(base.config).eval()


def given(base: PreTrainedModel) -> dict[str, Any]:
    decoder = {"decoder_input_ids": tokens(2, 5)} if base.config.is_encoder_decoder else {}
    return {"input_ids": tokens(), **decoder}


@pytest.mark.parametrize("name", NAMES)
def test_models_of_one_configuration(name: str) -> None:
    """What one does, or has done to it, the other does not see; each may be attached to."""
    base = tiny(name)
    config, before = base.config, base.config.to_dict()
    plain, second = sibling(base), sibling(base)
    own = plain.config._attn_implementation
    bare = plain(**given(plain)).logits
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P)).eval()
    expected = model(**given(base)).logits
    assert (config._attn_implementation, config.to_dict()) == (own, before)
    assert torch.equal(plain(**given(plain)).logits, bare)
    plain.set_attn_implementation("eager")
    config.output_attentions = True
    assert torch.equal(model(**given(base)).logits, expected)
    other = get_prefix_model(second, PrefixConfig(num_virtual_tokens=P)).eval()
    assert other(**given(second)).logits.shape == bare.shape
    model.attachment.remove()
    assert base.config is config
    assert other(**given(second)).logits.shape == bare.shape


def test_every_part_of_a_model_shares_its_copy() -> None:
    """What is set on the base model's configuration afterwards reaches its layers."""
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P))
    configs = {id(m.config) for m in model.base_model.modules() if hasattr(m, "config")}
    assert configs == {id(model.base_model.config)}


def test_a_failed_attachment_leaves_the_configuration_object() -> None:
    base = tiny("llama")
    config = base.config
    with pytest.raises(ValueError, match="layers must lie in"):
        get_prefix_model(base, PrefixConfig(layers=[9]))
    assert base.config is base.model.config is base.model.layers[0].self_attn.config is config


def test_a_bare_model_of_an_attached_configuration() -> None:
    """It is plain, and a prefix can be attached to it too, and to one that accelerate() serves."""
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P)).eval()
    for kind in (type(model.base_model), AutoModelForCausalLM.from_config):
        other = kind(model.base_model.config).eval()
        other.load_state_dict(model.base_model.state_dict())
        with model.disable_prefix():
            close(other(tokens()).logits, model(tokens()).logits, MODEL)
        get_prefix_model(other, PrefixConfig(num_virtual_tokens=P))(tokens()).logits.sum().backward()


@pytest.mark.peft
def test_accelerated_models_of_one_configuration() -> None:
    config = tiny("llama").config
    adapter = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    first, second = (get_peft_model(type(tiny("llama"))(config), copy.copy(adapter)).eval() for _ in range(2))
    expected = [model(input_ids=tokens()).logits for model in (first, second)]
    undo = accelerate(first)
    accelerate(second)
    undo()
    for model, logits in zip((first, second), expected):
        close(model(input_ids=tokens()).logits, logits, MODEL)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_attentions_of_several_models_on_one_base(name: str) -> None:
    """Each has its own weights and logits, whichever was attached last, and the frozen model has its own."""
    base = tiny(name)
    alone: Any = tiny(name, attn_implementation="eager")
    inputs = given(base)
    bare = alone(**inputs, output_attentions=True)
    key = next(key for key in bare if key.endswith("attentions") and bare[key])
    models = [get_prefix_model(base, PrefixConfig(num_virtual_tokens=n)).eval() for n in (4, 6, 5)]
    plain = [model(**inputs).logits for model in models]
    for model, logits, n in zip(models, plain, (4, 6, 5)):
        out = model(**inputs, output_attentions=True)
        assert torch.equal(out.logits, logits)
        assert {weights.shape[-1] for weights in out[key]} == {bare[key][0].shape[-1] + n}
    for weights, expected in zip(base(**inputs, output_attentions=True)[key], bare[key]):
        close(weights, expected, MODEL)


def test_a_table_and_prefixes_on_one_base() -> None:
    """Both kinds of table: one that attaches to the attention, and one that is inserted."""
    for name in ("llama", "mistral"):
        base = tiny(name)
        model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P)).eval()
        expected = model(tokens()).logits
        table = PrefixTuning(base, P, WIDTH).eval()
        tuned = table(tokens()).logits
        assert not torch.equal(tuned, expected)
        assert torch.equal(model(tokens()).logits, expected)
        assert torch.equal(model(tokens(), output_attentions=True).logits, expected)
        close(table(tokens(), output_attentions=True).logits, tuned, MODEL)


@pytest.mark.parametrize("first", [True, False])
def test_the_others_stay_when_one_is_gone(first: bool) -> None:
    """Whichever goes first, the last one restores the base model."""
    base = tiny("llama")
    config, bare = base.config, base(**given(base)).logits
    models = [get_prefix_model(base, PrefixConfig(num_virtual_tokens=P)).eval() for _ in range(2)]
    gone, stays = models if first else reversed(models)
    expected = stays(**given(base)).logits
    gone.unload()
    gone.unload()
    assert torch.equal(stays(**given(base)).logits, expected)
    assert not any(p.requires_grad for p in base.parameters())
    copy.deepcopy(stays).unload()
    stays.unload()
    assert base.config is config
    assert all(p.requires_grad for p in base.parameters())
    close(base(**given(base)).logits, bare, MODEL)


@pytest.mark.peft
def test_an_accelerated_model_outlives_another_on_its_base() -> None:
    """``undo`` of one leaves the other, and undoing both restores the base."""
    base = tiny("llama")
    own = base.config
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P)).eval()
    tuned = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    undo = accelerate(tuned)
    model.unload()
    accelerated = tuned(**given(base)).logits
    undo()
    assert base.config is own
    close(accelerated, tuned(**given(base)).logits, MODEL)
