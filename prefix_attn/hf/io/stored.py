"""``Stored``, a prefix as read from disk, and PEFT's files, which are read and written here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.hub import CARD, card_text
from prefix_attn.hf.io import files
from prefix_attn.hf.io.writing import check_finite, make_folder, replace, replace_all, serialised
from prefix_attn.quoting import quoted, shortened

ADAPTER_CONFIG, ADAPTER, TRAINING = "adapter_config.json", "adapter_model.safetensors", "training_state.safetensors"
# Tensors: the prefix, its gate, and the beginning of those of task heads.
KEY, GATE, TASK_HEAD = "prompt_embeddings", "prefix_gate", "base_model."
PEFT, FROZEN, OURS = "PREFIX_TUNING", "CARTRIDGE", "PREFIX_ATTN"  # peft_type
PROMPT = "PROMPT_TUNING"  # the same, of a table of input embeddings
OLD_ADAPTER = "adapter_model.bin"  # PEFT's, before safetensors


class Stored(NamedTuple):
    """A prefix on disk, as far as it is known without its base model.

    ``tensors`` has the prefix under ``KEY``: (P, 2 * slots * H * D), with slots by site in the order of ``SITES``, then
    by layer. It has the gate under ``GATE``, if there is one, and parameters of task heads under names that start with
    ``TASK_HEAD``.
    """

    format: str
    path: Path
    config: PrefixConfig  # not resolved
    tensors: dict[str, Tensor]
    sizes: Mapping[str, Any] = {}  # where known, in PEFT's words: num_layers (slots), num_attention_heads, token_dim
    widths: Mapping[str, int] = {}  # the columns of each site, where known
    metadata: Mapping[str, str] = {}
    notes: Sequence[str] = ()
    peft_type: str = OURS  # as which PEFT would know it, as it is
    encoder_decoder: bool = False  # the base model
    peft_slots: Sequence[int] | None = None  # of each decoder layer, in the file of an encoder-decoder model
    training: Mapping[str, Tensor] = {}  # the parameters of the encoder, where the file has them
    active: bool = False  # where the model had several
    others: Mapping[str, Tensor] = {}  # weights of the base model that were trained too, as base_model.NAME

    @property
    def of_peft_s_decoder(self) -> dict[str, Any]:
        """How the slots in PEFT's file of an encoder-decoder model were used. Empty for other files."""
        if self.peft_slots is None:
            return {}
        used = list(self.peft_slots)
        layers = {slot: [layer for layer, its in enumerate(used) if its == slot] for slot in used}
        return {
            "slot_of_layer": used,
            "dead_slots": sorted(set(range(self.sizes["peft_layers"])) - set(used)),
            "layers_that_share": [them for them in layers.values() if len(them) > 1],
        }


def write_adapter(
    folder: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
    training: Mapping[str, Tensor] | None = None,
    tags: Iterable[str] = (),
) -> None:
    """Write an adapter into ``folder``: the same bytes for the same prefix.

    A kill at any moment leaves each file as it was or as it is to be. Others may save and read there at the same time.

    Args:
        folder: made if it does not exist.
        fields: of ``adapter_config.json``.
        tensors: of the adapter.
        metadata: of the safetensors files.
        training: tensors of the training state. Without them, the state of an earlier adapter is removed.
        tags: of the model card, besides ours. A card that is there keeps its text.

    Raises:
        ValueError: ``folder`` is a file, or a tensor has values that are not finite.
        OSError: the disk is full, say. Nothing is written then.
    """
    check_finite({**tensors, **(training or {})})
    contents = {
        TRAINING: None if training is None else serialised(training, metadata),
        ADAPTER_CONFIG: json.dumps(fields, indent=2).encode(),
        ADAPTER: serialised(tensors, metadata),
        CARD: _card(folder / CARD, fields, tags),
    }
    make_folder(folder)
    replace_all(folder, contents)


def update_card(folder: Path, tags: Iterable[str] = ()) -> None:
    """Give the model card in ``folder`` the metadata of the adapter there, and ``tags``. Without one it stays."""
    if (folder / ADAPTER_CONFIG).is_file():
        replace(folder / CARD, _card(folder / CARD, files.read_json(folder / ADAPTER_CONFIG), tags))


def _card(path: Path, fields: Mapping[str, Any], tags: Iterable[str]) -> bytes:
    """The model card of an adapter with these ``fields``."""
    base, known = fields.get("base_model_name_or_path"), fields.get("peft_type") != OURS
    named = isinstance(base, str) and files.is_hub_id(base)  # a path of this machine helps nobody
    of_base = [f"base_model:adapter:{base}"] if named else []
    data = {
        "library_name": "peft" if known else "prefix_attn",
        "base_model": base if named else None,
        "pipeline_tag": "text-generation" if fields.get("task_type") == "CAUSAL_LM" else None,
        "tags": [
            "prefix-tuning",
            "prefix_attn",
            "transformers",
            *of_base,
            *tags,
        ],
    }
    body = f"""# A prefix{f" of {base}" if named else ""}

{fields.get("num_virtual_tokens")} virtual tokens for a frozen model, trained by prefix tuning.
{"PEFT loads them too, with `PeftModel.from_pretrained`." if known else ""}

```python
from prefix_attn import PrefixModel
from prefix_attn.quoting import quoted, shortened

model = PrefixModel.from_pretrained(base, "this repository")  # base: the model, as transformers loads it
```
"""
    there = path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else None
    return card_text(there, data, body).encode(errors="surrogateescape")  # bytes that are no UTF-8 stay too


def slots_of_peft(layers: int, decoder_layers: int) -> list[int]:
    """Which of the ``layers`` slots of PEFT's file each layer of an encoder-decoder model's decoder attends to.

    PEFT repeats the keys and values of all layers, [K0 V0 K1 V1 ... K0 V0 K1 V1 ...], hands four to each layer, and
    drops the last two, which were for cross attention: layer i has slot 2i mod L. Where L is even, every second slot
    is dead and layers i and i + L/2 share one.
    """
    return [2 * layer % layers for layer in range(decoder_layers)]


def read_peft(folder: Path, peft: dict[str, Any], decoder_layers: int | None) -> Stored:
    """The prefix in ``folder``, whose configuration ``peft`` is."""
    kind, submodules = peft["peft_type"], peft.get("num_transformer_submodules")
    if kind not in (OURS, FROZEN, PEFT):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: peft_type must be {OURS}, {FROZEN} or {PEFT}, got {quoted(kind)}")
    path = folder / ADAPTER
    if not path.exists() and (folder / OLD_ADAPTER).exists():
        path = folder / OLD_ADAPTER
    tensors, metadata = files.read_both(path)
    config = _peft_config(folder, peft, tensors, metadata)
    sizes = {name: peft.get(name) for name in ("num_layers", "num_attention_heads", "token_dim")}
    name, others = "ours" if "prefix_config" in metadata else "PEFT", {}
    if name == "ours":
        heads = {f"{TASK_HEAD}{head}" for head in config.modules_to_save or ()}
        others = {n: t for n, t in tensors.items() if n.startswith(TASK_HEAD) and not n.startswith(tuple(heads))}
        tensors = {n: t for n, t in tensors.items() if n not in others}
    stored = Stored(name, path, config, tensors, sizes, {}, metadata, (), kind, submodules == 2, others=others)
    if kind == OURS or submodules in (None, 1):
        return stored
    if submodules != 2:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: num_transformer_submodules must be 1 or 2, got {quoted(submodules)}"
        )
    return _of_decoder(stored, decoder_layers)


def _peft_config(
    folder: Path, peft: dict[str, Any], tensors: Iterable[str], metadata: Mapping[str, str]
) -> PrefixConfig:
    """Ours where we wrote the file, otherwise PEFT's fields and PEFT's positions."""
    try:
        if "prefix_config" in metadata or peft["peft_type"] == OURS:
            config = PrefixConfig.from_dict(json.loads(metadata.get("prefix_config", "null")))
        else:
            config = PrefixConfig(
                num_virtual_tokens=peft.get("num_virtual_tokens", 0),
                num_frozen_tokens=peft.get("num_frozen_tokens", 1) if peft["peft_type"] == FROZEN else 0,
                task_type=peft.get("task_type"),
                position_mode="shift",
                modules_to_save=task_heads_of(tensors),
            )
    except (ValueError, TypeError, AttributeError, RecursionError, NotImplementedError) as error:
        raise ValueError(f"{folder}: {shortened(error)}") from None
    config.base_model_name_or_path = peft.get("base_model_name_or_path")  # where people can edit it
    return config


def _of_decoder(stored: Stored, decoder_layers: int | None) -> Stored:
    """Reduce PEFT's file of an encoder-decoder model to what its decoder attends to: one slot for each layer."""
    layers, rows = stored.sizes["num_layers"], stored.tensors.get(KEY)
    if type(layers) is not int or layers < 1 or rows is None or rows.dim() != 2 or rows.shape[1] % (2 * layers):
        raise ValueError(f"{stored.path}: {KEY} must be (P, 2 * {layers} layers * width)")
    notes = []
    if decoder_layers is None:
        decoder_layers = layers
        notes.append(f"taken for granted: a decoder of {layers} layers, as many as num_layers; the base model decides")
    if decoder_layers > layers:
        raise ValueError(f"{stored.path}: has {layers} layers, and the decoder of the base model {decoder_layers}")
    used = slots_of_peft(layers, decoder_layers)
    pairs = rows.view(rows.shape[0], layers, -1)[:, used]
    stored.config.sites = ("decoder",)
    stored = stored._replace(
        format="PEFT (encoder-decoder)",
        peft_type=OURS,
        tensors=stored.tensors | {KEY: pairs.flatten(1)},
        sizes={**stored.sizes, "num_layers": decoder_layers, "peft_layers": layers},
        peft_slots=used,
    )
    dead, shared = (stored.of_peft_s_decoder[name] for name in ("dead_slots", "layers_that_share"))
    if dead:
        notes.append(f"slots {dead} of {layers} were never used in PEFT: their parameters are as they started")
    if shared:
        notes.append(f"decoder layers {shared} shared their parameters in PEFT: each has a copy of its own now")
    return stored._replace(notes=notes)


def task_heads_of(names: Iterable[str]) -> tuple[str, ...]:
    """The task heads of which there are parameters among ``names``."""
    return tuple(dict.fromkeys(n.removeprefix(TASK_HEAD).split(".")[0] for n in names if n.startswith(TASK_HEAD)))
