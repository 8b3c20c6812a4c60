"""The context window of models with tables of positions: refuse rows that do not fit before torch's index error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prefix_attn.hf.attach.ranks import whole


class RowsTooLongError(ValueError, IndexError):
    """A row has more tokens than the model has positions. Without the check torch would raise an IndexError."""


class Tables(TorchFunctionMode):
    """Notes which tables of positions the forwards within the context read: embeddings whose rows are consecutive.

    The forwards must have at least two tokens in their rows, whose ids are consecutive too.
    """

    def __init__(self, *ids: Tensor) -> None:
        """``ids`` are those of the tokens: a table that they index holds words."""
        super().__init__()
        self._ids = ids
        self._first: dict[Tensor, int] = {}  # of each table the row of position 0

    def __torch_function__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Note ``F.embedding``."""
        if function is F.embedding and isinstance(args[0], Tensor):
            self._note(args[0].flatten(), args[1])
        return function(*args, **kwargs or {})

    def _note(self, indices: Tensor, table: Tensor) -> None:
        indices = whole(indices).cpu()
        words = any(torch.equal(indices, ids.flatten().cpu()) for ids in self._ids)
        if not words and len(indices) > 1 and bool((indices.diff() == 1).all()):
            self._first[table] = int(indices[0])

    def positions(self, module: nn.Module) -> int | None:
        """How many positions ``module`` has; None if it has no table of them."""
        own = set(module.parameters()) | set(module.buffers())
        return min((len(table) - first for table, first in self._first.items() if table in own), default=None)


def check_length(tokens: int, virtual: int, positions: int) -> None:
    """Raise a RowsTooLongError if so many tokens after ``virtual`` others do not fit into ``positions``."""
    if tokens + virtual <= positions:
        return
    taken = f" after num_virtual_tokens={virtual}" if virtual else ""
    advice = f"; shorten the rows to {max(positions - virtual, 0)} tokens"
    if virtual:
        advice += ", or take fewer virtual tokens, or a PrefixModel with position_mode='none', where they take no room"
    raise RowsTooLongError(
        f"rows of {tokens} tokens{taken} need {tokens + virtual} positions, and the model has {positions}{advice}"
    )
