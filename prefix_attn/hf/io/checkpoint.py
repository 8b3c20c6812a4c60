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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefix_attn.hf.attach.attachment import Attachment
from prefix_attn.hf.attach.ranks import is_first, whole
from prefix_attn.hf.attach.wrapper import evaluating
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.encoder import PrefixEncoder
from prefix_attn.hf.io import files, formats
from prefix_attn.hf.io.fit import check_base, check_others, check_sizes, fingerprint
from prefix_attn.hf.io.state import STATES, plain_name, read_entries
from prefix_attn.hf.io.stored import (
    ADAPTER,
    ADAPTER_CONFIG,
    FROZEN,
    GATE,
    KEY,
    OURS,
    PEFT,
    PROMPT,
    TASK_HEAD,
    TRAINING,
    Stored,
    write_adapter,
)
from prefix_attn.hf.io.writing import check_finite
from prefix_attn.quoting import quoted, shortened

_log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """The tensors of a prefix that is saved."""

    prefix: dict[str, Tensor]  # folded, and its gate
    task_heads: dict[str, Tensor]
    training: dict[str, Tensor]  # the parameters of the encoder
    others: dict[str, Tensor]  # weights of the base model that were trained too


def parts(name: str, encoder: PrefixEncoder, state: Mapping[str, Tensor]) -> Parts:
    """Of the prefix ``name`` in the state_dict ``state`` of its model, which need not be on this process alone.

    Raises:
        ValueError: ``state`` lacks it, or it holds values that are not finite.
    """
    begin, head = f"prefixes.{name}.", f"heads.{name}."
    names = {plain_name(n): n for n in state}
    kept = [n for n in names if n.startswith((begin, head, TASK_HEAD))]
    state = {n: whole(state[names[n]]) for n in kept}  # of the prefixes only this one is gathered
    # Not its state_dict(): FSDP2 would take the weights that it gathered for this away.
    needed = [n for n, _ in (*encoder.named_parameters(), *encoder.named_buffers())]
    training = {n.removeprefix(begin): tensor for n, tensor in state.items() if n.startswith(begin)}
    if missing := sorted(set(needed) - training.keys()):
        raise ValueError(f"state_dict lacks {[begin + n for n in missing]}; it has {sorted(state)[:6]}")
    training = {n: training[n] for n in needed}
    with torch.no_grad(), evaluating(encoder):
        kv = torch.func.functional_call(encoder, training, ())
    prefix = {KEY: kv.permute(2, 0, 1, 3).flatten(1).float()}
    if "gate" in training:
        prefix[GATE] = training["gate"].float()
    task_heads = {TASK_HEAD + n.removeprefix(head): t for n, t in state.items() if n.startswith(head)}
    others = {n: t for n, t in state.items() if n.startswith(TASK_HEAD)}
    check_finite({begin + n: t for n, t in training.items()} | prefix)
    return Parts(prefix, task_heads, training, others)


def save_prefix(
    folder: Path,
    saved: Parts,
    encoder: PrefixEncoder,
    config: PrefixConfig,
    attachment: Attachment,
    *,
    training_state: bool,
) -> None:
    """Write a prefix into ``folder``, with ``training_state`` also its MLP."""
    metadata = {
        "format": "pt",
        "prefix_config": json.dumps(config.to_dict()),
        "base": json.dumps(fingerprint(attachment.base.config)),
        "prefix_sha256": _digest(saved.prefix),  # says to which prefix a training state belongs
    }
    fields = peft_fields(
        _kind(config, attachment),
        config,
        layers=encoder.num_layers,
        heads=encoder.num_heads,
        width=encoder.num_heads * encoder.head_dim,
        submodules=2 if attachment.probe.has_decoder else 1,
    )
    training = saved.training if training_state and encoder.mlp is not None else None
    tensors = saved.others | saved.prefix | saved.task_heads
    write_adapter(folder, fields, tensors, metadata, training, attachment.base.model_tags or ())


class Loaded(NamedTuple):
    """A prefix from disk that was checked against its base model."""

    config: PrefixConfig  # resolved
    parameters: dict[str, Tensor]  # of the encoder
    task_heads: dict[str, Tensor]
    others: dict[str, Tensor]  # weights of the base model, by their names there
    active: bool


def load_prefix(stored: Stored, attachment: Attachment, *, is_trainable: bool) -> Loaded:
    """Check ``stored`` against the base model.

    With ``is_trainable`` the MLP, where it was saved; otherwise the folded prefix. Embeddings in a state_dict stay
    embeddings: only the model can fold them.

    Raises:
        ValueError: damaged, or made for another model.
    """
    config, sizes = _resolved(stored, attachment)
    wanted = _wanted(stored, config, sizes, attachment)
    tensors = files.checked(stored.path, stored.tensors, wanted)
    others = check_others(stored.path, stored.others, attachment.base)
    for note in stored.notes:
        _log.warning("%s: %s", stored.path, note)
    prefix = {name: tensors.pop(name).float() for name in (KEY, GATE) if name in wanted}
    saved = {n.removeprefix(TASK_HEAD): t for n, t in tensors.items()}
    training = _training(stored, config, prefix) if is_trainable or KEY not in prefix else None
    if training is not None:
        path, state = training
        if config.mode == "embedding":
            width = int(attachment.base.get_input_embeddings().weight.shape[1])
            shapes: files.Shapes = {"embedding": (config.num_virtual_tokens, width)}
        else:
            shapes = _mlp_shapes(path, len(state), config, sizes)
        gate = {} if config.gate is None else {"gate": wanted[GATE]}
        return Loaded(config, files.checked(path, state, {**shapes, **gate}), saved, others, stored.active)
    config.fold()  # what is left is the prefix that was made
    frozen = config.num_frozen_tokens
    values = {"embedding": prefix[KEY][frozen:]}
    if frozen:
        values["frozen"] = prefix[KEY][:frozen]
    if config.gate is not None:
        values["gate"] = prefix[GATE]
    return Loaded(config, values, saved, others, stored.active)


def _resolved(stored: Stored, attachment: Attachment) -> tuple[PrefixConfig, tuple[int, int, int]]:
    """The configuration on this model, and its slots, heads and head size."""
    if stored.peft_slots is not None and not attachment.probe.has_decoder:
        name = type(attachment.base).__name__
        raise ValueError(f"{stored.path}: a prefix of an encoder-decoder model, and {name} is none")
    check_base(stored.path, stored.config, stored.metadata, attachment.base.config)
    try:
        config = attachment.resolver.resolve(stored.config)
        _, slots, heads, head_dim = attachment.resolver.layout(config)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{stored.path}: {shortened(error)}") from None
    sizes = len(slots), heads, head_dim
    check_sizes(stored, slots, heads * head_dim, sizes, attachment.base)
    return config, sizes


def _wanted(
    stored: Stored, config: PrefixConfig, sizes: tuple[int, int, int], attachment: Attachment
) -> dict[str, tuple[int, ...]]:
    """The shapes that the file must have."""
    layers, heads, head_dim = sizes
    wanted: dict[str, tuple[int, ...]] = {}
    if KEY in stored.tensors or config.mode != "embedding" or not stored.training:
        wanted[KEY] = config.num_virtual_tokens, 2 * layers * heads * head_dim
    if config.gate is not None:
        wanted[GATE] = layers, attachment.resolver.layout(config).slots[0].query_heads
    for name in config.modules_to_save or ():
        head = attachment.base.get_submodule(name).state_dict(prefix=f"{TASK_HEAD}{name}.")
        wanted |= {n: tuple(t.shape) for n, t in head.items()}
    return wanted


def _training(
    stored: Stored, config: PrefixConfig, prefix: Mapping[str, Tensor]
) -> tuple[Path, Mapping[str, Tensor]] | None:
    """What continuing the training needs besides ``prefix``, and its file. None if it was not saved."""
    if not config.prefix_projection and config.mode != "embedding":
        return None
    if stored.training:
        return stored.path, stored.training
    path = stored.path.parent / TRAINING
    if not path.exists():
        return None
    state, metadata = files.read_both(path)
    if metadata.get("prefix_sha256") == _digest(prefix):
        return path, state
    _log.warning("%s belongs to another prefix: training goes on from the folded one", path)
    return None


def save_table(folder: Path, state: Mapping[str, Tensor], base: PreTrainedModel, *, is_main_process: bool) -> None:
    """Write the state_dict of a ``PrefixTuning`` in the format of PEFT's prompt tuning."""
    state = {plain_name(name): whole(tensor) for name, tensor in state.items()}
    if (table := state.get("prefix")) is None:
        raise ValueError(f"state_dict lacks 'prefix'; it has {sorted(state)[:6]}")
    config = base.config.get_text_config()
    peft = {
        "peft_type": PROMPT,
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
    others = {name: tensor for name, tensor in state.items() if name.startswith(TASK_HEAD)}
    if is_main_process and is_first():
        write_adapter(folder, peft, {**others, KEY: table.float()}, metadata)


def check_safe(safe_serialization: bool) -> None:
    """Refuse to pickle."""
    if not safe_serialization:
        raise ValueError("safe_serialization must be True: prefixes are saved as safetensors, never pickled")


def load_table(path: str | Path, base: PreTrainedModel, **hub: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The reverse, from a folder or a Hub id: (P, hidden size) float32, and weights of the base model.

    Of a state_dict, in a file or in a folder of accelerate's, the same.

    Raises:
        ValueError: missing, damaged, or made for another model.
    """
    folder = files.find(path, ADAPTER_CONFIG, ADAPTER, **hub)
    state = folder if folder.is_file() else next((f for n in STATES if (f := folder / n).is_file()), None)
    if state is not None and not (folder / ADAPTER_CONFIG).is_file():
        return _table_in_state(state, base)
    peft = files.read_json(folder / ADAPTER_CONFIG)
    if peft.get("peft_type") != PROMPT:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: peft_type must be {PROMPT}, got {quoted(peft.get('peft_type'))}")
    metadata = files.read_metadata(folder / ADAPTER)
    check_base(folder, PrefixConfig(base_model_name_or_path=peft.get("base_model_name_or_path")), metadata, base.config)
    wanted = {KEY: (peft.get("num_virtual_tokens", 0), int(base.get_input_embeddings().weight.shape[1]))}
    tensors = files.read_tensors(folder / ADAPTER)
    others = {name: tensors.pop(name) for name in list(tensors) if name.startswith(TASK_HEAD)}
    table = files.checked(folder / ADAPTER, tensors, wanted)[KEY].float()
    return table, check_others(folder / ADAPTER, others, base)


def _table_in_state(path: Path, base: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    content = read_entries(path)
    state = {plain_name(n): t for n, t in content.items()} if isinstance(content, Mapping) else {}
    if "prefix" not in state:
        raise ValueError(
            f"{path}: a state_dict of a PrefixTuning has 'prefix', this file has {quoted(sorted(state)[:6])}"
        )
    if path.suffix != ".json":  # the shards of an index were checked one by one
        state = {n: files.backed(path, n, t, floating=False) for n, t in state.items()}
    table, width = state["prefix"], int(base.get_input_embeddings().weight.shape[1])
    table = files.checked(path, {"prefix": table}, {"prefix": (*table.shape[:1], width)})["prefix"].float()
    return table, check_others(path, {n: t for n, t in state.items() if n.startswith(TASK_HEAD)}, base)


def describe(path: str | Path) -> dict[str, Any]:
    """What a prefix on disk holds, as far as it is known without its base model: our configuration and PEFT's sizes."""
    every = formats.read_all(path)
    stored = next((one for one in every.values() if one.active), next(iter(every.values())))
    known = {name: value for name, value in stored.config.to_dict().items() if value is not None}
    sizes = {name: stored.sizes.get(name) for name in ("num_layers", "num_attention_heads", "token_dim")}
    made = {} if KEY in stored.tensors else stored.training
    held = {**made, **stored.tensors, **stored.others}
    tensors = {f"tensor {name}": quoted(tuple(tensor.shape)) for name, tensor in held.items()}
    parameters = sum(tensor.numel() for tensor in held.values())
    known.setdefault("base_model_name_or_path", None)
    training = bool(stored.training) or (stored.path.parent / TRAINING).is_file()
    found = {"format": stored.format} | known | sizes | tensors | {"parameters": parameters, "training_state": training}
    found |= {"prefixes": list(every)} if len(every) > 1 else {}
    return found | stored.of_peft_s_decoder | ({"notes": list(stored.notes)} if stored.notes else {})


def digest(path: str | Path) -> str:
    """What tells the weights of a prefix on disk from others, wherever they are."""
    stored = formats.read(path)
    held = {**stored.training, **stored.tensors, **stored.others}
    return _digest({name: held[name] for name in sorted(held)})


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


def read_resumable(folder: Path, base: PreTrainedModel, name: str | None) -> Mapping[str, Tensor] | None:
    """The state_dict in a Trainer's checkpoint; None where that has none of one file, as with FSDP.

    Raises:
        ValueError: another base model than ``base``, which prefixes call ``name``, was trained; or there is an adapter,
            but no state from which a Trainer could go on.
    """
    file = next((folder / state for state in STATES if (folder / state).is_file()), None)
    if (folder / ADAPTER).is_file():
        if file is None:
            raise ValueError(f"{folder}: has an adapter, and none of {STATES}, of which a training goes on")
        check_base(folder, PrefixConfig(), files.read_metadata(folder / ADAPTER), base.config)
        theirs = files.read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if theirs and name and Path(str(theirs)).name != Path(name).name:
            raise ValueError(
                f"{folder}: the training to resume is of {shortened(theirs)}, and this base model is {name}"
            )
    return None if file is None else read_entries(file)


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
    flat = (tensor.detach().cpu().reshape(-1).view(torch.uint8) for tensor in prefix.values())  # of any dtype
    return hashlib.sha256(b"".join(values.numpy().tobytes() for values in flat)).hexdigest()
