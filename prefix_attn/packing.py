"""Packed sequences <-> a batch in which every sequence ends at the right edge."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from prefix_attn.call import check_ids, check_int


class Packed:
    """The layout of B sequences in one packed axis of N tokens, and the way to a batch and back.

    All on the device without synchronisation, and only when asked for: a backend that takes packed sequences needs none
    of it.
    """

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
        check_int(length, max_seqlen, 0)
        N = tokens.shape[0]
        cu_seqlens = cu_seqlens.long()
        lengths = cu_seqlens.diff()
        check_ids(f"lengths in {name}", lengths, 0, max_seqlen)
        check_ids(f"first of {name}", cu_seqlens[:1], 0, 0)
        check_ids(f"last of {name}", cu_seqlens[-1:], N, N)
        self.batch = cu_seqlens.shape[0] - 1
        self.length = max_seqlen if N else 0
        self._tokens = N
        self._cu_seqlens = cu_seqlens

    @cached_property
    def padding(self) -> Tensor:
        """(B,): free places left of each sequence."""
        return self.length - self._cu_seqlens.diff()

    @cached_property
    def present(self) -> Tensor:
        """(B, length): False in free places."""
        return self._places >= self.padding[:, None]

    @cached_property
    def _places(self) -> Tensor:
        return torch.arange(self.length, device=self._cu_seqlens.device)

    @cached_property
    def _source(self) -> Tensor:
        # Free places read token 0: a real one, so that what they hold is finite. It is masked, and gets no gradient.
        token = self._cu_seqlens[:-1, None] + self._places - self.padding[:, None]
        return torch.where(self.present, token, 0).flatten()

    @cached_property
    def _target(self) -> Tensor:
        token = torch.arange(self._tokens, device=self._cu_seqlens.device)
        if not self._tokens:
            return token
        row = torch.searchsorted(self._cu_seqlens[1:], token, right=True).clamp(max=self.batch - 1)
        return row * self.length + self.padding[row] + token - self._cu_seqlens[row]

    def pad(self, tokens: Tensor) -> Tensor:
        """(N, H, D) -> (B, H, length, D), a view of (B, length, H, D)."""
        batch = tokens.index_select(0, self._source)
        return batch.view(self.batch, self.length, *tokens.shape[1:]).transpose(1, 2)

    def unpad(self, batch: Tensor) -> Tensor:
        """(B, H, length, D) -> (N, H, D)."""
        return batch.transpose(1, 2).flatten(0, 1).index_select(0, self._target)
