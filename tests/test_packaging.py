"""setup.py: the extension is built without importing torch, and its absence never stops an installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent

# Registers prefix_attn_packaging::same through the stable ABI.
BINDING = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include "args.h"
using torch::stable::Tensor;
static Tensor same(Tensor tensor) { return tensor; }
static void boxed_same(StableIValue* stack, uint64_t, uint64_t) { stack[0] = from(same(to<Tensor>(stack[0]))); }
STABLE_TORCH_LIBRARY(prefix_attn_packaging, m) { m.def("same(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(prefix_attn_packaging, CompositeExplicitAutograd, m) { m.impl("same", &boxed_same); }
"""

# A torch that fails when it is imported: first on the path of the build.
TRAP = "raise RuntimeError('setup.py imported torch')\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what a build needs, with no native source."""
    root = tmp_path / "project"
    root.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (root / "README.md").write_text("prefix_attn\n")
    (root / "prefix_attn").mkdir()
    (root / "prefix_attn/__init__.py").touch()
    (root / "csrc").mkdir()
    (root / "csrc/README.md").touch()
    return root


def add_sources(root: Path) -> None:
    (root / "csrc/bind_cpu.cpp").write_text(BINDING)
    (root / "csrc/args.h").write_text("#pragma once\n")


def build(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    trap = root.parent / "trap"
    (trap / "torch").mkdir(parents=True, exist_ok=True)
    (trap / "torch/__init__.py").write_text(TRAP)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFIX_ATTN_")}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=root,
        env={**inherited, "PYTHONPATH": str(trap), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def built(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "prefix_attn").glob("*.so"))


needs_compiler = pytest.mark.skipif(
    shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0]) is None or not sys.platform.startswith("linux"),
    reason="needs a C++ compiler on Linux",
)


@needs_compiler
def test_builds_with_torchs_headers_without_importing_torch(project: Path) -> None:
    add_sources(project)
    done = build(project)
    assert done.returncode == 0, done.stderr
    assert f"built with the headers in {TORCH}" in done.stderr
    assert built(project) == ["_C_cpu.abi3.so"], done.stderr
    code = (
        f"import torch; torch.ops.load_library({str(project / 'prefix_attn/_C_cpu.abi3.so')!r});"
        "print(torch.ops.prefix_attn_packaging.same(torch.tensor([1.0, 2.5])).tolist())"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert loaded.stdout.strip() == "[1.0, 2.5]", loaded.stderr


def test_no_compiler_is_no_failure(project: Path) -> None:
    add_sources(project)
    done = build(project, CC="/nonexistent", CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "prefix_attn._C_cpu was not built" in done.stderr
    assert "the pure PyTorch backends will be used" in done.stderr
    assert built(project) == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PREFIX_ATTN_BUILD": "0"}, "skipped: PREFIX_ATTN_BUILD=0"),
        ({"PREFIX_ATTN_TORCH_DIR": "/nonexistent"}, "PREFIX_ATTN_TORCH_DIR=/nonexistent holds no torch"),
    ],
)
def test_environment(project: Path, environment: dict[str, str], message: str) -> None:
    add_sources(project)
    done = build(project, **environment)
    assert done.returncode == 0, done.stderr
    assert message in done.stderr
    assert built(project) == []


def test_no_sources_no_extension(project: Path) -> None:
    done = build(project)
    assert done.returncode == 0, done.stderr
    assert "_C_cpu" not in done.stdout + done.stderr
    assert built(project) == []
