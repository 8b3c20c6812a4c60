"""The gradient of attention sinks, which needs no kernel: a sink is one more key, whose value is 0."""

from __future__ import annotations

import torch
from torch import Tensor


def grad_sinks(sinks: Tensor, lse: Tensor, share: Tensor, grad_lse: Tensor | None) -> Tensor:
    """-sum over rows of exp(sink - lse) (share - dlse), (Hq,) in the dtype of ``sinks``.

    share: (B, Hq, S), sum over keys of p dp. It equals the sum over Dv of out dout, but for the rounding of out, which
    half precision cannot afford.
    """
    share = share if grad_lse is None else share - grad_lse.to(share.dtype)
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - torch.where(lse == -torch.inf, torch.inf, lse))
    return -(weight * share).sum((0, 2)).to(sinks.dtype)
