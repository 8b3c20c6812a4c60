"""Compiles the CUDA C++ decode kernel for every architecture and reads what it takes. Needs nvcc, and no GPU.

    python -m benchmarks.kernels.compile_cuda --check                                    all kernels: minutes
    python -m benchmarks.kernels.compile_cuda --check --write docs/kernel-resources.md   and the table of that page
    python -m benchmarks.kernels.compile_cuda --check --arch 90 --only bf16/128/16       one of them: seconds

--check fails on a spill, on local memory, on more than 255 registers, and where the machine code lacks one of the
instructions that the kernel is made of: HMMA (mma.sync), LDSM (ldmatrix) and LDGSTS (cp.async).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

from prefix_attn.backends._native_cuda import ARCHITECTURES, NVCC

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TYPES = {"f16": "dev::half", "bf16": "dev::bfloat"}
KERNELS = ["/".join(map(str, found)) for found in product(TYPES, (64, 128), (16, 64))]  # type/head size/queries
NEEDED, FORBIDDEN = ("HMMA", "LDSM", "LDGSTS"), ("LDL", "STL")
MOST_REGISTERS = 255
HEADING = "## The CUDA C++ kernel"


class Compiled(NamedTuple):
    """What one kernel takes on one architecture."""

    arch: str
    kernel: str
    registers: int
    spilled: int  # bytes of stores and loads
    stack: int
    instructions: dict[str, int]

    def problems(self) -> list[str]:
        """What ``--check`` finds wrong."""
        found = [f"{self.spilled} bytes spilled"] if self.spilled else []
        found += [f"{self.stack} bytes of local memory"] if self.stack else []
        found += [f"{self.registers} registers"] if self.registers > MOST_REGISTERS else []
        found += [f"no {name}" for name in NEEDED if not self.instructions[name]]
        found += [f"{self.instructions[name]} {name}" for name in FORBIDDEN if self.instructions[name]]
        return [f"sm_{self.arch} {self.kernel}: {one}" for one in found]


def nvcc() -> str | None:
    """nvcc on the PATH, in CUDA_HOME or where its installer puts it."""
    homes = [os.environ.get("CUDA_HOME", ""), *map(str, sorted(Path("/usr/local").glob("cuda*"), reverse=True))]
    places = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)]
    return next(filter(None, places), None)


def cuobjdump() -> str | None:
    """cuobjdump of CUDA, or the one inside triton."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = find_spec("triton")
    bundled = Path(str(triton.origin)).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return str(bundled) if bundled and bundled.is_file() else None


def compiled(arch: str, kernel: str) -> Compiled:
    """Compiles one kernel, and disassembles it."""
    name, head, rows = kernel.split("/")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        instance = f"decode<{TYPES[name]}, {head}, {rows}>(const __grid_constant__ prefix_attn::Decode)"
        source.write_text(f'#include "decode.cuh"\ntemplate __global__ void prefix_attn::{instance};\n')
        command = [str(nvcc()), *NVCC, f"-I{CSRC / 'cuda'}", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
        said = subprocess.run([*command, source, "-o", binary], check=True, capture_output=True, text=True).stderr
        code = subprocess.run([str(cuobjdump()), "-sass", binary], check=True, capture_output=True, text=True).stdout
    (registers,) = map(int, re.findall(r"Used (\d+) registers", said))
    (spills,) = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in (*NEEDED, *FORBIDDEN)}
    stack, stores, loads = map(int, spills)
    return Compiled(arch, kernel, registers, stores + loads, stack, counts)


def table(found: Sequence[Compiled]) -> str:
    """The section of docs/kernel-resources.md."""
    version = re.findall(r"release ([\d.]+)", subprocess.check_output([str(nvcc()), "--version"], text=True))[0]
    lines = [
        HEADING,
        "",
        "Made by `python -m benchmarks.kernels.compile_cuda --check --write docs/kernel-resources.md` with nvcc "
        f"{version}: compiled, not run. Kernel: type, head size, queries of a unit. The last three are counts of "
        "instructions in the machine code.",
        "",
        f"| architecture | kernel | registers | spilled bytes | local bytes | shared KiB | {' | '.join(NEEDED)} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        head = int(one.kernel.split("/")[1])
        shared = (320 * head * 2 + 2048 + 128 + 256) / 1024  # shared_bytes of plan.h
        counts = " | ".join(str(one.instructions[name]) for name in NEEDED)
        taken = f"{one.registers} | {one.spilled} | {one.stack} | {shared:.1f}"
        lines.append(f"| sm_{one.arch} | {one.kernel} | {taken} | {counts} |")
    return "\n".join(lines) + "\n"


def write(path: Path, section: str) -> None:
    """Puts the section at the end of the page, in the place of an older one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    path.write_text(text.split(HEADING)[0].rstrip() + "\n\n" + section, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints the table and says what is wrong; 1 if ``--check`` finds something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(arguments)
    missing = [name for name, tool in (("nvcc", nvcc()), ("cuobjdump", cuobjdump())) if tool is None]
    if missing:
        print(f"nothing compiled: {' and '.join(missing)} not found")
        return 0
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda one: compiled(*one), product(args.arch, args.only)))
    print(table(found), end="")
    if args.write:
        write(args.write, table(found))
    wrong = [problem for one in found for problem in one.problems()]
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(args.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
