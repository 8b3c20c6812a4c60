"""Sequences one behind the other in a row, for the operator's packed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefix_attn.functional import prefix_attention_varlen


class Sequences:
    """Where the sequences of a batch of packed rows begin and end."""

    def __init__(self, position_ids: Tensor) -> None:
        """``position_ids`` is (B, S). A sequence begins where it does not go on by one, as transformers sees it."""
        begins = torch.ones_like(position_ids, dtype=torch.bool)
        begins[:, 1:] = position_ids.diff(dim=-1) != 1
        starts = begins.flatten().nonzero().flatten()
        self.rows, self.length = position_ids.shape
        self.cu_seqlens = torch.cat([starts, starts.new_tensor([begins.numel()])]).int()
        self.longest = int(self.cu_seqlens.diff().max())
        self._begins = begins
        self._seen: list[tuple[Tensor, bool]] = []

    def are_all_of(self, mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
        """Whether ``mask`` (B, 1, S, S) says nothing but that each sequence is causal, and on its own.

        Windows say more, unless they are longer than all sequences. Each mask of a forward is compared once.
        """
        B, _, S, _ = query.shape
        if mask is None or mask.dtype != torch.bool or (B, S, key.shape[2]) != (self.rows, self.length, self.length):
            return False
        for seen, verdict in self._seen:
            if seen is mask:
                return verdict
        number = self._begins.cumsum(-1).to(mask.device)
        causal = torch.ones(S, S, dtype=torch.bool, device=mask.device).tril_()
        wanted = (number[:, None, :, None] == number[:, None, None, :]) & causal
        self._seen.append((mask, mask.shape == wanted.shape and bool((mask == wanted).all())))
        return self._seen[-1][1]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *prefix: Tensor | None, **options: Any) -> Tensor:
        """``prefix_attention`` of rows (B, H, S, D) whose mask is as ``are_all_of`` has it."""
        packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
        cu_seqlens = self.cu_seqlens.to(query.device)
        lengths: dict[str, Any] = {"max_seqlen_q": self.longest, "max_seqlen_k": self.longest}
        out = prefix_attention_varlen(
            *packed, *prefix, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **lengths, **options
        )
        return out.unflatten(0, (self.rows, self.length)).transpose(1, 2)
