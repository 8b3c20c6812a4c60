"""A copy of a model is whole: it runs and trains its own prefix, in any module, process or library that holds it."""

from __future__ import annotations

import copy
import gc
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, accelerate, get_prefix_model
from tests.hf.models import tiny, tokens
from tests.numerics import MODEL, close

ROOT = Path(__file__).resolve().parents[2]
P = 4
QUIET: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CACHES: list[Any] = []  # that live on while a model is copied


def several() -> Any:
    """Every kind of prefix on one model, which has generated."""
    model = get_prefix_model(tiny("llama"), PrefixConfig(prefix_projection=True, encoder_hidden_size=8))
    model.add_prefix("gate", PrefixConfig(num_virtual_tokens=P, gate="zero", modules_to_save=["lm_head"]))
    model.add_prefix("embedding", PrefixConfig(num_virtual_tokens=P, mode="embedding"))
    model.generate(tokens(), **QUIET)
    return model


def classifier() -> Any:
    return get_prefix_model(tiny("bert"), PrefixConfig(num_virtual_tokens=P))


def encoder_decoder() -> Any:
    return get_prefix_model(tiny("t5"), PrefixConfig(num_virtual_tokens=P))


def shared_table() -> Any:
    return PrefixTuning(tiny("llama"), P, 32)


def inserted_table() -> Any:
    model = PrefixTuning(tiny("mistral"), P, 32)
    CACHES.append(model(tokens(), use_cache=True).past_key_values)
    return model


def accelerated() -> Any:
    model = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    accelerate(model)
    model.generate(input_ids=tokens(), **QUIET)
    return model


OURS: dict[str, Callable[[], Any]] = {
    f.__name__: f for f in (several, classifier, encoder_decoder, shared_table, inserted_table)
}
MODELS = [*OURS, pytest.param("accelerated", marks=pytest.mark.peft)]


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
    "AveragedModel": lambda model: AveragedModel(model).module,
}


def logits(model: Any) -> Tensor:
    decoder = {"decoder_input_ids": tokens(2, 5)} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens(), **decoder).logits


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_runs_and_trains_its_own_prefix(name: str, way: str) -> None:
    model = (OURS | {"accelerated": accelerated})[name]().eval()
    expected = logits(model).detach()
    other = WAYS[way](model)
    assert torch.equal(logits(other), expected)
    trained = [p for p in other.parameters() if p.requires_grad]
    assert len(trained) == len([p for p in model.parameters() if p.requires_grad])
    logits(other).sum().backward()
    assert any(p.grad is not None for p in trained)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for parameter in trained:
            parameter.zero_()
    assert torch.equal(logits(model), expected)
    changed = logits(other).detach()
    assert not torch.equal(changed, expected)
    del model
    gc.collect()
    assert torch.equal(logits(other), changed)


def test_a_copy_of_several_prefixes_has_them_all() -> None:
    model = several().eval()
    other = copy.deepcopy(model)
    other.delete_prefix("default")
    other.fold()
    assert (model.prefix_names, other.prefix_names) == (["default", "gate", "embedding"], ["gate", "embedding"])
    for name in other.prefix_names:
        model.set_prefix(name)
        other.set_prefix(name)
        assert torch.equal(other.generate(tokens(), **QUIET), model.generate(tokens(), **QUIET))
    assert model.prefix_configs["embedding"].mode == "embedding"


LOADED = """
import sys, torch
models = torch.load(sys.argv[1], weights_only=False)
print(torch.stack([model(input_ids=torch.arange(1, 8)[None]).logits for model in models]).tolist())
"""


def test_another_process(tmp_path: Path) -> None:
    """It knows nothing of our attention function until it unpickles the models."""
    models = [several().eval(), inserted_table().eval()]
    torch.save(models, tmp_path / "models.pt")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "models.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ids = torch.arange(1, 8)[None]
    expected = torch.stack([model(input_ids=ids).logits for model in models])
    close(torch.tensor(json.loads(done.stdout)), expected, MODEL)


OUTER: dict[str, Callable[[Any], nn.Module]] = {
    "alone": lambda model: model,
    "in a module": lambda model: nn.ModuleDict({"policy": model, "value": nn.Linear(2, 1)}),
    "twice": lambda model: nn.Sequential(model, classifier()),
    "AveragedModel": AveragedModel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
}


def emptied(outer: nn.Module) -> list[Tensor]:
    """What is trained, before it becomes 0."""
    before = [p.detach().clone() for p in outer.parameters() if p.requires_grad]
    for parameter in outer.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    return before


@pytest.mark.parametrize("name", ["several", "inserted_table"])
@pytest.mark.parametrize("place", OUTER)
def test_a_state_is_loaded_strictly(place: str, name: str) -> None:
    outer = OUTER[place](OURS[name]())
    state = {key: tensor.clone() for key, tensor in outer.state_dict().items()}
    assert not [key for key in state if "base_model" in key]
    expected = emptied(outer)
    keys = outer.load_state_dict(state)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert all(torch.equal(p, e) for p, e in zip((p for p in outer.parameters() if p.requires_grad), expected))
    lost = next(key for key in state if "prefix" in key)
    with pytest.raises(RuntimeError, match=f"Missing key.*{re.escape(lost)}"):
        outer.load_state_dict({key: tensor for key, tensor in state.items() if key != lost})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*more"):
        outer.load_state_dict({**state, "more": torch.zeros(1)})


@pytest.mark.parametrize("name", ["several", "inserted_table"])
def test_distributed_checkpoints(name: str) -> None:
    model = OURS[name]()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert state.keys() == model.state_dict().keys()
    state = {key: tensor.clone() for key, tensor in state.items()}
    expected = emptied(model)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    assert all(torch.equal(p, e) for p, e in zip((p for p in model.parameters() if p.requires_grad), expected))


def test_an_average_of_two() -> None:
    """An exponential moving average of what is trained; the base model keeps its bits."""
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    leaf = model.prefixes["default"].embedding
    start = leaf.detach().clone()
    with torch.no_grad():
        leaf.add_(2.0)
    average.update_parameters(model)
    inner = average.module
    assert isinstance(inner, PrefixModel)
    torch.testing.assert_close(inner.prefixes["default"].embedding, start + 1.0)
    for one, other in zip(inner.base_model.parameters(), model.base_model.parameters()):
        assert torch.equal(one, other)
    assert not torch.equal(logits(inner), logits(model))
