"""Forward of training and prefill: one launch, one online softmax over [prefix ; sequence].

    out[i] = sum_j exp(logit[i, j] - lse[i]) v[j],   lse[i] = log sum_j exp(logit[i, j])   (+ exp(sink))

A program owns BLOCK_M queries of one head. It walks the prefix's tiles, whose address has no batch index and whose only
mask is the end of the prefix, and then the sequence's: first those that a window cuts, then those that every query of
the tile sees whole, then those on the causal diagonal or at the end. Tiles that nobody sees are never visited.

Not a kernel for the prefix and one for the sequence with a merge after: for the short prefixes of prefix tuning its
extra traffic (out and lse written and read twice, in float32) costs more than re-reading P keys from the L2 cache.
Traffic: q and out once, k and v once per BLOCK_M queries, the prefix from L2. FLOPs: 2 S (P + T) (D + Dv) per head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prefix_attn.backends.triton.primitives import (
    SIZES,
    add_bias,
    entry_of,
    finish,
    kept,
    keys_of,
    load_full,
    load_rows,
    prefix_of,
    present,
    queries_of,
    softmax_step,
    store_rows,
    unscaled,
    visible,
)


@triton.jit
def program(B, HKV, G, S, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """(row of the batch, key head, query head, first query) of this program; S: the most queries that a row has.

    The heads of a group are neighbours, since they read the same keys; of a causal head the long rows come first.
    """
    i = tl.program_id(0)
    i_g = i % G
    i = i // G
    num = tl.cdiv(S, BLOCK_M)
    i_m = i % num
    i = i // num
    if CAUSAL:
        i_m = num - 1 - i_m
    i_kv = i % HKV
    i_b = (i // HKV).to(tl.int64)
    i_kv = i_kv.to(tl.int64)
    return i_b, i_kv, i_kv * G + i_g, i_m * BLOCK_M


@triton.jit
def begin(B, HKV, G, S, T, NQ, NK, rows, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """``program``, then of its row: (first query, number of queries, place of their lse, first key, visible keys)."""
    i_b, i_kv, i_h, first = program(B, HKV, G, S, BLOCK_M, CAUSAL)
    r_q, count, i_lse = queries_of(i_b, i_h, HKV * G, S, NQ, rows)
    r_k, _, length = keys_of(i_b, T, NK, rows)
    if rows.cu_q is not None:  # a program behind the end of a short sequence walks nothing
        length = tl.where(first < count, length, 0)
    return i_b, i_kv, i_h, first, r_q, count, i_lse, r_k, length


@triton.jit
def prefix_seen(i_b, first, count, length, P, N, rows, BLOCK_M: tl.constexpr):
    """(entry, visible tokens, first query that sees them) of the prefix of queries first..first + BLOCK_M."""
    entry = entry_of(i_b, N, rows)
    prefix = prefix_of(entry, P, rows)
    if rows.cu_q is not None:
        prefix = tl.where(first < count, prefix, 0)
    start = 0
    if rows.prefix_start is not None:
        start = tl.load(rows.prefix_start + i_b) - (length - count)
        prefix = tl.where(first + BLOCK_M > start, prefix, 0)
    return tl.maximum(entry, 0).to(tl.int64), prefix, start


@triton.jit
def sequence_range(first, length, count, scores, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(lo, full_lo, full_hi, hi), multiples of BLOCK_N but for hi: keys that queries first..first + BLOCK_M see.

    Between full_lo and full_hi every query sees every key; outside lo..hi none sees any.
    """
    bottom = length - count + first  # position of the first query, and of the one after the last
    top = bottom + BLOCK_M
    lo = 0
    full_lo = 0
    hi = length
    full_hi = length // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.maximum(tl.minimum(length, top), 0)
        full_hi = tl.minimum(full_hi, tl.maximum(bottom + 1, 0) // BLOCK_N * BLOCK_N)
    if scores.window is not None:
        lo = tl.minimum(tl.maximum(bottom - scores.window + 1, 0), hi) // BLOCK_N * BLOCK_N
        full_lo = tl.cdiv(tl.minimum(tl.maximum(top - scores.window, 0), hi), BLOCK_N) * BLOCK_N
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def _sequence_tile(
    n,
    b_q,
    b_m,
    b_l,
    b_acc,
    p_key,
    key_row,
    p_value,
    value_row,
    row_mask,
    bias,
    o_m,
    i_bh,
    length,
    count,
    P,
    scores,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The online softmax over keys n..n + BLOCK_N of the sequence."""
    o_n = n + tl.arange(0, BLOCK_N)
    m_n = present(o_n, length, row_mask)
    # [BLOCK_N, BLOCK_D]
    if MASKED:
        b_k = load_rows(p_key, o_n, key_row, m_n, D, BLOCK_D)
    else:
        b_k = load_full(p_key, n, key_row, D, BLOCK_N, BLOCK_D)
    # [BLOCK_M, BLOCK_N]
    b_s = unscaled(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), scores)
    if MASKED:
        m_mn = visible((length - count + o_m)[:, None], o_n[None, :], length, row_mask, scores, CAUSAL)
        if bias is not None:
            b_s = add_bias(b_s, bias, o_m[:, None], o_n[None, :], m_mn & (o_m < count)[:, None], scores)
        b_s = tl.where(m_mn, b_s, -float("inf"))
    b_keep = None
    if scores.seed is not None:
        b_keep = kept(i_bh, o_m[:, None], (P + o_n)[None, :], scores)
    b_v = None
    if p_value is not None:
        if MASKED:
            b_v = load_rows(p_value, o_n, value_row, m_n, DV, BLOCK_DV)
        else:
            b_v = load_full(p_value, n, value_row, DV, BLOCK_N, BLOCK_DV)
    return softmax_step(b_s, b_m, b_l, b_acc, b_v, b_keep, scores, MASKED, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    sinks,
    rows,
    scores,
    out,  # (B, Hq, S, Dv), or None with the values: only the lse is wanted
    lse,  # (B, Hq, S) float32, contiguous
    known,  # (B, Hq, S) float32 or None: an lse that is subtracted from the new one
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Output and lse of BLOCK_M queries of one head, over their prefix and then over their sequence."""
    i_b, i_kv, i_h, first, r_q, count, i_lse, r_k, length = begin(B, HKV, G, S, T, NQ, NK, rows, BLOCK_M, CAUSAL)
    i_bh = i_b * (HKV * G) + i_h
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < count
    # [BLOCK_M, BLOCK_D]
    p_q = query.data + i_b * query.batch + i_h * query.head + r_q * query.row
    b_q = load_rows(p_q, o_m, query.row, m_m, D, BLOCK_D)
    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, BLOCK_DV]
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    if prefix_key is not None:
        i_n, prefix, start = prefix_seen(i_b, first, count, length, P, N, rows, BLOCK_M)
        p_key = prefix_key.data + i_n * prefix_key.batch + i_kv * prefix_key.head
        if prefix_value is not None:
            p_value = prefix_value.data + i_n * prefix_value.batch + i_kv * prefix_value.head
        for n in range(0, prefix, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            m_n = o_n < prefix
            b_k = load_rows(p_key, o_n, prefix_key.row, m_n, D, BLOCK_D).to(b_q.dtype)
            b_s = unscaled(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), scores)
            m_mn = m_n[None, :]
            if rows.prefix_start is not None:
                m_mn = m_mn & (o_m >= start)[:, None]
            b_s = tl.where(m_mn, b_s, -float("inf"))
            b_keep = None
            if scores.seed is not None:
                b_keep = kept(i_bh, o_m[:, None], o_n[None, :], scores)
            b_v = None
            if prefix_value is not None:
                b_v = load_rows(p_value, o_n, prefix_value.row, m_n, DV, BLOCK_DV).to(b_q.dtype)
            b_m, b_l, b_acc = softmax_step(b_s, b_m, b_l, b_acc, b_v, b_keep, scores, True, PRECISION)

    p_key = key.data + i_b * key.batch + i_kv * key.head + r_k * key.row
    p_value = None
    value_row = None
    if value is not None:
        p_value = value.data + i_b * value.batch + i_kv * value.head + r_k * value.row
        value_row = value.row
    row_mask = rows.key_mask
    if rows.key_mask is not None:
        row_mask += i_b * T
    bias = scores.bias
    if scores.bias is not None:
        bias += i_b * scores.bias_batch + i_h * scores.bias_head
    lo, full_lo, full_hi, hi = sequence_range(first, length, count, scores, CAUSAL, BLOCK_M, BLOCK_N)
    if rows.tiles is not None:
        num = tl.cdiv(T, BLOCK_N)
        before = rows.before + i_b * (num + 1)
        for i in range(tl.load(before + lo // BLOCK_N), tl.load(before + tl.cdiv(hi, BLOCK_N))):
            n = tl.load(rows.tiles + i_b * num + i) * BLOCK_N
            b_m, b_l, b_acc = _sequence_tile(
                n, b_q, b_m, b_l, b_acc, p_key, key.row, p_value, value_row, row_mask, bias, o_m, i_bh, length, count,
                P, scores, D, DV, CAUSAL, True, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    else:
        if scores.bias is not None:
            full_lo = lo
            full_hi = lo
        if scores.window is not None:
            for n in range(lo, full_lo, BLOCK_N):
                b_m, b_l, b_acc = _sequence_tile(
                    n, b_q, b_m, b_l, b_acc, p_key, key.row, p_value, value_row, row_mask, bias, o_m, i_bh, length,
                    count, P, scores, D, DV, CAUSAL, True, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
        if scores.bias is None:
            for n in range(full_lo, full_hi, BLOCK_N):
                b_m, b_l, b_acc = _sequence_tile(
                    n, b_q, b_m, b_l, b_acc, p_key, key.row, p_value, value_row, row_mask, bias, o_m, i_bh, length,
                    count, P, scores, D, DV, CAUSAL, False, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
        for n in range(full_hi, hi, BLOCK_N):
            b_m, b_l, b_acc = _sequence_tile(
                n, b_q, b_m, b_l, b_acc, p_key, key.row, p_value, value_row, row_mask, bias, o_m, i_bh, length, count,
                P, scores, D, DV, CAUSAL, True, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    b_sink = None
    if sinks is not None:
        b_sink = tl.load(sinks + i_h).to(tl.float32)
    b_known = None
    if known is not None:
        b_known = tl.load(known + i_lse + o_m, mask=m_m, other=0.0)
    b_out, b_lse = finish(b_m, b_l, b_acc, b_sink, b_known, scores)
    if out is not None:
        p_out = out.data + i_b * out.batch + i_h * out.head + r_q * out.row
        store_rows(p_out, o_m, out.row, m_m, b_out, DV, BLOCK_DV)
    tl.store(lse + i_lse + o_m, b_lse, mask=m_m)
