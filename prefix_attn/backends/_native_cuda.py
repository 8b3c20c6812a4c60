"""Finds the decode kernel of csrc/cuda, or builds it, for GPUs and for the emulated one; the reason if it cannot."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent
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
    if found := next(iter(sorted(PACKAGE.glob("_C_cuda*.so"))), None):
        return _loaded(found)
    if os.environ.get("PREFIX_ATTN_BUILD") == "0":
        return "it was not built at installation"
    return _built(  # for the GPUs that are here: torch finds out which
        "prefix_attn_cuda",
        ["bind_cuda.cpp", "cuda/decode.cu"],
        "the CUDA kernel: once, minutes",
        extra_cflags=["-O2", "-std=c++20", STABLE, "-DUSE_CUDA"],
        extra_cuda_cflags=NVCC,
        with_cuda=True,
    )


def _emulated() -> str | None:
    if platform.machine() != "x86_64":
        return f"the emulator is written for x86-64, this is {platform.machine()}"
    return _built(
        "prefix_attn_emulated",
        ["bind_cuda.cpp", "emulate/decode.cpp", "emulate/emulate.cpp", "emulate/warp.cpp"],
        "the emulated CUDA kernel: once, about 20 seconds",
        extra_cflags=[*EMULATED, "-DPREFIX_ATTN_EMULATE"],
        include="emulate",
    )


def _loaded(library: Path) -> str | None:
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {str(error).splitlines()[0]}"
    ops = torch.ops.prefix_attn_cuda
    if not hasattr(ops, "interface") or ops.interface() != INTERFACE:
        return f"{library.name} was built from other sources than these: build it again"
    return None


def _built(name: str, files: list[str], what: str, *, include: str = "cuda", **flags: Any) -> str | None:
    """None once the library ``name`` is loaded; else why it could not be built."""
    from torch.utils import cpp_extension

    places = (PACKAGE / "csrc", PACKAGE.parent / "csrc")
    sources = next((path for path in places if (path / "bind_cuda.cpp").is_file()), None)
    if sources is None:
        return "its sources are not installed"
    if not cpp_extension.is_ninja_available():
        return "building it needs ninja on the PATH: pip install 'prefix-attn[jit]'"
    if not any(Path(cpp_extension._get_build_directory(name, verbose=False)).glob("*.so")):
        logging.getLogger(__name__).warning("building %s", what)
    paths = [str(sources / file) for file in files]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what went wrong is in the error
            cpp_extension.load(
                name, paths, extra_include_paths=[str(sources / include)], is_python_module=False, **flags
            )
    except (RuntimeError, OSError, ImportError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = next((line for line in lines if "error: " in line), lines[0] if lines else type(error).__name__)
        return f"building it failed: {said.strip()[:200]}"
    return None
