"""The specification: scores materialised, every option, any floating dtype, differentiable any number of times.

    out[i] = sum_j softmax_j(logit[i, j]) v[j],   logit = softcap(scale * q k) + bias,   j over [prefix ; visible keys]

Plain PyTorch on purpose: it concatenates, expands and repeats. Every other backend is tested against it in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.backends import visibility
from prefix_attn.call import Call

NAME = "eager"
PACKED = False


def refuse(call: Call) -> Iterator[str]:
    """Refuses nothing."""
    yield from ()


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call; autograd differentiates it."""
    kind = call.query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):  # it would form the scores in half precision after all
            return forward(call)
    exact = torch.promote_types(call.query.dtype, torch.float32)
    key, value, visible = _concatenate(call)
    # [B, Hq, S, P + T]
    logits = call.query.to(exact) @ key.to(exact).transpose(-1, -2) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if call.bias is not None:
        logits = logits + F.pad(call.bias.to(exact), (call.prefix_length(), 0))
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)

    # The sink is one more column, -inf without sinks, so that every row has a column: none is empty.
    sink = logits.new_full((logits.shape[1],), -torch.inf) if call.sinks is None else call.sinks.to(exact)
    logits = torch.cat([logits, sink[:, None, None].expand(*logits.shape[:-1], 1)], dim=-1)
    # A finite pivot: -inf - -inf would be NaN. The result does not depend on it, so neither does any gradient.
    pivot = logits.detach().amax(-1, keepdim=True)
    pivot = torch.where(pivot == -torch.inf, 0.0, pivot)
    weights = torch.exp(logits - pivot)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, pivot + total.log()).squeeze(-1)
    probabilities = (weights / total)[..., :-1]
    if visible is not None:  # they are 0 there already; their gradients, grad_out . value, need not be finite
        probabilities = probabilities.masked_fill(~visible, 0.0)
    probabilities = F.dropout(probabilities, call.dropout_p)
    return probabilities.to(call.query.dtype) @ value, lse


def _concatenate(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """[prefix ; sequence] keys and values per row and query head, and which of them each query sees."""
    B, Hq, S, _ = call.query.shape
    T, P = call.key.shape[2], call.prefix_length()
    key, value = visibility.without_hidden(call)
    visible = visibility.sequence(call, causal=call.is_causal)
    if call.prefix_key is not None and call.prefix_value is not None:
        prefix_key, prefix_value, prefix_visible = _prefix_of_each_row(call, call.prefix_key, call.prefix_value)
        key = torch.cat([prefix_key.to(key.dtype), key], dim=2)
        value = torch.cat([prefix_value.to(value.dtype), value], dim=2)
        if visible is not None or prefix_visible is not None:
            parts = [(prefix_visible, P), (visible, T)]
            yes = torch.ones((), dtype=torch.bool, device=key.device)
            visible = torch.cat([(yes if m is None else m).expand(B, 1, S, n) for m, n in parts], dim=-1)
    group = Hq // key.shape[1]
    return key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1), visible


def _prefix_of_each_row(call: Call, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, Hkv, P, D), (B, Hkv, P, Dv) and the (B, 1, S or 1, P) mask of what is visible; None = everything."""
    B, P = call.query.shape[0], call.prefix_length()
    rows = visibility.prefix_rows(call)
    visible = None if rows is None else rows[..., None].expand(-1, -1, -1, P)
    if not call.has_bank():
        return key.expand(B, -1, -1, -1), value.expand(B, -1, -1, -1), visible
    entries = visibility.prefix_entries(call)
    lengths = visibility.prefix_lengths(call)
    if lengths is None:
        lengths = torch.full((key.shape[0],), P, device=key.device)
    if key.shape[0] == 0:
        empty = key.new_zeros(B, *key.shape[1:]), value.new_zeros(B, *value.shape[1:])
        return *empty, torch.zeros(B, 1, 1, P, dtype=torch.bool, device=key.device)
    chosen = entries.clamp(min=0)
    limit = torch.where(entries >= 0, lengths[chosen], 0)
    valid = (torch.arange(P, device=key.device) < limit[:, None])[:, None, None]
    key, value = (t[chosen].masked_fill(~valid.mT, 0) for t in (key, value))  # hidden ones may hold anything
    return key, value, valid if visible is None else visible & valid
