"""Fold the MLP of a saved prefix: run it once, on what it was saved with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefix_attn.quoting import quoted

# An MLP may make so many times the numbers that it has: a hostile one of a few kilobytes could ask for any. A prefix
# has P * width of them and the last layer hidden * width: this is P / hidden, and far less where somebody trained it.
_MOST = 64


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
        raise ValueError(f"{path}: {tuple(flat.shape)} numbers are no prefix of length {quoted(length)}")
    return flat.view(length, -1).float()


def _mlp_rows(path: Path, part: Mapping[str, Tensor], activation: Any) -> Tensor:
    """What the MLP makes of the table ``wte``."""
    layers = _mlp_layers(path, part)
    hidden = part["wte.weight"].float()
    if hidden.dim() != 2 or any(w.dim() != 2 or b.shape != w.shape[:1] for w, b in layers):
        raise ValueError(
            f"{path}: an MLP must have matrices, got {quoted({n: tuple(t.shape) for n, t in part.items()})}"
        )
    sizes = [hidden.shape[1], *(w.shape[0] for w, _ in layers)]
    if hidden.shape[0] * max(sizes) > _MOST * sum(t.numel() for t in part.values()):
        raise ValueError(f"{path}: its MLP would make {hidden.shape[0]} x {max(sizes)} numbers, too many for a prefix")
    if any(n != w.shape[1] for n, (w, _) in zip(sizes, layers)):
        raise ValueError(f"{path}: the layers of the MLP do not fit one another: {quoted(list(pairwise(sizes)))}")
    for number, (weight, bias) in enumerate(layers):
        hidden = torch.nn.functional.linear(activation(hidden) if number else hidden, weight, bias)
    return hidden


def _mlp_layers(path: Path, part: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each layer, in the order of their numbers."""
    numbers = sorted({int(n.split(".")[1]) for n in part if re.fullmatch(r"control_trans\.\d{1,3}\.(weight|bias)", n)})
    needed = {f"control_trans.{i}.{kind}" for i in numbers for kind in ("weight", "bias")}
    if not numbers or set(part) != {"wte.weight"} | needed:
        raise ValueError(f"{path}: an MLP must have wte and layers of weight and bias, got {quoted(sorted(part))}")
    return [(part[f"control_trans.{i}.weight"].float(), part[f"control_trans.{i}.bias"].float()) for i in numbers]
