"""The positions of a stack's tokens: counted from its mask, and after the prefix with ``position_mode="shift"``.

Stacks number their tokens in one of three ways. Most take ``position_ids``. Models like T5 add a bias to the scores
that depends on the distance between query and key. Models like BART call a module ``embed_positions``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_attn.hf.attach.attention import DISTANCES, Distances
from prefix_attn.hf.attach.banks import grow
from prefix_attn.hf.attach.window import check_length
from prefix_attn.hf.attach.wrapper import device_of


class Positions:
    """How ``stack`` numbers its tokens.

    ``names`` are the names of its arguments. ``embedding`` is its module ``embed_positions``, if that takes the
    positions. ``can_shift`` says whether the tokens can be moved behind a prefix. ``limit`` is the number of positions,
    if the stack has a table of them.
    """

    limit: int | None = None

    def __init__(self, stack: PreTrainedModel) -> None:
        """Inspect ``stack``; it is not run."""
        self.names = list(inspect.signature(stack.forward).parameters)
        self._takes_ids = "position_ids" in self.names
        # RoBERTa and its kin number from padding_idx + 1 on.
        padding = getattr(getattr(getattr(stack, "embeddings", None), "position_embeddings", None), "padding_idx", None)
        self._first = 0 if padding is None else padding + 1
        self._table = next((m for m in stack.modules() if _has_table(m)), None)
        self._distances: dict[nn.Module, Callable[..., Tensor]] = {}
        embedding = None if self._takes_ids else getattr(stack, "embed_positions", None)
        takes_ids = embedding is not None and "position_ids" in inspect.signature(embedding.forward).parameters
        self.embedding = embedding if takes_ids else None
        self.can_shift = self._takes_ids or self._table is not None or self.embedding is not None

    def add(self, module: nn.Module) -> None:
        """``module`` is self-attention of the stack."""
        if self._table is not None:  # most modules have the table of the first
            table = module if _has_table(module) else self._table
            self._distances[module] = cast(Any, table).compute_bias

    def arguments(self, kwargs: dict[str, Any], shift: int | Tensor, longest: int) -> dict[str, Any]:
        """Arguments to add to the stack's ``kwargs``, so that its tokens start at position ``shift``.

        Raises:
            RowsTooLongError: there are fewer positions than tokens and ``longest``, the length of the longest prefix.
        """
        if self._takes_ids:
            given = kwargs.get("position_ids")
            if isinstance(shift, Tensor):
                shift = grow(shift, _tokens(kwargs).shape[0])
            ids = (self._first + from_mask(kwargs) if given is None else given) + shift
            self._check_length(kwargs, longest, ids)
            return {"position_ids": ids}
        self._check_length(kwargs, longest, None)
        if not self._distances or (isinstance(shift, int) and shift == 0):
            return {}
        return {DISTANCES: Distances(past(kwargs) + shift, self._distances)}

    def _check_length(self, kwargs: dict[str, Any], virtual: int, ids: Tensor | None) -> None:
        """Whether the tokens fit behind the ``virtual`` ones. Only rows that may be too long cost a look at ``ids``."""
        if self.limit is None or torch.compiler.is_compiling():
            return
        before = past(kwargs)
        if isinstance(before, Tensor):  # a static cache, which counts on its device, but knows its size
            before = cache_of(kwargs).get_max_length() - _tokens(kwargs).shape[1]
        length = before + _tokens(kwargs).shape[1]
        if length + virtual > self.limit and ids is not None:
            length = int(ids.max()) - self._first + 1 - virtual  # padding takes no position
        check_length(length, virtual, self.limit)


def shifted(embedding: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shift: int | Tensor) -> dict[str, Any]:
    """The keyword arguments of a call of ``Positions.embedding`` for tokens that start at ``shift``."""
    if isinstance(shift, Tensor):
        raise NotImplementedError(
            f"{type(embedding).__name__} moves the tokens of all rows alike, and prefixes of one batch need other "
            "distances; position_mode='none' works"
        )
    positions = kwargs.get("position_ids")
    if positions is None:  # an encoder's: from 0 on
        shape = getattr(args[0], "shape", args[0])
        positions = torch.arange(shape[1], device=device_of(embedding))
    return kwargs | {"position_ids": positions + shift}


def _has_table(module: Any) -> bool:
    return getattr(module, "has_relative_attention_bias", False)


def from_mask(kwargs: dict[str, Any]) -> Tensor:
    """Positions of the new tokens, counted from a 2-D attention mask without its padding, or else from the cache."""
    tokens = _tokens(kwargs)
    length, mask = tokens.shape[1], kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(length, device=tokens.device)[None] + past(kwargs)


def past(kwargs: Mapping[str, Any]) -> int | Tensor:
    """The number of tokens in the cache, as it is now: a static one counts in place."""
    cache = cache_of(kwargs)
    length = 0 if cache is None else cache.get_seq_length()
    return length.clone() if isinstance(length, Tensor) else length


def _tokens(kwargs: dict[str, Any]) -> Tensor:
    """(B, S) ids or (B, S, width) embeddings, whichever the stack was given."""
    embeddings = kwargs.get("inputs_embeds")
    return kwargs["input_ids"] if embeddings is None else embeddings


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model, or None: "past_key_values", and "cache" since transformers 5.24."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def is_packed(kwargs: Mapping[str, Any]) -> bool:
    """Whether rows hold several sequences, which shows in positions that start again.

    Rows with a mask are not packed, as in transformers: padding may have any positions.
    """
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("attention_mask") is not None or cache_of(kwargs) is not None:
        return False
    return not torch.compiler.is_compiling() and bool((positions.diff(dim=-1) < 0).any())
