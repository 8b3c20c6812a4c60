"""benchmarks/kernels/gpu.sh, as it would run on a GPU: stub_gpu.py says what of the GPU is real."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.kernels import tune
from benchmarks.machine import MALLOC
from benchmarks.results import records

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/kernels/gpu.sh"
TEXT = SCRIPT.read_text()
SETS = {name: stages.split() for name, stages in re.findall(r"^(first|second)=\(([\w ]+)\)$", TEXT, re.MULTILINE)}
BODIES = dict(re.findall(r"^ {8}(\w+)\)(.*?);;", TEXT, re.MULTILINE | re.DOTALL))
# Seconds of each stage, and of sweeps those after which no new case starts.
LIMITS = {n: sum(map(int, re.findall(r"(?:stage|operator|sanitizer) \w+ (\d+)", body))) for n, body in BODIES.items()}
BUDGETS = {n: int(b) for n, body in BODIES.items() for b in re.findall(r"(?:operator \w+ \d+|--budget) (\d+)", body)}
COMPILER = shutil.which("cc")


def environment(out: Path, **changes: str) -> dict[str, str]:
    return os.environ | {"OUT": str(out), "PYTHON": sys.executable, "GRID": "quick"} | changes


def run(out: Path, *stages: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *stages], env=environment(out, **changes), capture_output=True, text=True)


def packed(out: Path) -> set[str]:
    """The files in results.tgz, which is the only one that comes back."""
    assert [path.name for path in out.iterdir()] == ["results.tgz"]
    with tarfile.open(out / "results.tgz") as archive:
        return {member.name.removeprefix("./") for member in archive.getmembers() if member.isfile()}


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which every Python believes in a GPU, and NVIDIA's tools are at hand."""
    import triton

    folder = tmp_path_factory.mktemp("gpu")
    for name in ("cuda", "site", "bin"):
        (folder / name).mkdir()
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    source, library = Path(__file__).with_name("stub_cuda.c"), folder / "cuda/libcuda.so.1"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)], check=True)
    (folder / "cuda/libcuda.so").symlink_to(library.name)
    (folder / "site/sitecustomize.py").write_text("from tests.benchmarks import stub_gpu\n\nstub_gpu.install()\n")
    # Both run the command that follows their options; of the three cases that ncu counts, the first is enough.
    command = 'while case "$1" in *python*) false;; esac; do shift; done'
    table = r"""printf '"ID","Kernel Name","dram__bytes_read.sum"\n"","","byte"\n"0","split","600000000"\n'"""
    script(folder / "bin/ncu", f'{command}\ncase "$*" in *"--call 0") "$@" || exit;; esac\n{table}')
    script(folder / "bin/compute-sanitizer", f'{command}\n[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" ] && exec "$@"')
    cuda = str(folder / "cuda")
    found = {"STUB_CUDA": cuda, "TRITON_LIBCUDA_PATH": cuda, "LD_LIBRARY_PATH": cuda, "ONLY": "plain-bf16"}
    found |= {"STUB_CUDA_LOG": str(folder / "launches"), "TRITON_CACHE_DIR": str(folder / "cache")}
    found |= {"PYTHONPATH": str(folder / "site"), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    found |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"} | MALLOC
    return found


WRITES = {name: f"{name}.json" for name in ("train", "decode", "prefix_only", "decode_few", "memory", "overhead")}
WRITES |= {"dram": "dram/dram.json", "tune_forward": "tune/forward.json"}


def written(stages: list[str]) -> set[str]:
    return {f"{stage}.txt" for stage in stages} | {WRITES[stage] for stage in stages if stage in WRITES}


@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C compiler")
@pytest.mark.parametrize(
    ("name", "suites"), [("first", {"operator"}), ("second", {"operator", "memory", "overhead", "dram"})]
)
def test_a_set_runs_to_its_end_and_packs_after_every_stage(
    name: str, suites: set[str], gpu: dict[str, str], tmp_path: Path
) -> None:
    Path(gpu["STUB_CUDA_LOG"]).write_text("")
    out, done, text = tmp_path / "out", [], ""
    with subprocess.Popen([SCRIPT, name], env=environment(out, **gpu), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            text += line
            if begins := re.match(r"== (\w+)$", line):
                assert not done or packed(out) >= written(done), text
                done.append(begins[1])
    assert process.returncode == 0, text
    assert "left out" not in text
    assert done == SETS[name]
    assert packed(out) == written(done)
    with tarfile.open(out / "results.tgz") as archive:
        archive.extractall(tmp_path / "results", filter="data")
    sweeps = [path for path in (tmp_path / "results").rglob("*.json") if path.parent.name != "tune"]
    ours = [r for r in records(sweeps) if r["way"] in ("triton", "prefix_attention, triton")]
    assert {r["suite"] for r in ours} == suites
    assert [r for r in ours if "reason" in r] == []
    assert {r["launches"] for r in ours if "launches" in r} == {0}  # counted, though nothing ran
    launched = Path(gpu["STUB_CUDA_LOG"]).read_text().splitlines()
    assert len(launched) > 100
    tuned = re.findall(r"\('[\d.]+ us', \[", text)
    assert len(tuned) == (len(tune.CANDIDATES["forward"]["half/64"]) if name == "second" else 0)
    assert any(line.endswith("early 1") for line in launched) is (name == "second")  # a folded prefix


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")
def test_the_cuda_kernel_is_tried_from_end_to_end(tmp_path: Path) -> None:
    """On the emulated GPU, under stand-ins for the sanitizer."""
    out, tools = tmp_path / "out", tmp_path / "bin"
    tools.mkdir()
    script(tools / "compute-sanitizer", 'while case "$1" in *python*) false;; esac; do shift; done\nexec "$@"')
    found = {"DEVICE": "cpu", "PREFIX_ATTN_EMULATE": "1", "ONLY": "parity few b", "OMP_NUM_THREADS": "1"}
    done = run(out, "cuda", PATH=f"{tools}:{os.environ['PATH']}", **found)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok parity few bfloat16\nall passed" in done.stdout
    stages = ("cuda", "cuda_speed", "cuda_memcheck", "cuda_racecheck")
    assert re.findall(r"^== (\w+)$", done.stdout, re.MULTILINE) == list(stages)
    assert packed(out) == {"cuda/primitives.txt", "cuda/speed.json", *(f"{name}.txt" for name in stages)}


def test_what_is_packed_survives_a_kill_and_is_kept(tmp_path: Path) -> None:
    """The stand-in for Python answers the first stage, and never ends the second."""
    out = tmp_path / "out"
    python = script(tmp_path / "python", 'case "$1" in -c) echo ready;; *) exec sleep 600;; esac')
    with subprocess.Popen([SCRIPT, "device", "train"], env=environment(out, PYTHON=str(python)), text=True,
                          stdout=subprocess.PIPE, start_new_session=True) as process:  # fmt: skip
        assert process.stdout is not None
        while process.stdout.readline() != "== train\n":
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    assert packed(out) == {"device.txt"}
    roofline = run(out, "roofline", PYTHON=str(script(tmp_path / "other", "echo done")))
    assert roofline.returncode == 0
    assert packed(out) == {"device.txt", "roofline.txt"}


def test_without_a_device_nothing_else_runs(tmp_path: Path) -> None:
    done = run(tmp_path, PYTHON="false")
    assert done.returncode == 1
    assert re.findall(r"^== (\w+)$", done.stdout, re.MULTILINE) == ["device"]
    assert "failed: device: status 1" in done.stdout


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    done = run(tmp_path, "no-such", "train", "roofline", PYTHON="false")
    assert done.returncode == 1
    failed = re.findall(r"^failed: (.*)$", done.stdout, re.MULTILINE)
    assert failed == ["no-such: unknown", "train: status 1", "roofline: status 1"]


def test_its_sweeps_run_on_a_cpu_too(tmp_path: Path) -> None:
    done = run(tmp_path, "decode", "report", DEVICE="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert packed(tmp_path) >= {"decode.json", "report.md", "roofline.png"}
    with tarfile.open(tmp_path / "results.tgz") as archive:
        archive.extract("./decode.json", tmp_path, filter="data")
    assert {r["what"] for r in records([tmp_path / "decode.json"])} == {"decode"}


def test_it_names_what_exists() -> None:
    """Every module that the script runs, with every option that it gives."""
    commands = re.findall(r'"\$python" (?:\\\n)?\s*-m ((?:benchmarks|tests)[\w.]*)((?:\\\n|[^\n])*)', TEXT)
    given: dict[tuple[str, ...], set[str]] = {("tests.test_gpu",): {"--bare", "--only"}}
    given["tests.test_gpu_cuda",] = {"--bare"}
    for module, rest in commands:
        sub = re.search(r'"\$\{(?:sweep|slow)\[@\]\}"|report', rest)
        name = (module,) if not sub else (module, "report" if sub[0] == "report" else "run")
        given.setdefault(name, set()).update(re.findall(r"(--[\w-]+)", rest))
    tools = {f"benchmarks.kernels.{tool}" for tool in ("tune", "roofline", "dram")}
    assert {name[-1] for name in given} == {"run", "report", "tests.test_gpu", "tests.test_gpu_cuda", *tools}
    helps = {
        name: subprocess.Popen([sys.executable, "-m", *name, "--help"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for name in given
    }
    for name, process in helps.items():
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, name
        assert {option for option in given[name] if option not in text} == set(), name


def test_each_set_ends_within_five_minutes() -> None:
    assert SETS["first"][:2] == ["device", "correctness"]
    for name, stages in SETS.items():
        assert all(LIMITS[stage] for stage in stages)
        assert sum(LIMITS[stage] for stage in stages) <= 300, name
    assert BUDGETS.keys() == {"train", "decode", "prefix_only", "decode_few", "memory", "forward", "backward", "flex",
                              "decode_flex", "model"}  # fmt: skip
    # Kernels are compiled beside the budget, and the last case begins before it is spent.
    assert all(budget + 20 <= LIMITS[stage] for stage, budget in BUDGETS.items())


@pytest.mark.parametrize("stage", ["train", "decode", "prefix_only", "decode_few"])
def test_its_filters_leave_cases_of_the_default_grid(stage: str) -> None:
    from benchmarks import operator
    from benchmarks.results import parse_filters, selected

    (filters,) = re.findall(rf"operator {stage} \d+ \d+ (.*) ;;", TEXT)
    wanted = parse_filters(filters.split())
    found = selected(operator.grid("cuda"), wanted)
    assert {what for _, what in found} == wanted["what"]
    for field, values in wanted.items():
        assert {str({**case, "what": what}[field]) for case, what in found} == values, field


@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C compiler")
def test_host_times_are_of_the_launches_that_are_planned() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.host_time", "--calls", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [int(row[-1]) for row in rows] == [1, 2, 1, 7, 5]
    assert all(float(row[-4]) > 0 for row in rows)
