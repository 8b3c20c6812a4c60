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

from prefix_attn.backends.triton.primitives import LOG2E, SIZES, load_rows, rows_of, store_rows
from prefix_attn.backends.triton.walk import Queries, attend, begin


@triton.jit(do_not_specialize=["HQ", "NQ"])
def _delta(
    out,
    grad_out,
    lse,  # (B, Hq, NQ) float32
    grad_lse,  # (B, Hq, NQ) float32 or None
    lse2,  # (B, Hq, NQ) float32, in the units of logits
    delta,  # (B, Hq, NQ) float32
    HQ,
    NQ,
    NATURAL: tl.constexpr,  # the units of logits
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta = rowsum(dout * out) - dlse, and lse2, for BLOCK_M queries of one head.

    lse2 is the lse in the units of logits, and +inf for a query that sees nothing: each of its p is then an exact 0.
    """
    num = tl.cdiv(NQ, BLOCK_M)
    i_bh = (tl.program_id(0) // num).to(tl.int64)
    first = tl.program_id(0) % num * BLOCK_M
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < NQ
    i_b = i_bh // HQ
    i_h = i_bh % HQ
    p_do = grad_out.data + i_b * grad_out.batch + i_h * grad_out.head
    b_out = load_rows(out.data + i_b * out.batch + i_h * out.head, o_m, out.row, m_m, DV, BLOCK_DV)
    b_do = load_rows(p_do, o_m, grad_out.row, m_m, DV, BLOCK_DV)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    if grad_lse is not None:
        b_delta -= tl.load(grad_lse + i_bh * NQ + o_m, mask=m_m, other=0.0)
    tl.store(delta + i_bh * NQ + o_m, b_delta, mask=m_m)
    b_lse = tl.load(lse + i_bh * NQ + o_m, mask=m_m)
    b_lse2 = b_lse if NATURAL else b_lse * LOG2E
    tl.store(lse2 + i_bh * NQ + o_m, tl.where(b_lse == -float("inf"), float("inf"), b_lse2), mask=m_m)


@triton.jit
def load_queries(first, count, i_b, i_h, i_bh, r_q, i_lse, query, grad_out, lse2, delta, D: tl.constexpr,
                 DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Queries first..first + BLOCK_M of one head, with what every backward reads of them."""
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < count
    b_q = load_rows(rows_of(query, i_b, i_h, r_q), o_m, query.row, m_m, D, BLOCK_D)
    b_do = load_rows(rows_of(grad_out, i_b, i_h, r_q), o_m, grad_out.row, m_m, DV, BLOCK_DV)
    b_lse = tl.load(lse2 + i_lse + o_m, mask=m_m, other=float("inf"))
    b_delta = tl.load(delta + i_lse + o_m, mask=m_m, other=0.0)
    return Queries(b_q, o_m, m_m, i_bh, b_do, b_lse, b_delta)


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
    """dq, and the share where it is asked for, of BLOCK_M queries of one head, over prefix and sequence.

    Walks what ``_forward`` walks. Grid: B * Hq * ceil(S / BLOCK_M).
    """
    at = begin(B, HKV, G, S, T, NQ, NK, rows, BLOCK_M, CAUSAL)
    queries = load_queries(
        at.first, at.count, at.i_b, at.i_h, at.i_bh, at.r_q, at.i_lse, query, grad_out, lse2, delta,
        D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    # [BLOCK_M, BLOCK_D]
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Carried by the loops also where nothing is added to it: they carry no None.
    b_share = tl.zeros([BLOCK_M], tl.float32)
    _, b_share, b_dq = attend(
        at, queries, key, value, prefix_key, prefix_value, rows, scores, queries.lse, b_share, b_dq, T, P, N,
        D, DV, CAUSAL, share is not None, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    if grad_query is not None:
        p_dq = rows_of(grad_query, at.i_b, at.i_h, at.r_q)
        store_rows(p_dq, queries.o_m, grad_query.row, queries.m_m, b_dq * scale, D, BLOCK_D)
    if share is not None:
        tl.store(share + at.i_lse + queries.o_m, b_share, mask=queries.m_m)
