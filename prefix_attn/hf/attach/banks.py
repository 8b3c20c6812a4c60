"""Batches whose rows have different prefixes: a bank holds each prefix once, and each row has a number in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.hf.config import PrefixConfig

NO_PREFIX = "__base__"  # among PEFT's adapter_names


class BatchRows(NamedTuple):
    """Which prefix of a bank of N each row of a batch has."""

    ids: Tensor  # (B,) int64, -1 = no prefix
    shifts: Tensor | int  # (B, 1) int64: what is added to the positions of the row's tokens; or 0 for all
    lengths: Tensor  # (N,) int64, of the prefixes


def row_names(
    names: Sequence[str | None] | None, peft_names: Sequence[str | None] | None, *prompts: Tensor | None
) -> Sequence[str | None] | None:
    """The prefix names that a call gives, checked: one for each row of its prompts. None if it gives no names."""
    if names is not None and peft_names is not None:
        raise ValueError("prefix_names and adapter_names say the same: give one of them")
    given = names if peft_names is None else peft_names
    if given is None:
        return None
    if isinstance(given, str) or not all(name is None or isinstance(name, str) for name in given):
        raise TypeError(f"prefix_names must be a list with a name, or None, for each row, got {given!r}")
    rows = next((prompt.shape[0] for prompt in prompts if prompt is not None), 1)
    if len(given) != rows:
        raise ValueError(f"prefix_names must have a name, or None, for each of {rows} rows, got {len(given)}")
    return given if peft_names is None else [None if name == NO_PREFIX else name for name in given]


def make_bank(kvs: Sequence[Tensor]) -> Tensor:
    """(N, 2 * L, H, P, D) from prefixes (2 * L, H, P_n, D), with zeros after those that are shorter than P."""
    longest = max(kv.shape[2] for kv in kvs)
    return torch.stack([F.pad(kv, (0, 0, 0, longest - kv.shape[2])) for kv in kvs])


def make_rows(names: Sequence[str | None], configs: dict[str, PrefixConfig], kvs: Sequence[Tensor]) -> BatchRows:
    """The rows of a batch with prefixes ``names``; ``configs`` and ``kvs`` have the bank's prefixes in its order."""
    places = dict(zip(configs, range(len(configs))))
    rows = [(-1, 0) if name is None else (places[name], configs[name].shift) for name in names]
    ids, shifts = torch.tensor(rows, device=kvs[0].device).split(1, dim=1)
    return BatchRows(
        ids[:, 0],
        shifts if any(shift for _, shift in rows) else 0,
        torch.tensor([kv.shape[2] for kv in kvs], device=kvs[0].device),
    )


def grow(per_row: Tensor, batch: int) -> Tensor:
    """Repeat values per row of a batch for the larger batch that transformers may run.

    Beams and returned sequences repeat each row in place: row r of the larger batch is row r // factor of the batch.
    """
    rows = per_row.shape[0]
    if batch % rows:
        raise ValueError(f"prefix_names or infix_start is for {rows} rows, and the model runs {batch}")
    return per_row if batch == rows else per_row.repeat_interleave(batch // rows, dim=0)
