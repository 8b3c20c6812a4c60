"""The decode kernel of csrc/cuda on the emulated GPU, without torch: sanitizers, orders of threads, and planted bugs.

A check that cannot fail shows nothing. So each of BUGS is put into the kernel, and must be found by what is said there.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA, EMULATE, HERE = ROOT / "csrc/cuda", ROOT / "csrc/emulate", Path(__file__).parent / "emulated"
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")
CASES = ("plain", "long", "ragged", "unfolded", "wide", "chunks", "bank", "options", "many", "alone")
ORDERS = {"random": 0, "greedy": 1, "fair": 2}
SANITIZED = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    "ASAN_OPTIONS": "detect_leaks=0 exitcode=67",
}
WRONG, FAILED, COUNTED, RACE, OVERRUN = 2, 3, 4, 66, 67


class Bug(NamedTuple):
    """Text of a file of csrc/cuda that is replaced, how the kernel is then built, and how that is found."""

    old: str
    new: str
    status: int
    says: str
    sanitizer: str = ""
    file: str = "attend.cuh"


BUGS = {
    "no wait for copies": Bug("dev::copy_wait<1>();", "", WRONG, "WRONG"),
    "no barrier after the wait": Bug(
        "dev::sync_block();  // everybody's copies are there", "", RACE, "data race", "thread"
    ),
    "no barrier before a stage is filled again": Bug(
        "dev::sync_block();  // nobody reads the stage that is filled next", "", RACE, "data race", "thread"
    ),
    "one barrier for half the threads": Bug(
        "dev::sync_block();  // everybody's copies are there",
        "if (dev::thread() < 64) dev::sync_block(); else dev::sync_block();",
        FAILED,
        "threads of a block wait at different barriers",
    ),
    "a thread leaves before a barrier": Bug(
        "    dev::copy_wait<0>();  // of an empty run: the queries\n",
        "    dev::copy_wait<0>();\n    if (dev::thread() == 5) return;\n",
        FAILED,
        "a barrier that ended threads never reach",
        file="decode.cuh",
    ),
    "a shuffle in half a warp": Bug(
        "top[i] = fmaxf(top[i], dev::shuffle_xor(top[i], 2));",
        "if (dev::thread() % 32 < 16) top[i] = fmaxf(top[i], dev::shuffle_xor(top[i], 2));",
        FAILED,
        "lanes of a warp are at different instructions",
    ),
    "fragments in another order": Bug(
        "Math<T>::mma(s[n], a, b[0], b[1]);", "Math<T>::mma(s[n], a, b[0], b[2]);", WRONG, "WRONG"
    ),
    "shared memory that nobody wrote": Bug(
        "const bool valid = c * 8 < p.D && visible(n);",
        "const bool valid = c * 8 < p.D && visible(n);\n        if (!valid) continue;",
        WRONG,
        "WRONG",
    ),
    "hidden keys are copied": Bug(
        "const bool valid = c * 8 < p.D && visible(n);", "const bool valid = c * 8 < p.D && n < limit;", WRONG, "WRONG"
    ),
    "keys beyond a length are copied": Bug(
        "const auto visible = [&](int n) { return n < limit &&",
        "const auto visible = [&](int n) { return n < (limit + KEYS - 1) / KEYS * KEYS &&",
        OVERRUN,
        "heap-buffer-overflow",
        "address",
    ),
    "an array in shared memory is too small": Bug(
        "row = arena.template take<float>(4 * TILE * 2);",
        "row = arena.template take<float>(4 * 15 * 2);",
        OVERRUN,
        "use-after-poison",
        "address",
    ),
    "less shared memory than is used": Bug(
        "#pragma once",
        "#pragma once\n#define LESS_SHARED 16",
        FAILED,
        "more shared memory is used than the launch asks for",
    ),
    "a window that is one key wider": Bug(
        "low[j / 2] < o && o <= high", "low[j / 2] <= o && o <= high", WRONG, "WRONG"
    ),
    "a maximum that is not finite": Bug("top[i] == -INFINITY ? 0.f : top[i];  //", "top[i];  //", WRONG, "WRONG"),
    "banks in conflict": Bug("r * D + (c ^ (r & 7)) * 8", "r * D + c * 8", COUNTED, "COUNT"),
    "no barrier in the sum of warps": Bug(
        "                }\n        dev::sync_block();\n",
        "                }\n",
        RACE,
        "data race",
        "thread",
        "decode.cuh",
    ),
    "no barrier before a block is counted in": Bug(
        "dev::sync_block();    // every thread's slots",
        "// every thread's slots",
        RACE,
        "data race",
        "thread",
        "decode.cuh",
    ),
    "a counter that orders nothing": Bug(
        "dev::count(p.arrived + int64_t(of.unit + dev::thread()) * p.HKV + of.h)",
        "__atomic_fetch_add(p.arrived + int64_t(of.unit + dev::thread()) * p.HKV + of.h, 1, __ATOMIC_RELAXED)",
        RACE,
        "data race",
        "thread",
        "decode.cuh",
    ),
    "the sum before the last part": Bug(
        "p.plan.parts() - 1;", "p.plan.parts() - 2;", WRONG, "WRONG", file="decode.cuh"
    ),
    "a row gets another entry's prefix": Bug(
        "leave<T, D, 4, 1>(p, of, s, run, state);",
        "of.entry = Queries::ANY; leave<T, D, 4, 1>(p, of, s, run, state); of.entry = entry;",
        WRONG,
        "WRONG",
        file="decode.cuh",
    ),
    "a row without an entry leaves no part": Bug(
        "if (at.x >= 0) p.slots_lse[run", "if (false) p.slots_lse[run", WRONG, "WRONG", file="decode.cuh"
    ),
    "the prefix is read twice": Bug(
        "    leave<T, D, 4, 1>(p, of, s, run, state);",
        "    attend<T, D, 4, 1>(p, keys, s, state); leave<T, D, 4, 1>(p, of, s, run, state);",
        COUNTED,
        "COUNT",
        file="decode.cuh",
    ),
}


def compile_(source: Path, to: Path, *flags: str, cuda: Path = CUDA) -> Path:
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-g1", "-Wno-unknown-pragmas", *flags]
    command += [f"-I{EMULATE}", f"-I{cuda}", "-c", str(source), "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return to


@pytest.fixture(scope="session")
def core(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What is compiled once, and never with a sanitizer: the emulator and the checks."""
    folder = tmp_path_factory.mktemp("core")
    kept = "-fno-tree-loop-distribute-patterns"  # no call of memset, which a sanitizer would watch
    files = {"emulate": (EMULATE, "-O2", kept), "warp": (EMULATE, "-O2", kept), "decode_test": (HERE, "-O1")}
    return [compile_(where / f"{name}.cpp", folder / f"{name}.o", *flags) for name, (where, *flags) in files.items()]


def built(core: list[Path], folder: Path, *flags: str, sanitizer: str = "", cuda: Path = CUDA) -> Path:
    """The program, with a kernel compiled from the sources in ``cuda``."""
    sanitized = [f"-fsanitize={sanitizer}"] if sanitizer else []
    kernel = compile_(HERE / "kernel.cpp", folder / "kernel.o", *flags, *sanitized, cuda=cuda)
    command = [os.environ.get("CXX", "c++"), *sanitized, *map(str, core), str(kernel), "-o", str(folder / "program")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "program"


def run(program: Path, order: str, seed: int, late: bool, *cases: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(ORDERS[order]), str(seed), str(int(late)), *cases]
    options: dict[str, Any] = {"env": os.environ | SANITIZED, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, check=False, **options)
    if "unexpected memory mapping" in done.stderr:  # older ThreadSanitizers and a kernel that spreads memory further
        done = subprocess.run(["setarch", "-R", *command], check=False, **options)
    return done


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(core: list[Path], tmp_path: Path, sanitizer: str) -> None:
    done = run(built(core, tmp_path, "-O1", sanitizer=sanitizer), "random", 1, True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.findall(r"^(\w+) +ok", done.stdout, re.MULTILINE) == list(CASES)


def test_all_orders_give_the_same_bits(core: list[Path], tmp_path: Path) -> None:
    """And no ldmatrix conflicts in its banks, and as many bytes are copied as the formula says."""
    program = built(core, tmp_path, "-O1")
    said = set()
    for order in ORDERS:
        for late in (True, False):
            done = run(program, order, 3, late)
            assert done.returncode == 0, done.stdout + done.stderr[-3000:]
            said.add(done.stdout)
    (report,) = said
    found = re.findall(r"conflicts (\d+) bytes (\d+) of (\d+)", report)
    assert len(found) == len(CASES)
    assert all(conflicts == "0" and copied == formula != "0" for conflicts, copied, formula in found)


def test_fragments_lie_where_the_manual_says(tmp_path: Path) -> None:
    """By the formulas of the PTX ISA, and by CuTe's layouts where CUTLASS is installed (pip install nvidia-cutlass)."""
    found, cuda = find_spec("cutlass_library"), sorted(Path("/usr/local").glob("cuda*/include"))
    headers = [Path(str(found.origin)).parent / "source/include"] if found and cuda else []
    include = [f"-I{path}" for path in (*headers, *cuda, *(path / "cccl" for path in cuda))]
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-w", f"-I{EMULATE}", *include, str(HERE / "fragments.cpp")]
    done = subprocess.run([*command, str(EMULATE / "warp.cpp"), "-o", str(tmp_path / "fragments")], check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = subprocess.run([tmp_path / "fragments"], check=False, capture_output=True, text=True).stdout
    assert said == "mma 0 ldmatrix 0 transposed 0" + (" cute 0\n" if headers else "\n")


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(core: list[Path], tmp_path: Path, name: str) -> None:
    bug = BUGS[name]
    for path in CUDA.glob("*.cuh"):
        text = path.read_text()
        if path.name == bug.file:
            assert text.count(bug.old) == 1, "the bug's place is not where it was"
            text = text.replace(bug.old, bug.new)
        (tmp_path / path.name).write_text(text.replace('"plan.h"', f'"{CUDA / "plan.h"}"'))
    program = built(core, tmp_path, "-O0", "-DMOST_ROWS=16", sanitizer=bug.sanitizer, cuda=tmp_path)
    done = run(program, "random", 1, True, "plain", "long", "bank", "options")
    assert (done.returncode, bug.says in done.stdout + done.stderr) == (bug.status, True), done.stdout + done.stderr
