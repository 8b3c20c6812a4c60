"""Whether a prefix on disk was made for a base model: the model's name and kind, sizes, and weights trained with it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from prefix_attn.hf.attach.slots import Slot
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.io import files
from prefix_attn.hf.io.stored import ADAPTER_CONFIG, TASK_HEAD, Stored
from prefix_attn.quoting import quoted, shortened

_log = logging.getLogger(__name__)


def fingerprint(base: PreTrainedConfig) -> dict[str, Any]:
    """What identifies the base model of a prefix. The vocabulary size does not, because people add tokens."""
    config = base.get_text_config()
    return {name: getattr(config, name) for name in ("model_type", "hidden_size")}


def check_base(folder: Path, config: PrefixConfig, metadata: Mapping[str, str], base: PreTrainedConfig) -> None:
    """Refuse a base model of another kind, size or name. The same name in another place is only worth a warning."""
    ours = json.dumps(fingerprint(base))
    if metadata.get("base", ours) != ours:
        raise ValueError(f"{folder}: trained for a base model {shortened(metadata['base'])}, this one is {ours}")
    theirs, here = config.base_model_name_or_path, base._name_or_path
    if not isinstance(theirs, str) or not here or Path(theirs).name == Path(here).name:
        return  # the same model may lie in another folder or under another owner
    if files.is_hub_id(theirs) and files.is_hub_id(here):
        raise ValueError(
            f"{folder}: trained for {shortened(theirs)}, this base model is {here}; if they are the same, correct the "
            f"name in the {ADAPTER_CONFIG}, or config.json, beside it"
        )
    _log.warning("%s was trained for %s and is loaded into %s", folder, shortened(theirs), here)


def check_sizes(
    stored: Stored, slots: list[Slot], width: int, sizes: tuple[int, int, int], base: PreTrainedModel
) -> None:
    """Check the sizes in the file one by one: the tensor's shape has only their product, which names no culprit."""
    layers, heads, head_dim = sizes
    for name, size in {"num_layers": layers, "num_attention_heads": heads, "token_dim": width}.items():
        if stored.sizes.get(name) not in (None, size):
            raise ValueError(
                f"{stored.path}: {name} is {quoted(stored.sizes[name])}, {type(base).__name__} needs {size} "
                f"({layers} layers, {heads} key/value heads of size {head_dim})"
            )
    for site, columns in stored.widths.items():
        needed = 2 * sum(slot.site == site for slot in slots) * width
        if columns != needed:
            raise ValueError(
                f"{stored.path}: has {columns} numbers per token at {site!r}, the base model needs {needed}"
            )


def check_others(path: Path, others: Mapping[str, Tensor], base: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the base model that were trained with the prefix, checked to be in ``base``."""
    here = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()} if others else {}
    found = {name.removeprefix(TASK_HEAD): tensor for name, tensor in others.items()}
    for name, tensor in found.items():
        if here.get(name) != tuple(tensor.shape):
            raise ValueError(
                f"{path}: {shortened(name)} {quoted(tuple(tensor.shape))} of the base model was trained with the "
                f"prefix, and {type(base).__name__} has {here.get(name, 'no such weight')}: make it "
                "first, as before training"
            )
        ours = base.state_dict()[name].dtype
        if tensor.is_floating_point() != ours.is_floating_point or not tensor.isfinite().all():
            raise ValueError(
                f"{path}: {shortened(name)} of the base model must hold finite numbers of {ours}, has {tensor.dtype}"
            )
    return found
