"""FSDP2: the prefix sharded with the base, a base that was sharded before, and accelerate's way."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from tests.distributed.together import (
    FORMS,
    IDS,
    alone,
    attached,
    base,
    gradients,
    loads_alone,
    mine,
    same_gradients,
    whole,
)
from tests.numerics import MODEL, close


def sharded(model: Any, layers: Any) -> Any:
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def both(form: str, folder: Path) -> None:
    """One ``fully_shard`` around base and prefix."""
    model, one = alone(form), alone(form)
    sharded(model, model.base_model.model.layers)
    trained(model, one)
    model.save_pretrained(folder)
    loads_alone(folder, one)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert full.keys() == one.state_dict().keys()
    for name, tensor in full.items():
        close(tensor, one.state_dict()[name], MODEL)
    assert model.is_made_together == (form == "embedding")
    if dist.get_rank() == 0 and form != "embedding":  # as a Trainer does
        model.save_pretrained(folder / "by the first", state_dict=full)
    mine_alone = get_model_state_dict(model)  # shards, of which each process writes its own
    assert mine_alone.keys() == full.keys()
    with torch.no_grad():
        for parameter in model.prefixes.parameters():
            parameter.zero_()
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True))
    assert torch.equal(whole(model.prefixes["default"].embedding), one.prefixes["default"].embedding)


def before(form: str, folder: Path) -> None:
    """A base that no process has whole. The prefix is, as in DistributedDataParallel."""
    sharded_base = base()
    sharded(sharded_base, sharded_base.model.layers)
    model, one = attached(sharded_base, form), alone(form)
    state = one.state_dict()
    model.load_state_dict(state)  # the processes drew their own MLPs
    trained(model, one)
    for expected, got in zip(one.generate(IDS, **SHORT), model.generate(IDS, **SHORT)):
        assert torch.equal(got, expected)
    model.save_pretrained(folder)
    loads_alone(folder, one)
    again = PrefixModel.from_pretrained(sharded_base, folder).eval()
    close(again(IDS).logits, one.eval()(IDS).logits, MODEL)


SHORT: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(IDS)}


def trained(model: PrefixModel, one: PrefixModel) -> None:
    model(mine(IDS), labels=mine(IDS)).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None and not hasattr(parameter.grad, "full_tensor"):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    one(IDS, labels=IDS).loss.backward()
    same_gradients(gradients(model), gradients(one))


def as_accelerate_does(_: Path) -> None:
    """cpu_ram_efficient_loading gives the base to the processes from the first one's state, which has to have it."""
    torch.manual_seed(0)
    config = PrefixConfig(num_virtual_tokens=4, mode="infix", num_frozen_tokens=1)  # a state with more than parameters
    model, one = (get_prefix_model(base(), config).train() for _ in range(2))
    one.load_state_dict(model.state_dict())
    if dist.get_rank():  # the others have read nothing
        with torch.no_grad():
            for tensor in (*model.parameters(), model.prefixes["default"].frozen):
                tensor.zero_()
    names = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=True, reshard_after_forward=True, **names
    )
    stand_in = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
        torch_device_mesh=None,
        parallelism_config=None,
    )
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    dist.broadcast_object_list(sent := [state])
    one.load_state_dict(sent[0])
    try:
        model = fsdp2_prepare_model(stand_in, model)
    finally:
        del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
    trained(model, one)
    assert model.state_dict().keys() == one.state_dict().keys()


CHECKS = {f"fsdp, {form}": lambda folder, form=form: both(form, folder) for form in FORMS}
CHECKS |= {f"fsdp of the base before, {form}": lambda folder, form=form: before(form, folder) for form in FORMS}
CHECKS |= {"fsdp, cpu_ram_efficient_loading": as_accelerate_does}
