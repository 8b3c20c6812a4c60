"""Gradient of the prefix: the one sum over the whole batch.

    dpk[p] = sum over (b, i, g) of ds[b, i, g, p] q[b, i, g],   dpv[p] = sum of p[b, i, g, p] dout[b, i, g]

Every query sees every prefix key, so this is a dense product without masks. A program owns BLOCK_N prefix keys of one
key head and bank entry, and one of SPLITS equal runs of the (row, query tile, head of the group) units; its sums stay
in float32 registers. The partials of the runs are added by a second kernel in an order that never changes: float
atomics would add in the order in which programs finish, and no two runs would agree. Partials are SPLITS * N * Hkv * P
* (D + Dv) floats, which stay in the L2 cache.

Rows are grouped by bank entry beforehand (``order``, ``bounds``), so each entry's units are a run of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prefix_attn.backends.triton.primitives import (
    SIZES,
    keys_of,
    load_rows,
    prefix_of,
    queries_of,
    rows_of,
    store_rows,
)
from prefix_attn.backends.triton.query_grad import load_queries
from prefix_attn.backends.triton.sequence_grad import key_tile


@triton.jit(do_not_specialize=[*SIZES, "SPLITS"])
def _grad_prefix(
    query,
    prefix_key,
    prefix_value,
    rows,
    scores,
    order,  # (B,) rows sorted by entry, or None: as they are
    bounds,  # (N + 1,) where each entry's rows begin in ``order``, or None: all rows share the one entry
    grad_out,
    lse2,
    delta,
    grad_key,  # (SPLITS, N, Hkv, P, D) float32 partials; the gradient itself when SPLITS = 1
    grad_value,
    scale,
    SPLITS,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dk and dv of BLOCK_N tokens of one prefix and key head, over one of SPLITS runs of the queries that read it.

    Grid: SPLITS * N * Hkv * ceil(P / BLOCK_N).
    """
    num = tl.cdiv(P, BLOCK_N)
    i = tl.program_id(0)
    n = i % num * BLOCK_N
    i = i // num
    i_kv = (i % HKV).to(tl.int64)
    i = i // HKV
    i_n = (i % N).to(tl.int64)
    i_split = i // N

    o_n = n + tl.arange(0, BLOCK_N)
    m_n = o_n < prefix_of(i_n, P, rows)
    # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]
    b_k = load_rows(rows_of(prefix_key, i_n, i_kv, 0), o_n, prefix_key.row, m_n, D, BLOCK_D)
    b_v = load_rows(rows_of(prefix_value, i_n, i_kv, 0), o_n, prefix_value.row, m_n, DV, BLOCK_DV)
    b_k = b_k.to(query.data.dtype.element_ty)
    b_v = b_v.to(query.data.dtype.element_ty)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    first = tl.zeros([], tl.int32)
    last = B
    if bounds is not None:
        first = tl.load(bounds + i_n).to(tl.int32)
        last = tl.load(bounds + i_n + 1).to(tl.int32)
    # Fewer than 2**31: the lse of so many units would be 512 GB.
    tiles = tl.cdiv(S, BLOCK_M)
    units = (last - first) * tiles * G
    share = tl.cdiv(units, SPLITS)
    begin = i_split * share
    # Which head, query tile and row a unit is, divided once and then counted.
    i_g = begin % G
    i_m = begin // G % tiles
    i_row = first + begin // G // tiles
    for _ in range(begin, tl.minimum(begin + share, units)):
        i_b = i_row
        if order is not None:
            i_b = tl.load(order + i_b)
        i_b = i_b.to(tl.int64)
        i_h = i_kv * G + i_g
        r_q, count, i_lse = queries_of(i_b, i_h, HKV * G, S, NQ, rows)
        exists = True
        if rows.cu_q is not None:
            exists = i_m * BLOCK_M < count
        if exists:
            queries = load_queries(
                i_m * BLOCK_M, count, i_b, i_h, i_b * (HKV * G) + i_h, r_q, i_lse, query, grad_out, lse2, delta,
                D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            m_nm = None
            if rows.prefix_start is not None:
                _, _, length = keys_of(i_b, T, NK, rows)
                m_nm = (length - count + queries.o_m >= tl.load(rows.prefix_start + i_b))[None, :]
            # Nothing masks the keys past the prefix's end: their rows of dk and dv are not stored.
            b_dk, b_dv = key_tile(b_k, b_v, o_n, queries, b_dk, b_dv, m_nm, None, 0, scores, PRECISION)
        i_g += 1
        i_m += (i_g == G).to(tl.int32)
        i_g = tl.where(i_g == G, 0, i_g)
        i_row += (i_m == tiles).to(tl.int32)
        i_m = tl.where(i_m == tiles, 0, i_m)

    i_out = (i_split.to(tl.int64) * N + i_n) * HKV + i_kv
    b_dk = tl.where(m_n[:, None], b_dk * scale, 0.0)
    b_dv = tl.where(m_n[:, None], b_dv, 0.0)
    store_rows(grad_key + i_out * P * D, o_n, D, o_n < P, b_dk, D, BLOCK_D)
    store_rows(grad_value + i_out * P * DV, o_n, DV, o_n < P, b_dv, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["SPLITS", "SIZE"])
def _sum_splits(partials, total, SPLITS, SIZE, BLOCK: tl.constexpr):
    """total[x] = sum over s of partials[s, x], s upwards."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for _ in range(SPLITS):
        b_sum += tl.load(partials + o, mask=o < SIZE, other=0.0)
        partials += SIZE  # moves the pointer: s * SIZE would wrap at 2**31
    tl.store(total + o, b_sum.to(total.dtype.element_ty), mask=o < SIZE)
