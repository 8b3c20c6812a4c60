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

from prefix_attn.backends.triton.primitives import SIZES, finish, load_rows, rows_of, store_rows
from prefix_attn.backends.triton.walk import Queries, attend, begin


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
    """Output and lse of BLOCK_M queries of one head: one online softmax over their prefix and then their sequence.

    Shapes and strides are those of ``prefix_attention``'s arguments; a packed ``out`` is (1, Hq, NQ, Dv) and its lse
    (1, Hq, NQ). Grid: B * Hq * ceil(S / BLOCK_M).
    """
    at = begin(B, HKV, G, S, T, NQ, NK, rows, BLOCK_M, CAUSAL)
    o_m = at.first + tl.arange(0, BLOCK_M)
    m_m = o_m < at.count
    b_q = load_rows(rows_of(query, at.i_b, at.i_h, at.r_q), o_m, query.row, m_m, D, BLOCK_D)
    queries = Queries(b_q, o_m, m_m, at.i_bh, None, None, None)
    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, BLOCK_DV]
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    b_m, b_l, b_acc = attend(
        at, queries, key, value, prefix_key, prefix_value, rows, scores, b_m, b_l, b_acc, T, P, N,
        D, DV, CAUSAL, False, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    b_sink = None
    if sinks is not None:
        b_sink = tl.load(sinks + at.i_h).to(tl.float32)
    b_known = None
    if known is not None:
        b_known = tl.load(known + at.i_lse + o_m, mask=m_m, other=0.0)
    b_out, b_lse = finish(b_m, b_l, b_acc, b_sink, b_known, scores)
    if out is not None:
        store_rows(rows_of(out, at.i_b, at.i_h, at.r_q), o_m, out.row, m_m, b_out, DV, BLOCK_DV)
    tl.store(lse + at.i_lse + o_m, b_lse, mask=m_m)
