"""The walk of a tile of queries over its keys: what forward, decoding and the query's backward share.

``walk`` visits a run of the keys of one source, ``attend`` the prefix and then the sequence. The online
softmax and the backward of the query differ in what they do with a tile, and in nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from prefix_attn.backends.triton.primitives import (
    add_bias,
    entry_of,
    exponential,
    grad_product,
    kept,
    keys_of,
    load_full,
    load_rows,
    logits,
    prefix_of,
    queries_of,
    rows_of,
    softmax_step,
    unscaled,
)


class Source(NamedTuple):
    """The keys and values that the queries of one program attend to: its prefix or its sequence. Made in kernels."""

    key: Any  # pointer to the first row
    key_row: Any  # from row to row, in elements
    value: Any  # or None: only the lse is wanted
    value_row: Any
    end: Any  # keys from here on are hidden
    seen: Any  # [BLOCK_M] which queries see the source, or None: all
    shift: Any  # of a sequence: the position of query 0 among the keys
    window: Any  # int or None
    mask: Any  # pointer to the row's key_mask or None
    tiles: Any  # pointer to the list of its tiles that hold a visible key, or None
    bias: Any  # pointer to the bias of the head or None
    column: Any  # number of the first key in [prefix ; sequence]


class Queries(NamedTuple):
    """A tile of queries of one head. Made in kernels."""

    q: Any  # [BLOCK_M, BLOCK_D]
    o_m: Any  # [BLOCK_M] which queries of their row of the batch
    m_m: Any  # [BLOCK_M] whether they exist
    i_bh: Any  # head of the row of the batch
    do: Any  # [BLOCK_M, BLOCK_DV] gradient of the output; this and what follows: backward only
    lse: Any  # [BLOCK_M] in the units of logits; +inf where there is no query, or it sees nothing
    delta: Any  # [BLOCK_M]


class Place(NamedTuple):
    """What a program of ``_forward`` or ``_grad_query`` works on: BLOCK_M queries of one head."""

    i_b: Any  # row of the batch
    i_kv: Any
    i_h: Any
    i_bh: Any
    first: Any  # the first of its queries, among those of the row
    count: Any  # queries of the row
    length: Any  # visible keys of the row; 0 for a program behind the last query, which then walks nothing
    r_q: Any  # the row's first query and key in memory
    r_k: Any
    i_lse: Any  # and the place of its lse


@triton.jit
def begin(B, HKV, G, S, T, NQ, NK, rows, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """The ``Place`` of this program.

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
    i_b = (i // HKV).to(tl.int64)
    i_kv = (i % HKV).to(tl.int64)
    i_h = i_kv * G + i_g
    first = i_m * BLOCK_M
    r_q, count, i_lse = queries_of(i_b, i_h, HKV * G, S, NQ, rows)
    r_k, _, length = keys_of(i_b, T, NK, rows)
    if rows.cu_q is not None:
        length = tl.where(first < count, length, 0)
    return Place(i_b, i_kv, i_h, i_b * (HKV * G) + i_h, first, count, length, r_q, r_k, i_lse)


@triton.jit
def visible(queries, o_n, m_n, source, CAUSAL: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: which of the keys each query sees; ``m_n``: keys that some query may see."""
    b_position = (source.shift + queries.o_m)[:, None]
    if source.mask is not None:  # read again: m_n would have to pass from one layout to another, with two barriers
        m = tl.load(source.mask + o_n[None, :], mask=o_n[None, :] < source.end, other=0).to(tl.int1)
    else:
        m = m_n[None, :]
    if CAUSAL:
        m = m & (o_n[None, :] <= b_position)
    if source.window is not None:
        m = m & (b_position - o_n[None, :] < source.window)
    if source.seen is not None:
        m = m & source.seen[:, None]
    return m


@triton.jit
def sequence_range(at, T, rows, scores, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(lo, full_lo, full_hi, hi), multiples of BLOCK_N but for hi: keys that the queries of a ``Place`` see.

    Between full_lo and full_hi every query sees every key, and nothing is added to its logit; outside lo..hi none sees
    any. With a list of tiles: the range of its entries.
    """
    length = at.length
    bottom = length - at.count + at.first  # position of the first query, and of the one after the last
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
    if rows.tiles is not None:
        before = rows.before + at.i_b * (tl.cdiv(T, BLOCK_N) + 1)
        lo = tl.load(before + lo // BLOCK_N)
        hi = tl.load(before + tl.cdiv(hi, BLOCK_N))
    if rows.tiles is not None or scores.bias is not None:
        full_lo = lo
        full_hi = lo
    return lo, full_lo, full_hi, hi


@triton.jit
def _query_step(
    b_product, b_k, b_v, b_lse, b_share, b_dq, m_mn, o_n, queries, source, scores,
    SHARE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of keys gives to dq and, with SHARE, sum_j p dp to the share; ``m_mn`` None: all are seen."""
    b_s = logits(b_product, scores)
    b_x = b_s
    if source.bias is not None:
        m_bias = m_mn & queries.m_m[:, None]
        b_x = add_bias(b_s, source.bias, queries.o_m[:, None], o_n[None, :], m_bias, scores)
    b_x -= b_lse[:, None]
    if m_mn is not None:  # before the exponential, which would overflow where a hidden logit exceeds lse
        b_x = tl.where(m_mn, b_x, -float("inf"))
    b_p = exponential(b_x, scores)
    b_dp = tl.dot(queries.do, tl.trans(b_v), input_precision=PRECISION)
    if scores.seed is not None:
        m_keep = kept(queries.i_bh, queries.o_m[:, None], (source.column + o_n)[None, :], scores)
        b_dp = tl.where(m_keep, b_dp * (1 / (1 - scores.dropout)), 0.0)
    if SHARE:
        b_shares = b_p * b_dp
        if m_mn is not None:
            b_shares = tl.where(m_mn, b_shares, 0.0)
        b_share += tl.sum(b_shares, 1)
    b_ds = grad_product(b_p * (b_dp - queries.delta[:, None]), b_s, scores)
    if m_mn is not None:  # a hidden value may be huge, and 0 * inf is NaN
        b_ds = tl.where(m_mn, b_ds, 0.0)
    b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_share, b_dq


@triton.jit
def _softmax_step(
    b_product, b_v, b_m, b_l, b_acc, m_mn, o_n, queries, source, scores, PRECISION: tl.constexpr
):  # fmt: skip
    """``softmax_step`` of one tile of keys of a source."""
    b_s = unscaled(b_product, scores)
    if source.bias is not None:
        m_bias = m_mn & queries.m_m[:, None]
        b_s = add_bias(b_s, source.bias, queries.o_m[:, None], o_n[None, :], m_bias, scores)
    if m_mn is not None:
        b_s = tl.where(m_mn, b_s, -float("inf"))
    b_keep = None
    if scores.seed is not None:
        b_keep = kept(queries.i_bh, queries.o_m[:, None], (source.column + o_n)[None, :], scores)
    return softmax_step(b_s, b_m, b_l, b_acc, b_v, b_keep, scores, m_mn is not None, PRECISION)


@triton.jit
def walk(
    lo, hi, queries, source, scores, b_m, b_l, b_acc, D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Takes (b_m, b_l, b_acc) over keys lo..hi of a source, or over entries lo..hi of its list of tiles.

    Forward they are the maximum, sum and accumulator of the online softmax. Backward, where ``queries.do`` is not None,
    they are the lse, sum_j p dp (only with SHARE) and dq. Without MASKED every query sees every key of the tiles.
    """
    STEP: tl.constexpr = BLOCK_N if source.tiles is None else 1
    BLOCK_DV: tl.constexpr = b_acc.shape[1] if queries.do is None else queries.do.shape[1]
    for i in range(lo, hi, STEP):
        n = i
        if source.tiles is not None:
            n = tl.load(source.tiles + i) * BLOCK_N
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < source.end
        if source.mask is not None:
            m_n = m_n & tl.load(source.mask + o_n, mask=m_n, other=0).to(tl.int1)
        # [BLOCK_N, BLOCK_D]
        if MASKED:
            b_k = load_rows(source.key, o_n, source.key_row, m_n, D, queries.q.shape[1]).to(queries.q.dtype)
        else:
            b_k = load_full(source.key, n, source.key_row, D, BLOCK_N, queries.q.shape[1])
        # [BLOCK_M, BLOCK_N]
        b_product = tl.dot(queries.q, tl.trans(b_k), input_precision=PRECISION)
        m_mn = None
        if MASKED:
            m_mn = visible(queries, o_n, m_n, source, CAUSAL)
        # [BLOCK_N, BLOCK_DV]
        b_v = None
        if source.value is not None:
            if MASKED:
                b_v = load_rows(source.value, o_n, source.value_row, m_n, DV, BLOCK_DV).to(queries.q.dtype)
            else:
                b_v = load_full(source.value, n, source.value_row, DV, BLOCK_N, BLOCK_DV)
        if queries.do is None:
            b_m, b_l, b_acc = _softmax_step(
                b_product, b_v, b_m, b_l, b_acc, m_mn, o_n, queries, source, scores, PRECISION
            )
        else:
            b_l, b_acc = _query_step(
                b_product, b_k, b_v, b_m, b_l, b_acc, m_mn, o_n, queries, source, scores, SHARE, PRECISION
            )
    return b_m, b_l, b_acc


@triton.jit
def attend(
    at, queries, key, value, prefix_key, prefix_value, rows, scores, b_m, b_l, b_acc, T, P, N, D: tl.constexpr,
    DV: tl.constexpr, CAUSAL: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``walk`` over the whole prefix and then the sequence of the queries of a ``Place``."""
    if prefix_key is not None:
        entry = entry_of(at.i_b, N, rows)
        end = prefix_of(entry, P, rows)
        if rows.cu_q is not None:
            end = tl.where(at.first < at.count, end, 0)
        seen = None
        if rows.prefix_start is not None:
            start = tl.load(rows.prefix_start + at.i_b) - (at.length - at.count)
            end = tl.where(at.first + BLOCK_M > start, end, 0)
            seen = queries.o_m >= start
        i_n = tl.maximum(entry, 0).to(tl.int64)
        p_value = None
        value_row = None
        if prefix_value is not None:
            p_value = rows_of(prefix_value, i_n, at.i_kv, 0)
            value_row = prefix_value.row
        p_key = rows_of(prefix_key, i_n, at.i_kv, 0)
        prefix = Source(p_key, prefix_key.row, p_value, value_row, end, seen, 0, None, None, None, None, 0)
        b_m, b_l, b_acc = walk(
            0, end, queries, prefix, scores, b_m, b_l, b_acc, D, DV, False, True, SHARE, PRECISION, BLOCK_N
        )

    p_value = None
    value_row = None
    if value is not None:
        p_value = rows_of(value, at.i_b, at.i_kv, at.r_k)
        value_row = value.row
    mask = None
    if rows.key_mask is not None:
        mask = rows.key_mask + at.i_b * T
    tiles = None
    if rows.tiles is not None:
        tiles = rows.tiles + at.i_b * tl.cdiv(T, BLOCK_N)
    bias = None
    if scores.bias is not None:
        bias = scores.bias + at.i_b * scores.bias_batch + at.i_h * scores.bias_head
    p_key = rows_of(key, at.i_b, at.i_kv, at.r_k)
    shift = at.length - at.count
    sequence = Source(p_key, key.row, p_value, value_row, at.length, None, shift, scores.window, mask, tiles, bias, P)
    lo, full_lo, full_hi, hi = sequence_range(at, T, rows, scores, CAUSAL, BLOCK_M, BLOCK_N)
    if rows.tiles is None and scores.bias is None:
        if scores.window is not None:
            b_m, b_l, b_acc = walk(
                lo, full_lo, queries, sequence, scores, b_m, b_l, b_acc,
                D, DV, CAUSAL, True, SHARE, PRECISION, BLOCK_N,
            )  # fmt: skip
        b_m, b_l, b_acc = walk(
            full_lo, full_hi, queries, sequence, scores, b_m, b_l, b_acc,
            D, DV, CAUSAL, False, SHARE, PRECISION, BLOCK_N,
        )  # fmt: skip
    return walk(full_hi, hi, queries, sequence, scores, b_m, b_l, b_acc, D, DV, CAUSAL, True, SHARE, PRECISION, BLOCK_N)
