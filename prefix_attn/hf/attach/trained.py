"""What of a base model is trained beside the prefix: what its user chose, and nothing else."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


def freeze(base: PreTrainedModel) -> None:
    """Freeze the parameters of ``base``, unless its user chose which of them are trained.

    ``from_pretrained`` leaves all parameters trainable, so then nothing was chosen. If only some are, somebody chose
    them: a LoRA, norms, a head, the embeddings of new tokens. These stay trainable.
    """
    base = getattr(base, "_orig_mod", base)  # torch.compile's is around it
    trainable = {name: p for name, p in base.named_parameters() if p.requires_grad}
    if trainable and _is_chosen(base):
        first, *more = trainable
        rest = f" and {len(more)} more" if more else ""
        _log.warning("%s of %s%s stay trainable beside the prefix", first, type(base).__name__, rest)
        return
    for parameter in trainable.values():
        parameter.requires_grad_(False)


def keep_differentiable(base: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference, as it does on CPUs with bfloat16 units.

    No gradient gets through packed weights, silently: a prefix would stay where it started. Those that were packed in
    an earlier forward stay so; a warning says it.
    """
    quantised: list[Any] = [module for module in base.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for module in quantised:
        module.support_avx512bf16_for_cpu = False
    if any(getattr(module.weight.quant_state, "packing_format_for_cpu", False) for module in quantised):
        _log.warning(
            "the 4-bit weights of %s were run before the prefix was added, and bitsandbytes packed them: no gradient "
            "gets through. Load the model anew to train",
            type(base).__name__,
        )


def trained_names(base: nn.Module) -> set[str]:
    """The trainable parameters of ``base``, and the buffers of the modules that have some of their own.

    A tied parameter has the first of its names.
    """
    names = {name for name, p in base.named_parameters() if p.requires_grad}
    modules = {name.rpartition(".")[0] for name in names}
    return names | {name for name, _ in base.named_buffers() if name.rpartition(".")[0] in modules}


def changes(base: nn.Module, values: Mapping[str, Tensor]) -> list[str]:
    """Which parameters and buffers of ``base`` have other values."""
    here = base.state_dict() if values else {}
    return [name for name, value in values.items() if not torch.equal(here[name], value.to(here[name]))]


@torch.no_grad()
def set_trained(base: nn.Module, values: Mapping[str, Tensor], *, trainable: bool) -> None:
    """Give parameters and buffers of ``base`` the values that they were trained to."""
    if changed := changes(base, values):
        name = type(base).__name__
        _log.warning("%s: %d of its weights were trained with the prefix, and are set", name, len(changed))
    here = base.state_dict(keep_vars=True) if values else {}
    for name, value in values.items():
        here[name].copy_(value)
        if isinstance(here[name], nn.Parameter):
            here[name].requires_grad_(trainable)


def leave_out_frozen(model: Any) -> None:
    """Leave out of the state of ``model`` what is frozen in its ``base_model``.

    The hooks act wherever ``model`` is: alone, or in a LightningModule, an AveragedModel, a compiled module.
    """
    model.register_state_dict_post_hook(_drop_frozen)
    model.register_load_state_dict_pre_hook(_note_prefix)
    model.register_load_state_dict_post_hook(_miss_no_frozen)


def _drop_frozen(model: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    if is_read_by_the_first(model.base_model):  # accelerate asks each entry for its mesh: they must be parameters
        names = {prefix + name for name, _ in model.named_parameters(remove_duplicate=False)}
        for key in [key for key in state if key.startswith(prefix) and key not in names]:
            del state[key]
        return
    for key in _frozen_keys(model, state, prefix):
        del state[key]


def _note_prefix(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    model.prefix_in_state = prefix


def _miss_no_frozen(model: Any, keys: Any) -> None:
    for key in _frozen_keys(model, keys.missing_keys, model.prefix_in_state):
        keys.missing_keys.remove(key)
    if asks_the_first():
        for name, buffer in model.named_buffers():
            key = model.prefix_in_state + name
            if key in keys.missing_keys and not buffer.is_meta:
                torch.distributed.broadcast(buffer, src=0)
                keys.missing_keys.remove(key)


def _frozen_keys(model: Any, keys: Iterable[str], prefix: str) -> list[str]:
    start = f"{prefix}base_model."
    kept = {start + name for name in trained_names(model.base_model)}
    return [key for key in keys if key.startswith(start) and key not in kept]


def _is_chosen(base: PreTrainedModel) -> bool:
    """Whether somebody froze a part of ``base`` that could be trained."""
    frozen = {name for name, p in base.named_parameters() if not p.requires_grad and _can_train(p)}
    return bool(frozen - _frozen_by_its_class(base)) if frozen else False


def is_read_by_the_first(base: nn.Module) -> bool:
    """Whether accelerate's cpu_ram_efficient_loading is at work: FSDP2 gets all weights from the first process's state.

    It asks for that state before it shards ``base``, and again while the shards are on the meta device.
    """
    return asks_the_first() and all(p.is_meta or not hasattr(p, "full_tensor") for p in base.parameters())


def asks_the_first() -> bool:
    """Whether accelerate was told to."""
    asked = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() in ("1", "true", "yes")
    return asked and torch.distributed.is_available() and torch.distributed.is_initialized()


def _can_train(parameter: nn.Parameter) -> bool:
    """Whether it is no quantised weight: a plain tensor or a sharded one, of 16 bits or more."""
    plain = type(parameter.data) is Tensor or hasattr(parameter, "full_tensor")
    return plain and parameter.is_floating_point() and parameter.dtype.itemsize >= 2


def _frozen_by_its_class(base: PreTrainedModel) -> set[str]:
    """The parameters that every new model of this class has frozen, such as tables of positions."""
    try:
        with torch.device("meta"):
            new = type(base)(copy.deepcopy(base.config))
    except Exception:  # a user's own class, whose constructor may want anything
        return set()
    return {name for name, p in new.named_parameters() if not p.requires_grad}
