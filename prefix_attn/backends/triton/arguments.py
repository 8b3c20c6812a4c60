"""What the kernels take, made of a Call. No value of a tensor is read, so CUDA graphs can replay what is made here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefix_attn.backends import visibility
from prefix_attn.backends.triton import direct
from prefix_attn.backends.triton.direct import NO_ROWS
from prefix_attn.backends.triton.plan import cdiv
from prefix_attn.backends.triton.primitives import Array, Rows, Scores, _list_tiles
from prefix_attn.call import Call

Arrays = tuple[Array | None, ...]  # query, key, value, prefix_key, prefix_value


def array(tensor: Tensor | None) -> Array | None:
    """The tensor and its strides; a prefix that all rows share has a stride of 0 between entries."""
    if tensor is None:
        return None
    *batch, head, row, _ = tensor.stride()
    # The one row of a packed tensor has a batch index of its own, but no stride of its own.
    return Array(tensor, batch[0] if batch and tensor.size(0) > 1 else 0, head, row)


def arrays(call: Call) -> Arrays:
    """Query, key, value, prefix_key, prefix_value."""
    prefix: tuple[Tensor | None, ...] = (None, None)
    if call.prefix_key is not None and call.prefix_value is not None and call.prefix_length():
        prefix = call.prefix_key, call.prefix_value
        if not call.has_bank():
            # One small copy where a float32 prefix meets a half-precision model; kernels would round it in every tile,
            # and stage twice the bytes in shared memory. A bank, which may be large, they round themselves.
            prefix = _as(call.prefix_key, call.query.dtype), _as(call.prefix_value, call.query.dtype)
    return array(call.query), array(call.key), array(call.value), array(prefix[0]), array(prefix[1])


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, contiguous."""
    return None if tensor is None else tensor.contiguous()


class Given(NamedTuple):
    """What all kernels of a call take."""

    arrays: Arrays
    rows: Rows
    scores: Scores
    sizes: tuple[int, ...]  # what SIZES of ``primitives`` names, in its order


def given(call: Call) -> Given:
    """The arguments of the call's kernels. ``tiled`` adds what some of them also need."""
    return Given(arrays(call), rows(call), scores(call), sizes(call))


def rows(call: Call) -> Rows:
    """What differs from row to row of the batch."""
    options = call.prefix_ids, call.prefix_lengths, call.prefix_start, call.key_lengths, call.key_mask
    ids, lengths, start, keys, mask = map(contiguous, options)
    cu_q, cu_k = contiguous(call.cu_seqlens_q), contiguous(call.cu_seqlens_k)
    found = Rows(ids, lengths, start, keys, mask, None, None, cu_q, cu_k)
    return NO_ROWS if found.count(None) == len(found) else found


def tiled(rows: Rows, block_n: int) -> Rows:
    """With a key mask the list of the tiles that hold a visible key: for kernels that walk keys by it."""
    if rows.key_mask is None:
        return rows
    mask = rows.key_mask
    B, T = mask.shape
    num = cdiv(T, block_n)
    tiles = torch.empty(B, max(num, 1), dtype=torch.int32, device=mask.device)
    before = torch.empty(B, num + 1, dtype=torch.int32, device=mask.device)
    constants = {"BLOCK_N": block_n, "TILES": 1024 // block_n, "enable_fp_fusion": True}
    direct.launch(_list_tiles, B, (mask, tiles, before), (T,), constants)
    return rows._replace(tiles=tiles, before=before)


def scores(call: Call) -> Scores:
    """From the product query . key to a probability."""
    scale = call.scale if call.softcap is None else call.scale / call.softcap
    batch = head = row = column = None
    if call.bias is not None:
        batch, head, row, column = call.bias.stride()
        batch = batch if call.bias.shape[0] > 1 else 0
    dropout = None if call.seed is None else call.dropout_p
    late = 1 if call.softcap is None and call.bias is None and scale > 0 else None
    return Scores(
        float(scale),
        late,
        call.softcap,
        None if call.window is None else min(call.window, 1 << 30),  # a position plus it stays in 32 bits
        call.bias,
        batch,
        head,
        row,
        column,
        dropout,
        call.seed,
    )


def sizes(call: Call) -> tuple[int, ...]:
    """B, Hkv, G, S, T, P, N, NQ and NK; S and T are the largest of packed sequences."""
    B, Hq, NQ, _ = call.query.shape
    _, Hkv, NK, _ = call.key.shape
    S, T = NQ, NK
    if call.max_seqlen_q is not None and call.max_seqlen_k is not None:
        B, S, T = call.batch(), call.max_seqlen_q, call.max_seqlen_k
    N = call.prefix_key.shape[0] if call.prefix_key is not None and call.has_bank() else 1
    return B, Hkv, Hq // Hkv, S, T, call.prefix_length(), N, NQ, NK


def order(call: Call) -> tuple[Tensor, Tensor]:
    """(bank entries in ascending order, the rows that have them), on the device; -1 for none."""
    return torch.sort(visibility.prefix_entries(call), stable=True)


def grouped(call: Call) -> tuple[Tensor, Tensor]:
    """(rows sorted by bank entry, where each entry's rows begin among them), on the device."""
    assert call.prefix_key is not None
    entries, sorted_rows = order(call)
    bounds = torch.arange(call.prefix_key.shape[0] + 1, device=entries.device)
    return sorted_rows, torch.searchsorted(entries, bounds)
