"""Backward of the sequence's keys and values; the formulas are in ``query_grad``."""

from __future__ import annotations

import triton
import triton.language as tl

from prefix_attn.backends.triton.primitives import (
    SIZES,
    add_bias,
    exponential,
    grad_product,
    kept,
    keys_of,
    load_rows,
    logits,
    queries_of,
    rows_of,
    store_rows,
)
from prefix_attn.backends.triton.query_grad import load_queries


@triton.jit
def key_tile(b_k, b_v, o_n, queries, b_dk, b_dv, m_nm, bias, column, scores, PRECISION: tl.constexpr):
    """Adds what one tile of queries gives to dk and dv; everything lies transposed, [BLOCK_N, BLOCK_M].

    ``m_nm``: which pairs see each other, None = all. ``column``: number of the source's first key in
    [prefix ; sequence].
    """
    b_s = logits(tl.dot(b_k, tl.trans(queries.q), input_precision=PRECISION), scores)
    b_x = b_s
    if bias is not None:
        b_x = add_bias(b_s, bias, queries.o_m[None, :], o_n[:, None], m_nm, scores)
    b_x -= queries.lse[None, :]
    if m_nm is not None:  # before the exponential, which would overflow where a hidden logit exceeds lse
        b_x = tl.where(m_nm, b_x, -float("inf"))
    b_p = exponential(b_x, scores)
    b_dp = tl.dot(b_v, tl.trans(queries.do), input_precision=PRECISION)
    b_used = b_p
    if scores.seed is not None:
        m_keep = kept(queries.i_bh, queries.o_m[None, :], (column + o_n)[:, None], scores)
        b_used = tl.where(m_keep, b_p * (1 / (1 - scores.dropout)), 0.0)
        b_dp = tl.where(m_keep, b_dp * (1 / (1 - scores.dropout)), 0.0)
    b_dv = tl.dot(b_used.to(queries.do.dtype), queries.do, b_dv, input_precision=PRECISION)
    b_ds = grad_product(b_p * (b_dp - queries.delta[None, :]), b_s, scores)
    if m_nm is not None:  # a hidden value may be huge, and 0 * inf is NaN
        b_ds = tl.where(m_nm, b_ds, 0.0)
    b_dk = tl.dot(b_ds.to(queries.q.dtype), queries.q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=SIZES)
def _grad_sequence(
    query,
    key,
    value,
    rows,
    scores,
    grad_out,
    lse2,
    delta,
    grad_key,
    grad_value,
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
    """dk and dv of BLOCK_N keys of one key head, over the queries of all its heads that see them.

    Each key has one program, so nothing is added in memory. Grid: B * Hkv * ceil(T / BLOCK_N).
    """
    num = tl.cdiv(T, BLOCK_N)
    n = tl.program_id(0) % num * BLOCK_N
    i_kv = (tl.program_id(0) // num % HKV).to(tl.int64)
    i_b = (tl.program_id(0) // num // HKV).to(tl.int64)
    r_k, count, length = keys_of(i_b, T, NK, rows)
    o_n = n + tl.arange(0, BLOCK_N)
    m_n = o_n < length
    # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]
    b_k = load_rows(rows_of(key, i_b, i_kv, r_k), o_n, key.row, m_n, D, BLOCK_D)
    b_v = load_rows(rows_of(value, i_b, i_kv, r_k), o_n, value.row, m_n, DV, BLOCK_DV)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    # Queries lo..hi see some key of the tile. One loop with masks: apart from whole tiles they cost little beside four
    # products, and a second loop costs the registers that make the tile spill. What hides a key from all queries, its
    # length or the key mask, is left to the end: a row of dk and dv depends on no other key.
    r_q, count_q, i_lse = queries_of(i_b, i_kv * G, HKV * G, S, NQ, rows)
    per_head = S  # from one head's lse to the next
    if rows.cu_q is not None:
        per_head = NQ
    shift = length - count_q  # position of query 0
    lo = 0
    hi = tl.where(n < length, count_q, 0)
    if CAUSAL:
        lo = tl.minimum(tl.maximum(n - shift, 0), count_q) // BLOCK_M * BLOCK_M
    if scores.window is not None:
        hi = tl.minimum(hi, tl.maximum(n + BLOCK_N - 1 + scores.window - shift, 0))
    m_seen = m_n
    if rows.key_mask is not None:
        m_seen = m_n & tl.load(rows.key_mask + i_b * T + o_n, mask=m_n, other=0).to(tl.int1)
        hi = tl.where(tl.max(m_seen.to(tl.int32)) > 0, hi, 0)

    # One loop over the heads of the group and query tiles, so that loads run ahead across heads too. It counts both,
    # since dividing by numbers that are not constant costs as much as a product.
    tiles = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_M)
    i_g = tl.zeros([], tl.int32)
    i_m = tl.zeros([], tl.int32)
    for _ in range(tiles * G):
        i_h = i_kv * G + i_g
        queries = load_queries(
            lo + i_m * BLOCK_M, count_q, i_b, i_h, i_b * (HKV * G) + i_h, r_q, i_lse + i_g.to(tl.int64) * per_head,
            query, grad_out, lse2, delta, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        b_position = (shift + queries.o_m)[None, :]
        m_nm = None
        if CAUSAL:
            m_nm = o_n[:, None] <= b_position
        if scores.window is not None:
            m_near = b_position - o_n[:, None] < scores.window
            m_nm = m_near if m_nm is None else m_nm & m_near
        bias = scores.bias
        if scores.bias is not None:  # which must not be read where it is not
            bias += i_b * scores.bias_batch + i_h * scores.bias_head
            m_there = m_n[:, None] & queries.m_m[None, :]
            m_nm = m_there if m_nm is None else m_nm & m_there
        b_dk, b_dv = key_tile(b_k, b_v, o_n, queries, b_dk, b_dv, m_nm, bias, P, scores, PRECISION)
        i_m += 1
        i_g += (i_m == tiles).to(tl.int32)
        i_m = tl.where(i_m == tiles, 0, i_m)

    b_dk = tl.where(m_seen[:, None], b_dk * scale, 0.0)
    b_dv = tl.where(m_seen[:, None], b_dv, 0.0)
    m_t = o_n < count  # keys from length on get an exact 0
    store_rows(rows_of(grad_key, i_b, i_kv, r_k), o_n, grad_key.row, m_t, b_dk, D, BLOCK_D)
    store_rows(rows_of(grad_value, i_b, i_kv, r_k), o_n, grad_value.row, m_t, b_dv, DV, BLOCK_DV)
