"""What the kernels share: their arguments, which keys a query sees, and the step of the online softmax.

The alphabet of this package: ``i_`` index of a program, ``o_`` offsets, ``m_`` mask, ``b_`` tile in registers. Above a
tile stands its shape. Sizes are SPEC's: B Hq Hkv S T P N D Dv; G = Hq / Hkv. S and T are the most queries and keys that
a row of the batch has, NQ and NK the rows of query and key in memory: the same, but for packed sequences. Logits are
kept in units of log 2, so that ``exp2`` serves; the lse in memory is the natural logarithm. With a bias logits are
natural too: masks are made of finfo.min, and that times log2(e) is -inf.

Program indices become int64 before they meet a stride: their product wraps at 2**31 in int32.

Arguments travel in named tuples, which Triton 3.6 to 3.9 take alike, from the host and from kernels. Two things are
not portable, so nothing here does them: a function that returns a tuple with a None in it, and constants in a tuple,
which become tensors when the tuple gets a name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Array(NamedTuple):
    """A tensor of four dimensions, the last contiguous: pointer, and the strides of the others in elements."""

    data: Any
    batch: Any  # bank entry for prefixes
    head: Any
    row: Any


class Rows(NamedTuple):
    """What differs from row to row of the batch: pointers, each None where the call has no such option."""

    ids: Any  # (B,)
    prefix_lengths: Any  # (N,)
    prefix_start: Any  # (B,)
    key_lengths: Any  # (B,)
    key_mask: Any  # (B, T) bool, contiguous
    tiles: Any  # (B, ceil(T / BLOCK_N)) int32: which tiles have a visible key, see _list_tiles
    before: Any  # (B, ceil(T / BLOCK_N) + 1) int32: how many of these come before each tile
    cu_q: Any  # (B + 1,): packed sequences, whose query i of row b is row cu_q[b] + i of the one matrix of a head
    cu_k: Any  # (B + 1,)


class Scores(NamedTuple):
    """From the product query . key to a probability."""

    scale: Any  # float; with a softcap divided by it
    late: Any  # 1: the softmax multiplies by scale, see ``unscaled``; or None
    softcap: Any  # float or None
    window: Any  # int or None
    bias: Any  # pointer or None
    bias_batch: Any  # strides of bias, in elements
    bias_head: Any
    bias_row: Any
    bias_column: Any
    dropout: Any  # probability, or None
    seed: Any  # pointer to one int64, or None


# Never specialised on their values: else every new length would compile the kernels again.
SIZES = ["B", "HKV", "G", "S", "T", "P", "N", "NQ", "NK"]


@triton.jit
def queries_of(i_b, i_h, HQ, S, NQ, rows):
    """(first row, number) of the queries of row i_b, and where their lse begins, for head i_h.

    Clamped, as everything that is read from memory: a length out of range reads nothing out of bounds.
    """
    first = i_b * 0
    count = S
    place = (i_b * HQ + i_h) * S
    if rows.cu_q is not None:
        first = tl.load(rows.cu_q + i_b).to(tl.int64)
        count = tl.load(rows.cu_q + i_b + 1).to(tl.int64) - first
        count = tl.minimum(tl.minimum(tl.maximum(count, 0), S), NQ).to(tl.int32)
        first = tl.minimum(tl.maximum(first, 0), NQ - count)
        place = i_h * NQ + first
    return first, count, place


@triton.jit
def keys_of(i_b, T, NK, rows):
    """(first row, number, visible number) of the keys of row i_b."""
    first = i_b * 0
    count = T
    if rows.cu_k is not None:
        first = tl.load(rows.cu_k + i_b).to(tl.int64)
        count = tl.load(rows.cu_k + i_b + 1).to(tl.int64) - first
        count = tl.minimum(tl.minimum(tl.maximum(count, 0), T), NK).to(tl.int32)
        first = tl.minimum(tl.maximum(first, 0), NK - count)
    length = count
    if rows.key_lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(rows.key_lengths + i_b), 0), T).to(tl.int32)
    return first, count, length


@triton.jit
def entry_of(i_b, N, rows):
    """Bank entry of row i_b; -1 for none. A shared prefix is a bank of one; without ids row b has entry b."""
    if rows.ids is not None:
        entry = tl.load(rows.ids + i_b)
        entry = tl.where((entry >= 0) & (entry < N), entry, -1).to(tl.int32)
    else:
        entry = tl.where(N > 1, i_b, 0).to(tl.int32)
    return entry


@triton.jit
def prefix_of(entry, P, rows):
    """Valid length of a bank entry; 0 for entry -1."""
    length = P
    if rows.prefix_lengths is not None:
        length = tl.load(rows.prefix_lengths + tl.maximum(entry, 0), mask=entry >= 0, other=0)
        length = tl.minimum(tl.maximum(length, 0), P).to(tl.int32)
    return tl.where(entry >= 0, length, 0)


@triton.jit
def rows_of(array, i_b, i_h, first):
    """Pointer to row ``first`` of the matrix of one head."""
    return array.data + i_b * array.batch + i_h * array.head + first * array.row


@triton.jit
def load_rows(data, o_row, stride, m_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[len(o_row), BLOCK_D]: rows of a matrix with D columns; 0 outside."""
    o_d = tl.arange(0, BLOCK_D)
    m = m_row[:, None] & (o_d < D)[None, :] if D < BLOCK_D else m_row[:, None]
    return tl.load(data + o_row.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m, other=0.0)


@triton.jit
def load_full(data, first, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D]: rows from ``first`` on, all of which exist.

    What depends on ``first`` is one scalar, which a loop adds to addresses that it keeps in registers. ``load_rows``
    computes every address anew: more instructions, for loops that are short or have no registers to spare.
    """
    o_d = tl.arange(0, BLOCK_D)
    data += (first + tl.zeros([], tl.int64)) * stride
    p = data + tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride + o_d[None, :]
    if D < BLOCK_D:
        b = tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    else:
        b = tl.load(p)
    return b


@triton.jit
def store_rows(data, o_row, stride, m_row, b, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes [len(o_row), BLOCK_D] to a matrix with D columns, in its dtype."""
    o_d = tl.arange(0, BLOCK_D)
    m = m_row[:, None] & (o_d < D)[None, :] if D < BLOCK_D else m_row[:, None]
    tl.store(data + o_row.to(tl.int64)[:, None] * stride + o_d[None, :], b.to(data.dtype.element_ty), mask=m)


@triton.jit
def logits(b_product, scores):
    """Logits from query . key: scale, then softcap."""
    if scores.softcap is not None:
        # tanh(x) by exp2: exact to a few units of 1e-8, which the cap multiplies; the sign apart keeps exp2 in range.
        x = b_product * scores.scale
        e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        t = (1 - e) / (1 + e)
        b = tl.where(x < 0, -t, t) * (scores.softcap * unit(scores))
    else:
        b = b_product * (scores.scale * unit(scores))
    return b


@triton.jit
def unit(scores):
    """What a natural logarithm is multiplied with to be in the units of logits."""
    if scores.bias is not None:
        u = 1.0
    else:
        u = LOG2E
    return u


@triton.jit
def exponential(b_difference, scores):
    """exp of a difference of logits."""
    if scores.bias is not None:
        b_difference *= LOG2E
    return tl.exp2(b_difference)


@triton.jit
def unscaled(b_product, scores):
    """What ``softmax_step`` takes: ``logits``, or with ``scores.late`` the product itself.

    Then the factor joins the softmax's subtraction in one instruction, and no multiplication is left in the loop.
    """
    if scores.late is not None:
        b = b_product
    else:
        b = logits(b_product, scores)
    return b


@triton.jit
def grad_product(b_ds, b_s, scores):
    """From the gradient of the logits to that of query . key, but for the factor ``scale`` of the whole."""
    if scores.softcap is not None:
        t = b_s * (1 / (scores.softcap * unit(scores)))
        b_ds = b_ds * (1 - t * t)
    return b_ds


@triton.jit
def add_bias(b_s, bias, b_row, b_column, m, scores):
    """Logits plus the bias of one head; ``b_row`` and ``b_column`` are broadcast against each other."""
    p = bias + b_row.to(tl.int64) * scores.bias_row + b_column.to(tl.int64) * scores.bias_column
    return b_s + tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def kept(i_bh, b_row, b_column, scores):
    """Which probabilities dropout keeps: a function of (seed, head of row, query, key), so backward finds it again.

    ``b_column`` counts over [prefix ; sequence].
    """
    zero = (b_row + b_column) * 0
    bits, _, _, _ = tl.philox(tl.load(scores.seed), b_column + zero, b_row + zero, i_bh.to(tl.int32) + zero, zero)
    return tl.uint_to_uniform_float(bits) >= scores.dropout


@triton.jit
def softmax_step(b_s, b_m, b_l, b_acc, b_v, b_keep, scores, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of the online softmax. Invisible ``unscaled`` logits are -inf; with MASKED whole rows may be.

    ``b_v`` None: only the maximum and the sum are wanted.
    """
    b_top = tl.max(b_s, 1)
    if scores.late is not None:  # positive, so the largest stays the largest
        b_top *= scores.scale * LOG2E
        b_s *= scores.scale * LOG2E
    b_max = tl.maximum(b_m, b_top)
    b_pivot = tl.where(b_max == -float("inf"), 0.0, b_max) if MASKED else b_max
    b_alpha = exponential(b_m - b_pivot, scores)
    # [BLOCK_M, BLOCK_N]
    b_p = exponential(b_s - b_pivot[:, None], scores)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    if b_keep is not None:
        b_p = tl.where(b_keep, b_p * (1 / (1 - scores.dropout)), 0.0)
    if b_v is not None:
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    return b_max, b_l, b_acc


@triton.jit
def finish(b_m, b_l, b_acc, b_sink, b_known, scores):
    """(out, lse) of a finished online softmax; ``b_sink`` is one more natural logit per row, or None.

    ``b_known`` is None, or an lse that is subtracted; it is 0 instead where a query sees nothing.
    """
    if b_sink is not None:
        b_sink *= unit(scores)
        b_max = tl.maximum(b_m, b_sink)
        b_pivot = tl.where(b_max == -float("inf"), 0.0, b_max)
        b_alpha = exponential(b_m - b_pivot, scores)
        b_l = b_l * b_alpha + exponential(b_sink - b_pivot, scores)
        b_acc = b_acc * b_alpha[:, None]
        b_m = b_max
    b_empty = b_l == 0.0
    b_total = tl.where(b_empty, 1.0, b_l)
    if b_known is not None:
        b_known = tl.where(b_empty, 0.0, b_known)  # -inf - -inf is NaN
        b_lse = tl.where(b_empty, 0.0, b_m - b_known + tl.log2(b_total) * LN2)
    elif scores.bias is not None:
        b_lse = tl.where(b_empty, -float("inf"), b_m + tl.log2(b_total) * LN2)
    else:
        b_lse = tl.where(b_empty, -float("inf"), (b_m + tl.log2(b_total)) * LN2)
    return b_acc / b_total[:, None], b_lse


@triton.jit(do_not_specialize=["T"])
def _list_tiles(key_mask, tiles, before, T, BLOCK_N: tl.constexpr, TILES: tl.constexpr):
    """Which tiles of row i_b's keys have a visible one, in order, and how many of these come before each tile."""
    i_b = tl.program_id(0).to(tl.int64)
    num = tl.cdiv(T, BLOCK_N)
    key_mask += i_b * T
    tiles += i_b * num
    before += i_b * (num + 1)
    count = tl.zeros([], tl.int32)
    for i in range(0, num, TILES):  # several tiles in one step: each step waits for memory
        o_i = i + tl.arange(0, TILES)
        # [TILES, BLOCK_N]
        o_n = o_i[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        b_some = tl.max(tl.load(key_mask + o_n, mask=o_n < T, other=0).to(tl.int32), 1)
        b_before = count + tl.cumsum(b_some, 0) - b_some
        tl.store(before + o_i, b_before, mask=o_i < num)
        tl.store(tiles + b_before, o_i, mask=b_some > 0)
        count += tl.sum(b_some, 0)
    tl.store(before + num, count)
