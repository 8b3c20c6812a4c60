"""Gradient checkpointing: its switch, and the way of a prefix's gradient through the reentrant kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Bridge(torch.autograd.Function):
    """Hands the gradients that gathered on leaves to the graphs that made the leaves' values.

    Reentrant checkpointing runs a backward inside the backward for each layer. Through a shared graph (the MLP, the
    view per layer) the first would free what the second needs; so layers see detached leaves, and this node, whose
    place below all layers makes it run last, passes the leaves' gradients on. It also makes the hidden states require a
    gradient, without which reentrant checkpointing drops the prefix's.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, leaves: list[Tensor], *made: Tensor) -> Tensor:
        """The embeddings, unchanged. ``made`` are what the ``leaves`` are copies of."""
        ctx.leaves = leaves
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the embeddings where wanted, and the leaves'."""
        gathered = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None  # encoder and decoder have a bridge each, from the same leaves
        return grad if ctx.needs_input_grad[0] else None, None, *gathered


def bridge_next(embeddings: nn.Module, bridge: tuple[Any, ...]) -> None:
    """Put a bridge from ``(leaves, *made)`` behind the next call of ``embeddings``."""

    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        handle.remove()
        return Bridge.apply(output, *bridge)

    handle = embeddings.register_forward_hook(hook)


def set_checkpointing(model: Any, *, use_reentrant: bool | None) -> None:
    """Switch gradient checkpointing of a model on, of one kind or the other, or off (None).

    transformers 5.24 gave its methods other names, and warns of the old ones.
    """
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if use_reentrant is None:
        getattr(model, f"{kind}_checkpointing_disable")()
    else:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": use_reentrant})
