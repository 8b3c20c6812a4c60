"""The sweeps of benchmarks/gpu.sh on tiny shapes, without a GPU: their logic, their files, their pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, attention, decode, device, memory, peers, plot, roofline
from benchmarks.measure import read

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("composed", "composed, frozen", "sdpa", "cat + sdpa", "flex merged", "fa3")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the three sweeps wrote."""
    folder = tmp_path_factory.mktemp("results")
    options = ["--device", "cpu", "--quick", "--rounds", "3", "--peers", *PEERS]
    for sweep in (attention, decode, memory):
        name = sweep.__name__.rsplit(".", 1)[1]
        sweep.main([*options, "--out", str(folder / f"{name}.jsonl")])
    return folder


@pytest.mark.parametrize("name", ["attention", "decode", "memory"])
def test_every_peer_has_a_number_or_a_reason(results: Path, name: str) -> None:
    lines = [line for line in read(results / f"{name}.jsonl") if line["way"] in PEERS]
    assert {line["way"] for line in lines} >= set(PEERS) - {"composed, frozen"}
    number = {"memory": "extra"}.get(name, "median")
    assert all((number in line) != ("reason" in line) for line in lines)
    assert all(line["reason"] == "flash_attn_interface is not installed" for line in lines if line["way"] == "fa3")
    assert all({"torch", "triton", "device", "time"} <= line.keys() for line in lines)


def test_errors_are_multiples_of_torchs_own(results: Path) -> None:
    lines = [line for line in read(results / "attention.jsonl") if line.get("error_multiple") is not None]
    assert {line["error_multiple"] for line in lines if line["way"] == "sdpa"} == {1.0}
    assert all(0 < line["error_multiple"] < 4 for line in lines)


def test_memory_of_the_prefix_is_flat_and_a_concatenation_is_not(results: Path) -> None:
    lines = [line for line in read(results / "memory.jsonl") if line["what"] == "forward" and "extra" in line]
    extras = {way: {(r["case"]["B"], r["case"]["P"]): r["extra"] for r in lines if r["way"] == way} for way in PEERS}
    assert memory.growth(extras["composed"], 2, 16) < memory.FLAT
    assert memory.growth(extras["sdpa"], 2, 16) == pytest.approx(1, abs=0.05)


def test_pictures_and_report(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for path in sorted(results.glob("*.jsonl"))]
    written = plot.main(["--out", str(tmp_path), *files])
    assert [path.name for path in written] == ["memory.png"]  # the tiny shapes vary nothing else
    assert all(path.stat().st_size > 10_000 for path in written)
    assert roofline.main(files).count("not measured") == len(roofline.targets())
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize("cases", [attention.grid(), attention.grid(full=True), decode.grid(), decode.grid(full=True)])
def test_grids_repeat_nothing(cases: list[dict[str, int]]) -> None:
    assert len({tuple(sorted(c.items())) for c in cases}) == len(cases) > 10


def test_a_wrong_peer_is_not_timed() -> None:
    x = peers.inputs(2, 4, 2, 8, 8, 4, 16, is_causal=True, dtype=torch.bfloat16, device="cpu")
    ready, reasons = peers.prepare(["sdpa", "composed"], x, gradients=True)
    true = ready["composed"]
    ready["composed"] = true._replace(forward=lambda: true.forward() * 1.5)
    attention.verified(ready, reasons, x, gradients=True)
    assert list(ready) == ["sdpa"]
    assert reasons["composed"].startswith("wrong, so not timed")


def test_accuracy_sees_what_is_not_a_number() -> None:
    assert accuracy.multiple({"out": (1.0, 0.5)}, {"out": (0.5, 0.5)}) == 2.0
    assert accuracy.multiple({"out": (float("nan"), 0.5)}, {"out": (0.5, 0.5)}) != 2.0
    assert accuracy.multiple({"out": (1.0, 0.0)}, {"out": (0.0, 0.0)}) == float("inf")


def test_a_budget_leaves_cases_out_by_name(tmp_path: Path) -> None:
    log, seen = device.Log("attention", tmp_path / "log.jsonl"), []
    clock = iter([0.0, 0.5, 2.0])
    budget = device.Budget(1.0, clock=lambda: next(clock))
    attention.sweep([{"S": 1}, {"S": 2}], lambda c: seen.append(c["S"]), log, budget)
    assert seen == [1]
    assert [(r["case"]["S"], r["reason"]) for r in log.records] == [(2, "the time was up")]


def test_gpu_sh_names_what_exists(tmp_path: Path) -> None:
    """Every module that the script runs, with every option that it gives."""
    script = ROOT / "benchmarks" / "gpu.sh"
    commands = re.findall(r'"\$python" (?:\\\n)?\s*-m ((?:benchmarks|tests)\.\w+)([^\n]*)', script.read_text())
    given = {module: set() for module, _ in commands}
    for module, rest in commands:
        given[module] |= set(re.findall(r"(--[\w-]+)", rest))
    assert len(given) >= 8
    helps = {
        module: subprocess.Popen([sys.executable, "-m", module, "--help"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for module in given
    }
    for module, process in helps.items():
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, module
        assert {option for option in given[module] if option not in text} == set(), module


def test_gpu_sh_reports_what_it_does_not_know(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu.sh"
    environment = os.environ | {"OUT": str(tmp_path)}
    unknown = subprocess.run([script, "no-such"], env=environment, capture_output=True, text=True, check=False)
    assert unknown.returncode == 1
    assert "failed: no-such: unknown" in unknown.stdout
