"""What fused backends return, and what an lse rounded to float32 takes away from it."""

from __future__ import annotations

import torch
from torch import Tensor

from prefix_attn.call import Call


def empty_like(call: Call, tensor: Tensor, size: int) -> Tensor:
    """``tensor`` with a last dimension of ``size``, in the memory order (B, S, H, D), which models reshape for free.

    Zeros where sequences are packed: nobody writes the tokens behind a ``cu_seqlens`` that ends too early.
    """
    B, H, S, _ = tensor.shape
    if call.cu_seqlens_q is None:
        return tensor.new_empty_strided((B, H, S, size), (S * H * size, size, H * size, 1))
    return tensor.new_zeros(B, S, H, size).transpose(1, 2)


def rescaled(grad_out: Tensor, grad_lse: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of out and lse, times ``factor`` (B, Hq, S) = 1 / sum_j exp(logit_j - lse).

    The sum is 1, unless every key of a query has a large bias. With finfo.min on T keys all logits are finfo.min. So is
    the lse, which has lost log T, and a backward pass takes each p for 1 instead of for 1 / T. The gradients that it
    returns are linear in those that it is given, so this factor makes them right.
    """
    scaled = (grad_out * factor[..., None]).to(grad_out.dtype)
    return scaled, None if grad_lse is None else (grad_lse * factor).to(grad_lse.dtype)


def grad_sinks(sinks: Tensor, lse: Tensor, share: Tensor, grad_lse: Tensor | None) -> Tensor:
    """-sum over rows of exp(sink - lse) (share - dlse), (Hq,) in the dtype of ``sinks``.

    It needs no kernel: a sink is one more key, whose value is 0.

    share: (B, Hq, S), sum over keys of p dp. It equals the sum over Dv of out dout, but for the rounding of out, which
    half precision cannot afford.
    """
    share = share if grad_lse is None else share - grad_lse.to(share.dtype)
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - torch.where(lse == -torch.inf, torch.inf, lse))
    return -(weight * share).sum((0, 2)).to(sinks.dtype)
