"""Prefixes on disk, in the format of PEFT's prefix tuning.

    adapter_config.json          what PEFT reads
    adapter_model.safetensors    prompt_embeddings (P, 2 * slots * H * D) float32, the folded prefix; if it has them,
                                 prefix_gate (slots, Hq) float32, and heads
    training_state.safetensors   the MLP, if asked for

A slot is a layer at a site. PEFT has a prefix for each layer of one stack, and calls it a CARTRIDGE where the first
tokens are frozen; others (encoder-decoder models, a choice of layers, gates) have the same files and fields under a
``peft_type`` that PEFT does not know and so refuses.
Both safetensors files carry our configuration in their metadata, so that each is whole by itself: a kill between the
renames leaves the old prefix or the new one, never half of each. Read without pickle; headers are checked before
anything is allocated, and values before anything in memory changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_attn.hf.attach import Attachment
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.prefix import PrefixEncoder

ADAPTER_CONFIG, ADAPTER, TRAINING = "adapter_config.json", "adapter_model.safetensors", "training_state.safetensors"
# Tensors: the prefix, its gate, and the beginning of those of heads.
KEY, GATE, HEAD = "prompt_embeddings", "prefix_gate", "base_model."
PEFT, FROZEN, OURS = "PREFIX_TUNING", "CARTRIDGE", "PREFIX_ATTN"  # peft_type
READ = (OURS, FROZEN, PEFT)
_log = logging.getLogger(__name__)
_Shapes = Mapping[str, tuple[int, ...]]


def save_prefix(
    folder: Path,
    encoder: PrefixEncoder,
    heads: nn.ModuleDict,
    config: PrefixConfig,
    attachment: Attachment,
    *,
    training_state: bool,
) -> None:
    """Write a prefix into ``folder``. A kill at any moment leaves each file as it was or as it is to be."""
    with torch.no_grad():
        prefix = {KEY: encoder.prompt_embeddings().float()}
    if encoder.gate is not None:
        prefix[GATE] = encoder.gate
    prefix = _on_cpu(prefix)
    metadata = {
        "format": "pt",
        "prefix_config": json.dumps(config.to_dict()),
        "base": json.dumps(_fingerprint(attachment.base)),
        "prefix_sha256": _digest(prefix),  # says to which prefix a training state belongs
    }
    files: dict[str, bytes] = {}
    if training_state and encoder.mlp is not None:
        files[TRAINING] = save(_on_cpu(encoder.state_dict()), metadata)
    files[ADAPTER_CONFIG] = json.dumps(_peft_config(encoder, config, attachment), indent=2).encode()
    files[ADAPTER] = save(prefix | _on_cpu(heads.state_dict(prefix=HEAD)), metadata)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _replace(folder / name, content)
    if TRAINING not in files:
        (folder / TRAINING).unlink(missing_ok=True)


def load_prefix(
    path: str | Path, attachment: Attachment, *, is_trainable: bool
) -> tuple[PrefixConfig, dict[str, Tensor], dict[str, Tensor]]:
    """(resolved configuration, parameters of the encoder, those of the heads) from a folder or a Hub id.

    With ``is_trainable`` the MLP, where it was saved; otherwise the folded prefix.

    Raises:
        ValueError: missing, damaged, or made for another model.
    """
    folder = _folder(path)
    peft = _read_json(folder / ADAPTER_CONFIG, *READ)
    shapes, metadata = _header(folder / ADAPTER)
    config = _config(folder, peft, metadata, shapes)
    _check_base(folder, config, metadata, attachment.base)
    try:
        config = attachment.resolve(config)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{folder}: {error}") from None
    slots, heads, head_dim = attachment.layout(config)
    sizes = len(slots), heads, head_dim
    _check_sizes(folder / ADAPTER_CONFIG, peft, sizes, attachment.base)
    wanted = {KEY: (config.num_virtual_tokens, 2 * len(slots) * heads * head_dim)}
    if config.gate is not None:
        wanted[GATE] = len(slots), slots[0].query_heads
    for name in config.modules_to_save or ():
        head = attachment.base.get_submodule(name).state_dict(prefix=f"{HEAD}{name}.")
        wanted |= {n: tuple(t.shape) for n, t in head.items()}
    tensors = _read_tensors(folder / ADAPTER, shapes, wanted)
    prefix = {name: tensors.pop(name).float() for name in (KEY, GATE) if name in wanted}
    saved = {n.removeprefix(HEAD): t for n, t in tensors.items()}
    training = folder / TRAINING
    if is_trainable and (config.prefix_projection or config.mode == "embedding") and training.exists():
        shapes, metadata = _header(training)
        if metadata.get("prefix_sha256") == _digest(prefix):
            if config.mode == "embedding":
                width = int(attachment.base.get_input_embeddings().weight.shape[1])
                parameters: _Shapes = {"embedding": (config.num_virtual_tokens, width)}
            else:
                parameters = _mlp_shapes(training, shapes, config, sizes)
            gate = {} if config.gate is None else {"gate": wanted[GATE]}
            return config, _read_tensors(training, shapes, {**parameters, **gate}), saved
        _log.warning("%s belongs to another prefix: training goes on from the folded one", training)
    config.mode, config.prefix_projection = "kv", False  # what is left is the prefix that was made
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
    tensors = {KEY: table.detach().float().cpu().contiguous()}
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / ADAPTER_CONFIG, json.dumps(peft, indent=2).encode())
    _replace(folder / ADAPTER, save(tensors, {"format": "pt", "base": json.dumps(_fingerprint(base))}))


def load_table(path: str | Path, base: PreTrainedModel) -> Tensor:
    """The reverse: (P, hidden size) float32 from a folder or a Hub id.

    Raises:
        ValueError: missing, damaged, or made for another model.
    """
    folder = _folder(path)
    peft = _read_json(folder / ADAPTER_CONFIG, "PROMPT_TUNING")
    shapes, metadata = _header(folder / ADAPTER)
    _check_base(folder, PrefixConfig(base_model_name_or_path=peft.get("base_model_name_or_path")), metadata, base)
    wanted = {KEY: (peft.get("num_virtual_tokens", 0), int(base.get_input_embeddings().weight.shape[1]))}
    return _read_tensors(folder / ADAPTER, shapes, wanted)[KEY].float()


def describe(path: str | Path) -> dict[str, Any]:
    """What an adapter holds, as far as that is known without its base model: our configuration and PEFT's sizes."""
    folder = _folder(path)
    peft = _read_json(folder / ADAPTER_CONFIG, *READ)
    shapes, metadata = _header(folder / ADAPTER)
    config = _config(folder, peft, metadata, shapes)
    known = {name: value for name, value in config.to_dict().items() if value is not None}
    sizes = {name: peft.get(name) for name in ("num_layers", "num_attention_heads", "token_dim")}
    tensors = {f"tensor {name}": str(shape) for name, shape in shapes.items()}
    parameters = sum(math.prod(shape) for shape in shapes.values())
    known.setdefault("base_model_name_or_path", None)
    return known | sizes | tensors | {"parameters": parameters, "training_state": (folder / TRAINING).is_file()}


def _folder(path: str | Path) -> Path:
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or not _is_hub_id(str(path)):
        raise ValueError(f"{path}: not a folder with {ADAPTER_CONFIG} and {ADAPTER}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=[ADAPTER_CONFIG, ADAPTER, TRAINING]))
    except Exception as error:  # offline, not there, private, gated: a dozen types, one meaning
        raise ValueError(f"{path}: neither a folder nor a Hub repository within reach ({error})") from error


def _read_json(path: Path, *peft_types: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is this the folder of an adapter?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    found = content.get("peft_type") if isinstance(content, dict) else type(content).__name__
    if found not in peft_types:
        raise ValueError(f"{path}: peft_type must be {' or '.join(peft_types)}, got {found!r}")
    if found in (PEFT, FROZEN) and content.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(f"{path}: a prefix that PEFT made for an encoder-decoder model; those have another meaning")
    return content


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and metadata of a safetensors file, of which no tensor is read."""
    try:
        with safe_open(path, framework="pt") as f:
            return {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, or not safetensors ({error})") from None


def _read_tensors(path: Path, shapes: _Shapes, wanted: _Shapes) -> dict[str, Tensor]:
    """The tensors of ``path``, which must have the shapes ``wanted`` and finite values."""
    if dict(shapes) != dict(wanted):
        raise ValueError(f"{path}: base model and configuration need {dict(wanted)}, the file has {dict(shapes)}")
    with safe_open(path, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in wanted}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} must hold finite floating-point numbers")
    return tensors


def _mlp_shapes(path: Path, shapes: _Shapes, config: PrefixConfig, sizes: tuple[int, int, int]) -> _Shapes:
    layers, heads, head_dim = sizes
    tensors = 2 * config.encoder_depth + 3 + (config.num_frozen_tokens > 0) + (config.gate is not None)
    if len(shapes) != tensors:  # else a hostile depth would have us build that many layers
        raise ValueError(f"{path}: an MLP of encoder_depth={config.encoder_depth} does not have {len(shapes)} tensors")
    with torch.device("meta"):
        hidden = config.encoder_hidden_size or heads * head_dim
        P, depth, frozen = config.num_virtual_tokens, config.encoder_depth, config.num_frozen_tokens
        encoder = PrefixEncoder(P, layers, heads, head_dim, hidden_size=hidden, depth=depth, num_frozen_tokens=frozen)
    return {name: tuple(t.shape) for name, t in encoder.state_dict().items()}


def _config(folder: Path, peft: dict[str, Any], metadata: dict[str, str], shapes: _Shapes) -> PrefixConfig:
    """Ours where we wrote the file, otherwise PEFT's fields and PEFT's positions."""
    try:
        if "prefix_config" in metadata or peft["peft_type"] == OURS:
            config = PrefixConfig.from_dict(json.loads(metadata.get("prefix_config", "null")))
        else:
            P, task = peft.get("num_virtual_tokens", 0), peft.get("task_type")
            heads = tuple(dict.fromkeys(n.removeprefix(HEAD).split(".")[0] for n in shapes if n.startswith(HEAD)))
            frozen = peft.get("num_frozen_tokens", 1) if peft["peft_type"] == FROZEN else 0
            config = PrefixConfig(
                num_virtual_tokens=P,
                num_frozen_tokens=frozen,
                task_type=task,
                position_mode="shift",
                modules_to_save=heads,
            )
    except (ValueError, TypeError, AttributeError, RecursionError, NotImplementedError) as error:
        raise ValueError(f"{folder}: {error}") from None
    config.base_model_name_or_path = peft.get("base_model_name_or_path")  # where people can edit it
    return config


def _check_base(folder: Path, config: PrefixConfig, metadata: dict[str, str], base: PreTrainedModel) -> None:
    ours = json.dumps(_fingerprint(base))
    if metadata.get("base", ours) != ours:
        raise ValueError(f"{folder}: trained for a base model {metadata['base']}, this one is {ours}")
    theirs, here = config.base_model_name_or_path, base.config._name_or_path
    if not isinstance(theirs, str) or not here or Path(theirs).name == Path(here).name:
        return  # the same model may lie in another folder or under another owner
    if _is_hub_id(theirs) and _is_hub_id(here):
        raise ValueError(
            f"{folder}: trained for {theirs}, this base model is {here}; if they are the same, edit "
            f"base_model_name_or_path in {ADAPTER_CONFIG}"
        )
    _log.warning("%s was trained for %s and is loaded into %s", folder, theirs, here)


def _check_sizes(path: Path, peft: dict[str, Any], sizes: tuple[int, int, int], base: PreTrainedModel) -> None:
    """Compare by name what the configuration says; the shape of the tensor says the same as one number."""
    layers, heads, head_dim = sizes
    needed = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * head_dim}
    for name, size in needed.items():
        if peft.get(name) not in (None, size):
            raise ValueError(
                f"{path}: {name} is {peft[name]!r}, {type(base).__name__} needs {size} "
                f"({layers} layers, {heads} key/value heads of size {head_dim})"
            )


def _fingerprint(base: PreTrainedModel) -> dict[str, Any]:
    """What the weights that a prefix was trained for cannot change. The vocabulary can: people add tokens."""
    config = base.config.get_text_config()
    return {name: getattr(config, name) for name in ("model_type", "hidden_size")}


def _peft_config(encoder: PrefixEncoder, config: PrefixConfig, attachment: Attachment) -> dict[str, Any]:
    """The fields of PEFT's PrefixTuningConfig or CartridgeConfig. The prefix is folded, so that PEFT needs no MLP."""
    kind = OURS
    if config.layers == "all" and not attachment.has_decoder and config.gate is None:
        kind = FROZEN if config.num_frozen_tokens else PEFT
    projection = {"encoder_hidden_size": encoder.num_heads * encoder.head_dim, "prefix_projection": False}
    return {
        "peft_type": kind,
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "inference_mode": True,
        "num_virtual_tokens": encoder.num_virtual_tokens,
        "token_dim": encoder.num_heads * encoder.head_dim,
        "num_transformer_submodules": 2 if attachment.has_decoder else 1,
        "num_attention_heads": encoder.num_heads,
        "num_layers": encoder.num_layers,
        "modules_to_save": list(config.modules_to_save or ()) or None,
    } | ({"num_frozen_tokens": config.num_frozen_tokens} if kind == FROZEN else projection)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _digest(prefix: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in prefix.values())).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
