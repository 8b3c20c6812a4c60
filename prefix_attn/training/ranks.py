"""Measure on the processes of ``torch.distributed`` together, each on its share of the batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


def share(batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """This process's share of ``batches``, each with whether it counts.

    All processes get as many, because the weights of their models may be spread over them. Where there are too few,
    some get one that counts elsewhere. A process alone gets all.
    """
    if not _are_several():
        yield from ((batch, True) for batch in batches)
        return
    rank, ranks, every = torch.distributed.get_rank(), torch.distributed.get_world_size(), list(batches)
    for start in range(0, len(every), ranks):
        counts = start + rank < len(every)
        yield every[start + rank if counts else start], counts


def sums(*values: float, device: torch.device) -> list[float]:
    """The sums of ``values`` over all processes, equal in all of them."""
    if not _are_several():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.tolist()


def _are_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
