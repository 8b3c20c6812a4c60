"""What the kernels take, made of a Call. No value of a tensor is read, so CUDA graphs can replay what is made here."""

from __future__ import annotations

import torch
from torch import Tensor

from prefix_attn.backends import visibility
from prefix_attn.backends.triton.plan import cdiv
from prefix_attn.backends.triton.primitives import Array, Rows, Scores, _list_tiles
from prefix_attn.call import Call


def array(tensor: Tensor | None) -> Array | None:
    """The tensor and its strides; a prefix that all rows share has a stride of 0 between entries."""
    if tensor is None:
        return None
    batch, head, row = tensor.stride()[:3] if tensor.dim() == 4 else (0, *tensor.stride()[:2])
    # The one row of a packed tensor has a batch index of its own, but no stride of its own.
    return Array(tensor, 0 if tensor.dim() == 4 and tensor.shape[0] == 1 else batch, head, row)


def arrays(call: Call) -> tuple[Array | None, ...]:
    """Query, key, value, prefix_key, prefix_value."""
    prefix: tuple[Tensor | None, ...] = (None, None)
    if call.prefix_key is not None and call.prefix_value is not None and call.prefix_length():
        prefix = call.prefix_key, call.prefix_value
        if not call.has_bank():
            # One small copy where a float32 prefix meets a half-precision model; kernels would round it in every tile,
            # and stage twice the bytes in shared memory. A bank, which may be large, they round themselves.
            prefix = call.prefix_key.to(call.query.dtype), call.prefix_value.to(call.query.dtype)
    return tuple(array(t) for t in (call.query, call.key, call.value, *prefix))


def sinks(call: Call) -> Tensor | None:
    """The sinks, contiguous."""
    return None if call.sinks is None else call.sinks.contiguous()


def rows(call: Call, block_n: int | None = None) -> Rows:
    """``block_n``: of a kernel that walks keys by the list of tiles that hold a visible one."""
    mask = None if call.key_mask is None else call.key_mask.contiguous()
    tiles = before = None
    if mask is not None and block_n is not None:
        B, T = mask.shape
        num = cdiv(T, block_n)
        tiles = torch.empty(B, max(num, 1), dtype=torch.int32, device=mask.device)
        before = torch.empty(B, num + 1, dtype=torch.int32, device=mask.device)
        _list_tiles[(B,)](mask, tiles, before, T, BLOCK_N=block_n, TILES=1024 // block_n, enable_fp_fusion=True)
    ids, lengths, start, keys = (
        None if t is None else t.contiguous()
        for t in (call.prefix_ids, call.prefix_lengths, call.prefix_start, call.key_lengths)
    )
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return Rows(ids, lengths, start, keys, mask, tiles, before, None, None)
    cu_q, cu_k = call.cu_seqlens_q.contiguous(), call.cu_seqlens_k.contiguous()
    return Rows(ids, lengths, start, keys, mask, tiles, before, cu_q, cu_k)


def scores(call: Call) -> Scores:
    """From the product query . key to a probability."""
    scale = call.scale if call.softcap is None else call.scale / call.softcap
    batch, head, row, column = (0, 0, 0, 0) if call.bias is None else call.bias.stride()
    if call.bias is not None and call.bias.shape[0] == 1:
        batch = 0
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
    """What SIZES of ``primitives`` names, in its order; S and T are the largest of packed sequences."""
    Hq, NQ, _ = call.query.shape[1:]
    Hkv, NK = call.key.shape[1:3]
    S, T = NQ, NK
    if call.max_seqlen_q is not None and call.max_seqlen_k is not None:
        S, T = call.max_seqlen_q, call.max_seqlen_k
    N = call.prefix_key.shape[0] if call.prefix_key is not None and call.has_bank() else 1
    return call.batch(), Hkv, Hq // Hkv, S, T, call.prefix_length(), N, NQ, NK


def order(call: Call) -> tuple[Tensor, Tensor]:
    """(bank entries in ascending order, the rows that have them), on the device; -1 for none."""
    return torch.sort(visibility.prefix_entries(call), stable=True)


def grouped(call: Call) -> tuple[Tensor, Tensor]:
    """(rows sorted by bank entry, where each entry's rows begin among them), on the device."""
    assert call.prefix_key is not None
    entries, sorted_rows = order(call)
    bounds = torch.arange(call.prefix_key.shape[0] + 1, device=entries.device)
    return sorted_rows, torch.searchsorted(entries, bounds)
