"""The positions of a stack's tokens: counted from its mask, and after the prefix with ``position_mode="shift"``.

Stacks number their tokens in one of three ways. Most take ``position_ids``. Models like T5 add a bias to the scores
that depends on the distance between query and key. Models like BART call a module ``embed_positions``.

Models of images and text are a model around the stack of their text. Some of them make masks or positions before the
stack is called. The stack's own arguments do not show the padding then, and ``Outer`` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_attn.hf.attach.attention import DISTANCES, Distances
from prefix_attn.hf.attach.banks import grow
from prefix_attn.hf.attach.window import check_length
from prefix_attn.hf.attach.wrapper import device_of


class Outer(NamedTuple):
    """What the whole model was called with.

    ``numbered`` says whether it was given positions. If not, those that a stack is given were made in between.
    ``reads_ids`` says whether it was given token ids.
    """

    mask: Tensor | None = None  # (B, T)
    numbered: bool = False
    reads_ids: bool = False


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
        # The position of all padding in stacks that do not number it like other tokens: OPT's kin, and RoBERTa's.
        counts = getattr(getattr(stack, "embed_positions", None), "forward", None)
        masked = counts is not None and "attention_mask" in inspect.signature(counts).parameters
        self._padding = -1 if masked else padding
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

    def arguments(self, kwargs: dict[str, Any], shift: int | Tensor, longest: int, outer: Outer) -> dict[str, Any]:
        """Arguments to add to the stack's ``kwargs``, so that its tokens start at position ``shift``.

        Raises:
            RowsTooLongError: there are fewer positions than tokens and ``longest``, the length of the longest prefix.
        """
        if self._takes_ids:
            if isinstance(shift, Tensor):
                shift = grow(shift, _tokens(kwargs).shape[0])
            ids = self._numbers(kwargs, shift, outer)
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

    def _numbers(self, kwargs: dict[str, Any], shift: int | Tensor, outer: Outer) -> Tensor:
        """(B, S), or (3, B, S) where a token of an image has three: the positions of the tokens."""
        given = kwargs.get("position_ids")
        if given is not None and outer.numbered:
            return given + shift
        first: int | Tensor = self._first + shift
        if given is not None and given.dim() == 2 and given.shape[0] == 1:  # all rows alike: padding was counted
            first = given[:, :1] - past(kwargs) + shift
        # Without ids a model like Qwen2-VL goes on from the images of an earlier batch.
        elif given is not None and (given.dim() == 2 or outer.reads_ids or past(kwargs) != 0):
            return given[..., -_tokens(kwargs).shape[1] :] + shift  # from a mask that covers the cache too
        mask = mask_of(kwargs, outer.mask)
        positions = first + from_mask(kwargs, mask)
        if mask is None or positions.shape[1] == 1:
            return positions
        last = positions if self.limit is None else positions.clamp(max=self._first + self.limit - 1)
        padding = last if self._padding is None else self._padding
        return torch.where(mask[:, -positions.shape[1] :].to(positions.device).bool(), positions, padding)


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


def mask_of(kwargs: Mapping[str, Any], outer: Tensor | None = None) -> Tensor | None:
    """The 2-D attention mask: the stack's own, or ``outer``, the whole model's, if the stack has another form of it."""
    mask = kwargs.get("attention_mask")
    ids = kwargs.get("input_ids")
    if isinstance(mask, Tensor) and ids is not None and mask.dim() == ids.dim() == 3:  # rows of choices
        return mask.flatten(0, 1)
    return mask if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2) else outer


def from_mask(kwargs: Mapping[str, Any], mask: Tensor | None) -> Tensor:
    """Positions of the new tokens, from 0 on, counted from a 2-D mask (B, T) without its padding, or from the cache.

    Padding after a row's last token is counted, as it is in transformers: a head for question answering reads it.
    """
    tokens = _tokens(kwargs)
    length = tokens.shape[1]
    if mask is None:
        return torch.arange(length, device=tokens.device)[None] + past(kwargs)
    mask = mask.to(tokens.device)
    count = mask.long().cumsum(-1)
    if length > 1:
        count = count + ((count == count[:, -1:]) & (mask == 0)).cumsum(-1)
    return (count - 1).clamp(min=0)[:, -length:]


def past(kwargs: Mapping[str, Any]) -> int | Tensor:
    """The number of tokens in the cache, as it is now: a static one counts in place."""
    cache = cache_of(kwargs)
    length = 0 if cache is None else cache.get_seq_length()
    return length.clone() if isinstance(length, Tensor) else length


def _tokens(kwargs: Mapping[str, Any]) -> Tensor:
    """(B, S) ids or (B, S, width) embeddings, whichever the stack was given.

    GPT-2's takes ids (B, choices, S) too, as rows of their own.
    """
    embeddings = kwargs.get("inputs_embeds")
    return kwargs["input_ids"].flatten(0, -2) if embeddings is None else embeddings


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
    return not torch.compiler.is_compiling() and starts_again(positions)


def starts_again(positions: Tensor) -> bool:
    """Whether positions (..., B, S) start again within a row.

    Tokens of images have three positions, which do so with each line of the image. Those of the text may come before.
    """
    if positions.dim() == 3:
        positions = positions[: len(positions) - 3]
    return bool((positions.diff(dim=-1) < 0).any())
