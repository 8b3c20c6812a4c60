"""Read prefixes of any library; each format is recognised by its files.

    ours, and PEFT's    adapter_config.json with peft_type, adapter_model.safetensors (or .bin): prompt_embeddings
    adapters'           adapter_config.json with architecture, pytorch_adapter.bin or adapter.safetensors
    Cartridges'         a .pt file: trainable_keys and trainable_values, frozen_keys and frozen_values
    PrefixTuning's      pytorch_model.bin beside config.json: wte and control_trans (Li and Liang 2021, their code)

MLPs are folded on reading, because the code that wrote them needs them only in training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.activations import ACT2FN

from prefix_attn.hf.config import SITES, PrefixConfig
from prefix_attn.hf.io import files
from prefix_attn.hf.io.stored import (
    ADAPTER,
    ADAPTER_CONFIG,
    FROZEN,
    KEY,
    OLD_ADAPTER,
    OURS,
    PEFT,
    TASK_HEAD,
    TRAINING,
    Stored,
    read_peft,
    task_heads_of,
)

_ADAPTERS = ("adapter.safetensors", "pytorch_adapter.bin")
_ADAPTERS_TASK_HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
_ORIGINAL = "pytorch_model.bin"
_ON_HUB = (ADAPTER_CONFIG, ADAPTER, TRAINING, OLD_ADAPTER, *_ADAPTERS, *_ADAPTERS_TASK_HEADS)
_LARGEST = 2**28  # numbers that an MLP may make: a hostile one of a few megabytes could ask for any


def read(path: str | Path, *, decoder_layers: int | None = None) -> Stored:
    """The prefix in a folder, a file or a Hub repository. On the Hub, only ours, PEFT's and adapters' are read.

    Args:
        path: where it is.
        decoder_layers: of the base model. PEFT's files of encoder-decoder models do not tell it.

    Raises:
        ValueError: not a prefix of a known format, damaged, or not supported.
    """
    place = files.find(path, *_ON_HUB)
    try:
        stored = _read(place, decoder_layers)
    except (TypeError, AttributeError, KeyError, RuntimeError, NotImplementedError, RecursionError) as error:
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from None
    for name, size in stored.sizes.items():
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{stored.path}: {name} must be a positive int, got {size!r}")
    return stored


def _read(place: Path, decoder_layers: int | None) -> Stored:
    if place.is_file():
        return _file(place)
    if (place / ADAPTER_CONFIG).exists() or not any((place / name).exists() for name in _pickles(place)):
        known = files.read_json(place / ADAPTER_CONFIG)
        return _adapters(place, known) if "peft_type" not in known else read_peft(place, known, decoder_layers)
    return _file(_one_of(place))


def _file(path: Path) -> Stored:
    content = files.read_pickle(path)
    names = list(content) if isinstance(content, dict) else []
    if "trainable_keys" in names:
        return _cartridge(path, content)
    if any(str(name).split(".")[0] == "control_trans" for name in names):
        return _original(path, {str(name): files.backed(path, str(name), t) for name, t in content.items()})
    raise ValueError(
        f"{path}: neither a cartridge (trainable_keys) nor a checkpoint of the original PrefixTuning (control_trans), "
        f"got {[str(name) for name in names[:4]] or type(content).__name__}"
    )


def _pickles(folder: Path) -> list[str]:
    return [_ORIGINAL, *sorted(p.name for kind in ("*.pt", "*.torch") for p in folder.glob(kind))]


def _one_of(folder: Path) -> Path:
    """The one file that holds a prefix."""
    found = [folder / name for name in _pickles(folder) if (folder / name).exists()]
    last = folder / "cache_last.pt"  # what Cartridges leaves after its last step
    if len(found) > 1 and last not in found:
        raise ValueError(f"{folder}: has {[path.name for path in found]}; name one of them")
    return last if last in found else found[0]


# adapters' ------------------------------------------------------------------------------------------------------------

_POOL = re.compile(r"(?:.*\.)?prefix_tuning\.(?:pool\.)?prefix_tunings\.([^.]+)\.([^.]+)\.(.+)")
_CLASSES = {
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
    "SEQ_CLS": ("ForSequenceClassification",),
    "TOKEN_CLS": ("ForTokenClassification",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
}
_LOCATIONS = {"encoder_prefix": "encoder", "cross_prefix": "cross", "self_prefix": "decoder", "self": "decoder"}


def _adapters(folder: Path, known: dict[str, Any]) -> Stored:
    options = known.get("config")
    if not isinstance(options, dict) or options.get("architecture") != "prefix_tuning":
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: neither PEFT's (peft_type) nor a prefix of adapters (architecture)"
        )
    if options.get("use_gating") or options.get("leave_out"):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: use_gating and leave_out are not read")
    path = next((folder / name for name in _ADAPTERS if (folder / name).exists()), folder / _ADAPTERS[-1])
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in files.read_tensors(path).items():
        match = _POOL.fullmatch(name)
        if match is None or match[1] != known.get("name", match[1]) or match[2] not in _LOCATIONS:
            raise ValueError(f"{path}: {name} is not of the prefix {known.get('name')!r}")
        part = parts.setdefault(match[2], {})
        # The pool of prefixes is in the file once for each layer that uses it.
        if match[3] in part and not torch.equal(part[match[3]], tensor):
            raise ValueError(f"{path}: {name} differs from its other copies")
        part[match[3]] = tensor
    P = options.get("prefix_length")
    rows = {
        _LOCATIONS[name]: fold(path, part, P, ACT2FN[str(options.get("non_linearity", "tanh")).lower()])
        for name, part in parts.items()
    }
    model_type, notes = known.get("model_type"), []
    if "t5" in str(model_type).lower():
        notes.append("adapters counts the distances of T5's tokens P too far, which nothing here does: outputs differ")
    task = next((task for task, ends in _CLASSES.items() if str(known.get("model_class")).endswith(ends)), None)
    task_heads, head_notes = _adapters_task_heads(folder, task)
    config = PrefixConfig(
        num_virtual_tokens=next(iter(rows.values())).shape[0] if rows else 0,
        sites=sorted(rows, key=SITES.index) if _has_decoder(model_type) else None,
        task_type=task,
        position_mode="none",
        modules_to_save=task_heads_of(task_heads),
        base_model_name_or_path=known.get("model_name") or None,
    )
    base = {"model_type": model_type, "hidden_size": known.get("hidden_size")}
    return _joined(
        "adapters", path, config, rows, {"base": json.dumps(base)}, [*notes, *head_notes], task_heads=task_heads
    )


def _adapters_task_heads(folder: Path, task: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """The head of a classifier, which is trained with the prefix; that of a language model is the base model's own."""
    path = next((folder / name for name in _ADAPTERS_TASK_HEADS if (folder / name).exists()), None)
    if path is None or task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return {}, []
    if task is None:
        return {}, [f"{path.name} is not read: it is the head of a class of adapters' own"]
    return {f"{TASK_HEAD}{name}": tensor for name, tensor in files.read_tensors(path).items()}, []


# Cartridges' ----------------------------------------------------------------------------------------------------------


def _cartridge(path: Path, content: Mapping[str, Any]) -> Stored:
    old = "fixed" if "fixed_keys" in content else "frozen"
    trained, frozen = (_cartridge_kv(path, content, name) for name in ("trainable", old))
    if trained is None:
        raise ValueError(f"{path}: trainable_keys and trainable_values must have one shape in all layers, got none")
    kv, num_frozen = trained, 0
    if frozen is not None:
        shapes = tuple(frozen.shape), tuple(trained.shape)
        if (*frozen.shape[:2], frozen.shape[3]) != (*trained.shape[:2], trained.shape[3]):
            raise ValueError(f"{path}: {old}_keys do not fit trainable_keys: (2 * L, H, tokens, D) are {shapes}")
        kv, num_frozen = torch.cat([frozen, trained], dim=2), frozen.shape[2]
    slots, heads, P, head_dim = kv.shape
    return Stored(
        "Cartridges",
        path,
        PrefixConfig(
            num_virtual_tokens=P,
            num_frozen_tokens=num_frozen,
            task_type="CAUSAL_LM",
            position_mode="shift",
            modules_to_save=(),
        ),
        {KEY: kv.permute(2, 0, 1, 3).flatten(1)},
        {"num_layers": slots // 2, "num_attention_heads": heads, "token_dim": heads * head_dim},
        peft_type=FROZEN if num_frozen else PEFT,
    )


def _cartridge_kv(path: Path, content: Mapping[str, Any], name: str) -> Tensor | None:
    """(2 * L, H, tokens, D) float32 from the lists ``name``_keys and ``name``_values, or None if both are empty."""
    keys, values = (_cartridge_layers(path, content, f"{name}_{kind}") for kind in ("keys", "values"))
    shapes = {tuple(t.shape) for t in (*keys, *values)}
    if len(keys) != len(values) or len(shapes) > 1:
        raise ValueError(f"{path}: {name}_keys and {name}_values must have one shape in all layers, got {shapes}")
    return torch.stack([t for pair in zip(keys, values) for t in pair]) if keys else None


def _cartridge_layers(path: Path, content: Mapping[str, Any], name: str) -> list[Tensor]:
    tensors = [files.backed(path, f"{name}.{i}", t) for i, t in enumerate(content.get(name) or [])]
    if any(t.dim() != 4 or t.shape[0] != 1 for t in tensors):
        raise ValueError(f"{path}: {name} must be (1, heads, tokens, head size)")
    return [t[0].float() for t in tensors]


# PrefixTuning's -------------------------------------------------------------------------------------------------------

_MODULES = {"encoder": ("wte_enc", "control_trans_enc"), "cross": ("wte2", "control_trans2")}
_MODULES["decoder"] = ("wte", "control_trans")


def _original(path: Path, tensors: dict[str, Tensor]) -> Stored:
    beside = path.with_name("config.json")
    known = files.read_json(beside) if beside.exists() else {}
    width, layers = known.get("n_embd", known.get("d_model")), known.get("n_layer", known.get("decoder_layers"))
    heads = known.get("n_head", known.get("decoder_attention_heads"))
    rows = {}
    for site, (table, mlp) in _MODULES.items():
        part = {"wte.weight": tensors.pop(f"{table}.weight")} if f"{table}.weight" in tensors else {}
        inside = [n for n in tensors if n == mlp or n.startswith(mlp + ".")]
        part |= {n.replace(mlp, "control_trans", 1): tensors.pop(n) for n in inside}
        if not inside and part:
            raise ValueError(f"{path}: {table} without {mlp}: a prefix in infix format, whose keys depend on the input")
        if part:
            rows[site] = fold(path, part, known.get("preseqlen"), torch.tanh)
    if tensors:
        raise ValueError(f"{path}: has {sorted(tensors)[:4]} besides a prefix")
    if isinstance(width, int) and any(r.shape[1] == width for r in rows.values()):
        raise ValueError(f"{path}: a prefix of input embeddings (PrefixEmbTuning), not of keys and values")
    seq2seq = len(rows) > 1 or "decoder_layers" in known
    config = PrefixConfig(
        num_virtual_tokens=rows["decoder"].shape[0],
        sites=sorted(rows, key=SITES.index) if seq2seq else None,
        task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        position_mode="none" if seq2seq else "shift",  # their BART does not count what is cached, their GPT-2 does
        modules_to_save=(),
        base_model_name_or_path=known.get("_name_or_path") or None,
    )
    metadata, sizes = {}, {}
    if known:
        metadata = {"base": json.dumps({"model_type": known.get("model_type"), "hidden_size": width})}
        slots = layers * len(rows) if isinstance(layers, int) else None
        sizes = {"num_layers": slots, "num_attention_heads": heads, "token_dim": width}
    return _joined("PrefixTuning", path, config, rows, metadata, [], sizes=sizes)


# What they have in common ---------------------------------------------------------------------------------------------


def fold(path: Path, part: Mapping[str, Tensor], length: Any, activation: Any) -> Tensor:
    """(P, width) float32 from ``wte`` and the MLP ``control_trans``, or from ``control_trans`` alone.

    Args:
        path: for messages.
        part: tensors by name.
        length: P, for a prefix without MLP, which is one row of numbers (P * width,), or past keys and values
            (2 * L, 1, H, P, D).
        activation: between the MLP's layers.
    """
    flat = part.get("control_trans")
    return _mlp_rows(path, part, activation) if flat is None else _flat_rows(path, flat, length)


def _flat_rows(path: Path, flat: Tensor, length: Any) -> Tensor:
    """The rows of a prefix without MLP."""
    if flat.dim() == 5 and flat.shape[1] == 1:
        return flat[:, 0].permute(2, 0, 1, 3).flatten(1).float()
    if flat.dim() != 1 or type(length) is not int or length < 1 or flat.numel() % length:
        raise ValueError(f"{path}: {tuple(flat.shape)} numbers are no prefix of length {length!r}")
    return flat.view(length, -1).float()


def _mlp_rows(path: Path, part: Mapping[str, Tensor], activation: Any) -> Tensor:
    """What the MLP makes of the table ``wte``."""
    layers = _mlp_layers(path, part)
    hidden = part["wte.weight"].float()
    if hidden.dim() != 2 or any(w.dim() != 2 or b.shape != w.shape[:1] for w, b in layers):
        raise ValueError(f"{path}: an MLP must have matrices, got { {n: tuple(t.shape) for n, t in part.items()} }")
    sizes = [hidden.shape[1], *(w.shape[0] for w, _ in layers)]
    if hidden.shape[0] * max(sizes) > _LARGEST:
        raise ValueError(f"{path}: its MLP would make {hidden.shape[0]} x {max(sizes)} numbers, too many for a prefix")
    if any(n != w.shape[1] for n, (w, _) in zip(sizes, layers)):
        raise ValueError(f"{path}: the layers of the MLP do not fit one another: {list(pairwise(sizes))}")
    for number, (weight, bias) in enumerate(layers):
        hidden = torch.nn.functional.linear(activation(hidden) if number else hidden, weight, bias)
    return hidden


def _mlp_layers(path: Path, part: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each layer, in the order of their numbers."""
    numbers = sorted({int(n.split(".")[1]) for n in part if re.fullmatch(r"control_trans\.\d{1,3}\.(weight|bias)", n)})
    needed = {f"control_trans.{i}.{kind}" for i in numbers for kind in ("weight", "bias")}
    if not numbers or set(part) != {"wte.weight"} | needed:
        raise ValueError(f"{path}: an MLP must have wte and layers of weight and bias, got {sorted(part)[:8]}")
    return [(part[f"control_trans.{i}.weight"].float(), part[f"control_trans.{i}.bias"].float()) for i in numbers]


def _joined(
    name: str,
    path: Path,
    config: PrefixConfig,
    rows: Mapping[str, Tensor],
    metadata: dict[str, str],
    notes: Sequence[str],
    *,
    sizes: Mapping[str, Any] | None = None,
    task_heads: Mapping[str, Tensor] | None = None,
) -> Stored:
    """One prefix from those of several sites."""
    order = sorted(rows, key=SITES.index)
    if len({r.shape[0] for r in rows.values()}) != 1:
        raise ValueError(f"{path}: its sites have prefixes of different lengths, {[len(r) for r in rows.values()]}")
    tensors = {KEY: torch.cat([rows[site] for site in order], dim=1), **(task_heads or {})}
    widths = {site: rows[site].shape[1] for site in order} if config.sites else {}
    kind = OURS if config.sites or config.position_mode == "none" else PEFT
    return Stored(name, path, config, tensors, sizes or {}, widths, metadata, notes, kind, config.sites is not None)


def _has_decoder(model_type: Any) -> bool:
    """Whether models of this type have an encoder and a decoder."""
    try:
        return bool(AutoConfig.for_model(model_type).is_encoder_decoder)
    except (ValueError, TypeError, AttributeError):
        return False
