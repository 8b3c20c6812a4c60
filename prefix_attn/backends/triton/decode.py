"""Forward for few queries per row of the batch (decoding, speculation): bound by reading keys and values.

``_split_keys``: a program owns the S * G queries of one (row, key head), or one of CHUNKS equal parts where they are
more than a tile holds, and one of SPLITS runs of its keys, so that a key is read once for the whole group. Short
prefixes are walked in the same loop, from the L2 cache. With SPLITS = 1 that is the whole work, in one launch.
Otherwise each program leaves (out, lse) of its run in a slot, and whoever arrives last adds up the slots, in their
order: no second launch.

``_fold_prefix``: where a prefix is long enough, B programs reading it cost more than another launch. Then the queries
of all rows that share an entry are folded into tiles of BLOCK_M, each prefix tile is read once per BLOCK_M queries, and
the results go to slots of their own that ``_split_keys`` adds in. With a bank, rows come sorted by entry, and a tile
walks the few entries it holds; the grid does not depend on how many there are, so nothing is read back to the host.

The two launches overlap from sm_90 on (``EARLY``, programmatic dependent launch): ``_fold_prefix``, which waits for the
tensor cores and the L2 cache, lets ``_split_keys``, which waits for memory, start beside it, and that waits for the
slots only when its own keys are done.

Lengths are read on the device: captured in a CUDA graph, both kernels follow ``key_lengths`` as it changes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prefix_attn.backends.triton.primitives import (
    LOG2E,
    SIZES,
    entry_of,
    finish,
    keys_of,
    prefix_of,
    rows_of,
)
from prefix_attn.backends.triton.walk import Queries, Source, walk


@triton.jit
def _add_slots(
    slots_out, slots_lse, o_row, stride, COUNT, m_row, b_m, b_l, b_acc,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds COUNT finished parts of the softmax, rows ``o_row`` of each slot, to a running one, in the slots' order.

    The maximum comes first. After it no load waits for what an earlier one brought. Up to four are under way, as
    registers allow. .cg: from the L2 cache, since another program may have just written it.
    """
    o_d = tl.arange(0, BLOCK_DV)
    m = m_row[:, None] & (o_d < DV)[None, :]
    UNROLL: tl.constexpr = 4 if BLOCK_M * BLOCK_DV <= 1024 else 2 if BLOCK_M * BLOCK_DV <= 2048 else 1
    b_max = b_m
    p_lse = slots_lse + o_row
    for _ in tl.range(0, COUNT, loop_unroll_factor=UNROLL):
        b_lse = tl.load(p_lse, mask=m_row, other=-float("inf"), cache_modifier=".cg")
        b_max = tl.maximum(b_max, b_lse * LOG2E)
        p_lse += stride
    b_pivot = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_old = tl.exp2(b_m - b_pivot)
    b_l *= b_old
    b_acc *= b_old[:, None]
    for _ in tl.range(0, COUNT, loop_unroll_factor=UNROLL):
        b_lse = tl.load(slots_lse + o_row, mask=m_row, other=-float("inf"), cache_modifier=".cg")
        b_out = tl.load(slots_out + o_row[:, None] * DV + o_d[None, :], mask=m, other=0.0, cache_modifier=".cg")
        b_share = tl.exp2(b_lse * LOG2E - b_pivot)
        b_l += b_share
        b_acc += b_out * b_share[:, None]
        o_row += stride
    return b_max, b_l, b_acc


@triton.jit
def _write(
    out, lse, sinks, i_b, o_h, o_s, HQ, S, m_row, b_m, b_l, b_acc, scores, DV: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """Stores the output and lse of a finished softmax whose rows are queries ``o_s`` of heads ``o_h``."""
    b_sink = None
    if sinks is not None:
        b_sink = tl.load(sinks + o_h, mask=m_row, other=0.0).to(tl.float32)
    b_out, b_lse = finish(b_m, b_l, b_acc, b_sink, None, scores)
    o_d = tl.arange(0, BLOCK_DV)
    p_out = out.data + i_b * out.batch + (o_h * out.head + o_s * out.row)[:, None] + o_d[None, :]
    tl.store(p_out, b_out.to(out.data.dtype.element_ty), mask=m_row[:, None] & (o_d < DV)[None, :])
    tl.store(lse + (i_b * HQ + o_h) * S + o_s, b_lse, mask=m_row)


@triton.jit(do_not_specialize=[*SIZES, "CHUNKS", "SPLITS", "FOLDED"])
def _split_keys(
    query,
    key,
    value,
    prefix_key,  # None: no prefix, or it is in the first FOLDED slots
    prefix_value,
    sinks,
    rows,
    scores,
    out,
    lse,
    slots_out,  # (FOLDED + SPLITS, B, Hq, S, Dv) float32, or None: one split, nothing folded
    slots_lse,  # (FOLDED + SPLITS, B, Hq, S) float32
    arrived,  # (B, Hkv, CHUNKS) int32 zeros, or None: one split
    CHUNKS,
    SPLITS,
    FOLDED,
    B,
    HKV,
    G,
    S,
    T,
    P,
    N,
    NQ,
    NK,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One run of the keys of one (row, key head), for all its queries or a chunk of them; the last run sums all up."""
    i = tl.program_id(0)
    i_split = i % SPLITS
    i = i // SPLITS
    i_chunk = i % CHUNKS  # neighbours, since they read the same keys
    i = i // CHUNKS
    i_kv = (i % HKV).to(tl.int64)
    i_b = (i // HKV).to(tl.int64)
    HQ = HKV * G
    _, _, length = keys_of(i_b, T, NK, rows)
    o_q = i_chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_q < S * G
    o_s = o_q // G
    o_h = i_kv * G + o_q % G
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    p_q = query.data + i_b * query.batch + (o_h * query.head + o_s.to(tl.int64) * query.row)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # The work of this split: a run of the tiles of [prefix ; keys that some query sees].
    lo = 0
    if scores.window is not None:
        lo = tl.maximum(length - S - scores.window + 1, 0) // BLOCK_N
    hi = tl.cdiv(length, BLOCK_N)
    prefix = 0
    i_n = i_b * 0
    if prefix_key is not None:
        entry = entry_of(i_b, N, rows)
        prefix = prefix_of(entry, P, rows)
        i_n = tl.maximum(entry, 0).to(tl.int64)
    before = tl.cdiv(prefix, BLOCK_N)
    share = tl.cdiv(before + tl.maximum(hi - lo, 0), SPLITS)
    first = i_split * share
    last = first + share

    queries = Queries(b_q, o_s, m_row, None, None, None, None)
    if prefix_key is not None:
        seen = None
        if rows.prefix_start is not None:
            seen = length - S + o_s >= tl.load(rows.prefix_start + i_b)
        source = Source(
            rows_of(prefix_key, i_n, i_kv, 0), prefix_key.row, rows_of(prefix_value, i_n, i_kv, 0), prefix_value.row,
            prefix, seen, 0, None, None, None, None, 0,
        )  # fmt: skip
        b_m, b_l, b_acc = walk(
            first * BLOCK_N, tl.minimum(last, before) * BLOCK_N, queries, source, scores, b_m, b_l, b_acc,
            D, DV, False, True, False, PRECISION, BLOCK_N,
        )  # fmt: skip
    mask = None
    if rows.key_mask is not None:
        mask = rows.key_mask + i_b * T
    sequence = Source(
        rows_of(key, i_b, i_kv, 0), key.row, rows_of(value, i_b, i_kv, 0), value.row,
        length, None, length - S, scores.window, mask, None, None, P,
    )  # fmt: skip
    b_m, b_l, b_acc = walk(
        (tl.maximum(first - before, 0) + lo) * BLOCK_N, tl.minimum(last - before + lo, hi) * BLOCK_N,
        queries, sequence, scores, b_m, b_l, b_acc, D, DV, CAUSAL, True, False, PRECISION, BLOCK_N,
    )  # fmt: skip

    if EARLY:  # the first FOLDED slots are written by a kernel that may still run
        gdc_wait()
    o_row = (i_b * HQ + o_h) * S + o_s
    slot = B.to(tl.int64) * HQ * S  # rows of a slot
    if arrived is None:
        if slots_out is not None:
            b_m, b_l, b_acc = _add_slots(
                slots_out, slots_lse, o_row, slot, FOLDED, m_row, b_m, b_l, b_acc, DV, BLOCK_M, BLOCK_DV
            )
        _write(out, lse, sinks, i_b, o_h, o_s, HQ, S, m_row, b_m, b_l, b_acc, scores, DV, BLOCK_DV)
    else:
        b_out, b_lse = finish(b_m, b_l, b_acc, None, None, scores)
        o_d = tl.arange(0, BLOCK_DV)
        o_own = o_row + (FOLDED + i_split) * slot
        m = m_row[:, None] & (o_d < DV)[None, :]
        tl.store(slots_out + o_own[:, None] * DV + o_d[None, :], b_out, mask=m)
        tl.store(slots_lse + o_own, b_lse, mask=m_row)
        tl.debug_barrier()  # every thread's stores come before the one that announces them
        if tl.atomic_add(arrived + (i_b * HKV + i_kv) * CHUNKS + i_chunk, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
            b_l = tl.zeros([BLOCK_M], tl.float32)
            b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
            b_m, b_l, b_acc = _add_slots(
                slots_out, slots_lse, o_row, slot, FOLDED + SPLITS, m_row, b_m, b_l, b_acc, DV, BLOCK_M, BLOCK_DV
            )
            _write(out, lse, sinks, i_b, o_h, o_s, HQ, S, m_row, b_m, b_l, b_acc, scores, DV, BLOCK_DV)


@triton.jit(do_not_specialize=[*SIZES, "FOLDED"])
def _fold_prefix(
    query,
    prefix_key,
    prefix_value,
    rows,
    scores,
    order,  # (B,) rows sorted by entry, or None: as they are
    slots_out,
    slots_lse,
    FOLDED,  # runs that the prefix is split into
    B,
    HKV,
    G,
    S,
    T,
    P,
    N,
    NQ,
    NK,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One run of the prefix, for BLOCK_M queries of one key head and of any rows."""
    if EARLY:
        gdc_launch_dependents()
    i = tl.program_id(0)
    i_split = (i % FOLDED).to(tl.int64)
    i = i // FOLDED
    i_kv = (i % HKV).to(tl.int64)
    o_fold = (i // HKV).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_fold < B.to(tl.int64) * S * G
    o_b = tl.where(m_row, o_fold // (S * G), 0)
    if order is not None:
        o_b = tl.load(order + o_b).to(tl.int64)
    o_s = o_fold % (S * G) // G
    o_h = i_kv * G + o_fold % G
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    p_q = query.data + (o_b * query.batch + o_h * query.head + o_s * query.row)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    m_sees = m_row
    if rows.prefix_start is not None:
        length = tl.zeros([BLOCK_M], tl.int64) + T
        if rows.key_lengths is not None:
            length = tl.minimum(tl.maximum(tl.load(rows.key_lengths + o_b), 0), T).to(tl.int64)
        m_sees = m_sees & (length - S + o_s >= tl.load(rows.prefix_start + o_b))
    b_entry = tl.zeros([BLOCK_M], tl.int32)
    if rows.ids is not None:
        b_id = tl.load(rows.ids + o_b)
        m_sees = m_sees & (b_id >= 0) & (b_id < N)
        b_entry = tl.where(m_sees, b_id, 0).to(tl.int32)
    queries = Queries(b_q, o_s, m_row, None, None, None, None)
    entry = tl.min(tl.where(m_sees, b_entry, N))
    while entry < N:
        prefix = prefix_of(entry, P, rows)
        share = tl.cdiv(tl.cdiv(prefix, BLOCK_N), FOLDED) * BLOCK_N
        i_n = entry.to(tl.int64)
        source = Source(
            rows_of(prefix_key, i_n, i_kv, 0), prefix_key.row, rows_of(prefix_value, i_n, i_kv, 0), prefix_value.row,
            prefix, m_sees & (b_entry == entry), 0, None, None, None, None, 0,
        )  # fmt: skip
        first = (i_split * share).to(tl.int32)
        b_m, b_l, b_acc = walk(
            first, tl.minimum(first + share, prefix), queries, source, scores, b_m, b_l, b_acc,
            D, DV, False, True, False, PRECISION, BLOCK_N,
        )  # fmt: skip
        entry = tl.min(tl.where(m_sees & (b_entry > entry), b_entry, N))  # the next one that a row of the tile has

    b_out, b_lse = finish(b_m, b_l, b_acc, None, None, scores)
    o_row = i_split * B * (HKV * G) * S + (o_b * (HKV * G) + o_h) * S + o_s
    o_d = tl.arange(0, BLOCK_DV)
    tl.store(slots_out + o_row[:, None] * DV + o_d[None, :], b_out, mask=m_row[:, None] & (o_d < DV)[None, :])
    tl.store(slots_lse + o_row, b_lse, mask=m_row)
