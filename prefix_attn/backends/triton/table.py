"""Which tile sizes a kernel runs with, and when decoding folds the prefix: the shipped table ``tiles.json``.

The table is made by ``python -m benchmarks.kernels.tune``. It is read, never searched, at run time: no autotuning in a
user's first call, none inside a CUDA graph's capture, and equal results on equal devices.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

import torch

from prefix_attn.backends.triton import interpreter


@functools.cache
def table() -> dict[str, Any]:
    """The file: per architecture, kernel and ``dtype/head size`` the tile's [BLOCK_M, BLOCK_N, warps, stages]."""
    return json.loads(resources.files("prefix_attn.backends.triton").joinpath("tiles.json").read_text(encoding="utf-8"))


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's column for a device: the newest that its shared memory and instructions cover."""
    if interpreter.ACTIVE:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # 12.x has mma and shared memory like 8.x, not like 10.0
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run at once; the interpreter pretends 4."""
    return 4 if interpreter.ACTIVE else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def tile(arch: str, kernel: str, dtype: torch.dtype, size: int, kind: str) -> dict[str, int]:
    """Launch options of a kernel for head sizes up to ``size``: BLOCK_M, BLOCK_N, num_warps, num_stages.

    kind: "" for a plain call, "+" for one with options that take registers, "*" for one cheap option. Where the table
    has no entry for the last, that of "+" serves.
    """
    head = next(limit for limit in (64, 128, 256) if size <= limit)
    name, column = f"{'half' if dtype.itemsize == 2 else 'float'}/{head}", table()[arch][kernel]
    block_m, block_n, warps, stages = column.get(name + kind) or column[name + "+"]
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
