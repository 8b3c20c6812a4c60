"""Builds the optional extensions and the package page; everything else about the package is in pyproject.toml.

torch is never imported here: under pip's build isolation it cannot be, and the extension uses torch's stable ABI, so
the headers of whichever torch the target environment holds are enough. Without headers or without a compiler the
package installs as pure Python.

The extension for GPUs is compiled where nvcc is and torch has CUDA: for all architectures, which takes minutes.

Environment: PREFIX_ATTN_BUILD=0 skips both extensions, PREFIX_ATTN_TORCH_DIR names the directory of an installed torch,
PREFIX_ATTN_CUDA=0 skips the extension for GPUs, PREFIX_ATTN_CUDA="80 90" builds it for these architectures, whatever
torch is there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REPOSITORY = "https://github.com/prefix-attn/prefix-attn"
# The oldest torch whose stable ABI the extension may use: 2.10, the minimum in pyproject.toml.
TORCH_TARGET_VERSION = "0x020a000000000000"
# What prefix_attn/backends/_native_cuda.py has, too. PTX of the newest serves GPUs that come after it.
ARCHITECTURES = "80 90 100 120"
NVCC = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", "--threads=0"]


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
            if ext.name.endswith("_C_cuda"):
                self.compile_cuda(ext)
            super().build_extension(ext)
        except Exception as error:
            say(f"{ext.name} was not built ({error}); the pure PyTorch backends will be used")

    def compile_cuda(self, ext: Extension) -> None:
        """Kernels by nvcc. Where torch has no CUDA, a stand-in for its library, so that the extension asks for it."""
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        wanted = os.environ.get("PREFIX_ATTN_CUDA") or ARCHITECTURES
        newest = wanted.split()[-1]
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted.split()]
        targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        kernels, compiler = str(folder / "decode.o"), nvcc() or "nvcc"
        say(f"{compiler} compiles {ext.name} for {wanted}")
        command = [compiler, *NVCC, *targets, "-Icsrc/cuda", "-c", "csrc/cuda/decode.cu", "-o", kernels]
        subprocess.run(command, check=True)
        ext.extra_objects = [kernels]
        ext.library_dirs.append(str(folder))
        if not any((Path(path) / "libtorch_cuda.so").is_file() for path in ext.library_dirs):
            stand_in = "void aoti_torch_get_current_cuda_stream(void) {}"
            link = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-xc", "-", "-o", f"{folder}/libtorch_cuda.so"]
            subprocess.run([os.environ.get("CC", "cc"), *link], input=stand_in, text=True, check=True)


def cuda_homes() -> list[Path]:
    """Where CUDA may be installed: CUDA_HOME, and where its installer puts it, the newest first."""
    named = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    return [*named, *sorted(Path("/usr/local").glob("cuda*"), reverse=True)]


def nvcc() -> str | None:
    """nvcc there or on the PATH."""
    found = [shutil.which("nvcc", path=str(home / "bin")) for home in cuda_homes()]
    return next(filter(None, found), None) or shutil.which("nvcc")


def cuda_extensions(torch: Path) -> list[Extension]:
    """The extension for GPUs, if it can be compiled and is of use."""
    wanted, compiler = os.environ.get("PREFIX_ATTN_CUDA"), nvcc()
    if not (ROOT / "csrc/bind_cuda.cpp").is_file():
        return []
    if wanted == "0":
        reason = "PREFIX_ATTN_CUDA=0"
    elif not wanted and not (torch / "lib/libtorch_cuda.so").is_file():
        reason = "this torch has no CUDA"
    elif compiler is None:
        reason = "no nvcc found in CUDA_HOME, in /usr/local or on PATH"
    else:
        reason = ""
    if reason or compiler is None:
        say(f"prefix_attn._C_cuda skipped: {reason}")
        return []
    homes = [*cuda_homes(), Path(compiler).resolve().parent.parent]
    return [
        Extension(
            "prefix_attn._C_cuda",
            ["csrc/bind_cuda.cpp"],
            include_dirs=["csrc", str(torch / "include")],
            library_dirs=[str(torch / "lib"), *(str(home / name) for home in homes for name in ("lib64", "lib"))],
            libraries=["torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"],
            depends=["csrc/args.h", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/cuda").iterdir()))],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("USE_CUDA", None)],
            extra_compile_args=["-O2", "-std=c++20"],
            extra_link_args=["-Wl,--exclude-libs,ALL"],  # cudart stays inside
            py_limited_api=True,
            optional=True,
        )
    ]


def extensions() -> list[Extension]:
    """The extensions, if their sources, the headers and the platform are there."""
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
        ),
        *cuda_extensions(torch),
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
