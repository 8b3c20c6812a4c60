"""Packed sequences <-> a batch in which every sequence ends at the right edge."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefix_attn.call import Call, as_int, check_ids


class Packed:
    """B sequences in one packed axis of N tokens, checked. A backend that takes them as they lie needs no more."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, tokens: Tensor, suffix: str) -> None:
        """``tokens`` is (N, H, D); ``suffix`` ("q" or "k") names the arguments in errors."""
        name, length = f"cu_seqlens_{suffix}", f"max_seqlen_{suffix}"
        owner = {"q": "query", "k": "key"}[suffix]
        if not isinstance(tokens, Tensor) or not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"{owner} and {name} must be tensors")
        if tokens.dim() != 3:
            raise ValueError(f"{owner} must be (N{suffix}, heads, D), got {tuple(tokens.shape)}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be torch.int32 or torch.int64, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"{name} must be (B + 1,), got {tuple(cu_seqlens.shape)}")
        if cu_seqlens.device != tokens.device:
            raise ValueError(f"{name} must be on {owner}'s device {tokens.device}, got {cu_seqlens.device}")
        self.max_seqlen = as_int(length, max_seqlen, 0)
        self.batch = cu_seqlens.shape[0] - 1
        self._cu_seqlens, self._tokens = cu_seqlens.long(), tokens.shape[0]
        check_ids(f"lengths in {name}", self._cu_seqlens.diff(), 0, self.max_seqlen)
        check_ids(f"first of {name}", self._cu_seqlens[:1], 0, 0)
        check_ids(f"last of {name}", self._cu_seqlens[-1:], self._tokens, self._tokens)

    def padding(self) -> Padding:
        """The way to a batch and back. On the device, without synchronisation.

        Values that could not be checked are clamped: nothing out of bounds is read.
        """
        N, length = self._tokens, self.max_seqlen if self._tokens else 0
        cu = self._cu_seqlens.clamp(0, N).cummax(0).values
        starts, counts = cu[:-1], cu.diff().clamp(0, length)
        free = length - counts
        places = torch.arange(length, device=cu.device)
        present = places >= free[:, None]
        # Free places read token 0: a real one, so that what they hold is finite. It is masked, and gets no gradient.
        source = torch.where(present, starts[:, None] + places - free[:, None], 0)
        return Padding(free, present, source, cu, N)


class Padding(NamedTuple):
    """Where the N tokens of B sequences stand in a batch of rows of one length."""

    free: Tensor  # (B,) places left of each sequence
    present: Tensor  # (B, length) False in free places
    source: Tensor  # (B, length) the token of each place
    bounds: Tensor  # (B + 1,) where each sequence begins
    tokens: int  # N

    def pad(self, tokens: Tensor) -> Tensor:
        """(N, H, D) -> (B, H, length, D), a view of (B, length, H, D)."""
        batch = tokens.index_select(0, self.source.flatten())
        return batch.view(*self.source.shape, *tokens.shape[1:]).transpose(1, 2)

    def targets(self) -> tuple[Tensor, Tensor]:
        """(N,) the place of each token, and False for a token of no sequence."""
        batch, length = self.present.shape
        token = torch.arange(self.tokens, device=self.free.device)
        if not self.tokens or not batch:
            return token, token < 0
        row = torch.searchsorted(self.bounds[1:].contiguous(), token, right=True).clamp(max=batch - 1)
        step = token - self.bounds[row]
        within = (step >= 0) & (step < length - self.free[row])
        return torch.where(within, row * length + self.free[row] + step, 0), within

    def unpad(self, *batches: tuple[Tensor, float]) -> list[Tensor]:
        """Each (B, H, length, D) -> (N, H, D), with the number beside it for the tokens of no sequence."""
        target, within = self.targets()
        flat = [(batch.transpose(1, 2).flatten(0, 1), fill) for batch, fill in batches]
        if not self.present.numel() and self.tokens:  # tokens, and no sequence
            return [t.new_full((self.tokens, *t.shape[1:]), fill) for t, fill in flat]
        return [t.index_select(0, target).masked_fill(~within[:, None, None], fill) for t, fill in flat]


def padded(call: Call, queries: Padding, keys: Padding) -> Call:
    """A packed call as a batch. Each sequence ends at the right edge, from where causality and windows count."""
    start = call.prefix_start
    return call._replace(
        query=queries.pad(call.query[0].transpose(0, 1)),
        key=keys.pad(call.key[0].transpose(0, 1)),
        value=keys.pad(call.value[0].transpose(0, 1)),
        prefix_start=None if start is None else start + keys.free,
        key_mask=keys.present,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
    )
