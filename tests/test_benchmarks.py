"""The arithmetic of benchmarks/measure.py, on callables and a clock that are exact."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import Summary, interleave, read, rotations, summarise, table, write
from benchmarks.train_step import forget_peak, peak_resident


class Clock:
    """Time that passes only when a way says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def way(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.now += seconds


def test_every_way_is_first_in_turn() -> None:
    assert rotations(["a", "b", "c"], 4) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_samples_are_seconds_per_call() -> None:
    clock = Clock()
    ways = {"a": lambda: clock.way("a", 1.0), "b": lambda: clock.way("b", 0.25)}
    samples = interleave(ways, rounds=3, calls=2, warmup=1, clock=clock)
    assert samples == {"a": [1.0, 1.0, 1.0], "b": [0.25, 0.25, 0.25]}
    assert clock.calls == ["a", "b"] + ["a", "a", "b", "b"] + ["b", "b", "a", "a"] + ["a", "a", "b", "b"]


def test_a_real_clock_gives_positive_times() -> None:
    samples = interleave({"sum": lambda: sum(range(1000))}, rounds=5)
    assert len(samples["sum"]) == 5
    assert min(samples["sum"]) > 0


def test_summary() -> None:
    summaries = summarise({"floor": [2.0, 4.0, 3.0], "ours": [9.0, 3.0, 4.0, 5.0]}, reference="floor")
    assert summaries == {"floor": Summary(2.0, 3.0, 1.0), "ours": Summary(3.0, 4.5, 1.5)}


@pytest.mark.parametrize(("unit", "number"), [("s", "0.002"), ("ms", "1.500"), ("us", "1500.000")])
def test_table(unit: str, number: str) -> None:
    lines = table({"ours": Summary(0.0015, 0.002, 0.75)}, unit=unit).splitlines()
    assert lines[0].split() == ["min", unit, "median", unit, "ratio"]
    assert lines[1].split()[1] == number
    assert lines[1].split()[-1] == "0.75"


def test_lines_hold_every_sample_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "results" / "bench.jsonl"
    write(path, "bench", {"P": 4}, {"a": [0.5, 0.25]})
    write(path, "bench", {"P": 8}, {"a": [1.0]}, note="second")
    first, second = read(path)
    assert (first["bench"], first["case"], first["way"], first["seconds"]) == ("bench", {"P": 4}, "a", [0.5, 0.25])
    assert (second["case"], second["seconds"], second["note"]) == ({"P": 8}, [1.0], "second")
    assert first["torch"] == torch.__version__
    assert first["threads"] == torch.get_num_threads()
    assert first["device"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak can be forgotten on Linux only")
def test_peak_memory_counts_from_where_it_was_forgotten() -> None:
    forget_peak()
    before = peak_resident()
    torch.ones(2**24)  # 64 MiB, freed at once
    after = peak_resident()
    assert 60 * 2**20 < after - before < 80 * 2**20
    forget_peak()
    assert peak_resident() < after - 40 * 2**20
