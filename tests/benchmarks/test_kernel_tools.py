"""benchmarks/kernels/: what may spill where, what a run with a profiler asks for, and shares of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import operator
from benchmarks.kernels import compile_cuda, compile_kernels, decode_cuda, dram, shares, tune
from benchmarks.kernels.compile_kernels import TIMED_SPILLS, Kernel
from prefix_attn.backends.triton import table

KERNEL = Kernel("sm_90", "forward", "half", 128, "plain", "128x32 w4 s3", 255, TIMED_SPILLS, 1 << 17, "wgmma.mma_async")


def test_only_a_device_may_choose_a_tile_that_spills() -> None:
    assert len(compile_kernels.problems(KERNEL)) == 1
    assert compile_kernels.problems(KERNEL, TIMED_SPILLS) == []
    assert len(compile_kernels.problems(KERNEL._replace(spills=TIMED_SPILLS + 1), TIMED_SPILLS)) == 1


def test_a_column_says_whether_a_device_chose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"sm_90": {"source": "measured on a GPU"}, "sm_80": {"source": "compiled offline, not measured"}}
    monkeypatch.setattr(table, "table", lambda: columns)
    assert compile_kernels.timed("sm_90")
    assert not compile_kernels.timed("sm_80")


@pytest.mark.parametrize("spills", [0, TIMED_SPILLS])
def test_the_tuner_says_what_its_candidates_may_spill(monkeypatch: pytest.MonkeyPatch, spills: int) -> None:
    monkeypatch.setattr(tune.offline, "built", lambda *_: [(KERNEL, None)])
    found = tune.problems("sm_90", "forward", "half/128", "", [128, 32, 4, 3], spills)
    assert len(found) == (0 if spills else 1)


def test_ncu_leaves_the_clocks_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And each case is counted: the stand-in's table says that it read twice what was needed."""
    said = [f'"ID","Kernel Name","{dram.METRIC}"\n"","","byte"\n"0","split","{2 * dram.needed(c)}"' for c in dram.CASES]
    ncu = tmp_path / "ncu"
    ncu.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\nfor call; do :; done\ncat {tmp_path}/$call\n')
    ncu.chmod(0o755)
    for number, text in enumerate(said):
        (tmp_path / str(number)).write_text(text)
    monkeypatch.setattr(dram, "find_ncu", lambda: str(ncu))
    assert [record["ratio"] for record in dram.main(["--out", str(tmp_path / "dram.json")])] == [2.0] * len(dram.CASES)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == len(dram.CASES)
    assert all("--clock-control none" in line for line in asked)


def test_shares_take_the_fastest_of_all_processes() -> None:
    """Each time and each ceiling on its own: what else ran on the machine slowed either."""
    ceilings = {"memory": 1e10, "float32": 5e10, "bfloat16": 1e12}
    limits = [operator.roofline(c, "decode", ceilings) for c in shares.CASES]
    slow = {name: rate / 2 for name, rate in ceilings.items()}
    about = {"processor": "a processor", "instructions": "avx2"}
    found = [
        {"ceilings": slow, "seconds": [2 * limit for limit in limits], **about},
        {"ceilings": ceilings, "seconds": [9 * limit for limit in limits], **about},
    ]
    rows = shares.table(found).splitlines()
    assert rows[0] == "a processor, avx2, one thread, 2 processes; memory 10 G/s, float32 50 G/s, bfloat16 1000 G/s"
    assert [row.split(" | ")[4] for row in rows[4:]] == ["50%"] * 4
    assert [row.split(" | ")[3] for row in rows[4:]] == ["memory", "products", "memory", "memory"]


def test_both_tables_of_resources_are_kept(tmp_path: Path) -> None:
    """Each tool writes its own part of the page."""
    page = tmp_path / "page.md"
    page.write_text(compile_kernels.table([KERNEL]))
    for registers in (100, 101):
        compile_cuda.write(page, f"{compile_cuda.HEADING}\n\n{registers}\n")
    assert page.read_text() == compile_kernels.table([KERNEL]).rstrip() + f"\n\n{compile_cuda.HEADING}\n\n101\n"


def test_predictions_of_decoding_are_of_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes bound large steps, so twice the rows take twice the time; Triton's time is that of ``roofline``'s model."""
    found = {B: decode_cuda.predicted(B, 8192, 128) for B in (1, 256, 512)}
    assert 1.9 < found[512].cuda / found[256].cuda < 2.1
    assert (found[1].folded, found[1].splits) == (0, 33)
    assert (found[256].folded, found[256].splits) == (2, 1)
    assert all(one.cuda >= one.triton for one in found.values())
    monkeypatch.setattr("sys.argv", ["decode_cuda"])
    decode_cuda.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(decode_cuda.CASES)
    text = (compile_cuda.CSRC.parent / "docs/kernels.md").read_text()
    assert all(row in text for row in rows)
