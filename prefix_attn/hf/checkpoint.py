"""Prefixes on disk, in the format of PEFT's prefix tuning.

    adapter_config.json          what PEFT reads
    adapter_model.safetensors    prompt_embeddings (P, 2 * L * H * D) float32, the folded prefix; our configuration is in
                                 its metadata, so that this one file is always whole
    training_state.safetensors   the MLP, if asked for: whole by itself too

Written to temporary names and renamed; read without pickle; checked before anything in memory changes.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.prefix import PrefixEncoder

ADAPTER_CONFIG, ADAPTER, TRAINING = "adapter_config.json", "adapter_model.safetensors", "training_state.safetensors"
KEY = "prompt_embeddings"
_log = logging.getLogger(__name__)


def save_prefix(
    folder: Path, encoder: PrefixEncoder, config: PrefixConfig, base: PreTrainedModel, *, training_state: bool
) -> None:
    """Write a prefix into ``folder``. A kill at any moment leaves each file as it was or as it is to be."""
    with torch.no_grad():
        folded = encoder.prompt_embeddings().detach().float().cpu().contiguous()
    metadata = {"prefix_config": json.dumps(config.to_dict()), "base": json.dumps(_fingerprint(base)), "format": "pt"}
    files: dict[str, bytes] = {}
    if training_state and encoder.mlp is not None:
        tensors = {n: t.detach().cpu().contiguous() for n, t in encoder.state_dict().items()}
        files[TRAINING] = save(tensors, metadata)
    files[ADAPTER_CONFIG] = json.dumps(_peft_config(encoder, config), indent=2).encode()
    files[ADAPTER] = save({KEY: folded}, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    if TRAINING not in files:
        (folder / TRAINING).unlink(missing_ok=True)  # it would belong to another prefix
    for name, content in files.items():
        _replace(folder / name, content)


def load_prefix(
    path: str | Path, base: PreTrainedModel, sizes: tuple[int, int, int], *, is_trainable: bool
) -> tuple[PrefixConfig, dict[str, Tensor]]:
    """(configuration, parameters of the encoder) from a folder or a Hub id; ``sizes`` are base's (L, H, D).

    With ``is_trainable`` the MLP, where it was saved; otherwise the folded prefix.

    Raises:
        ValueError: missing, damaged, or made for a model of other sizes.
    """
    folder = _folder(path)
    peft = _read_json(folder / ADAPTER_CONFIG)
    if peft.get("peft_type") != "PREFIX_TUNING":
        raise ValueError(f"{folder / ADAPTER_CONFIG}: peft_type must be PREFIX_TUNING, got {peft.get('peft_type')!r}")
    tensors, metadata = _read_tensors(folder / ADAPTER)
    config = _config(folder, peft, metadata)
    _check_base(folder, config, metadata, base)
    if KEY not in tensors:
        raise ValueError(f"{folder / ADAPTER}: no tensor {KEY!r}, only {sorted(tensors)}")
    layers, heads, head_dim = sizes
    wanted, shape = (config.num_virtual_tokens, 2 * layers * heads * head_dim), tuple(tensors[KEY].shape)
    if shape != wanted:
        raise ValueError(
            f"{folder / ADAPTER}: {KEY} must be (num_virtual_tokens, 2 * layers * heads * head size) = {wanted} for "
            f"{type(base).__name__} with {layers} layers, {heads} key/value heads of size {head_dim}, got {shape}"
        )
    if is_trainable and config.prefix_projection and (folder / TRAINING).exists():
        trained, _ = _read_tensors(folder / TRAINING)
        return config, trained
    config.prefix_projection = False  # what is left is the prefix that the MLP made
    return config, {"embedding": tensors[KEY].float()}


def _folder(path: str | Path) -> Path:
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or str(path).startswith((".", "/", "~")):
        raise ValueError(f"{path}: not a folder with {ADAPTER_CONFIG} and {ADAPTER}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=[ADAPTER_CONFIG, ADAPTER, TRAINING]))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is this the folder of an adapter?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object, got {type(content).__name__}")
    return content


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, all finite."""
    try:
        with safe_open(path, framework="pt") as f:
            tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not safetensors ({error})") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} must hold finite floating-point numbers")
    return tensors, metadata


def _config(folder: Path, peft: dict[str, Any], metadata: dict[str, str]) -> PrefixConfig:
    """Ours where we wrote the file, otherwise PEFT's fields and PEFT's positions."""
    try:
        if "prefix_config" in metadata:
            return PrefixConfig.from_dict(json.loads(metadata["prefix_config"]))
        return PrefixConfig(
            num_virtual_tokens=peft.get("num_virtual_tokens", 0),
            base_model_name_or_path=peft.get("base_model_name_or_path"),
            task_type=peft.get("task_type"),
            position_mode="shift",
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{folder}: {error}") from None


def _check_base(folder: Path, config: PrefixConfig, metadata: dict[str, str], base: PreTrainedModel) -> None:
    ours = _fingerprint(base)
    theirs = json.loads(metadata["base"]) if "base" in metadata else ours
    if theirs != ours:
        raise ValueError(f"{folder}: trained for a base model {theirs}, got {ours}")
    name = base.config._name_or_path
    if config.base_model_name_or_path and name and config.base_model_name_or_path != name:
        _log.warning("%s was trained for %s and is loaded into %s", folder, config.base_model_name_or_path, name)


def _fingerprint(base: PreTrainedModel) -> dict[str, Any]:
    """What tells base models apart wherever they lie: folders and names change."""
    config = base.config.get_text_config()
    return {name: getattr(config, name) for name in ("model_type", "hidden_size", "vocab_size")}


def _peft_config(encoder: PrefixEncoder, config: PrefixConfig) -> dict[str, Any]:
    """The fields of PEFT's PrefixTuningConfig. The prefix is folded, so that PEFT needs no MLP."""
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "inference_mode": True,
        "num_virtual_tokens": encoder.num_virtual_tokens,
        "token_dim": encoder.num_heads * encoder.head_dim,
        "num_transformer_submodules": 1,
        "num_attention_heads": encoder.num_heads,
        "num_layers": encoder.num_layers,
        "encoder_hidden_size": encoder.num_heads * encoder.head_dim,
        "prefix_projection": False,
    }


def _replace(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush, rename."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
