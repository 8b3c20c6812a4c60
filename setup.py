"""Builds the optional CPU extension and the package page; everything else about the package is in pyproject.toml.

torch is never imported here: under pip's build isolation it cannot be, and the extension uses torch's stable ABI, so
the headers of whichever torch the target environment holds are enough. Without headers or without a compiler the
package installs as pure Python.

Environment: PREFIX_ATTN_BUILD=0 skips the extension, PREFIX_ATTN_TORCH_DIR names the directory of an installed torch.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REPOSITORY = "https://github.com/prefix-attn/prefix-attn"
# The oldest torch whose stable ABI the extension may use: 2.10, the minimum in pyproject.toml.
TORCH_TARGET_VERSION = "0x020a000000000000"


def say(message: str) -> None:
    """Writes to stderr, where pip shows it with -v or on failure."""
    print(f"prefix_attn: {message}", file=sys.stderr, flush=True)


def package_page() -> str:
    """README.md with absolute links. A package page has no files beside it, so relative links would lead nowhere."""

    def absolute(link: re.Match[str]) -> str:
        text, target = link.groups()
        if target.startswith("#"):
            return f"{text}({REPOSITORY}{target})"
        return f"{text}({REPOSITORY}/{'raw' if text.startswith('!') else 'blob'}/main/{target})"

    page = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?\[[^\]]*\])\((?!https?:)([^)\s]+)\)", absolute, page)


def is_torch(directory: Path) -> bool:
    """Whether the directory is an installed torch with the stable-ABI headers and the library to link to."""
    headers = ("include/torch/csrc/stable/library.h", "include/torch/headeronly/version.h")
    return all((directory / header).is_file() for header in headers) and (directory / "lib").is_dir()


def find_torch() -> Path | None:
    """Directory of an installed torch, found without importing it.

    Build isolation hides the target environment from sys.path, but sys.prefix is still that environment (pip); tools
    that build in an environment of their own leave VIRTUAL_ENV or CONDA_PREFIX to go by.
    """
    named = os.environ.get("PREFIX_ATTN_TORCH_DIR")
    if named:
        if is_torch(Path(named)):
            return Path(named)
        say(f"PREFIX_ATTN_TORCH_DIR={named} holds no torch with stable-ABI headers")
        return None
    candidates: list[Path] = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        candidates += [Path(location) for location in spec.submodule_search_locations]
    for base in (sys.prefix, os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX")):
        if base:
            places = {"base": base, "platbase": base}
            candidates += [Path(sysconfig.get_path(key, vars=places)) / "torch" for key in ("purelib", "platlib")]
    return next((candidate for candidate in candidates if is_torch(candidate)), None)


class BuildOptionalExtension(build_ext):
    """An extension that cannot be compiled is reported and left out; the installation goes on."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles one extension, or says why it is left out."""
        try:
            super().build_extension(ext)
        except Exception as error:
            say(f"{ext.name} was not built ({error}); the pure PyTorch backends will be used")


def extensions() -> list[Extension]:
    """The extension, if its sources, the headers and the platform are there."""
    source = Path("csrc")
    if not (ROOT / source / "bind_cpu.cpp").is_file():
        return []
    if os.environ.get("PREFIX_ATTN_BUILD", "1") == "0":
        say("prefix_attn._C_cpu skipped: PREFIX_ATTN_BUILD=0")
        return []
    if not sys.platform.startswith("linux"):
        say(f"prefix_attn._C_cpu skipped: built on Linux only, this is {sys.platform}")
        return []
    torch = find_torch()
    if torch is None:
        say("prefix_attn._C_cpu skipped: no installed torch found; install torch first or set PREFIX_ATTN_TORCH_DIR")
        return []
    say(f"prefix_attn._C_cpu is built with the headers in {torch}")
    units = sorted(path.relative_to(ROOT) for path in (ROOT / source / "cpu").glob("*.cpp"))
    return [
        Extension(
            "prefix_attn._C_cpu",
            [str(source / "bind_cpu.cpp"), *map(str, units)],
            include_dirs=[str(source), str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / source).rglob("*.h"))],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
            extra_compile_args=["-O3", "-std=c++20", "-fno-math-errno", "-Wno-psabi"],
            py_limited_api=True,
            optional=True,
        )
    ]


EXTENSIONS = extensions()
setup(
    long_description=package_page(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["prefix_attn", "prefix_attn.*"]), "prefix_attn.csrc"],
    package_dir={"prefix_attn.csrc": "csrc"},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildOptionalExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)
