"""Backward of the query, from the saved global lse; ``delta``, which all backwards take, is made here.

    p[i, j] = exp(logit[i, j] - lse[i])              the share of key j in the whole softmax, whatever its source
    ds[i, j] = p[i, j] (dout[i] . v[j] - delta[i]),  delta[i] = dout[i] . out[i] - dlse[i]
    dq[i] = sum_j ds[i, j] k[j],   dk[j] = sum_i ds[i, j] q[i],   dv[j] = sum_i p[i, j] dout[i]

With the global lse every p is final, so the sources need no merge and their gradients simply add. Two kernels, seven
products, instead of one with five: there dq would have to be added to by many programs, which is slow in a fixed order
and not repeatable in any other. ``_grad_query`` owns BLOCK_M queries and walks keys as forward does; ``_grad_sequence``
of ``sequence_grad`` owns BLOCK_N keys of a key head and walks the queries of all its heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prefix_attn.backends.triton.attend import begin, prefix_seen, sequence_range
from prefix_attn.backends.triton.primitives import (
    LOG2E,
    SIZES,
    add_bias,
    exponential,
    grad_product,
    kept,
    load_full,
    load_rows,
    logits,
    present,
    store_rows,
    visible,
)


@triton.jit(do_not_specialize=["HQ", "S"])
def _delta(
    out,
    grad_out,
    lse,  # (B, Hq, S) float32
    grad_lse,  # (B, Hq, S) float32 or None
    lse2,  # (B, Hq, S) float32, in the units of logits
    delta,  # (B, Hq, S) float32
    HQ,
    S,
    NATURAL: tl.constexpr,  # the units of logits
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta = rowsum(dout * out) - dlse, and lse2, for BLOCK_M queries of one head.

    lse2 is the lse in the units of logits, and +inf for a query that sees nothing: each of its p is then an exact 0.
    """
    num = tl.cdiv(S, BLOCK_M)
    i_bh = (tl.program_id(0) // num).to(tl.int64)
    first = tl.program_id(0) % num * BLOCK_M
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < S
    i_b = i_bh // HQ
    i_h = i_bh % HQ
    p_do = grad_out.data + i_b * grad_out.batch + i_h * grad_out.head
    b_out = load_rows(out.data + i_b * out.batch + i_h * out.head, o_m, out.row, m_m, DV, BLOCK_DV)
    b_do = load_rows(p_do, o_m, grad_out.row, m_m, DV, BLOCK_DV)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    if grad_lse is not None:
        b_delta -= tl.load(grad_lse + i_bh * S + o_m, mask=m_m, other=0.0)
    tl.store(delta + i_bh * S + o_m, b_delta, mask=m_m)
    b_lse = tl.load(lse + i_bh * S + o_m, mask=m_m)
    b_lse2 = b_lse if NATURAL else b_lse * LOG2E
    tl.store(lse2 + i_bh * S + o_m, tl.where(b_lse == -float("inf"), float("inf"), b_lse2), mask=m_m)


@triton.jit
def load_queries(m, count, p_q, q_row, p_do, do_row, p_lse2, p_delta, D: tl.constexpr, DV: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """(offsets, q, dout, lse2, delta) of queries m..m + BLOCK_M of one head; lse2 is +inf where there is none."""
    o_m = m + tl.arange(0, BLOCK_M)
    m_m = o_m < count
    b_q = load_rows(p_q, o_m, q_row, m_m, D, BLOCK_D)
    b_do = load_rows(p_do, o_m, do_row, m_m, DV, BLOCK_DV)
    b_lse = tl.load(p_lse2 + o_m, mask=m_m, other=float("inf"))
    return o_m, b_q, b_do, b_lse, tl.load(p_delta + o_m, mask=m_m, other=0.0)


@triton.jit
def _query_tile(
    b_k,
    b_v,
    b_q,
    b_do,
    b_lse,
    b_delta,
    b_dq,
    b_share,
    m_mn,
    bias,
    b_row,
    b_column,
    i_bh,
    offset,
    scores,
    SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what one tile of keys gives to dq, and with SHARE sum_j p dp to the rows'; ``m_mn`` None = all visible."""
    # [BLOCK_M, BLOCK_N]
    b_s = logits(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), scores)
    b_x = b_s
    if bias is not None:
        b_x = add_bias(b_s, bias, b_row, b_column, m_mn, scores)
    b_x -= b_lse[:, None]
    if m_mn is not None:  # before the exponential, which would overflow where a hidden logit exceeds lse
        b_x = tl.where(m_mn, b_x, -float("inf"))
    b_p = exponential(b_x, scores)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    if scores.seed is not None:
        b_dp = tl.where(kept(i_bh, b_row, offset + b_column, scores), b_dp * (1 / (1 - scores.dropout)), 0.0)
    if SHARE:
        b_shares = b_p * b_dp
        if m_mn is not None:
            b_shares = tl.where(m_mn, b_shares, 0.0)
        b_share += tl.sum(b_shares, 1)
    b_ds = grad_product(b_p * (b_dp - b_delta[:, None]), b_s, scores)
    if m_mn is not None:  # a hidden value may be huge, and 0 * inf is NaN
        b_ds = tl.where(m_mn, b_ds, 0.0)
    b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq, b_share


@triton.jit
def _query_sequence_tile(
    n,
    b_q,
    b_do,
    b_lse,
    b_delta,
    b_dq,
    b_share,
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
    SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """``_query_tile`` for keys n..n + BLOCK_N of the sequence."""
    o_n = n + tl.arange(0, BLOCK_N)
    m_n = present(o_n, length, row_mask)
    m_mn = None
    if MASKED:
        b_k = load_rows(p_key, o_n, key_row, m_n, D, BLOCK_D)
        b_v = load_rows(p_value, o_n, value_row, m_n, DV, BLOCK_DV)
        m_mn = visible((length - count + o_m)[:, None], o_n[None, :], length, row_mask, scores, CAUSAL)
        m_mn = m_mn & (o_m < count)[:, None]
    else:
        b_k = load_full(p_key, n, key_row, D, BLOCK_N, BLOCK_D)
        b_v = load_full(p_value, n, value_row, DV, BLOCK_N, BLOCK_DV)
    return _query_tile(
        b_k, b_v, b_q, b_do, b_lse, b_delta, b_dq, b_share, m_mn, bias, o_m[:, None], o_n[None, :], i_bh, P, scores,
        SHARE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _grad_query(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    rows,
    scores,
    grad_out,
    lse2,
    delta,
    grad_query,
    share,  # (B, Hq, S) float32 or None: sum_j p dp, for the gradient of the sinks
    scale,
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
    """dq, and the share where it is asked for, of BLOCK_M queries of one head, over prefix and sequence."""
    i_b, i_kv, i_h, first, r_q, count, i_lse, r_k, length = begin(B, HKV, G, S, T, NQ, NK, rows, BLOCK_M, CAUSAL)
    i_bh = i_b * (HKV * G) + i_h
    p_q = query.data + i_b * query.batch + i_h * query.head + r_q * query.row
    p_do = grad_out.data + i_b * grad_out.batch + i_h * grad_out.head + r_q * grad_out.row
    m_m = first + tl.arange(0, BLOCK_M) < count
    o_m, b_q, b_do, b_lse, b_delta = load_queries(
        first, count, p_q, query.row, p_do, grad_out.row, lse2 + i_lse, delta + i_lse, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV
    )
    # [BLOCK_M, BLOCK_D]
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    SHARE: tl.constexpr = share is not None
    # Carried by the loops also where nothing is added to it: they carry no None.
    b_share = tl.zeros([BLOCK_M], tl.float32)

    if prefix_key is not None:
        i_n, prefix, start = prefix_seen(i_b, first, count, length, P, N, rows, BLOCK_M)
        p_key = prefix_key.data + i_n * prefix_key.batch + i_kv * prefix_key.head
        p_value = prefix_value.data + i_n * prefix_value.batch + i_kv * prefix_value.head
        for n in range(0, prefix, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            m_n = o_n < prefix
            b_k = load_rows(p_key, o_n, prefix_key.row, m_n, D, BLOCK_D).to(b_q.dtype)
            b_v = load_rows(p_value, o_n, prefix_value.row, m_n, DV, BLOCK_DV).to(b_q.dtype)
            m_mn = m_n[None, :]
            if rows.prefix_start is not None:
                m_mn = m_mn & (o_m >= start)[:, None]
            b_dq, b_share = _query_tile(
                b_k, b_v, b_q, b_do, b_lse, b_delta, b_dq, b_share, m_mn, None, o_m[:, None], o_n[None, :], i_bh, 0,
                scores, SHARE, PRECISION,
            )  # fmt: skip

    p_key = key.data + i_b * key.batch + i_kv * key.head + r_k * key.row
    p_value = value.data + i_b * value.batch + i_kv * value.head + r_k * value.row
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
            b_dq, b_share = _query_sequence_tile(
                n, b_q, b_do, b_lse, b_delta, b_dq, b_share, p_key, key.row, p_value, value.row, row_mask, bias, o_m,
                i_bh, length, count, P, scores, D, DV, CAUSAL, True, SHARE, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    else:
        if scores.bias is not None:
            full_lo = lo
            full_hi = lo
        if scores.window is not None:
            for n in range(lo, full_lo, BLOCK_N):
                b_dq, b_share = _query_sequence_tile(
                    n, b_q, b_do, b_lse, b_delta, b_dq, b_share, p_key, key.row, p_value, value.row, row_mask, bias,
                    o_m, i_bh, length, count, P, scores, D, DV, CAUSAL, True, SHARE, PRECISION, BLOCK_N,
                    BLOCK_D, BLOCK_DV,
                )  # fmt: skip
        if scores.bias is None:
            for n in range(full_lo, full_hi, BLOCK_N):
                b_dq, b_share = _query_sequence_tile(
                    n, b_q, b_do, b_lse, b_delta, b_dq, b_share, p_key, key.row, p_value, value.row, row_mask, bias,
                    o_m, i_bh, length, count, P, scores, D, DV, CAUSAL, False, SHARE, PRECISION, BLOCK_N,
                    BLOCK_D, BLOCK_DV,
                )  # fmt: skip
        for n in range(full_hi, hi, BLOCK_N):
            b_dq, b_share = _query_sequence_tile(
                n, b_q, b_do, b_lse, b_delta, b_dq, b_share, p_key, key.row, p_value, value.row, row_mask, bias, o_m,
                i_bh, length, count, P, scores, D, DV, CAUSAL, True, SHARE, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    if grad_query is not None:
        p_dq = grad_query.data + i_b * grad_query.batch + i_h * grad_query.head + r_q * grad_query.row
        store_rows(p_dq, o_m, grad_query.row, m_m, b_dq * scale, D, BLOCK_D)
    if share is not None:
        tl.store(share + i_lse + o_m, b_share, mask=m_m)
