"""Prefixes on disk as a paged cache takes them: keys and values of every layer, read without the base model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prefix_attn.hf.edit import move_kv
from prefix_attn.hf.io import files, formats
from prefix_attn.hf.io.fit import check_base
from prefix_attn.hf.io.stored import ADAPTER_CONFIG, GATE, KEY, PROMPT, Stored
from prefix_attn.quoting import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Shape(NamedTuple):
    """What the base model needs of a prefix.

    Attributes:
        layers: with self-attention.
        heads: of keys and values, on all devices together.
        head_dim: size of a head.
        base: its configuration, whose ``_name_or_path`` is its name.
        longest: prefixes are shorter than that: the context window.
    """

    layers: int
    heads: int
    head_dim: int
    base: PreTrainedConfig
    longest: int


class Prefix(NamedTuple):
    """Keys and values of a prefix.

    Attributes:
        kv: (P, layers, 2, heads, head size) float32. Keys are turned for positions 0..P-1.
        digest: of ``kv``: what tells it from any other prefix of the base model, wherever its file is.
    """

    kv: Tensor
    digest: str

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return self.kv.shape[0]


def read(path: Path, shape: Shape) -> Prefix:
    """The prefix in a folder or a file of any format that ``PrefixModel.load_prefix`` takes.

    Raises:
        ValueError: there is none, it is damaged, or it cannot be served with this base model. All reasons are named.
    """
    if holds_embeddings(path):
        raise ValueError(
            f"{path}: vLLM cannot serve this prefix: it has input embeddings alone, of which only the base model makes "
            "keys and values; 'prefix-attn serve --prefix' has it make them"
        )
    stored = formats.read(path)
    check_base(stored.path, stored.config, stored.metadata, shape.base)
    if reasons := list(refusals(stored, shape)):
        raise ValueError(f"{path}: vLLM cannot serve this prefix: {'; '.join(reasons)}")
    length = stored.config.num_virtual_tokens
    wanted = {KEY: (length, 2 * shape.layers * shape.heads * shape.head_dim)}
    flat = files.checked(stored.path, stored.tensors, wanted)[KEY]
    kv = flat.float().reshape(length, shape.layers, 2, shape.heads, shape.head_dim).contiguous()
    mode = stored.config.position_mode or "shift"
    digest = digest_of(kv, mode)
    return Prefix(_behind(stored.path, kv, shape) if mode == "none" else kv, digest)


def holds_embeddings(path: Path) -> bool:
    """Whether a folder has input embeddings, as ``PrefixTuning`` and PEFT's prompt tuning save them."""
    file = path / ADAPTER_CONFIG
    return file.is_file() and files.read_json(file).get("peft_type") == PROMPT


def _behind(path: Path, kv: Tensor, shape: Shape) -> Tensor:
    """``kv`` of a prefix whose texts start at 0, for texts that start behind it."""
    layers = kv.permute(1, 2, 3, 0, 4).flatten(0, 1)  # (2 * layers, heads, P, head size)
    try:
        moved = move_kv(layers, shape.base, len(kv))
    except NotImplementedError as error:
        raise ValueError(
            f"{path}: vLLM cannot serve this prefix: its texts start at position 0 (position_mode='none'), and they "
            f"cannot be moved behind it: {error}"
        ) from None
    return moved.unflatten(0, kv.shape[1:3]).permute(3, 0, 1, 2, 4).contiguous()


def digest_of(kv: Tensor, position_mode: str = "shift") -> str:
    """40 hexadecimal digits that name ``kv``, as it was read: its sizes, its bytes, and where its texts start."""
    found = hashlib.sha256(json.dumps([*kv.shape, position_mode]).encode())
    found.update(kv.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:40]


def refusals(stored: Stored, shape: Shape) -> Iterator[str]:
    """Every reason for which a paged cache cannot hold the prefix, or this base model cannot use it."""
    config = stored.config
    if stored.encoder_decoder or stored.peft_slots is not None or config.sites not in (None, ("decoder",)):
        yield "it is of an encoder-decoder model, or for other attention than that of a decoder to itself"
    if config.gate is not None or GATE in stored.tensors:
        yield "it has a gate, and attention in vLLM is one softmax"
    if config.mode == "infix":
        yield "it is an infix, which stands behind the input"
    if config.layers != "all":
        yield "its layers see different lengths" if config.has_lengths else "not all layers have it"
    if config.modules_to_save or stored.others or stored.tensors.keys() - {KEY, GATE}:
        yield "weights of the base model were trained with it"
    if KEY not in stored.tensors:
        yield "it has no keys and values yet: PrefixModel.save_pretrained writes them"
    yield from _misfits(stored, shape)


def _misfits(stored: Stored, shape: Shape) -> Iterator[str]:
    """What of the prefix does not fit the base model."""
    names = ("num_layers", shape.layers), ("num_attention_heads", shape.heads)
    for name, size in (*names, ("token_dim", shape.heads * shape.head_dim)):
        if stored.sizes.get(name) not in (None, size):
            yield f"its {name} is {quoted(stored.sizes[name])}, and the base model needs {size}"
    if (length := stored.config.num_virtual_tokens) >= shape.longest:
        yield f"its {length} tokens leave no room for a text in a context window of {shape.longest}"
