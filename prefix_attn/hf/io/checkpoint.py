"""Save and load prefixes in the file format of PEFT's prefix tuning.

    adapter_config.json          what PEFT reads
    adapter_model.safetensors    prompt_embeddings (P, 2 * slots * H * D) float32, the folded prefix; if it has them,
                                 prefix_gate (slots, Hq) float32, and task heads
    training_state.safetensors   the MLP, if asked for

A slot is a layer at a site. PEFT's prefixes have all layers of one stack, and are called CARTRIDGE if their first
tokens are frozen. Other prefixes (encoder-decoder models, a choice of layers, gates, an infix, position_mode="none")
have the same files and fields, but a ``peft_type`` that PEFT does not know and so refuses. ``formats`` reads all of
these, and the files of other libraries.

Both safetensors files carry our configuration in their metadata, so that each is complete by itself. A kill between two
writes leaves the old prefix or the new one, never half of each. Nothing is unpickled. Headers are checked before
anything is allocated, and values before anything in memory changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefix_attn.hf.attach.attachment import Attachment
from prefix_attn.hf.attach.slots import Slot
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.encoder import PrefixEncoder
from prefix_attn.hf.io import files, formats
from prefix_attn.hf.io.stored import (
    ADAPTER,
    ADAPTER_CONFIG,
    FROZEN,
    GATE,
    KEY,
    OURS,
    PEFT,
    TASK_HEAD,
    TRAINING,
    Stored,
    write_adapter,
)

_log = logging.getLogger(__name__)


def save_prefix(
    folder: Path,
    encoder: PrefixEncoder,
    task_heads: nn.ModuleDict,
    config: PrefixConfig,
    attachment: Attachment,
    *,
    training_state: bool,
) -> None:
    """Write a prefix into ``folder``, with ``training_state`` also its MLP."""
    with torch.no_grad():
        prefix = {KEY: encoder.prompt_embeddings().float()}
    if encoder.gate is not None:
        prefix[GATE] = encoder.gate.float()
    metadata = {
        "format": "pt",
        "prefix_config": json.dumps(config.to_dict()),
        "base": json.dumps(fingerprint(attachment.base.config)),
        "prefix_sha256": _digest(prefix),  # says to which prefix a training state belongs
    }
    fields = peft_fields(
        _kind(config, attachment),
        config,
        layers=encoder.num_layers,
        heads=encoder.num_heads,
        width=encoder.num_heads * encoder.head_dim,
        submodules=2 if attachment.probe.has_decoder else 1,
    )
    training = encoder.state_dict() if training_state and encoder.mlp is not None else None
    write_adapter(folder, fields, prefix | task_heads.state_dict(prefix=TASK_HEAD), metadata, training)


def load_prefix(
    path: str | Path, attachment: Attachment, *, is_trainable: bool
) -> tuple[PrefixConfig, dict[str, Tensor], dict[str, Tensor]]:
    """(resolved configuration, parameters of the encoder, those of the task heads) from a folder, a file or a Hub id.

    With ``is_trainable`` the MLP, where it was saved; otherwise the folded prefix.

    Raises:
        ValueError: missing, damaged, or made for another model.
    """
    stored = formats.read(path, decoder_layers=attachment.resolver.decoder_layers)
    config = stored.config
    if stored.peft_slots is not None and not attachment.probe.has_decoder:
        name = type(attachment.base).__name__
        raise ValueError(f"{stored.path}: a prefix of an encoder-decoder model, and {name} is none")
    _check_base(stored.path, config, stored.metadata, attachment.base)
    try:
        config = attachment.resolver.resolve(config)
        _, slots, heads, head_dim = attachment.resolver.layout(config)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{stored.path}: {error}") from None
    sizes = len(slots), heads, head_dim
    _check_sizes(stored, slots, heads * head_dim, sizes, attachment.base)
    wanted = {KEY: (config.num_virtual_tokens, 2 * len(slots) * heads * head_dim)}
    if config.gate is not None:
        wanted[GATE] = len(slots), slots[0].query_heads
    for name in config.modules_to_save or ():
        head = attachment.base.get_submodule(name).state_dict(prefix=f"{TASK_HEAD}{name}.")
        wanted |= {n: tuple(t.shape) for n, t in head.items()}
    tensors = files.checked(stored.path, stored.tensors, wanted)
    for note in stored.notes:
        _log.warning("%s: %s", stored.path, note)
    prefix = {name: tensors.pop(name).float() for name in (KEY, GATE) if name in wanted}
    saved = {n.removeprefix(TASK_HEAD): t for n, t in tensors.items()}
    training = stored.path.parent / TRAINING
    if is_trainable and (config.prefix_projection or config.mode == "embedding") and training.exists():
        state = files.read_tensors(training)
        if files.read_metadata(training).get("prefix_sha256") == _digest(prefix):
            if config.mode == "embedding":
                width = int(attachment.base.get_input_embeddings().weight.shape[1])
                parameters: files.Shapes = {"embedding": (config.num_virtual_tokens, width)}
            else:
                parameters = _mlp_shapes(training, len(state), config, sizes)
            gate = {} if config.gate is None else {"gate": wanted[GATE]}
            return config, files.checked(training, state, {**parameters, **gate}), saved
        _log.warning("%s belongs to another prefix: training goes on from the folded one", training)
    config.fold()  # what is left is the prefix that was made
    frozen = config.num_frozen_tokens
    values = {"embedding": prefix[KEY][frozen:]}
    if frozen:
        values["frozen"] = prefix[KEY][:frozen]
    if config.gate is not None:
        values["gate"] = prefix[GATE]
    return config, values, saved


def save_table(folder: Path, table: Tensor, base: PreTrainedModel) -> None:
    """Write the embeddings (P, hidden size) of virtual tokens in the format of PEFT's prompt tuning."""
    config = base.config.get_text_config()
    peft = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM" if base.can_generate() else None,
        "base_model_name_or_path": base.config._name_or_path or None,
        "inference_mode": True,
        "num_virtual_tokens": table.shape[0],
        "token_dim": table.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
    }
    metadata = {"format": "pt", "base": json.dumps(fingerprint(base.config))}
    write_adapter(folder, peft, {KEY: table.float()}, metadata)


def load_table(path: str | Path, base: PreTrainedModel) -> Tensor:
    """The reverse: (P, hidden size) float32 from a folder or a Hub id.

    Raises:
        ValueError: missing, damaged, or made for another model.
    """
    folder = files.find(path, ADAPTER_CONFIG, ADAPTER)
    peft = files.read_json(folder / ADAPTER_CONFIG)
    if peft.get("peft_type") != "PROMPT_TUNING":
        raise ValueError(f"{folder / ADAPTER_CONFIG}: peft_type must be PROMPT_TUNING, got {peft.get('peft_type')!r}")
    metadata = files.read_metadata(folder / ADAPTER)
    _check_base(folder, PrefixConfig(base_model_name_or_path=peft.get("base_model_name_or_path")), metadata, base)
    wanted = {KEY: (peft.get("num_virtual_tokens", 0), int(base.get_input_embeddings().weight.shape[1]))}
    return files.checked(folder / ADAPTER, files.read_tensors(folder / ADAPTER), wanted)[KEY].float()


def describe(path: str | Path) -> dict[str, Any]:
    """What a prefix on disk holds, as far as it is known without its base model: our configuration and PEFT's sizes."""
    stored = formats.read(path)
    known = {name: value for name, value in stored.config.to_dict().items() if value is not None}
    sizes = {name: stored.sizes.get(name) for name in ("num_layers", "num_attention_heads", "token_dim")}
    tensors = {f"tensor {name}": str(tuple(tensor.shape)) for name, tensor in stored.tensors.items()}
    parameters = sum(tensor.numel() for tensor in stored.tensors.values())
    known.setdefault("base_model_name_or_path", None)
    training = (stored.path.parent / TRAINING).is_file()
    found = {"format": stored.format} | known | sizes | tensors | {"parameters": parameters, "training_state": training}
    return found | stored.of_peft_s_decoder | ({"notes": list(stored.notes)} if stored.notes else {})


def _mlp_shapes(path: Path, tensors: int, config: PrefixConfig, sizes: tuple[int, int, int]) -> files.Shapes:
    layers, heads, head_dim = sizes
    needed = 2 * config.encoder_depth + 3 + (config.num_frozen_tokens > 0) + (config.gate is not None)
    if tensors != needed:  # else a hostile depth would have us build that many layers
        raise ValueError(f"{path}: an MLP of encoder_depth={config.encoder_depth} does not have {tensors} tensors")
    with torch.device("meta"):
        hidden = config.encoder_hidden_size or heads * head_dim
        P, depth, frozen = config.num_virtual_tokens, config.encoder_depth, config.num_frozen_tokens
        encoder = PrefixEncoder(P, layers, heads, head_dim, hidden_size=hidden, depth=depth, num_frozen_tokens=frozen)
    return {name: tuple(t.shape) for name, t in encoder.state_dict().items()}


def _check_base(folder: Path, config: PrefixConfig, metadata: Mapping[str, str], base: PreTrainedModel) -> None:
    ours = json.dumps(fingerprint(base.config))
    if metadata.get("base", ours) != ours:
        raise ValueError(f"{folder}: trained for a base model {metadata['base']}, this one is {ours}")
    theirs, here = config.base_model_name_or_path, base.config._name_or_path
    if not isinstance(theirs, str) or not here or Path(theirs).name == Path(here).name:
        return  # the same model may lie in another folder or under another owner
    if files.is_hub_id(theirs) and files.is_hub_id(here):
        raise ValueError(
            f"{folder}: trained for {theirs}, this base model is {here}; if they are the same, correct the name in the "
            f"{ADAPTER_CONFIG}, or config.json, beside it"
        )
    _log.warning("%s was trained for %s and is loaded into %s", folder, theirs, here)


def _check_sizes(
    stored: Stored, slots: list[Slot], width: int, sizes: tuple[int, int, int], base: PreTrainedModel
) -> None:
    """Check the sizes in the file one by one: the tensor's shape has only their product, which names no culprit."""
    layers, heads, head_dim = sizes
    for name, size in {"num_layers": layers, "num_attention_heads": heads, "token_dim": width}.items():
        if stored.sizes.get(name) not in (None, size):
            raise ValueError(
                f"{stored.path}: {name} is {stored.sizes[name]!r}, {type(base).__name__} needs {size} "
                f"({layers} layers, {heads} key/value heads of size {head_dim})"
            )
    for site, columns in stored.widths.items():
        needed = 2 * sum(slot.site == site for slot in slots) * width
        if columns != needed:
            raise ValueError(
                f"{stored.path}: has {columns} numbers per token at {site!r}, the base model needs {needed}"
            )


def fingerprint(base: PreTrainedConfig) -> dict[str, Any]:
    """What identifies the base model of a prefix. The vocabulary size does not, because people add tokens."""
    config = base.get_text_config()
    return {name: getattr(config, name) for name in ("model_type", "hidden_size")}


def peft_fields(
    kind: str, config: PrefixConfig, *, layers: int, heads: int | None, width: int | None, submodules: int
) -> dict[str, Any]:
    """The fields of PEFT's PrefixTuningConfig or CartridgeConfig. The prefix is folded, so that PEFT needs no MLP.

    Args:
        kind: peft_type.
        config: of the prefix.
        layers: slots in the file.
        heads: of keys and values.
        width: heads times head size.
        submodules: 2 for encoder-decoder models.
    """
    projection = {"encoder_hidden_size": width, "prefix_projection": False}
    return {
        "peft_type": kind,
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "inference_mode": True,
        "num_virtual_tokens": config.num_virtual_tokens,
        "token_dim": width,
        "num_transformer_submodules": submodules,
        "num_attention_heads": heads,
        "num_layers": layers,
        "modules_to_save": list(config.modules_to_save or ()) or None,
    } | ({"num_frozen_tokens": config.num_frozen_tokens} if kind == FROZEN else projection)


def _kind(config: PrefixConfig, attachment: Attachment) -> str:
    """PEFT's name of such a prefix, where it has one."""
    # PEFT shifts the tokens of every model whose tokens can be shifted.
    in_place = config.position_mode == "shift" or attachment.resolver.unshiftable(config)
    known = config.layers == "all" and config.gate is None and config.mode != "infix"
    if known and in_place and not attachment.probe.has_decoder:
        return FROZEN if config.num_frozen_tokens else PEFT
    return OURS


def _digest(prefix: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in prefix.values())).hexdigest()
