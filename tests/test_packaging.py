"""What is released: the extension, the source distribution, and what a user's tools see once it is installed."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_layers import tracked

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent
(VERSION,) = re.findall('^__version__ = "(.+)"$', (ROOT / "prefix_attn/__init__.py").read_text(), re.MULTILINE)
REPOSITORY = "https://github.com/prefix-attn/prefix-attn"

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
    (root / "prefix_attn/__init__.py").write_text('__version__ = "0.1.0"\n')
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


@pytest.mark.parametrize(("wanted", "reason"), [("0", "PREFIX_ATTN_CUDA=0"), ("", "this torch has no CUDA")])
def test_the_extension_for_gpus_is_left_out_with_a_reason(project: Path, wanted: str, reason: str) -> None:
    add_sources(project)
    (project / "csrc/bind_cuda.cpp").touch()
    if not wanted and (TORCH / "lib/libtorch_cuda.so").is_file():
        reason = "_C_cuda"
    done = build(project, CC="/nonexistent", CXX="/nonexistent", CUDA_HOME="", PREFIX_ATTN_CUDA=wanted)
    assert done.returncode == 0, done.stderr
    assert f"prefix_attn._C_cuda skipped: {reason}" in done.stderr


def test_no_sources_no_extension(project: Path) -> None:
    done = build(project)
    assert done.returncode == 0, done.stderr
    assert "_C_cpu" not in done.stdout + done.stderr
    assert built(project) == []


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python, with no extension to build."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PREFIX_ATTN_BUILD": "0", "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of the working tree, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    for path in tracked():
        to = folder / "tree" / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    for name in ("tests/__pycache__/old.pyc", "prefix_attn/_C_cpu.abi3.so", "docs/.draft.md"):
        (folder / "tree" / name).parent.mkdir(exist_ok=True)
        (folder / "tree" / name).touch()
    done = python(
        "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=folder / "tree"
    )
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the wheel that it made of the source distribution."""
    folder = tmp_path_factory.mktemp("installed")
    (archive,) = sdist.parents[1].glob("*.tar.gz")
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    done = python("-m", "pip", "install", *options, "--target", str(folder / "site"), str(archive), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def metadata(installed: Path) -> Distribution:
    (found,) = installed.glob("*.dist-info")
    return PathDistribution(found)


def test_sdist_is_the_repository(sdist: Path) -> None:
    """All but hidden files, and nothing that was built."""
    ours = {path.relative_to(ROOT) for path in tracked()}
    expected = {str(path) for path in ours if not any(part.startswith(".") for part in path.parts)}
    made = {"PKG-INFO", "setup.cfg"}
    packed = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert {name for name in packed - made if ".egg-info/" not in name} == expected - made


def test_tests_pass_in_an_unpacked_sdist(sdist: Path) -> None:
    """Without git: what asks git for the files of the repository looks for them itself."""
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_layers.py", cwd=sdist)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > len(list((sdist / "prefix_attn").rglob("*.py")))


def test_the_wheel_passes_the_operators_tests(sdist: Path, installed: Path, tmp_path: Path) -> None:
    """Tests of the source distribution, copied to where no other package is found than the installed one.

    Those of the backends that are there without a compiler.
    """
    shutil.copytree(sdist / "tests", tmp_path / "tests")
    shutil.copy(sdist / "pyproject.toml", tmp_path)
    code = (
        "import prefix_attn, pytest, sys; print(prefix_attn.__file__);"
        "which = ['tests/test_functional.py', '-k', 'error or eager or composed'];"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *which]))"
    )
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{installed / 'prefix_attn/__init__.py'}\n")


def test_the_wheel_holds_every_module_and_the_kernels(installed: Path) -> None:
    def files(folder: Path, *patterns: str) -> set[str]:
        return {str(path.relative_to(folder)) for pattern in patterns for path in folder.rglob(pattern)}

    package = installed / "prefix_attn"
    modules = files(ROOT / "prefix_attn", "*.py", "*.json", "py.typed")
    assert files(package, "*.py", "*.json", "py.typed") == modules
    sources = ("*.h", "*.cpp", "*.cu", "*.cuh")
    assert files(package / "csrc", *sources) == files(ROOT / "csrc", *sources)
    assert {path.name for path in installed.iterdir()} <= {"bin", "prefix_attn", f"prefix_attn-{VERSION}.dist-info"}


def test_metadata(metadata: Distribution) -> None:
    """One version, the addresses of the project, and a package page whose links lead somewhere."""
    assert metadata.version == VERSION
    urls = dict(url.split(", ") for url in metadata.metadata.get_all("Project-URL") or ())
    assert set(urls) == {"Homepage", "Repository", "Documentation", "Issues", "Changelog"}
    assert all(url.startswith(REPOSITORY) for url in urls.values())
    page = metadata.metadata.get_payload()
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert [link for link in links if not link.startswith("https://")] == []
    ours = re.findall(rf"\(({re.escape(REPOSITORY)}[^)\s]+)\)", page)
    files = [re.sub(rf"{re.escape(REPOSITORY)}/(?:blob|raw)/main/", "", link) for link in ours if "#" not in link]
    assert len(files) > 3
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_extras(metadata: Distribution) -> None:
    """Nothing but the operator's torch without an extra, and no exact version but in dev and for the demo's data."""
    requires = metadata.requires or []
    assert [line for line in requires if "extra ==" not in line] == ["torch>=2.10"]
    assert [line for line in requires if "==" in line.split(";")[0] and 'extra == "dev"' not in line] == [
        'botocore==1.44.5; extra == "demo"'
    ]


# What a user's type checker has to accept, and what it finds out.
RIGHT = """
import torch
from prefix_attn import PrefixAttention, PrefixConfig, PrefixModel, explain, get_prefix_model, prefix_attention
from prefix_attn import prefix_attention_varlen
from transformers import PreTrainedModel
from typing_extensions import reveal_type

x = torch.ones(1, 1, 1, 8)
reveal_type(prefix_attention(x, x, x, None, None))
reveal_type(prefix_attention(x, x, x, None, None, return_lse=True))
packed, cu = x[0], torch.tensor([0, 1])
lengths = {"max_seqlen_q": 1, "max_seqlen_k": 1}
reveal_type(prefix_attention_varlen(packed, packed, packed, None, None, cu_seqlens_q=cu, cu_seqlens_k=cu, **lengths))
reveal_type(explain(x, x, x, None, None, window=3))
reveal_type(PrefixAttention(64, 4, 10))
config = PrefixConfig(num_virtual_tokens=10)


def tune(base: PreTrainedModel) -> None:
    reveal_type(get_prefix_model(base, config))
    reveal_type(PrefixModel.from_pretrained(base, "folder"))
"""
REVEALED = [
    "Tensor",
    "tuple[Tensor, Tensor]",
    "Tensor",
    "Explanation",
    "PrefixAttention",
    "PrefixModel",
    "PrefixModel",
]
# Every line that ends in a comment is wrong.
WRONG = """
import torch
from prefix_attn import PrefixConfig, get_prefix_model, prefix_attention

x = torch.ones(1, 1, 1, 8)
prefix_attention("x")  # no tensor
prefix_attention(x, x, x, None, None, return_lse="yes")  # no bool
n: int = prefix_attention(x, x, x, None, None)  # no int
t: torch.Tensor = prefix_attention(x, x, x, None, None, return_lse=True)  # no tensor
prefix_attention(x, x, x, None, None, windoww=3)  # no such option
explain(x, x, x, None, None, window="three")  # no number
PrefixConfig(num_virtual_tokens="ten")  # no number
get_prefix_model(torch.nn.Linear(1, 1), 10)  # no config
PrefixConfig().num_virtual_token  # no such field
"""


def checked(source: str, installed: Path, folder: Path) -> str:
    """What pyrefly says about a user's file; a package without py.typed would have no types for it."""
    (folder / "use.py").write_text(source)
    (folder / "pyrefly.toml").write_text('replace-untyped-imports-with-any = ["prefix_attn", "prefix_attn.*"]\n')
    pyrefly = Path(sys.executable).with_name("pyrefly")
    options = ("--output-format", "min-text", "--python-interpreter-path", sys.executable)
    command = [pyrefly, "check", *options, "--site-package-path", installed, "use.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


def test_users_type_checkers_see_types(installed: Path, tmp_path: Path) -> None:
    found = checked(RIGHT, installed, tmp_path)
    assert re.findall(r"revealed type: (.*) \[", found) == REVEALED
    assert "ERROR" not in found
    found = checked(WRONG, installed, tmp_path)
    expected = [number for number, line in enumerate(WRONG.splitlines(), start=1) if "  # no" in line]
    assert sorted({int(line) for line in re.findall(r"ERROR use.py:(\d+):", found)}) == expected, found


def test_a_folder_with_the_package_is_enough(tmp_path: Path) -> None:
    """Nothing installed, and nothing there but torch: what the extras bring cannot be imported."""
    shutil.copytree(ROOT / "prefix_attn", tmp_path / "prefix_attn", ignore=shutil.ignore_patterns("*.so"))
    code = """
import json, sys
extras = "transformers", "safetensors", "accelerate", "gguf", "huggingface_hub", "peft", "triton", "typer", "rich"
sys.modules.update(dict.fromkeys(extras))
import torch, prefix_attn
x = torch.ones(1, 1, 1, 8)
out = prefix_attn.prefix_attention(x, x, x, None, None)
print(json.dumps([prefix_attn.__file__, prefix_attn.__version__, torch.equal(out, x)]))
"""
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(tmp_path / "prefix_attn/__init__.py"), VERSION, True]


def test_the_changelog_says_where_modules_went() -> None:
    moved = re.findall(r"^\| `(\S+)`[^|]*\| `(\S+)`", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(moved) > 30

    def files(name: str) -> list[Any]:
        """The module, script, folder or files of that name, or a module's own."""
        path = name if "/" in name else name.replace(".", "/")
        if found := [*ROOT.glob(path), *ROOT.glob(f"{path}.py")]:
            return found
        module, _, own = name.rpartition(".")
        inside = module and (ROOT / f"{module.replace('.', '/')}.py").is_file()
        return [own] if inside and hasattr(importlib.import_module(module), own) else []

    assert [new for _, new in moved if not files(new)] == []
    assert [
        old for old, _ in moved if any(not isinstance(found, Path) or found.is_file() for found in files(old))
    ] == []


def test_without_its_extras_every_name_that_is_listed_can_be_had() -> None:
    """`from prefix_attn import *` and inspect take the operator's names, where there is no transformers."""
    code = """
import importlib.util, inspect
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "transformers" else found(name, *rest)
import prefix_attn
from prefix_attn import *
print(sorted(prefix_attn.__all__), len(inspect.getmembers(prefix_attn)) > 5)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    names = ["PrefixAttention", "PrefixAttentionFunction", "explain", "prefix_attention", "prefix_attention_varlen"]
    assert done.stdout.strip() == f"{names} True", done.stderr
