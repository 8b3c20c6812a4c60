"""From a Call to launches: strides, tiles, buffers. No value of a tensor is read here, so CUDA graphs can replay it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefix_attn.backends import visibility
from prefix_attn.backends.outputs import empty_like, grad_sinks, rescaled
from prefix_attn.backends.triton import interpreter
from prefix_attn.backends.triton.attend import _forward
from prefix_attn.backends.triton.decode import _fold_prefix, _split_keys
from prefix_attn.backends.triton.prefix_grad import _grad_prefix, _sum_splits
from prefix_attn.backends.triton.primitives import Array, Rows, Scores, _list_tiles
from prefix_attn.backends.triton.query_grad import _delta, _grad_query
from prefix_attn.backends.triton.sequence_grad import _grad_sequence
from prefix_attn.backends.triton.table import architecture, processors, table, tile
from prefix_attn.call import Call

if interpreter.ACTIVE:
    interpreter.repair()

# Options that take registers. One of _FEW alone takes few, and the call runs with the table's "*" entries. With two of
# them, or any of _MANY, it runs with the smaller tiles of the "+" entries.
_FEW = ("prefix_ids", "prefix_start", "key_lengths", "key_mask", "window")
_MANY = ("bias", "cu_seqlens_q", "seed", "softcap")
SPLIT_KEYS = 128  # a run of fewer costs more in the sum of the runs than it saves
MAX_DECODE_QUERIES = 16  # per head; more fill a tile of their own, and causal skipping pays


def _cdiv(a: int, b: int) -> int:  # triton.cdiv takes 2 us on the host, twenty times in a training step
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def max_decode_rows(itemsize: int, size: int) -> int:
    """How many queries times heads of a group one program holds in registers."""
    return 64 if size <= (128 if itemsize == 2 else 64) else 16


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) by ``_forward``, or by the decode kernels where each row has few queries."""
    out = empty_like(call, call.query, call.value.shape[-1])
    lse = torch.empty(call.query.shape[:3], dtype=torch.float32, device=out.device)
    if call.cu_seqlens_q is not None:
        lse.fill_(-torch.inf)  # of the tokens that belong to no sequence
    if not lse.numel():
        return out, lse
    B, Hkv, G, S, *_ = sizes = _sizes(call)
    decode = S <= MAX_DECODE_QUERIES and call.cu_seqlens_q is None
    if decode and call.bias is None and call.seed is None:
        _decode(call, out, lse)
    else:
        options = _options(call, "forward")
        num = _cdiv(S, options["BLOCK_M"])
        _forward[(B * Hkv * G * num,)](
            *_arrays(call),
            _sinks(call),
            _rows(call, options["BLOCK_N"]),
            _scores(call),
            _array(out),
            lse,
            None,
            *sizes,
            CAUSAL=call.is_causal,
            **options,
        )
    return out, lse


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """The gradients that ``needs`` asks for, each by the kernels that make it and no other."""
    if not lse.numel():
        return [torch.zeros_like(t) if isinstance(t, Tensor) and needed else None for t, needed in zip(call, needs)]
    grads: list[Tensor | None] = [None] * 7
    if call.bias is not None:
        grad_out, grad_lse = rescaled(grad_out, grad_lse, torch.exp(-_lost(call, lse)))
    arrays, scores = _arrays(call), _scores(call)
    saved = _saved(call, out, lse, grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous(), grad_lse)
    if needs[0] or needs[5]:
        grads[0] = empty_like(call, call.query, call.query.shape[-1]) if needs[0] else None
        share = torch.zeros_like(lse) if needs[5] else None
        _launch_grad_query(call, arrays, scores, saved, grads[0], share)
        if share is not None and call.sinks is not None:
            grads[5] = grad_sinks(call.sinks, lse, share, grad_lse)
    if needs[1] or needs[2]:
        grads[1], grads[2] = (empty_like(call, t, t.shape[-1]) for t in (call.key, call.value))
        _launch_grad_sequence(call, arrays, scores, saved, grads[1], grads[2])
    if needs[3] or needs[4]:
        grads[3], grads[4] = _grad_of_prefix(call, arrays, saved)
    return [grad if needed else None for grad, needed in zip(grads, needs)]


def _lost(call: Call, lse: Tensor) -> Tensor:
    """(B, Hq, S) log sum_j exp(logit_j - lse): what ``lse`` lost when it was rounded, see ``rescaled``."""
    lost = torch.empty_like(lse)
    B, Hkv, G, S, *_ = sizes = _sizes(call)
    options = _options(call, "forward")
    query, key, _, prefix_key, _ = _arrays(call)
    _forward[(B * Hkv * G * _cdiv(S, options["BLOCK_M"]),)](
        query, key, None, prefix_key, None, _sinks(call), _rows(call, options["BLOCK_N"]),
        _scores(call)._replace(dropout=None, seed=None), None, lost, lse, *sizes, CAUSAL=call.is_causal, **options,
    )  # fmt: skip
    return lost


def _saved(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """(grad_out, lse in the units of logits, delta): what every backward kernel reads."""
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    B, Hq, S = lse.shape
    _delta[(B * Hq * _cdiv(S, 64),)](
        _array(out),
        _array(grad_out),
        lse,
        None if grad_lse is None else grad_lse.float().contiguous(),
        lse2,
        delta,
        Hq,
        S,
        NATURAL=call.bias is not None,
        DV=call.value.shape[-1],
        BLOCK_M=64,
        BLOCK_DV=_blocks(call)["BLOCK_DV"],
        enable_fp_fusion=True,
    )
    return _array(grad_out), lse2, delta


def _launch_grad_query(
    call: Call,
    arrays: tuple[Array | None, ...],
    scores: Scores,
    saved: tuple[Any, ...],
    grad: Tensor | None,
    share: Tensor | None,
) -> None:
    B, Hkv, G, S, *_ = sizes = _sizes(call)
    options = _options(call, "grad_query")
    _grad_query[(B * Hkv * G * _cdiv(S, options["BLOCK_M"]),)](
        *arrays,
        _rows(call, options["BLOCK_N"]),
        scores,
        *saved,
        _array(grad),
        share,
        call.scale,
        *sizes,
        CAUSAL=call.is_causal,
        **options,
    )


def _launch_grad_sequence(
    call: Call,
    arrays: tuple[Array | None, ...],
    scores: Scores,
    saved: tuple[Any, ...],
    grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> None:
    B, Hkv, _, _, T, *_ = sizes = _sizes(call)
    if not T:
        return
    options = _options(call, "grad_sequence")
    _grad_sequence[(_cdiv(T, options["BLOCK_N"]) * Hkv * B,)](
        *arrays[:3],
        _rows(call, None),
        scores,
        *saved,
        _array(grad_key),
        _array(grad_value),
        call.scale,
        *sizes,
        CAUSAL=call.is_causal,
        **options,
    )


def _decode(call: Call, out: Tensor, lse: Tensor) -> None:
    B, Hq, S, _ = call.query.shape
    Hkv, T = call.key.shape[1:3]
    options = _options(call, "split_keys")
    # The smallest tile that tensor cores take and that holds a row's queries, or an equal part of them.
    size = max(call.query.shape[-1], call.value.shape[-1])
    chunks = _cdiv(S * (Hq // Hkv), max_decode_rows(call.query.dtype.itemsize, size))
    options["BLOCK_M"] = max(16, _power_of_2(_cdiv(S * (Hq // Hkv), chunks)))
    query, key, value, prefix_key, prefix_value = _arrays(call)
    runs = _fold_runs(call)
    seen = T if call.window is None else min(T, call.window + S - 1)
    keys = seen if runs else seen + call.prefix_length()
    splits = max(1, min(keys // SPLIT_KEYS, 2 * processors(out.device) // (B * Hkv * chunks)))
    slots_out = slots_lse = arrived = None
    if runs or splits > 1:
        slots = (runs + (splits if splits > 1 else 0), B, Hq, S)
        slots_out = torch.empty(*slots, call.value.shape[-1], dtype=torch.float32, device=out.device)
        slots_lse = torch.empty(slots, dtype=torch.float32, device=out.device)
    if splits > 1:
        arrived = torch.zeros(B, Hkv, chunks, dtype=torch.int32, device=out.device)
    rows, scores, sinks, sizes = _rows(call, None), _scores(call), _sinks(call), _sizes(call)
    early = bool(runs) and architecture(out.device) in ("sm_90", "sm_100")
    if runs:
        folded = _options(call, "fold_prefix")
        order = None if rows.ids is None else _order(call)[1]
        _fold_prefix[(_fold_tiles(call) * Hkv * runs,)](
            query, prefix_key, prefix_value, rows, scores, order, slots_out, slots_lse, runs, *sizes,
            EARLY=early, **folded,
        )  # fmt: skip
        prefix_key = prefix_value = None
    if early:  # starts before the launch above has ended: what both read and write was there before that began
        options["launch_pdl"] = True
    _split_keys[(B * Hkv * chunks * splits,)](
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        sinks,
        rows,
        scores,
        _array(out),
        lse,
        slots_out,
        slots_lse,
        arrived,
        chunks,
        splits,
        runs,
        *sizes,
        CAUSAL=call.is_causal,
        EARLY=early,
        **options,
    )


def _fold_tiles(call: Call) -> int:
    """Tiles of the queries of all rows, per key head."""
    B, Hq, S, _ = call.query.shape
    return _cdiv(B * S * (Hq // call.key.shape[1]), _options(call, "fold_prefix")["BLOCK_M"])


def _fold_runs(call: Call) -> int:
    """Into how many runs a folded prefix is split, so that every processor has one; 0 = the prefix is not folded."""
    if not _folds(call):
        return 0
    tiles = _cdiv(call.prefix_length(), _options(call, "fold_prefix")["BLOCK_N"])
    return max(1, min(tiles, processors(call.query.device) // (_fold_tiles(call) * call.key.shape[1])))


def _folds(call: Call) -> bool:
    """Whether decoding reads the prefix once for many rows, for the price of a launch and of slots.

    Unfolded, B * Hkv programs read it from the L2 cache. It pays from the table's ``fold_bytes`` of such reads on.
    """
    if call.prefix_key is None or call.prefix_value is None:
        return False
    B, Hkv = call.query.shape[0], call.key.shape[1]
    if call.has_bank() and call.prefix_ids is None and call.prefix_key.shape[0] > 1:
        return False  # every row has an entry of its own: nothing is shared
    width = call.prefix_key.shape[-1] + call.prefix_value.shape[-1]
    shared = B - call.prefix_key.shape[0] if call.has_bank() else B  # each entry must be read once in any case
    read = shared * Hkv * call.prefix_length() * width * call.query.element_size()
    return call.prefix_length() > 0 and read >= table()[architecture(call.query.device)]["fold_bytes"]


def _grad_of_prefix(call: Call, arrays: tuple[Array | None, ...], saved: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    assert call.prefix_key is not None and call.prefix_value is not None
    prefix = call.prefix_key, call.prefix_value
    if not call.prefix_key.shape[-2] or not call.prefix_key.numel():
        return torch.zeros_like(prefix[0]), torch.zeros_like(prefix[1])
    B, Hkv, G, S, _, P, N, *_ = sizes = _sizes(call)
    options = _options(call, "grad_prefix")
    programs = _cdiv(P, options["BLOCK_N"]) * Hkv * N
    units = _cdiv(B * _cdiv(S, options["BLOCK_M"]) * G, N)
    # Two waves of programs; the last bits of the gradient depend on SPLITS, so on the device, never on the run.
    splits = max(1, min(units, 2 * processors(call.query.device) // programs))
    order, bounds = (None, None) if N == 1 and call.prefix_ids is None else _grouped(call)
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in prefix)
    parts = grads
    if splits > 1:
        parts = tuple(torch.empty(splits, N, Hkv, P, t.shape[-1], dtype=torch.float32, device=t.device) for t in grads)
    query, _, _, prefix_key, prefix_value = arrays
    _grad_prefix[(programs * splits,)](
        query,
        prefix_key,
        prefix_value,
        _rows(call, None),
        _scores(call),
        order,
        bounds,
        *saved,
        *parts,
        call.scale,
        splits,
        *sizes,
        **options,
    )
    if splits > 1:
        for part, grad in zip(parts, grads):
            size = grad.numel()
            _sum_splits[(_cdiv(size, 1024),)](part, grad, splits, size, BLOCK=1024, enable_fp_fusion=True)
    return grads[0], grads[1]


def _order(call: Call) -> tuple[Tensor, Tensor]:
    """(bank entries in ascending order, the rows that have them), on the device; -1 for none."""
    return torch.sort(visibility.prefix_entries(call), stable=True)


def _grouped(call: Call) -> tuple[Tensor, Tensor]:
    """(rows sorted by bank entry, where each entry's rows begin among them), on the device."""
    assert call.prefix_key is not None
    entries, order = _order(call)
    return order, torch.searchsorted(entries, torch.arange(call.prefix_key.shape[0] + 1, device=entries.device))


# What kernels take --------------------------------------------------------------------------------------------------


def _array(tensor: Tensor | None) -> Array | None:
    if tensor is None:
        return None
    batch, head, row = tensor.stride()[:3] if tensor.dim() == 4 else (0, *tensor.stride()[:2])
    # The one row of a packed tensor has a batch index of its own, but no stride of its own.
    return Array(tensor, 0 if tensor.dim() == 4 and tensor.shape[0] == 1 else batch, head, row)


def _arrays(call: Call) -> tuple[Array | None, ...]:
    prefix: tuple[Tensor | None, ...] = (None, None)
    if call.prefix_key is not None and call.prefix_value is not None and call.prefix_length():
        prefix = call.prefix_key, call.prefix_value
        if not call.has_bank():
            # One small copy where a float32 prefix meets a half-precision model; kernels would round it in every tile,
            # and stage twice the bytes in shared memory. A bank, which may be large, they round themselves.
            prefix = call.prefix_key.to(call.query.dtype), call.prefix_value.to(call.query.dtype)
    return tuple(_array(t) for t in (call.query, call.key, call.value, *prefix))


def _sinks(call: Call) -> Tensor | None:
    return None if call.sinks is None else call.sinks.contiguous()


def _rows(call: Call, block_n: int | None) -> Rows:
    """``block_n``: of a kernel that walks keys by the list of tiles that hold a visible one."""
    mask = None if call.key_mask is None else call.key_mask.contiguous()
    tiles = before = None
    if mask is not None and block_n is not None:
        B, T = mask.shape
        num = _cdiv(T, block_n)
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


def _scores(call: Call) -> Scores:
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


def _sizes(call: Call) -> tuple[int, ...]:
    """What SIZES of ``primitives`` names, in its order; S and T are the largest of packed sequences."""
    Hq, NQ, _ = call.query.shape[1:]
    Hkv, NK = call.key.shape[1:3]
    S, T = NQ, NK
    if call.max_seqlen_q is not None and call.max_seqlen_k is not None:
        S, T = call.max_seqlen_q, call.max_seqlen_k
    N = call.prefix_key.shape[0] if call.prefix_key is not None and call.has_bank() else 1
    return call.batch(), Hkv, Hq // Hkv, S, T, call.prefix_length(), N, NQ, NK


def _blocks(call: Call) -> dict[str, Any]:
    D, Dv = call.query.shape[-1], call.value.shape[-1]
    return {"BLOCK_D": max(16, _power_of_2(D)), "BLOCK_DV": max(16, _power_of_2(Dv))}


def _kind(call: Call) -> str:
    """Which entry of the table serves the call: "" plain, "*" one cheap option, "+" any."""
    many = any(getattr(call, name) is not None for name in _MANY)
    few = sum(getattr(call, name) is not None for name in _FEW)
    return "+" if many or few > 1 else "*" if few else ""


def _options(call: Call, kernel: str) -> dict[str, Any]:
    """Everything that the kernel is compiled for: head sizes, precision of dots, tiles, warps and stages."""
    blocks = _blocks(call)
    exact = call.query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    size = max(blocks["BLOCK_D"], blocks["BLOCK_DV"])
    options = tile(architecture(call.query.device), kernel, call.query.dtype, size, _kind(call))
    precision = "ieee" if exact else "tf32"
    # Loops count on a multiplication and an addition being one instruction, which Triton 3.10 no longer does unasked.
    return (
        {"D": call.query.shape[-1], "DV": call.value.shape[-1], "PRECISION": precision, "enable_fp_fusion": True}
        | blocks
        | options
    )
