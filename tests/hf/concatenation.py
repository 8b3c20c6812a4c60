"""Prefixes by plain concatenation, independent of the project: for models whose attention modules are known by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

# The prefix of each attention module: key and value (H, P, D), bias (1, H, S, P) for a query length S or None.
_prefixes: dict[nn.Module, tuple[Tensor, Tensor, Any]] = {}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    B, _, S, D = query.shape
    logits = query @ key.mT * (D**-0.5 if scaling is None else scaling)
    logits = logits if position_bias is None else logits + position_bias
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, -torch.inf)
    if module in _prefixes:
        prefix_key, prefix_value, bias = _prefixes[module]
        before = query @ prefix_key.mT * (D**-0.5 if scaling is None else scaling)
        logits = torch.cat([before if bias is None else before + bias(S), logits], dim=-1)
        value = torch.cat([prefix_value.expand(B, -1, -1, -1), value], dim=2)
    return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def _mask(**arguments: Any) -> Tensor:
    mask = sdpa_mask(**arguments | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    assert mask is not None
    return mask


AttentionInterface.register("concatenation", _attention)
AttentionMaskInterface.register("concatenation", _mask)


@contextmanager
def concatenation(base: PreTrainedModel, prefixes: Mapping[nn.Module, tuple[Tensor, Tensor, Any]]) -> Iterator[None]:
    """Within the context, attention modules of ``base`` concatenate these prefixes."""
    configs = [m.config for m in base.modules() if isinstance(m, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "concatenation"
    _prefixes.update(prefixes)
    try:
        yield
    finally:
        _prefixes.clear()
        for config, implementation in zip(configs, before):
            config._attn_implementation = implementation
