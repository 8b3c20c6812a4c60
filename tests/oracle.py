"""Attention with a prefix by its definition: one query at a time, over a list of the keys that it sees.

Slow, and differentiable in any dtype. Nothing here comes from the package, so its mistakes cannot be repeated here.
Every function takes the arguments of ``prefix_attention`` as one dictionary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def entries(a: dict[str, Any]) -> list[int]:
    """The bank entry of each row; -1 for none. A prefix that all rows share is entry 0 of a bank of one."""
    B = len(a["query"])
    if a["prefix_key"] is None:
        return [-1] * B
    if a.get("prefix_ids") is not None:
        return a["prefix_ids"].tolist()
    shared = a["prefix_key"].dim() == 3 or len(a["prefix_key"]) == 1
    return [0] * B if shared else list(range(B))


def visible(a: dict[str, Any]) -> Tensor:
    """(B, S, P + T) bool: whether query i of row b sees each token of the prefix, then each key of the sequence."""
    B, _, S, _ = a["query"].shape
    T = a["key"].shape[2]
    P = 0 if a["prefix_key"] is None else a["prefix_key"].shape[-2]
    chosen = entries(a)
    names = ("prefix_lengths", "prefix_start", "key_lengths", "key_mask")
    prefix_lengths, starts, key_lengths, mask = (None if a.get(n) is None else a[n].tolist() for n in names)
    is_causal, window = a.get("is_causal", True), a.get("window")

    def position(b: int, i: int) -> int:
        return (T if key_lengths is None else key_lengths[b]) - S + i

    def sees_prefix(b: int, i: int, p: int) -> bool:
        if chosen[b] < 0 or (prefix_lengths is not None and p >= prefix_lengths[chosen[b]]):
            return False
        return starts is None or position(b, i) >= starts[b]

    def sees_key(b: int, i: int, j: int) -> bool:
        if key_lengths is not None and j >= key_lengths[b]:
            return False
        if mask is not None and not mask[b][j]:
            return False
        if is_causal and j > position(b, i):
            return False
        return window is None or position(b, i) - j < window

    rows = [
        [sees_prefix(b, i, p) for p in range(P)] + [sees_key(b, i, j) for j in range(T)]
        for b in range(B)
        for i in range(S)
    ]
    return torch.tensor(rows, dtype=torch.bool, device=a["query"].device).view(B, S, P + T)


def concatenation(a: dict[str, Any], b: int) -> tuple[Tensor, Tensor]:
    """Keys (Hkv, P + T, D) and values (Hkv, P + T, Dv) of row b, in the sequence's dtype."""
    key, value, entry = a["key"][b], a["value"][b], entries(a)[b]
    if a["prefix_key"] is None:
        return key, value
    prefix_key, prefix_value = (t[None] if t.dim() == 3 else t for t in (a["prefix_key"], a["prefix_value"]))
    # Of a row without a prefix any entry will do: none of its tokens is visible.
    parts = ((prefix_key, key), (prefix_value, value))
    joined = [torch.cat([bank[max(entry, 0)].to(own.dtype), own], dim=1) for bank, own in parts]
    return joined[0], joined[1]


def attention(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The output (B, Hq, S, Dv) and the lse (B, Hq, S)."""
    query = a["query"]
    B, Hq, S, _ = query.shape
    Dv, T = a["value"].shape[-1], a["key"].shape[2]
    sees = visible(a)
    P = sees.shape[-1] - T
    nothing = query.flatten()[:0]  # a part of the query, so that there is a graph even without queries
    outs, lses = [nothing.view(0, Dv)], [nothing]
    for b in range(B):
        keys, values = concatenation(a, b)
        for h in range(Hq):
            head = h // (Hq // len(keys))
            for i, q in enumerate(query[b, h].unbind()):
                seen = sees[b, i].nonzero().flatten()
                scores = logits(a, b, h, i, q, keys[head][seen], seen - P)
                out, lse = of_query(a, b, h, scores, values[head][seen], seen < P)
                outs.append(out[None])
                lses.append(lse[None])
    return torch.cat(outs).view(B, Hq, S, Dv), torch.cat(lses).view(B, Hq, S)


def logits(a: dict[str, Any], b: int, h: int, i: int, q: Tensor, keys: Tensor, columns: Tensor) -> Tensor:
    """One for each key: scaled, capped, with its bias. ``columns``: its place among the keys, below 0 in the prefix."""
    scale = a.get("scale")
    scores = (len(q) ** -0.5 if scale is None else scale) * (keys @ q)
    if (cap := a.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if (bias := a.get("bias")) is not None:
        row = bias[b if len(bias) > 1 else 0, h, i]
        scores = torch.cat([scores[columns < 0], scores[columns >= 0] + row[columns[columns >= 0]]])
    return scores


def of_query(
    a: dict[str, Any], b: int, h: int, scores: Tensor, values: Tensor, prefix: Tensor
) -> tuple[Tensor, Tensor]:
    """(Dv,) and the lse of one query. ``prefix``: which of its keys are the prefix's."""
    sink = None if a.get("sinks") is None else a["sinks"][h]
    gate = a.get("prefix_gate")
    if gate is None:
        return average(scores, values, sink)
    out, lse = average(scores[~prefix], values[~prefix], sink)
    other, _ = average(scores[prefix], values[prefix], None)
    return out + (gate[h] if gate.dim() == 1 else gate[b, h]) * other, lse


def average(scores: Tensor, values: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values' average by softmax, and the lse; 0 and -inf where there is nothing to see."""
    there = scores > -math.inf
    scores, values = scores[there], values[there]
    terms = scores if sink is None else torch.cat([scores, sink[None]])
    if not len(terms):
        return values.sum(0), scores.new_full((), -math.inf)
    lse = terms.logsumexp(0)
    return (scores - lse).exp() @ values, lse
