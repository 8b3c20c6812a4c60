"""Finds the decode kernel of csrc/cuda, or builds it, for GPUs and for the emulated one; the reason if it cannot."""

from __future__ import annotations

import functools
import os
import platform
from typing import Any

import torch

from prefix_attn.backends import _native

INTERFACE = 1  # of csrc/bind_cuda.cpp
STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# What setup.py has, too.
ARCHITECTURES = ("80", "90", "100", "120")
NVCC = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
# -O1: tests run each kernel a few times. memset and memcpy, which sanitizers watch, are not what loops may become.
EMULATED = ["-O1", "-std=c++20", "-Wno-unknown-pragmas", "-fno-tree-loop-distribute-patterns", STABLE]

loaded: set[str] = set()  # kinds that are not missing


@functools.cache
def missing(kind: str) -> str | None:
    """Why the op for ``kind``, "cuda" or "emulated", cannot be had; None if it is there.

    Where the installation has built nothing, the first call builds with ninja, and with nvcc for "cuda": minutes, kept
    in torch's extension cache. PREFIX_ATTN_BUILD=0 forbids it.
    """
    if (reason := _cuda() if kind == "cuda" else _emulated()) is None:
        loaded.add(kind)
    return reason


def op(kind: str) -> Any:
    """The op, which is not ``missing``."""
    return getattr(torch.ops, f"prefix_attn_{kind}").decode.default


def _cuda() -> str | None:
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if found := next(iter(sorted(_native.PACKAGE.glob("_C_cuda*.so"))), None):
        return _native.loaded(found, "prefix_attn_cuda", INTERFACE)
    if os.environ.get("PREFIX_ATTN_BUILD") == "0":
        return "it was not built at installation"
    return _native.build(  # for the GPUs that are here: torch finds out which
        "prefix_attn_cuda",
        ["bind_cuda.cpp", "cuda/decode.cu"],
        "the CUDA kernel: once, minutes",
        extra_cflags=["-O2", "-std=c++20", STABLE, "-DUSE_CUDA"],
        include="cuda",
        extra_cuda_cflags=NVCC,
        with_cuda=True,
    )


def _emulated() -> str | None:
    if platform.machine() != "x86_64":
        return f"the emulator is written for x86-64, this is {platform.machine()}"
    return _native.build(
        "prefix_attn_emulated",
        ["bind_cuda.cpp", "emulate/decode.cpp", "emulate/emulate.cpp", "emulate/warp.cpp"],
        "the emulated CUDA kernel: once, about 20 seconds",
        extra_cflags=[*EMULATED, "-DPREFIX_ATTN_EMULATE"],
        include="emulate",
    )
