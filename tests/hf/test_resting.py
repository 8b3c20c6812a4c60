"""Of several prefixes the active one is trainable: DistributedDataParallel refuses parameters that no loss reaches."""

from __future__ import annotations

import copy
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf import edit
from tests.hf.models import tiny, tokens

P = 4


def several(name: str = "llama", **fields: Any) -> PrefixModel:
    """Prefixes "default", "b" with an MLP, and "loaded", which is not trained."""
    torch.manual_seed(0)
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, **fields))
    model.add_prefix("b", PrefixConfig(num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=8))
    model.add_prefix("loaded", PrefixConfig(num_virtual_tokens=P, inference_mode=True))
    return model


def trainable(model: nn.Module) -> set[str]:
    """The prefixes that have trainable parameters, or trainable heads."""
    return {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}


def loss(model: PrefixModel, **named: Any) -> torch.Tensor:
    return model(tokens(), labels=tokens(), **named).loss


def test_the_active_prefix_alone_is_trainable() -> None:
    model = several()
    assert trainable(model) == {"default", "b"}
    names = model.state_dict().keys()
    for name in ("default", "b", "default"):
        model.set_prefix(name)
        assert trainable(model) == {name}
        loss(model).backward()
        assert {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None} == {name}
        model.zero_grad()
    model.set_prefix("loaded")
    assert trainable(model) == set()
    assert model.state_dict().keys() == names
    model.delete_prefix("loaded")
    assert model.active_prefix == "default"
    assert trainable(model) == {"default"}


def test_each_way_to_make_a_prefix_leaves_one_trainable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The active one, whichever that is, where several processes train: none waits for the gradients of another."""
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 0}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P))
    model.add_prefix("added", PrefixConfig(num_virtual_tokens=P))
    assert trainable(model) == {"added"}
    model.save_pretrained(tmp_path, selected_adapters=["added"])
    model.load_prefix(tmp_path / "added", "loaded", is_trainable=True)
    assert trainable(model) == {"loaded"}
    edit.concatenate(model, ["added", "default"], "made", is_trainable=True)
    assert trainable(model) == {"made"}
    model.add_adapter("adapter", PrefixConfig(num_virtual_tokens=P))  # which leaves the active one
    model.load_adapter(tmp_path / "added", "loaded too", is_trainable=True)
    assert trainable(model) == {"made"}
    model.set_adapter("adapter")
    with model.disable_prefix():
        assert trainable(model) == {"adapter"}
    assert trainable(model) == {"adapter"}
    model.delete_prefix("adapter")
    assert trainable(model) == {"default"}
    torch.save(model.state_dict(), tmp_path / "state.pt")
    names = model.prefix_names
    again = PrefixModel.from_pretrained(tiny("llama"), tmp_path / "state.pt", is_trainable=True)
    assert again.prefix_names == names
    assert trainable(again) == {again.active_prefix}


def test_heads_rest_with_their_prefix() -> None:
    model = several("bert")
    model.set_prefix("default")
    on = {n for n, p in model.named_parameters() if p.requires_grad}
    assert on == {f"heads.default.classifier.{n}" for n in ("weight", "bias")} | {"prefixes.default.embedding"}


def test_what_its_user_froze_stays_frozen() -> None:
    model = several(gate="zero")
    encoder = model.prefixes["default"]
    encoder.gate.requires_grad_(False)
    for name in ("b", "default", "b", "default"):
        model.set_prefix(name)
    assert encoder.embedding.requires_grad
    assert not encoder.gate.requires_grad


def test_a_forward_trains_those_that_it_names() -> None:
    model = several()
    model.set_prefix("default")
    with torch.no_grad():
        loss(model, prefix_names=["b", "default"])
    assert trainable(model) == {"default"}
    loss(model, prefix_names=["b", "default"]).backward()
    assert trainable(model) == {"default", "b"}
    assert all(p.grad.abs().max() > 0 for p in model.prefixes["default"].parameters())
    assert model.prefixes["b"].embedding.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["default", "b"])
def test_a_gradient_that_is_still_to_come_comes(kind: str) -> None:
    """Autograd drops the gradient of what is frozen by then. A loss that nobody will differentiate does not count."""
    model, other = several(), {"default": "b", "b": "default"}[kind]
    model.set_prefix(kind)
    here = loss(model)
    model.set_prefix(other)
    (here + loss(model)).backward()
    for name in ("default", "b"):
        assert model.prefixes[name].embedding.grad.abs().max() > 0
    model.set_prefix(kind)
    assert trainable(model) == {kind}
    dropped = loss(model)
    del dropped
    model.set_prefix(other)
    assert trainable(model) == {other}


def test_a_copy_wakes_its_own() -> None:
    model = several()
    model.set_prefix("b")
    again = copy.deepcopy(model)
    again.set_prefix("default")
    assert trainable(again) == {"default"}
    assert trainable(model) == {"b"}


def test_an_optimizer_that_holds_all_of_them_moves_the_active_one() -> None:
    model = several()
    optimizer = torch.optim.AdamW(model.prefixes.parameters(), lr=1e-2, weight_decay=0.1)
    for name in ("b", "default"):
        model.set_prefix(name)
        before = {n: p.detach().clone() for n, p in model.prefixes.named_parameters()}
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {n.split(".")[0] for n, p in model.prefixes.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {name}


@pytest.mark.parametrize("when", ["it is made", "its gradient comes", "it was alone"])
def test_another_is_set_in_the_middle(when: str) -> None:
    """By a callback or another thread: the prefix that runs keeps its gradient."""
    model = several()
    if when == "it was alone":
        model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P))
    else:
        model.set_prefix("default")
    encoder = model.prefixes["default"]
    if when == "it is made":
        encoder.register_forward_pre_hook(lambda *_: model.set_prefix("b"))
    if when == "its gradient comes":
        encoder.embedding.register_hook(lambda _: model.set_prefix("b"))
    here = loss(model)
    if when == "it was alone":
        model.add_prefix("b", PrefixConfig(num_virtual_tokens=P))
        model.set_prefix("b")
    here.backward()
    assert encoder.embedding.grad.abs().max() > 0
    model.set_prefix("b")
    assert trainable(model) == {"b"}


def test_threads_train_while_others_are_set() -> None:
    """Of 7 backwards 5 came to nothing, and then a loss had no gradient at all."""
    model, lost, interval = several(), [], sys.getswitchinterval()

    def train(name: str) -> None:
        parameters = list(model.prefixes[name].parameters())
        for _ in range(10):
            for parameter in parameters:
                parameter.grad = None
            try:
                loss(model, prefix_names=[name] * len(tokens())).backward()
            except RuntimeError as error:
                lost.append(error)
            lost.extend(name for parameter in parameters if parameter.grad is None)

    threads = [threading.Thread(target=train, args=(name,)) for name in ("default", "b")]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for name in ("loaded", "default", "b"):
                model.set_prefix(name)
    finally:
        sys.setswitchinterval(interval)
    assert not lost
