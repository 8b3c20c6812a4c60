"""Heads over processes (tensor parallelism), keys over processes (context parallelism), DTensors in the operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from examples.context_parallel import main as context_parallel
from prefix_attn import PrefixModel, prefix_attention
from prefix_attn.hf.mass import prefix_mass
from tests.distributed.together import FORMS, IDS, alone, attached, base, gradients, loads_alone, same_gradients, whole
from tests.numerics import FLOAT, MODEL, close


def split_base(folder: Path) -> Any:
    """The base with its heads over both processes, as transformers' tp_plan has it."""
    if dist.get_rank() == 0:
        base().save_pretrained(folder / "base")
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", distributed_config=DistributedConfig(tp_plan="auto")
    ).eval()


def tensor_parallel(form: str, folder: Path) -> None:
    """The processes are seeded apart, and draw what the first draws. Each has all gradients, and one writes."""
    one, model = alone(form), attached(split_base(folder), form)
    assert {slot.ranks for slot in model.attachment.resolver.layout(model.active_peft_config).slots} == {2}
    outputs = [m(IDS, labels=IDS) for m in (model, one)]
    close(whole(outputs[0].logits), outputs[1].logits, MODEL)
    for output in outputs:
        output.loss.backward()
    same_gradients(gradients(model), gradients(one))
    model.save_pretrained(folder / "saved", training_state=True)
    loads_alone(folder / "saved", one)
    again = PrefixModel.from_pretrained(model.unload(), folder / "saved", is_trainable=True).eval()
    expected = PrefixModel.from_pretrained(base(), folder / "saved", is_trainable=True).eval()
    for m in (again, expected):
        m(IDS, labels=IDS).loss.backward()
    same_gradients(gradients(again), gradients(expected))
    if form == "gate":  # a softmax of its own has no share
        return
    batch = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    for site, share in prefix_mass(expected, batch).items():
        close(prefix_mass(again, batch)[site], share, MODEL)


def dtensors(_: Path) -> None:
    """Refused, with a way that works: local_map, over heads or rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    shapes = (2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8), (2, 3, 8), (2, 3, 8)
    given = [torch.randn(shape).requires_grad_() for shape in shapes]
    expected = prefix_attention(*given)
    wanted = torch.autograd.grad(expected.square().sum(), given)
    heads = [[Shard(1)]] * 3 + [[Shard(0)]] * 2
    rows = [[Shard(0)]] * 3 + [[Replicate()]] * 2
    for places in (heads, rows):
        spread = [distribute_tensor(t.detach(), mesh, p).requires_grad_() for t, p in zip(given, places)]
        with pytest.raises(NotImplementedError, match=r"query is a DTensor.*local_map"):
            prefix_attention(*spread)
        if places is rows:  # each process has a part of the prefix's gradient: shards of rows sum it
            continue
        out = local_map(prefix_attention, out_placements=places[0], in_placements=tuple(places))(*spread)
        close(whole(out), expected, FLOAT)
        whole(out).square().sum().backward()
        for tensor, grad in zip(spread, wanted):
            close(whole(tensor.grad), grad, MODEL)


def example(_: Path) -> None:
    for name, error in context_parallel().items():
        assert error < FLOAT.rtol * 4, (name, error)


CHECKS = {f"tensor parallel, {form}": lambda folder, form=form: tensor_parallel(form, folder) for form in FORMS}
CHECKS |= {"DTensors": dtensors, "context parallel": example}
