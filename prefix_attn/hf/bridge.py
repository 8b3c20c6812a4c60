"""The way of a prefix's gradient through reentrant gradient checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Bridge(torch.autograd.Function):
    """Hands the gradient that gathered on a leaf to the graph that made the leaf's values.

    Reentrant checkpointing runs a backward inside the backward for each layer. Through a shared graph (the MLP, the
    view per layer) the first would free what the second needs; so layers see a detached leaf, and this node, whose
    place below all layers makes it run last, passes the leaf's gradient on. It also makes the hidden states require a
    gradient, without which reentrant checkpointing drops the prefix's.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, kv: Tensor, leaf: Tensor) -> Tensor:
        """The embeddings, unchanged."""
        ctx.leaf = leaf
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradient of the embeddings where wanted, and the leaf's."""
        gathered, ctx.leaf.grad = ctx.leaf.grad, None  # encoder and decoder have a bridge each, from the same leaf
        return grad if ctx.needs_input_grad[0] else None, gathered, None


def bridge_next(embeddings: nn.Module, bridge: tuple[Tensor, Tensor]) -> None:
    """Put a bridge from ``(kv, leaf)`` behind the next call of ``embeddings``."""

    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        handle.remove()
        return Bridge.apply(output, *bridge)

    handle = embeddings.register_forward_hook(hook)
