"""Every suite on tiny shapes, without a GPU: logic, files, pictures, report; and benchmarks/kernels/gpu.sh."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, gate, memory, model, operator, overhead, peers, regret, report
from benchmarks.kernels import roofline
from benchmarks.main import main
from benchmarks.results import read, records
from prefix_attn.backends import cpu
from tests.numerics import MODEL, close

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("cpu", "composed", "sdpa", "cat + sdpa", "cat into + sdpa", "flex merged", "fa3", "xformers merged")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the suites wrote."""
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    options = ["--device", "cpu", "--grid", "quick", "--threads", "1"]
    for suite, more in (
        ("operator", ["--rounds", "3", "--peers", *PEERS]),
        ("memory", ["--peers", *PEERS[:5]]),
        ("model", ["--rounds", "1"]),
        ("overhead", ["--rounds", "2"]),
    ):
        assert main(["run", "--suite", suite, *options, *more, "--out", str(folder / f"{suite}.json")]) == 0
    torch.set_num_threads(threads)
    return folder


def test_every_peer_has_a_number_or_a_reason(results: Path) -> None:
    found = records([results / "operator.json"])
    assert {r["way"] for r in found} == set(PEERS)
    assert {r["what"] for r in found} == {"decode", *operator.TRAINING, "prefill"}
    assert all(("median" in r) != ("reason" in r) for r in found)
    assert {r["reason"] for r in found if r["way"] == "fa3"} == {"flash_attn_interface is not installed"}
    assert {r["reason"] for r in found if r["way"] == "cat into + sdpa" and "reason" in r} == {"has no backward"}
    head = read(results / "operator.json")
    assert head["ceilings"].keys() == {"memory", "float32", "bfloat16"}
    assert 0 <= head["noise_floor"] < 20
    assert head["command"].startswith("python -m benchmarks run --suite operator")


def test_decoding_few_rows_is_part_of_the_overhead(results: Path) -> None:
    found = [r for r in records([results / "overhead.json"]) if r["what"] == overhead.DECODE]
    assert [(r["case"]["threads"], r["case"]["dtype"], r["way"]) for r in found] == [
        (threads, dtype, way)
        for threads in (1, 2)
        for dtype in ("float32", "bfloat16")
        for way in (overhead.REFERENCE, "prefix_attention, cpu")
    ]
    assert [overhead.missed(1e-6 * us, 1e-6 * peer) for us, peer in ((17, 10), (19, 10), (110, 100), (120, 100))] == [
        *(False, True),
        *(False, True),
    ]
    assert len(overhead.grid("cpu", "full")) == 2 + 180
    assert {what for _, what in overhead.grid("cuda", "full")} == set(overhead.WHAT)


def test_errors_are_multiples_of_torchs_own(results: Path) -> None:
    found = [r for r in records([results / "operator.json"]) if r.get("error_multiple") is not None]
    assert {r["error_multiple"] for r in found if r["way"] == "sdpa"} == {1.0}
    assert all(0 < r["error_multiple"] < 4 for r in found)


def test_a_share_of_the_roofline_is_a_share_of_its_ceilings(results: Path) -> None:
    ceilings = read(results / "operator.json")["ceilings"]
    timed = [r for r in records([results / "operator.json"]) if "seconds" in r]
    for r in timed:
        case, what = {k: v for k, v in r["case"].items() if k != "on"}, r["what"]
        close(r["of_roofline"] * r["median"] / operator.roofline(case, what, ceilings), 1.0, MODEL)
        close(r["tflops"] * r["median"] * 1e12 / operator.flops(case, what), 1.0, MODEL)
        close(r["bytes_per_second"] * r["median"] / operator.traffic(case, what), 1.0, MODEL)


def test_memory_of_the_prefix_is_flat_and_a_concatenation_is_not(results: Path) -> None:
    found = memory.rectangles(records([results / "memory.json"]))
    rate = {(what, way): memory.growth(extras, copy) for (what, _, way, copy), extras in found.items()}
    for what in ("forward", "both"):
        assert abs(rate[what, "cpu"]) < memory.FLAT
        assert rate[what, "composed"] < memory.FLAT
    # A copy, expanded from two key heads to four.
    assert abs(rate["forward", "sdpa"] - 2) < 2 * memory.FLAT
    assert abs(rate["forward", "cat + sdpa"] - 1) < 2 * memory.FLAT
    for what in model.WHAT:
        assert abs(rate[what, "ours"]) < memory.FLAT
        assert rate[what, "PEFT"] > 0.99


def test_whole_models_are_compared_with_the_bare_one(results: Path) -> None:
    found = records([results / "model.json"])
    assert {r["way"] for r in found} == {"bare", "ours", "PEFT", "adapters"}
    assert all("is not installed" in r["reason"] for r in found if r["way"] == "adapters")
    ratios = model.relative(found)
    assert {(r["what"], r["way"], r["case"]["P"]) for r in ratios} == {
        (what, way, P) for what in model.WHAT for way in ("ours", "PEFT") for P in (4, 16)
    }
    bare = {r["what"]: r for r in found if r["way"] == "bare" and "median" in r}
    first = ratios[0]
    (same,) = [r for r in found if (r["what"], r["way"], r["case"]) == (first["what"], first["way"], first["case"])]
    assert first["ratio"] == same["minimum"] / bare[first["what"]]["minimum"]
    assert first["of_medians"] == same["median"] / bare[first["what"]]["median"]


def test_pictures_report_and_regret(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for path in sorted(results.glob("*.json"))]
    assert main(["plot", *files, "--out", str(tmp_path / "figures")]) == 0
    drawn = sorted((tmp_path / "figures").iterdir())
    assert [path.stem for path in drawn] == ["memory", "model", "regret", "roofline"]  # nothing else varies enough
    assert all(path.stat().st_size > 10_000 for path in drawn)
    assert main(["report", *files, "--figures", str(tmp_path), "--out", str(tmp_path / "report.md")]) == 0
    text = (tmp_path / "report.md").read_text()
    assert set(re.findall(r"\]\((\w+)\.png\)", text)) == {"memory", "model", "regret", "roofline"}
    assert "* fa3: flash_attn_interface is not installed" in text
    assert main(["regret", *files]) == int(any(r.regret > 0.1 for r in regret.regrets(records(map(Path, files)))))
    assert roofline.main(files).count("not measured") == len(roofline.targets())
    assert "regret of auto over" in capsys.readouterr().out


def test_errors_of_the_user_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--suite", "operator", "--select", "Q=1", "--list"]) == 2
    assert main(["compare", str(tmp_path / "none.json"), str(tmp_path / "none.json")]) == 2
    assert main(["run", "--suite", "model", "--peers", "sdpa"]) == 2
    assert main(["run", "--suite", "overhead", "--peers", "sdpa"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("error: --select Q: cases have")
    assert lines[2] == "error: --peers: the suite model has no 'sdpa'; there are bare, ours, PEFT, adapters"
    assert lines[3] == "error: --peers: the suite overhead has no 'sdpa'; there are none to choose"


@pytest.mark.parametrize("option", ["--threads", "--rounds"])
def test_numbers_of_options_are_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--suite", "operator", option, "0"])
    assert f"argument {option}: must be a positive integer, got '0'" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_grids(device: str) -> None:
    """Nothing twice; the full one holds every length, batch, kind and dtype; the targets' cases come early on a GPU."""
    for name in ("default", "full", "flex", "quick"):
        plan = operator.grid(device, name)
        assert len({(*sorted(c.items()), what) for c, what in plan}) == len(plan)
    for name in ("default", "full"):
        prefixes = {c["P"] for c, _ in operator.grid("cpu", name)}
        assert prefixes == {0, 1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096}
    full = operator.grid(device, "full")
    assert {what for _, what in full} >= {"decode", *operator.TRAINING}
    assert {(c["Hq"], c["Hkv"]) for c, _ in full} >= {(32, 8)}
    assert len(full) > 500


def test_a_wrong_peer_is_not_timed() -> None:
    x = peers.inputs(2, 4, 2, 8, 8, 4, 16, is_causal=True, dtype=torch.bfloat16, device="cpu")
    ready, reasons, _ = peers.prepare({n: peers.PEERS[n] for n in ("sdpa", "composed")}, x, gradients=True)
    true = ready["composed"]
    ready["composed"] = true._replace(forward=lambda: true.forward() * 1.5)
    operator.verified(ready, reasons, x, gradients=True)
    assert list(ready) == ["sdpa"]
    assert reasons["composed"].startswith("wrong, so not timed")


def test_accuracy_sees_what_is_not_a_number() -> None:
    assert accuracy.multiple({"out": (1.0, 0.5)}, {"out": (0.5, 0.5)}) == 2.0
    assert accuracy.multiple({"out": (float("nan"), 0.5)}, {"out": (0.5, 0.5)}) != 2.0
    assert accuracy.multiple({"out": (1.0, 0.0)}, {"out": (0.0, 0.0)}) == float("inf")


@pytest.mark.skipif(cpu.slow() is not None, reason="the ratios were recorded on processors with AVX2 or AVX-512")
@pytest.mark.parametrize("pair", gate.PAIRS, ids=lambda pair: f"{pair.what} {pair.case['dtype']}")
def test_ours_is_as_much_faster_than_torch_as_recorded(pair: gate.Pair) -> None:
    """The gate: a ratio of one process, one retry; it says nothing of the machine."""
    reached, ratio = gate.holds(pair)
    assert reached, f"{ratio}, at least {pair.least:.2f} is needed"


def test_the_gate_sees_a_slower_kernel() -> None:
    pair = gate.PAIRS[0]._replace(recorded=1000.0)
    assert gate.holds(pair)[0] is False


CPU = ROOT / "benchmarks/results/cpu"
COMMITTED = [f"benchmarks/results/cpu/{name}.json" for name in (
    "operator", "flex", "model", "llama", "gpt2", "memory", "overhead"
)]  # fmt: skip


def test_the_committed_sweep_regrets_little() -> None:
    found = regret.regrets(records([CPU / "operator.json"]))
    assert len(found) > 100
    assert found[0].regret <= regret.LIMIT, regret.summary(found)


def test_the_document_is_what_the_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/benchmarks.md: python -m benchmarks report FILES --figures docs/results/cpu --out docs/benchmarks.md."""
    monkeypatch.chdir(ROOT)
    names = ("latency", "lengths", "speedup", "roofline", "regret", "memory", "model")
    folder = Path("docs/results/cpu")
    pictures = [folder / f"{name}.png" for name in names if (folder / f"{name}.png").is_file()]
    text = report.markdown(list(map(Path, COMMITTED)), pictures, Path("docs/benchmarks.md"))
    assert text == (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")


def test_a_slice_of_a_suite_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    slice_of_it = ("--select", "what=decode", "B=64", "dtype=float32", "--device", "cpu")
    assert main(["run", "--suite", "operator", *slice_of_it, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13
    assert lines[-1] == "12 cases"
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m benchmarks")


def test_suites_under_pytest_benchmark() -> None:
    """benchmarks/test_ways.py, each call once."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "benchmarks", "--benchmark-disable"]
    done = subprocess.run(
        [*command, "-k", "decode and (cpu or tiny)"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert re.search(r"^4 passed", done.stdout, re.MULTILINE), done.stdout
