"""What the backend ``cuda`` is predicted to take on an H100, beside ``triton``, and what its calls take on the host.

    python -m benchmarks.kernels.decode_cuda           the predictions, written before any measurement
    python -m benchmarks.kernels.decode_cuda --host    and microseconds of a call on this machine, without a GPU

A decode step, S = 1, 32 query heads on 8 key heads of 128, bfloat16. The model:

    device = launches + max(bytes / (SHARE * copy), waves * tiles of a run * TILE_SECONDS) + SUM_SECONDS

``triton`` is predicted as in ``roofline``: 92 % of a copy. ``cuda`` has one tile of keys on its way while it multiplies
another, where Triton has two, so it is given less. Its fold and split blocks run side by side in one launch, and the
parts are added up by the last block of each row. On the host, launches of the emulated op are left out.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.kernels.roofline import LAUNCH, OVERLAPPED_LAUNCH, PROCESSORS, SUSTAINED

HQ, HKV, D, SIZE, KEYS, TILE = 32, 8, 128, 2, 64, 64
FOLD_BYTES, SPLIT_KEYS, BLOCKS = 4 << 20, 128, 2  # csrc/cuda/plan.h; blocks of a processor, by shared memory
TRITON_FOLD_BYTES = 32 << 20
SHARE, TRITON_SHARE = 0.85, 0.92  # of the rate of a copy
TILE_SECONDS = 0.8e-6  # of a block for one tile of keys: the latency of memory, which the one tile ahead just hides
SUM_SECONDS = 2e-6  # slots to the L2 cache, the counter, slots back
MEMSET = 1e-6  # of the counters, before the launch
CASES = [(B, T, P) for B in (1, 16, 64, 256) for T, P in ((512, 128), (2048, 512), (8192, 128))]


class Prediction(NamedTuple):
    """Microseconds of one decode step."""

    folded: int  # runs of the prefix; 0: each row reads it
    splits: int
    cuda: float
    triton: float


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def predicted(B: int, T: int, P: int) -> Prediction:
    """By the plan of csrc/cuda/plan.h."""
    group, wanted, prefix = HQ // HKV, BLOCKS * PROCESSORS, B * HKV * P * 2 * D * SIZE
    keys, tiles, folded = T, ceil_div(B, TILE // group), 0
    if prefix >= FOLD_BYTES:
        folded = max(1, min(wanted // (tiles * HKV), ceil_div(P, KEYS)))
    else:
        keys += P
    splits = max(1, min(wanted // (B * HKV), keys // SPLIT_KEYS))
    blocks = B * HKV * splits + tiles * HKV * folded
    work = B * HKV * ceil_div(keys, KEYS) + tiles * HKV * ceil_div(P, KEYS) * bool(folded)  # tiles of keys
    size = HKV * 2 * D * SIZE * (B * T + P)
    # A short run has to fill its first stage, which nothing hides.
    serial = ceil_div(work, min(blocks, wanted)) * TILE_SECONDS / (BLOCKS if blocks > PROCESSORS else 1) + TILE_SECONDS
    cuda = MEMSET + LAUNCH + max(size / (SHARE * SUSTAINED), serial) + SUM_SECONDS
    launches = LAUNCH + (OVERLAPPED_LAUNCH if prefix >= TRITON_FOLD_BYTES else 0)
    split = SUM_SECONDS + MEMSET if wanted >= B * HKV * 2 and (T + P) // SPLIT_KEYS > 1 else 0
    triton = launches + max(size / (TRITON_SHARE * SUSTAINED), serial) + split
    return Prediction(folded, splits, cuda * 1e6, triton * 1e6)


def microseconds(call: Callable[[], object], calls: int) -> float:
    """The fastest of many calls."""
    best = float("inf")
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best * 1e6


def host(calls: int) -> list[tuple[str, float]]:
    """What a call takes before its launch, beside torch's own tiny call."""
    os.environ["PREFIX_ATTN_EMULATE"] = "1"
    from prefix_attn import prefix_attention
    from prefix_attn.backends import _native_cuda

    if reason := _native_cuda.missing("emulated"):
        raise SystemExit(reason)
    torch.set_num_threads(1)
    torch.ops.prefix_attn_emulated.configure(0, 1, True, 4, PROCESSORS, FOLD_BYTES, SPLIT_KEYS, False)
    query, key = torch.zeros(1, 8, 1, 64).bfloat16(), torch.zeros(1, 2, 16, 64).bfloat16()
    prefix, tiny = torch.zeros(2, 8, 64).bfloat16(), torch.zeros(1, 1, 1, 8)
    arguments = (query, key, key, prefix, prefix)
    rest = (*(None,) * 5, True, None, 0.125, None)
    op = _native_cuda.op("emulated")
    calls_of = {
        "scaled_dot_product_attention, 1 x 1 x 1 x 8": lambda: F.scaled_dot_product_attention(tiny, tiny, tiny),
        "the registered op": lambda: op(*arguments, *rest),
        "prefix_attention": lambda: prefix_attention(*arguments, backend="cuda"),
    }
    with torch.inference_mode():
        return [(name, microseconds(call, calls)) for name, call in calls_of.items()]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--calls", type=int, default=3000)
    args = parser.parse_args()
    print("| B | T | P | runs of the prefix | of the keys | cuda, us | triton, us |\n|---|---|---|---|---|---|---|")
    for case in CASES:
        found = predicted(*case)
        cells = (*case, found.folded or "-", found.splits, f"{found.cuda:.1f}", f"{found.triton:.1f}")
        print(f"| {' | '.join(map(str, cells))} |")
    if args.host:
        rows = host(args.calls)
        print("\n| on the host | us | times torch's |\n|---|---|---|")
        for name, us in rows:
            print(f"| {name} | {us:.1f} | {us / rows[0][1]:.1f} |")


if __name__ == "__main__":
    main()
