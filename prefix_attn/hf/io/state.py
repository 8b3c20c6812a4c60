"""Prefixes in a state_dict of ``PrefixModel``: what Trainers, accelerate, Lightning and torch.save leave.

    model.safetensors, pytorch_model.bin    Trainer's, accelerate's; or their shards, which an index lists
    *.ckpt                                  Lightning's: the state_dict is an entry
    any other name                          torch.save's and safetensors'

Names end in ``prefixes.NAME.`` and a parameter of ``PrefixEncoder``, in ``heads.NAME.`` and one of a task head, or in
``base_model.`` and a weight of the base model that was trained too. What stands before is the same in all: the place of
the model in a larger one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefix_attn.hf.config import UNSHOWN_FIELDS, PrefixConfig
from prefix_attn.hf.encoder import ACTIVATIONS, UNSHOWN, read_unshown
from prefix_attn.hf.io import files
from prefix_attn.hf.io.mlp import fold
from prefix_attn.hf.io.stored import GATE, KEY, TASK_HEAD, Stored
from prefix_attn.quoting import quoted, shortened

STATES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
BASE = "base_model."
_WRAPPERS = re.compile(r"\b_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
_PARAMETER = re.compile(rf"(|.*\.)prefixes\.([^.]+)\.(embedding|gate|frozen|mlp\..+|{UNSHOWN})")


def plain_name(name: Any) -> str:
    """The name of an entry of a state_dict without those of wrappers: compiled, FSDP's, DDP's."""
    return _WRAPPERS.sub("", str(name)).removeprefix("module.")


def is_state(names: Iterable[Any]) -> bool:
    """Whether the entries of these names are a state_dict with prefixes."""
    return any(_PARAMETER.fullmatch(str(name)) for name in names)


def find_state(content: Any) -> Mapping[str, Any] | None:
    """The state_dict with prefixes in the content of a file: all of it, or one of its entries."""
    if not isinstance(content, Mapping):
        return None
    entries = (content, *(entry for entry in content.values() if isinstance(entry, Mapping)))
    return next((entry for entry in entries if is_state(entry)), None)


def read_state_file(path: Path) -> dict[str, Stored]:
    """The prefixes in a safetensors file, in the shards that an index lists, or in a file of torch.save.

    Raises:
        ValueError: there are none, or the file is damaged.
    """
    content = read_entries(path)
    state = find_state(content)
    if state is None:
        found = quoted(sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__)
        raise ValueError(f"{path}: a state_dict of a PrefixModel has prefixes.NAME.embedding, this file has {found}")
    return read_state(path, state)


def read_entries(path: Path) -> Any:
    """What is in a file of tensors, or in the shards that an index lists."""
    return _shards(path) if path.suffix == ".json" else _content(path)


def read_state(path: Path, state: Mapping[str, Any]) -> dict[str, Stored]:
    """The prefixes in a state_dict by their names; ``path`` is where it was read.

    Raises:
        ValueError: it is damaged, or holds more than one model.
    """
    plain = {plain_name(name): entry for name, entry in state.items()}
    matches = [match for name in plain if (match := _PARAMETER.fullmatch(name))]
    places = sorted({match[1] for match in matches})
    if len(places) > 1:
        raise ValueError(
            f"{path}: has prefixes of several models, at {quoted(places)}; save the state_dict of one of them"
        )
    inside = {name.removeprefix(places[0]): entry for name, entry in plain.items() if name.startswith(places[0])}
    names = dict.fromkeys(match[2] for match in matches)
    others = {name: _backed(path, name, entry) for name, entry in inside.items() if name.startswith(BASE)}
    return {name: _stored(path, name, inside, others) for name in names}


def check_same(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Refuse to go on from the state ``there`` with a model whose own is ``here``.

    A Trainer loads of a state what fits, and would go on from a part of a prefix or from none.

    Raises:
        ValueError: there are other prefixes, or one is of another kind or size.
    """
    ours, theirs = ({m[2] for n in names if (m := _PARAMETER.fullmatch(n))} for names in (here, there))
    if ours != theirs:
        raise ValueError(f"the state has prefixes {quoted(sorted(theirs))}, and the model {sorted(ours)}")
    for name in sorted(ours):
        (shapes, fields), (their_shapes, their_fields) = (_kind(name, entries) for entries in (here, there))
        if shapes == their_shapes and fields == their_fields:
            continue
        pairs = {f: (their_fields.get(f, "default"), fields.get(f, "default")) for f in {**their_fields, **fields}}
        if all(there == here for there, here in pairs.values()):
            pairs = {n: (their_shapes.get(n), shapes.get(n)) for n in {**their_shapes, **shapes}}
        said = "; ".join(f"{n} is {there} there and {here} here" for n, (there, here) in pairs.items() if there != here)
        raise ValueError(
            f"the state is of another prefix {quoted(name)}, or of another base model: {shortened(said, 1000)}"
        )


def _kind(name: str, state: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """The shapes of a prefix and its task heads, and the fields of its configuration that its state tells."""
    begins = f"prefixes.{name}.", f"heads.{name}."
    part = {n.removeprefix(begins[0]): entry for n, entry in state.items() if n.startswith(begins[0])}
    heads = {n.removeprefix(begins[1]): entry for n, entry in state.items() if n.startswith(begins[1])}
    entry = part.pop(UNSHOWN, None)
    shapes = {n: tuple(t.shape) for n, t in {**part, **heads}.items()}
    told = {} if entry is None else read_unshown(entry)
    return shapes, _shown(Path(begins[0]), part, heads) | told


def _stored(path: Path, name: str, state: Mapping[str, Any], others: Mapping[str, Tensor]) -> Stored:
    begin, head = f"prefixes.{name}.", f"heads.{name}."
    part = {n.removeprefix(begin): entry for n, entry in state.items() if n.startswith(begin)}
    entry = part.pop(UNSHOWN, None)
    part = {n: _backed(path, begin + n, entry) for n, entry in part.items()}
    files.check_total(path, part.values())
    heads = {n.removeprefix(head): _backed(path, n, t) for n, t in state.items() if n.startswith(head)}
    shown = _shown(path, part, heads)
    try:
        told = {} if entry is None else read_unshown(entry)
        if unknown := sorted(told.keys() - set(UNSHOWN_FIELDS)):
            raise ValueError(f"{UNSHOWN} has unknown fields {quoted(unknown)}")
        config = PrefixConfig.from_dict(shown | told)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path}: {shortened(begin)}{shortened(error)}") from None
    tensors = {TASK_HEAD + n: t for n, t in heads.items()}
    if config.mode != "embedding":  # of embeddings only the model makes keys and values
        tensors[KEY] = _rows(path, part, config)
    if "gate" in part:
        tensors[GATE] = part["gate"]
    return Stored("state_dict", path, config, tensors, training=part, others=others)


def _shown(path: Path, part: Mapping[str, Tensor], heads: Iterable[str]) -> dict[str, Any]:
    """The fields of the configuration that the shapes show."""
    embedding = part.get("embedding")
    if embedding is None or embedding.dim() != 2:
        raise ValueError(f"{path}: has {quoted(sorted(part))} of a prefix, and no embedding (P, width)")
    frozen = part["frozen"].shape[0] if "frozen" in part else 0
    weights = [t for n, t in part.items() if n.startswith("mlp.") and n.endswith(".weight")]
    return {
        "num_virtual_tokens": embedding.shape[0] + frozen,
        "num_frozen_tokens": frozen,
        "prefix_projection": bool(weights),
        "encoder_hidden_size": part["mlp.0.weight"].shape[0] if "mlp.0.weight" in part else None,
        "encoder_depth": max(len(weights) - 1, 1),
        "gate": "zero" if "gate" in part else None,
        "modules_to_save": tuple(dict.fromkeys(n.split(".")[0] for n in heads)),
    }


def _rows(path: Path, part: Mapping[str, Tensor], config: PrefixConfig) -> Tensor:
    """(P, 2 * slots * H * D) float32: what is stored of a prefix once its MLP is folded."""
    rows = part["embedding"].float()
    if config.prefix_projection:
        mlp = {n.replace("mlp", "control_trans", 1): t for n, t in part.items() if n.startswith("mlp.")}
        activation = ACTIVATIONS[config.encoder_activation]()
        rows = fold(path, {"wte.weight": rows, **mlp}, None, activation)
    return torch.cat([part["frozen"].float(), rows]) if "frozen" in part else rows


def _content(path: Path) -> Any:
    return files.read_tensors(path) if path.suffix == ".safetensors" else files.read_pickle(path)


def _backed(path: Path, name: str, entry: Any) -> Tensor:
    if path.suffix == ".json":  # its shards were checked one by one
        return entry
    return files.backed(path, name, entry, floating=not name.startswith(BASE))


def _shards(index: Path) -> dict[str, Any]:
    """The entries of all files that an index of shards lists."""
    listed = files.read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index}: must list the file of each tensor in weight_map")
    if outside := [n for n in listed.values() if Path(n).name != n or not n.isprintable() or len(n) > 255]:
        raise ValueError(f"{index}: lists files outside of its folder: {quoted(outside[:4])}")
    found: dict[str, Any] = {}
    for name in dict.fromkeys(listed.values()):
        content = _content(index.parent / name)
        if not isinstance(content, Mapping):
            raise ValueError(f"{index.parent / name}: must hold tensors by name, got {type(content).__name__!r}")
        found |= {n: files.backed(index.parent / name, n, t, floating=False) for n, t in content.items()}
    if missing := sorted(listed.keys() - found.keys()):
        raise ValueError(f"{index}: lists {quoted(missing[:4])}, which its files do not hold")
    return found
