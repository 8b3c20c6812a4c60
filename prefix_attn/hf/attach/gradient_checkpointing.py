"""Switch gradient checkpointing on and off, and carry a prefix's gradient through the reentrant kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Bridge(torch.autograd.Function):
    """Passes the gradients of detached leaves on to the graph that the leaves' values came from.

    Reentrant checkpointing runs a backward of its own for each layer. If layers shared a graph (the MLP, the view per
    layer), the first of these would free what the second needs. So the layers see detached leaves. This node sits below
    all layers and therefore runs last, when the leaves have all of their gradients. It also makes the hidden states
    require a gradient, because reentrant checkpointing drops the prefix's gradient otherwise.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, leaves: list[Tensor], *made: Tensor) -> Tensor:
        """The embeddings, unchanged. ``leaves`` are detached copies of ``made``."""
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
    """Switch gradient checkpointing of a model on, reentrant or not, or off (None).

    transformers 5.24 renamed its methods, and warns about the old names.
    """
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if use_reentrant is None:
        getattr(model, f"{kind}_checkpointing_disable")()
    else:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": use_reentrant})
