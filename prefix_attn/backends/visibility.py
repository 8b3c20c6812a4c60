"""Which keys a query sees: the rules of masks, windows and lengths, as boolean tensors. True = visible.

Query i of row b sits at position ``length[b] - S + i``, with length ``key_lengths`` or T: bottom-right aligned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefix_attn.call import Call


def positions(call: Call) -> Tensor:
    """(B or 1, S) int64: where each query sits among the sequence's keys."""
    S, T = call.query.shape[2], call.key.shape[2]
    steps = torch.arange(S, device=call.query.device)[None]
    if call.key_lengths is None:
        return steps + (T - S)
    return steps + (_lengths(call)[:, None] - S)


def sequence(call: Call, *, causal: bool) -> Tensor | None:
    """(B or 1, 1, S or 1, T): sequence keys that each query sees; None when it sees all of them.

    ``causal`` is apart from the call so that a kernel with a causal flag of its own can leave that rule out.
    """
    columns = torch.arange(call.key.shape[2], device=call.query.device)
    rules = []
    if causal or call.window is not None:
        rows = positions(call)[:, None, :, None]  # [B or 1, 1, S, 1]
        if causal:
            rules.append(columns <= rows)
        if call.window is not None:
            rules.append(rows - columns < call.window)
    if call.key_lengths is not None:
        rules.append(columns < _lengths(call)[:, None, None, None])
    if call.key_mask is not None:
        rules.append(call.key_mask[:, None, None, :])
    if not rules:
        return None
    visible = rules[0]
    for rule in rules[1:]:
        visible = visible & rule
    return visible


def without_hidden(call: Call) -> tuple[Tensor, Tensor]:
    """Key and value, with 0 where ``key_lengths`` and ``key_mask`` hide a key from every query of its row.

    Masked scores are not enough: a probability of 0 times a NaN or inf is NaN, and static caches are full of them.
    """
    rules = []
    if call.key_lengths is not None:
        rules.append(torch.arange(call.key.shape[2], device=call.key.device) >= _lengths(call)[:, None])
    if call.key_mask is not None:
        rules.append(~call.key_mask)
    if not rules:
        return call.key, call.value
    hidden = (rules[0] if len(rules) == 1 else rules[0] | rules[1])[:, None, :, None]
    return call.key.masked_fill(hidden, 0), call.value.masked_fill(hidden, 0)


def sequence_rows(call: Call) -> Tensor | None:
    """(B or 1, 1, S): queries that see at least one sequence key; None when every query does. Ignores ``bias``.

    Counts instead of looking at all S * T pairs: O(B * (S + T)).
    """
    B, _, S, _ = call.query.shape
    T = call.key.shape[2]
    if call.key_mask is None and call.key_lengths is None and (not call.is_causal or S <= T):
        return None
    columns = torch.arange(T, device=call.query.device)
    present = torch.ones(B, T, dtype=torch.bool, device=call.query.device) if call.key_mask is None else call.key_mask
    if call.key_lengths is not None:
        present = present & (columns < _lengths(call)[:, None])
    before = torch.nn.functional.pad(present.cumsum(-1), (1, 0))  # [B, T + 1] visible keys before each column
    rows = positions(call).expand(B, S)
    last = (rows + 1).clamp(0, T) if call.is_causal else torch.full_like(rows, T)
    first = torch.zeros_like(rows) if call.window is None else (rows - call.window + 1).clamp(0, T)
    return (before.gather(1, last) > before.gather(1, first))[:, None]


def prefix_rows(call: Call) -> Tensor | None:
    """(B, 1, S): queries that see the prefix at all (``prefix_start``); None when every query does."""
    if call.prefix_start is None:
        return None
    return (positions(call) >= call.prefix_start[:, None])[:, None]


def prefix_entries(call: Call) -> Tensor:
    """(B,) int64: the bank entry of each row, -1 for none. An id out of range counts as -1."""
    assert call.prefix_key is not None
    B, N = call.batch(), call.prefix_key.shape[0]
    device = call.query.device
    if call.prefix_ids is None:
        return torch.zeros(B, dtype=torch.int64, device=device) if N == 1 else torch.arange(B, device=device)
    ids = call.prefix_ids.long()
    return torch.where((ids >= 0) & (ids < N), ids, -1)


def prefix_lengths(call: Call) -> Tensor | None:
    """(N,) int64: valid length of each bank entry, clamped to 0..P; None when all are full."""
    return None if call.prefix_lengths is None else call.prefix_lengths.long().clamp(0, call.prefix_length())


def _lengths(call: Call) -> Tensor:
    assert call.key_lengths is not None
    return call.key_lengths.long().clamp(0, call.key.shape[2])
