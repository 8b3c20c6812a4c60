"""Read prefixes of any library; each format is recognised by its files.

    ours, and PEFT's    adapter_config.json with peft_type, adapter_model.safetensors (or .bin): prompt_embeddings
    of a Trainer        model.safetensors, *.ckpt or any other file with a state_dict: see ``state``
    adapters'           adapter_config.json with architecture, pytorch_adapter.bin or adapter.safetensors
    Cartridges'         a .pt file: trainable_keys and trainable_values, frozen_keys and frozen_values
    PrefixTuning's      pytorch_model.bin beside config.json: wte and control_trans (Li and Liang 2021, their code)

MLPs are folded on reading, because the code that wrote them needs them only in training.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.activations import ACT2FN

from prefix_attn.hf.config import SITES, PrefixConfig
from prefix_attn.hf.io import files
from prefix_attn.hf.io.mlp import fold
from prefix_attn.hf.io.state import STATES, find_state, is_state, read_state, read_state_file
from prefix_attn.hf.io.stored import (
    ADAPTER,
    ADAPTER_CONFIG,
    FROZEN,
    GATE,
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
from prefix_attn.hf.io.writing import locked
from prefix_attn.quoting import quoted, shortened

_log = logging.getLogger(__name__)
_ADAPTERS = ("adapter.safetensors", "pytorch_adapter.bin")
_ADAPTERS_TASK_HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
_NAMED = (".safetensors", ".json")  # files that say which tensors they have before these are read
_ROUNDING = 1e-3  # of an MLP, on another machine; one in bfloat16 rounds more
# A model's file: not an adapter's, a shard, or what trainers save besides.
_MODEL = re.compile(
    r"(?!adapter|pytorch_adapter|pytorch_model_head|model_head|training_|optimizer|scheduler|scaler|sampler|rng_state"
    r"|random_states|dl_state_dict|.*-\d{5}-of-\d{5}\.).*\.(?:safetensors|bin|pt|pth|ckpt|torch)"
)
_ON_HUB = (ADAPTER_CONFIG, ADAPTER, TRAINING, OLD_ADAPTER, *_ADAPTERS, *_ADAPTERS_TASK_HEADS)
READABLE = (
    f"a folder with {ADAPTER_CONFIG} (ours, PEFT's, adapters'); a state_dict of a PrefixModel in a file of torch.save "
    "or safetensors (Trainer's, accelerate's, Lightning's); a cartridge (.pt); pytorch_model.bin of the original code"
)


def read(path: str | Path, *, decoder_layers: int | None = None) -> Stored:
    """The prefix in a folder, a file or a Hub repository; of several the one that was active.

    Args:
        path: where it is.
        decoder_layers: of the base model. PEFT's files of encoder-decoder models do not tell it.

    Raises:
        ValueError: not a prefix of a known format, damaged, or not supported.
    """
    return choose(path, read_all(path, decoder_layers=decoder_layers), "default")


def choose(path: str | Path, found: Mapping[str, Stored], name: str | None) -> Stored:
    """The only prefix, that of this name, or that which was active."""
    if len(found) == 1 or name in found:
        return next(iter(found.values())) if len(found) == 1 else found[str(name)]
    active = next((own for own, stored in found.items() if stored.active), None)
    if active is None:
        raise ValueError(f"{path}: has the prefixes {quoted(list(found))}; give the name of one of them, got {name!r}")
    _log.warning("%s: has the prefixes %s; %r was active and is taken", path, quoted(list(found)), active)
    return found[active]


def read_all(path: str | Path, *, decoder_layers: int | None = None, **hub: Any) -> dict[str, Stored]:
    """Every prefix at ``path`` by its name; one without a name is "default". Of the Hub, only folders of adapters.

    Raises:
        ValueError: as ``read``.
    """
    place = files.find(path, *_ON_HUB, **hub)
    try:
        with locked(place if place.is_dir() else place.parent):
            found = _folder(place, decoder_layers) if place.is_dir() else _file(place)
    except (TypeError, AttributeError, LookupError, RuntimeError, MemoryError, OverflowError) as error:
        raise ValueError(f"{place}: {type(error).__name__}: {shortened(error)}") from None
    for stored in found.values():
        for name, size in stored.sizes.items():
            if size is not None and (type(size) is not int or size < 1):
                raise ValueError(f"{stored.path}: {name} must be a positive int, got {quoted(size)}")
    return found


def _folder(place: Path, decoder_layers: int | None) -> dict[str, Stored]:
    if not (place / ADAPTER_CONFIG).exists():
        return _file(_one_of(place))
    known = files.read_json(place / ADAPTER_CONFIG)
    stored = _adapters(place, known) if "peft_type" not in known else read_peft(place, known, decoder_layers)
    return _beside_state(place, stored)


def _beside_state(place: Path, stored: Stored) -> dict[str, Stored]:
    """Our adapter, and what else a Trainer saved of the model beside it: MLP, other prefixes, weights of the base."""
    path = next((place / name for name in STATES[:2] if (place / name).exists()), None)
    if path is None or "prefix_config" not in stored.metadata or not is_state(files.read_names(path)):
        return {"default": stored}  # the base model's own weights, say
    states = read_state_file(path)
    name = next((name for name, state in states.items() if _is_same(stored, state)), None)
    if name is None:
        note = f"{path.name} beside it has other prefixes: {ADAPTER} alone is read"
        return {"default": stored._replace(notes=(*stored.notes, note))}
    training, others = states[name].training, states[name].others
    return states | {name: stored._replace(training=training, others=others, active=True)}


def _is_same(stored: Stored, state: Stored) -> bool:
    """Whether an adapter is the prefix in a state. An MLP may round a little otherwise on another machine."""
    if stored.config.mode == "embedding" or state.config.mode == "embedding":
        return stored.config.mode == state.config.mode and KEY in stored.tensors
    rounding = max(_ROUNDING, *(4 * torch.finfo(t.dtype).eps for t in state.training.values()))
    ours, theirs = ([stored.tensors.get(KEY), stored.tensors.get(GATE)], [state.tensors[KEY], state.tensors.get(GATE)])
    for one, other in zip(ours, theirs, strict=True):
        if one is None or other is None:
            if one is not other:
                return False
        elif one.shape != other.shape or not (one - other).norm() <= rounding * other.norm():
            return False
    return True


def _file(path: Path) -> dict[str, Stored]:
    if path.suffix in (".safetensors", ".json"):
        is_adapter = path.name == ADAPTER and (path.parent / ADAPTER_CONFIG).exists()
        return _folder(path.parent, None) if is_adapter else read_state_file(path)
    content = files.read_pickle(path)
    if (state := find_state(content)) is not None:
        return read_state(path, state)
    names = list(content) if isinstance(content, dict) else []
    if "trainable_keys" in names:
        return {"default": _cartridge(path, content)}
    if any(str(name).split(".")[0] == "control_trans" for name in names):
        tensors = {str(name): files.backed(path, str(name), t) for name, t in content.items()}
        return {"default": _original(path, tensors)}
    raise ValueError(
        f"{path}: neither a cartridge (trainable_keys), a checkpoint of the original PrefixTuning (control_trans) nor "
        "a state_dict with prefixes (prefixes.NAME.embedding), "
        f"got {quoted([str(name) for name in names[:4]] or type(content).__name__)}"
    )


def _one_of(folder: Path) -> Path:
    """The one file in ``folder`` that holds prefixes.

    Raises:
        ValueError: there is none, or more than one; the message says what there is.
    """
    here = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = [path for path in here if path.name in STATES or _MODEL.fullmatch(path.name)]
    last = folder / "cache_last.pt"  # what Cartridges leaves after its last step
    if last in found:
        return last
    if len(found) > 1:  # accelerate saves several models side by side
        found = [path for path in found if path.suffix not in _NAMED or is_state(files.read_names(path))] or found
    if len(found) > 1:
        raise ValueError(f"{folder}: has {[path.name for path in found]}; name one of them")
    if found:
        return found[0]
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    if sharded := [path.name for path in (folder, *inside) if (path / ".metadata").exists()]:
        raise ValueError(
            f"{folder}: {sharded} is in shards of torch.distributed.checkpoint, whose index is a pickle that is not "
            "read; torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes one file of it"
        )
    further = [path.name for path in inside if (path / ADAPTER_CONFIG).exists() or (path / STATES[0]).exists()]
    more = f"; its folders {further[:8]} may be read" if further else ""
    raise ValueError(
        f"{folder / ADAPTER_CONFIG}: no such file; the folder has {[path.name for path in here][:8]}{more}; what can "
        f"be read: {READABLE}"
    )


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
            raise ValueError(f"{path}: {shortened(name)} is not of the prefix {quoted(known.get('name'))}")
        part = parts.setdefault(match[2], {})
        # The pool of prefixes is in the file once for each layer that uses it.
        if match[3] in part and not torch.equal(part[match[3]], tensor):
            raise ValueError(f"{path}: {shortened(name)} differs from its other copies")
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
    files.check_total(path, (*keys, *values))
    shapes = {tuple(t.shape) for t in (*keys, *values)}
    if len(keys) != len(values) or len(shapes) > 1:
        raise ValueError(
            f"{path}: {name}_keys and {name}_values must have one shape in all layers, got {quoted(shapes)}"
        )
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
        raise ValueError(f"{path}: has {quoted(sorted(tensors)[:4])} besides a prefix")
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
