"""What a call runs with: tiles, precision, and the splits of its keys and prefix in decoding. It makes no tensor."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from prefix_attn.backends.triton.table import architecture, processors, table, tile
from prefix_attn.call import Call

SPLIT_KEYS = 128  # a run of fewer costs more in the sum of the runs than it saves
MAX_DECODE_QUERIES = 16  # per head; more fill a tile of their own, and causal skipping pays


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. ``triton.cdiv`` takes 2 us on the host, twenty times in a training step."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next power of 2."""
    return 1 << (n - 1).bit_length()


def options(call: Call, kernel: str) -> dict[str, Any]:
    """Everything that the kernel is compiled for: head sizes, precision of dots, tiles, warps and stages.

    The dictionary is shared by all calls like this one: change a copy.
    """
    query = call.query
    exact = query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    arch, sizes = architecture(query.device), (query.shape[-1], call.value.shape[-1])
    return constants(arch, kernel, query.dtype, *sizes, _kind(call), "ieee" if exact else "tf32")


@functools.cache
def constants(arch: str, kernel: str, dtype: torch.dtype, D: int, Dv: int, kind: str, precision: str) -> dict[str, Any]:
    """``options`` of all calls that agree in these."""
    blocks = {"BLOCK_D": max(16, power_of_2(D)), "BLOCK_DV": max(16, power_of_2(Dv))}
    # Loops count on a multiplication and an addition being one instruction, which Triton 3.10 no longer does unasked.
    fixed = {"D": D, "DV": Dv, "PRECISION": precision, "enable_fp_fusion": True}
    return fixed | blocks | tile(arch, kernel, dtype, max(blocks.values()), kind)


def _kind(call: Call) -> str:
    """Which entry of the table serves the call.

    "" a plain one. "*" one with one of the options that take few registers. "+", with smaller tiles: two of them, or
    any other option.
    """
    for option in (call.bias, call.cu_seqlens_q, call.seed, call.softcap):
        if option is not None:
            return "+"
    kind = ""
    for option in (call.prefix_ids, call.prefix_start, call.key_lengths, call.key_mask, call.window):
        if option is not None:
            if kind:
                return "+"
            kind = "*"
    return kind


def decodes(call: Call) -> bool:
    """Whether the decode kernels run the call: few queries per row, and none of what they lack."""
    few = call.query.shape[2] <= MAX_DECODE_QUERIES and call.cu_seqlens_q is None
    return few and call.bias is None and call.seed is None


class Decode(NamedTuple):
    """How a call is decoded."""

    rows: int  # queries times heads of a group that a program holds: BLOCK_M
    chunks: int  # into which those of a (row, key head) are cut
    splits: int  # runs of the keys
    runs: int  # into which a folded prefix is split, so that every processor has one; 0: it is not folded
    tiles: int  # of the queries of all rows per key head, where it is
    early: bool  # whether the second launch starts while the first runs


def decode(call: Call) -> Decode:
    """The plan of a call that ``decodes``."""
    B, Hq, S, D = call.query.shape
    _, Hkv, T, Dv = call.value.shape
    cores, P = processors(call.query.device), call.prefix_length()
    # The smallest tile that tensor cores take and that holds a row's queries, or an equal part of them.
    group = S * (Hq // Hkv)
    chunks = cdiv(group, max_decode_rows(call.query.dtype.itemsize, max(D, Dv)))
    rows = max(16, power_of_2(cdiv(group, chunks)))
    keys = T if call.window is None else min(T, call.window + S - 1)
    runs = tiles = 0
    if folds(call):
        folded = options(call, "fold_prefix")
        tiles = cdiv(B * group, folded["BLOCK_M"])
        runs = max(1, min(cdiv(P, folded["BLOCK_N"]), cores // (tiles * Hkv)))
    else:
        keys += P
    splits = max(1, min(keys // SPLIT_KEYS, 2 * cores // (B * Hkv * chunks)))
    early = runs > 0 and architecture(call.query.device) in ("sm_90", "sm_100")
    return Decode(rows, chunks, splits, runs, tiles, early)


def max_decode_rows(itemsize: int, size: int) -> int:
    """How many queries times heads of a group one program holds in registers."""
    return 64 if size <= (128 if itemsize == 2 else 64) else 16


def folds(call: Call) -> bool:
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


def prefix_splits(call: Call, units: int, programs: int) -> int:
    """Runs of the ``units`` over which each of ``programs`` sums the prefix's gradient: two waves of programs.

    The last bits of the gradient depend on it, so on the device, never on the run.
    """
    return max(1, min(units, 2 * processors(call.query.device) // programs))
