"""Convert a prefix from any readable format to ours or PEFT's, without the weights of its base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from prefix_attn.hf.config import SITES
from prefix_attn.hf.io import files, formats
from prefix_attn.hf.io.checkpoint import fingerprint, peft_fields
from prefix_attn.hf.io.stored import (
    ADAPTER_CONFIG,
    FROZEN,
    GATE,
    KEY,
    OURS,
    PEFT,
    TASK_HEAD,
    TRAINING,
    Stored,
    slots_of_peft,
    write_adapter,
)
from prefix_attn.quoting import quoted

TARGETS = ("prefix-attn", "peft")


def convert(
    source: str | Path, target: str | Path, *, to: str = "prefix-attn", base: PreTrainedConfig | None = None
) -> dict[str, Any]:
    """Read a prefix of any library, fold its MLP, and write it into the folder ``target``.

    Args:
        source: a folder, a file or a Hub id, in any format that ``formats`` can read.
        target: the folder. It is made if it does not exist. A kill leaves the old files or the new ones.
        to: "prefix-attn" or "peft". The first writes PEFT's files if PEFT has such a prefix, and ours otherwise. The
            second writes PEFT's files or raises.
        base: the configuration of the base model, for what the source does not say: heads in files of adapters, layers
            of the decoder in PEFT's.

    Returns:
        What was read and written, ready for JSON. "notes" says in words what changed.

    Raises:
        ValueError: the source is damaged or does not fit ``base``, or PEFT has no such prefix. ``target`` is unchanged.

    Examples:
        >>> get_prefix_model(base, PrefixConfig(num_virtual_tokens=4)).save_pretrained("ours")
        >>> convert("ours", "theirs", to="peft")["notes"]
        []
    """
    if to not in TARGETS:
        raise ValueError(f"to must be one of {TARGETS}, got {to!r}")
    stored = formats.read(source, decoder_layers=None if base is None else _sizes(base)["decoder_layers"])
    stored = stored if base is None else _on_base(stored, base)
    folder = Path(target)
    if folder.is_file() or folder.resolve() in (stored.path.resolve(), stored.path.parent.resolve()):
        raise ValueError(f"{folder}: must be a folder other than that of the source")
    tensors, sizes = _checked(stored, base)
    config = stored.config
    config.fold()
    kind, layers = stored.peft_type, sizes["num_layers"]
    metadata = {"format": "pt"}
    if to == "peft":
        kind, layers, tensors[KEY] = _for_peft(stored, tensors[KEY], sizes)
    else:
        metadata |= _our_metadata(stored, base)
    fields = peft_fields(
        kind,
        config,
        layers=layers,
        heads=sizes["num_attention_heads"],
        width=sizes["token_dim"],
        submodules=2 if stored.encoder_decoder else 1,
    )
    write_adapter(folder, fields, tensors, metadata)
    notes = [*stored.notes, *_losses(stored, to)]
    return _report(stored, folder, kind, sizes["num_layers"], tensors) | stored.of_peft_s_decoder | {"notes": notes}


def _on_base(stored: Stored, base: PreTrainedConfig) -> Stored:
    """A prefix from a state_dict, with what that leaves to the defaults of its model."""
    config = stored.config
    if stored.format != "state_dict" or config.position_mode is not None:
        return stored
    in_place = base.is_encoder_decoder or config.gate is not None or config.mode == "infix"
    config.position_mode = "none" if in_place else "shift"
    if base.is_encoder_decoder and config.sites is None:
        config.sites = SITES
    kind = config.peft_type if not base.is_encoder_decoder else OURS
    return stored._replace(peft_type=kind, encoder_decoder=base.is_encoder_decoder)


def _our_metadata(stored: Stored, base: PreTrainedConfig | None) -> dict[str, str]:
    """What our files say besides PEFT's fields: our configuration and, where known, the base model."""
    metadata = {"prefix_config": json.dumps(stored.config.to_dict())}
    if base is not None:
        return metadata | {"base": json.dumps(fingerprint(base))}
    return metadata | ({"base": stored.metadata["base"]} if "base" in stored.metadata else {})


def _losses(stored: Stored, to: str) -> list[str]:
    """In words, what the target lacks."""
    notes = []
    if stored.others:
        notes.append(f"{len(stored.others)} weights of the base model, which were trained too, are left behind")
    if any(name.startswith("mlp.") for name in stored.training):
        notes.append("its MLP is left behind: the prefix is folded, and goes on training without it")
    if (stored.path.parent / TRAINING).exists():
        notes.append(f"{TRAINING} is left behind: the prefix is folded, and goes on training without its MLP")
    if to == "peft" and stored.config.task_type is None:
        notes.append(f"task_type is not known, and PEFT runs no prefix without: set it in {ADAPTER_CONFIG}")
    return notes


def _report(stored: Stored, folder: Path, kind: str, slots: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What was read and written, as JSON can hold it."""
    config = stored.config
    return {
        "source": str(stored.path),
        "format": stored.format,
        "target": str(folder),
        "peft_type": kind,
        "num_virtual_tokens": config.num_virtual_tokens,
        "num_frozen_tokens": config.num_frozen_tokens,
        "sites": list(config.sites or ()) or None,
        "slots": slots,
        "position_mode": config.position_mode,
        "base_model_name_or_path": config.base_model_name_or_path,
        "heads": list(config.modules_to_save or ()),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    }


def read_config(model: str) -> PreTrainedConfig:
    """The configuration of a model in a folder or on the Hub.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: no configuration of a model ({str(error).splitlines()[0]})") from error


def _checked(stored: Stored, base: PreTrainedConfig | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of ``stored``, contiguous and finite; PEFT's sizes, None where nobody says."""
    sizes: dict[str, Any] = {n: stored.sizes.get(n) for n in ("num_layers", "num_attention_heads", "token_dim")}
    if base is not None:
        needed = _sizes(base)
        for name in ("num_attention_heads", "token_dim"):
            if sizes[name] not in (None, needed[name]):
                raise ValueError(f"{stored.path}: {name} is {quoted(sizes[name])}, the base model needs {needed[name]}")
            sizes[name] = needed[name]
        theirs = json.loads(stored.metadata.get("base", "{}"))
        here = {name: getattr(base.get_text_config(), name, None) for name in theirs}
        if theirs != here:
            raise ValueError(f"{stored.path}: trained for a base model {quoted(theirs)}, this one is {quoted(here)}")
    P = stored.config.num_virtual_tokens
    if KEY not in stored.tensors and stored.config.mode == "embedding":
        raise ValueError(
            f"{stored.path}: holds input embeddings, of which only their model makes keys and values: load it with "
            "PrefixModel.from_pretrained, and save_pretrained"
        )
    found = stored.tensors.get(KEY)
    width = 0 if found is None or found.dim() != 2 else found.shape[1]
    if sizes["token_dim"] is not None and sizes["num_layers"] is None:
        sizes["num_layers"] = width // (2 * sizes["token_dim"])
    if None not in (sizes["token_dim"], sizes["num_layers"]):
        width = 2 * sizes["num_layers"] * sizes["token_dim"]
    others = {
        name: tuple(tensor.shape) for name, tensor in stored.tensors.items() if name.startswith((TASK_HEAD, GATE))
    }
    tensors = files.checked(stored.path, stored.tensors, {KEY: (P, width), **others})
    return {name: tensor.contiguous() for name, tensor in tensors.items()} | {
        KEY: tensors[KEY].float().contiguous()
    }, sizes


def _for_peft(stored: Stored, rows: Tensor, sizes: dict[str, Any]) -> tuple[str, int, Tensor]:
    """PEFT's type of the prefix, its number of layers, and the prefix as PEFT lays it out.

    PEFT hands decoder layer i of an encoder-decoder model the slot 2i mod L. With an odd L that is another one for each
    layer; a decoder of an even number of layers gets one slot more, which is dead.
    """
    config = stored.config
    if None in sizes.values():
        raise ValueError(f"{stored.path} does not say how many heads its base model has: give its configuration")
    if stored.peft_type != OURS:
        return stored.peft_type, sizes["num_layers"], rows
    why = []
    if config.layers != "all":
        why.append(
            f"it has {'another length in each layer' if config.has_lengths else f'layers {list(config.layers)} only'}"
        )
    if config.mode == "infix":
        why.append("it is an infix")
    if config.gate is not None:
        why.append("it has a gate")
    if config.position_mode != "shift":
        why.append(
            "its tokens start at position 0 (position_mode='none'), PEFT's behind the prefix; prefix_attn.hf.edit.move "
            "moves it on a model with rotary embeddings"
        )
    if stored.encoder_decoder and list(config.sites or ()) != ["decoder"]:
        why.append(f"it has sites {list(config.sites or ())}, PEFT's encoder-decoder models the decoder alone")
    if why:
        raise ValueError(f"{stored.path}: PEFT has no such prefix: {'; '.join(why)}")
    layers = sizes["num_layers"]
    if stored.encoder_decoder:
        used = layers
        layers += 1 - used % 2
        pairs = torch.zeros(rows.shape[0], layers, rows.shape[1] // used)
        pairs[:, slots_of_peft(layers, used)] = rows.view(rows.shape[0], used, -1)
        rows = pairs.flatten(1)
    return FROZEN if config.num_frozen_tokens else PEFT, layers, rows


def _sizes(base: PreTrainedConfig) -> dict[str, int]:
    """PEFT's sizes of ``base``, and the layers of its decoder."""
    config = base.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    layers = (getattr(config, n, None) for n in ("decoder_layers", "num_decoder_layers", "num_hidden_layers"))
    return {
        "num_attention_heads": shared,
        "token_dim": shared * size,
        "decoder_layers": next(n for n in layers if n is not None),
    }
