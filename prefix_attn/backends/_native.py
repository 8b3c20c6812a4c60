"""Finds the shared object of csrc, or builds it, and keeps the reason when it can do neither."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent
FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
INTERFACE = 2  # of csrc/bind_cpu.cpp


def _load() -> str | None:
    """Load what ``pip install`` built, as ``torch.ops.prefix_attn_cpu``; the reason if it cannot be had."""
    found = next(iter(sorted(PACKAGE.glob("_C_cpu*.so"))), None)
    if found is None:
        return "it was not built at installation"
    return loaded(found, "prefix_attn_cpu", INTERFACE) or _choose()


def loaded(library: Path, name: str, interface: int) -> str | None:
    """Load ``library`` as ``torch.ops.NAME``; the reason if it cannot be, or was built from other sources."""
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {str(error).splitlines()[0]}"
    ops = getattr(torch.ops, name)
    if not hasattr(ops, "interface") or ops.interface() != interface:
        return f"{library.name} was built from other sources than these: build it again"
    return None


def _choose() -> str | None:
    global isa
    try:
        isa = torch.ops.prefix_attn_cpu.isa()
    except RuntimeError as error:  # PREFIX_ATTN_ISA names what this processor lacks
        return str(error).splitlines()[0]
    return None


isa = ""  # the instruction set that runs: avx512bf16, avx512, avx2 or generic
_missing = _load()


def cpu_ops_missing() -> str | None:
    """Why ``torch.ops.prefix_attn_cpu`` cannot be had; None if it is there.

    Where the installation has built nothing, the first call builds with ninja (about 20 seconds, kept in torch's
    extension cache), unless PREFIX_ATTN_BUILD=0 forbids it or torch.compile is tracing.
    """
    global _missing
    if _missing is not None and not torch.compiler.is_compiling():
        _missing = _built()
    return _missing


@functools.cache
def _built() -> str | None:
    if os.environ.get("PREFIX_ATTN_BUILD") == "0" or sources() is None or any(PACKAGE.glob("_C_cpu*.so")):
        return _missing
    what = "the CPU kernels: once, about 20 seconds"
    reason = build("prefix_attn_cpu", ["bind_cpu.cpp", "cpu/*.cpp"], what, extra_cflags=FLAGS)
    return f"{_missing}, and {reason}" if reason else _choose()


def sources() -> Path | None:
    """The folder csrc: of the package where it is installed, of the repository else."""
    places = (PACKAGE / "csrc", PACKAGE.parent / "csrc")
    return next((path for path in places if (path / "bind_cpu.cpp").is_file()), None)


def build(name: str, files: list[str], what: str, *, include: str = "", **flags: Any) -> str | None:
    """Build ``files`` of csrc by ninja and load them as ``torch.ops.NAME``; the reason if that fails.

    ``what`` is logged, and headers are found in the folder ``include`` of csrc too.
    """
    from torch.utils import cpp_extension

    if (folder := sources()) is None:
        return "its sources are not installed"
    if not cpp_extension.is_ninja_available():
        return "building it now needs ninja on the PATH: pip install 'prefix-attn[jit]'"
    paths = [str(path) for file in files for path in sorted(folder.glob(file))]
    if not any(Path(cpp_extension._get_build_directory(name, verbose=False)).glob("*.so")):
        logging.getLogger(__name__).warning("building %s", what)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what went wrong is in the error
            cpp_extension.load(
                name, paths, extra_include_paths=[str(folder / include)], is_python_module=False, **flags
            )
    except (RuntimeError, OSError, ImportError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = next((line for line in lines if "error: " in line), lines[0] if lines else type(error).__name__)
        return f"building it now failed: {said.strip()[:200]}"
    return None
