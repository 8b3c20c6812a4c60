"""Counts the instructions of the C++ CPU kernels: from run to run they differ by millionths, so a few per cent show.

    python -m benchmarks.kernels.instructions             exit status 1 where a count is above the recorded one
    python -m benchmarks.kernels.instructions --record    these counts become the recorded ones

Callgrind counts one call per case, the second of its process, on one thread: the kernels as they ship, without torch,
in instructions.cpp. It does not know AVX-512, whose kernels are the same text with wider vectors. Needs valgrind and a
compiler, on x86-64.

A count is a fact of a compiler, and the record names the one that made it. GCC 13.3 and 14.2 count from 7 % less to
1.1 % more than GCC 12.2. TOLERANCE lies above that, and below what one instruction more per broadcast costs in a
forward or backward: 5 % or more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from prefix_attn.backends._native import FLAGS

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks/results/instructions.json"
TOLERANCE = 1.03
ISAS = ("avx2", "generic")
H, D = 2, 64
PRODUCTS = {"decode": 2, "forward": 2, "backward": 5, "prefix-only": 4}  # D multiplications each, per visible pair


class Case(NamedTuple):
    """One call. Decoding has one query per row, the others are causal; N entries of a bank take turns."""

    what: str  # decode, forward, backward or prefix-only
    dtype: str
    B: int
    S: int
    P: int
    N: int = 1

    @property
    def title(self) -> str:
        """As the table and the record show it."""
        bank = f" N={self.N}" if self.N > 1 else ""
        return f"{self.what} {self.dtype} B={self.B} P={self.P} S={self.S}{bank}"


CASES = (
    Case("decode", "float32", 64, 128, 512),
    Case("decode", "float32", 64, 128, 512, 16),
    Case("decode", "float32", 64, 256, 0),
    Case("decode", "bfloat16", 64, 128, 512),
    Case("forward", "float32", 2, 128, 100),
    Case("forward", "bfloat16", 2, 128, 100),
    Case("backward", "float32", 2, 128, 100),
    Case("prefix-only", "float32", 2, 128, 100),
)


def multiplications(case: Case) -> int:
    """Multiply-accumulates that the result needs. Hidden pairs of a causal mask are not counted."""
    queries = 1 if case.what == "decode" else case.S
    own = case.S if case.what == "decode" else case.S * (case.S + 1) // 2
    pairs = queries * case.P + (0 if case.what == "prefix-only" else own)
    return PRODUCTS[case.what] * D * case.B * H * pairs


def compiler() -> list[str]:
    """The command that builds the kernels where nothing was installed, too."""
    return os.environ.get("CXX", "c++").split()


def build(folder: Path, csrc: Path = ROOT / "csrc") -> Path:
    """The program that makes one call."""
    program = folder / "instructions"
    sources = [ROOT / "benchmarks/kernels/instructions.cpp", *(csrc / f"cpu/{isa}.cpp" for isa in ISAS)]
    subprocess.run([*compiler(), *FLAGS, "-fPIC", f"-I{csrc}", *sources, "-o", program], check=True)
    return program


def count(program: Path, isa: str, case: Case) -> int:
    """Instructions of one call."""
    queries = 1 if case.what == "decode" else case.S
    sizes = map(str, (case.B, H, queries, case.S, case.P, case.N, D))
    callgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={os.devnull}", "--toggle-collect=counted"]
    command = [*callgrind, str(program), isa, case.what, case.dtype, *sizes]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    found = re.search(r"Collected : ([1-9]\d*)", done.stdout)  # 0: it found no function of this name
    if done.returncode or found is None:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")
    return int(found[1])


def above(counts: Mapping[str, int], recorded: Mapping[str, int]) -> list[str]:
    """The cases that take more than TOLERANCE times what is recorded, or of which nothing is."""
    return [
        f"{name}: {instructions} instructions, {recorded.get(name, 0)} recorded"
        for name, instructions in counts.items()
        if instructions > TOLERANCE * recorded.get(name, 0)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Count, print, compare or record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    recorded = record["instructions"]
    version = subprocess.check_output([*compiler(), "--version"], text=True).splitlines()[0]
    print(f"{version}; recorded with {record['compiler']}\n")
    print("| case | instructions | per multiply-accumulate | over the record |")
    print("|---|---|---|---|")
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for isa in ISAS:
            for case in CASES:
                name = f"{isa} {case.title}"
                n = counts[name] = count(program, isa, case)
                ratio = f"{n / recorded[name]:.3f}" if name in recorded else "new"
                print(f"| {name} | {n} | {n / multiplications(case):.3f} | {ratio} |", flush=True)
    if options.record:
        RECORD.write_text(json.dumps({"compiler": version, "instructions": counts}, indent=2) + "\n", encoding="utf-8")
        return 0
    broken = above(counts, recorded)
    print("\n".join(broken), file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
