"""Find the attention modules that a prefix can enter, from the calls of one forward rather than from names.

A slot is the attention of one layer at one site. The sites are "encoder" (self-attention that is not causal), "cross"
(attention to another sequence) and "decoder" (causal self-attention).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from prefix_attn.hf.attach.attention import AttentionCall
from prefix_attn.hf.attach.ranks import gathering, heads_mesh
from prefix_attn.hf.config import SITES


class Slot(NamedTuple):
    """An attention module that a prefix can enter. ``heads`` and ``head_dim`` belong to its keys and values.

    Under tensor parallelism the heads are those of all ``ranks``, over which the module spreads them.
    """

    site: str
    layer: int
    module: nn.Module
    stack: PreTrainedModel
    heads: int
    head_dim: int
    query_heads: int
    ranks: int = 1


def find_stacks(base: PreTrainedModel) -> list[PreTrainedModel]:
    """The models within ``base`` that run a list of layers themselves and pass keyword arguments on to them.

    The state enters here, above the checkpointed layers. So a layer that is recomputed in backward gets the arguments
    of its forward, and the state is among them.
    """
    owners: dict[nn.Module, PreTrainedModel] = {}
    for model in base.modules():
        if isinstance(model, PreTrainedModel):  # outer ones come first, so that the innermost stays
            owners |= {module: model for module in model.modules() if isinstance(module, nn.ModuleList)}
    return [model for model in dict.fromkeys(owners.values()) if _takes_keywords(model)]


def find_layers(base: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The list of the model's layers, after the module that runs them. Of an encoder-decoder, its decoder's.

    Raises:
        NotImplementedError: no list has as many modules as the configuration has layers.
    """
    config, stack, names = base.config.get_text_config(), base, ["num_hidden_layers"]
    if base.config.is_encoder_decoder:
        stack, names = base.get_decoder(), ["decoder_layers", "num_decoder_layers", *names]
    count = next((getattr(config, name) for name in names if hasattr(config, name)), None)
    embeddings = stack.get_input_embeddings()
    inner = [m for m in stack.modules() if isinstance(m, PreTrainedModel) and any(e is embeddings for e in m.modules())]
    for model in reversed(inner):  # a vision tower beside the text may have as many layers
        for module in model.modules():
            for child in module.children():
                if isinstance(child, nn.ModuleList) and len(child) == count:
                    return module, child
    raise NotImplementedError(f"{type(base).__name__} has no list of {count or 'its'} layers")


def find_slots(base: PreTrainedModel, calls: Sequence[AttentionCall]) -> list[Slot]:
    """The slots of ``base``, by site, then by layer.

    Args:
        base: the model.
        calls: the calls of its attention modules in one forward, in which encoder and decoder had different lengths
            and every mask was 4-D.

    Raises:
        NotImplementedError: a layer made no call, or has keys and values that no prefix can join.
    """
    name = type(base).__name__
    modules = {call.module for call in calls}
    if len(modules) < len(calls):
        raise NotImplementedError(f"{name} runs an attention module more than once in a forward")
    slots: list[Slot] = []
    whole = {module for gatherer in gathering(base) for module in gatherer.modules()}  # when they run
    for stack in find_stacks(base):
        layers = _layers(stack, modules)
        numbers = {module: number for number, layer in enumerate(layers) for module in layer.modules()}
        inside = [
            _slot(call, numbers[call.module], stack, 1 if call.module in whole else _ranks(call.module))
            for call in calls
            if call.module in numbers
        ]
        for site in dict.fromkeys(slot.site for slot in inside):
            found = [slot.layer for slot in inside if slot.site == site]
            if missing := sorted(set(range(len(layers))) - set(found)):
                raise NotImplementedError(
                    f"layers {missing} of {name} do not call transformers' AttentionInterface for a text: they attend "
                    "to images alone, or have no attention or one of their own"
                )
            if len(found) > len(layers) or any(slot.site == site for slot in slots):
                raise NotImplementedError(f"{name} has more than one {site} attention of the same layer number")
        slots += inside
    if not slots:
        raise NotImplementedError(f"no layer of {name} calls transformers' AttentionInterface")
    return sorted(slots, key=lambda slot: (SITES.index(slot.site), slot.layer))


def is_causal(call: AttentionCall) -> bool:
    """Whether the queries of ``call`` see no later keys: by its mask, or by its module if there is no mask."""
    if call.mask is None:
        return getattr(call.module, "is_causal", True)
    last = call.mask[0, 0, 0, -1]
    return not bool(last) if call.mask.dtype == torch.bool else bool(last < 0)


def _ranks(attention: nn.Module) -> int:
    mesh = heads_mesh(attention)
    return 1 if mesh is None else mesh.size()


def _slot(call: AttentionCall, layer: int, stack: PreTrainedModel, ranks: int) -> Slot:
    heads, size, value_size = call.key.shape[1], call.key.shape[3], call.value.shape[3]
    if size != value_size:
        raise NotImplementedError(
            f"{type(stack).__name__} has keys of size {size} and values of size {value_size}, as latent attention has; "
            "a prefix has both in one size"
        )
    if call.query.shape[2] != call.key.shape[2]:
        site = "cross"
    else:
        site = "decoder" if is_causal(call) else "encoder"
    return Slot(site, layer, call.module, stack, heads * ranks, size, call.query.shape[1] * ranks, ranks)


def _layers(stack: PreTrainedModel, modules: set[nn.Module]) -> list[nn.Module]:
    """The outermost list in ``stack`` that holds one of ``modules``; empty if there is none."""
    for child in stack.modules():
        if isinstance(child, nn.ModuleList) and not modules.isdisjoint(child.modules()):
            return list(child)
    return []


def _takes_keywords(model: PreTrainedModel) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
