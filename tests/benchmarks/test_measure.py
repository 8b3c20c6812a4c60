"""Timing, ratios, files of results, on callables and a clock that are exact."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, machine, results
from benchmarks.measure import Ratio, Way, back_to_back, during, noise, paired, rotations, spread
from benchmarks.regret import LIMIT, regrets, summary


class Clock:
    """Time that passes only when a way says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def way(self, name: str, seconds: float) -> Way:
        def run(_: object) -> None:
            self.calls.append(name)
            self.now += seconds

        return Way(run)


def test_every_way_is_first_in_turn() -> None:
    assert rotations(["a", "b", "c"], 4) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_samples_are_seconds_per_call() -> None:
    clock = Clock()
    ways = {"a": clock.way("a", 1.0), "b": clock.way("b", 0.25)}
    samples = back_to_back(ways, "cpu", rounds=2, calls=2, warmup=1, clock=clock)
    assert samples == {"a": [1.0, 1.0], "b": [0.25, 0.25]}
    assert clock.calls == ["a", "a", "b", "b"] + ["b", "b", "a", "a"] + ["a", "a", "b", "b"]


def test_setting_up_is_not_timed_and_seconds_end_the_rounds() -> None:
    clock = Clock()

    def setup() -> None:
        clock.now += 10.0

    samples = back_to_back({"a": clock.way("a", 1.0)._replace(setup=setup)}, "cpu", rounds=9, seconds=70, clock=clock)
    assert samples == {"a": [1.0] * 7}  # 11 s each: the eighth round would begin after 77


def event(name: str, start: float, end: float, device: str = "CPU") -> SimpleNamespace:
    kind = getattr(torch.autograd.DeviceType, device)
    return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))


def test_launches_belong_to_the_way_during_which_they_start() -> None:
    events = [
        event("way 0", 0, 10), event("way 0", 2, 9, "CUDA"), event("fold", 2, 4, "CUDA"), event("split", 3, 9, "CUDA"),
        event("setup", 11, 12, "CUDA"), event("way 1", 20, 30), event("aten::mm", 21, 22), event("mm", 25, 31, "CUDA"),
    ]  # fmt: skip
    assert during(events, ["way 0", "way 1"]) == {"way 0": ["fold", "split"], "way 1": ["mm"]}


def test_noise_of_a_real_clock() -> None:
    assert 0 <= noise(Way(lambda _: sum(range(1000))), "cpu", groups=2, rounds=5) < 20


def test_ratios_are_of_the_same_round() -> None:
    found = paired([2.0, 4.0, 9.0], [1.0, 4.0, 3.0])
    assert found == Ratio(median=2.0, low=1.0, high=3.0, of_minima=2.0)
    assert Ratio(1.3, 1.0, 2.0, 1.1).cautious == 1.1
    assert spread([3.0, 1.0, 2.0]) == {"minimum": 1.0, "median": 2.0, "iqr": 2.0}
    assert spread([3.0])["iqr"] is None


def test_a_file_holds_every_sample_and_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    log = results.Results("operator", path, machine=machine.describe("cpu"), noise_floor=0.01)
    log.add({"P": 4}, "forward", "cpu", seconds=[0.123456789, 2.0], median=1.0)
    log.save()
    log.add({"P": 4}, "forward", "fa3", reason="not installed")
    log.save()
    document = results.read(path)
    assert [r["way"] for r in document["records"]] == ["cpu", "fa3"]
    assert document["records"][0]["seconds"] == [0.123457, 2.0]
    assert {"device", "threads", "clocks", "versions", "python", "time"} <= document["machine"].keys()
    assert results.records([path])[0]["suite"] == "operator"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"suite": "operator"})])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: not"):
        results.read(path)


def test_selecting() -> None:
    cases = [({"P": P, "B": 1}, what) for P in (0, 4) for what in ("decode", "both")]
    filters = results.parse_filters(["P=0,8", "what=decode"])
    assert results.selected(cases, filters) == [({"P": 0, "B": 1}, "decode")]
    assert len(results.selected(cases, results.parse_filters(["P=0"]))) == 2
    with pytest.raises(ValueError, match="--select Q: cases have B, P, what"):
        results.selected(cases, {"Q": {"1"}})
    with pytest.raises(ValueError, match="leaves nothing"):
        results.selected(cases, {"P": {"7"}})
    with pytest.raises(ValueError, match="takes NAME=VALUE"):
        results.parse_filters(["P"])


def test_a_budget_leaves_items_for_their_name() -> None:
    log, seen = results.Results("operator", None), []
    clock = iter([0.0, 0.5, 2.0])
    budget = results.Budget(1.0, clock=lambda: next(clock))
    assert results.sweep([1, 2], seen.append, log, budget) == [2]
    assert seen == [1]


def record(way: str, seconds: list[float], auto: str = "cpu", **case: object) -> dict[str, object]:
    return {"suite": "operator", "run": "a.json", "case": {"P": 4, **case}, "what": "decode", "way": way, "auto": auto,
            "seconds": seconds, **spread(seconds)}  # fmt: skip


def test_regret_is_what_the_choice_lost_by_median_and_minimum() -> None:
    both = [record("cpu", [1.2, 1.2, 1.2]), record("composed", [1.0, 1.0, 0.9])]
    noisy = [record("cpu", [2.0, 1.0, 3.0], P=8), record("composed", [1.5, 1.0, 1.5], P=8)]
    alone = [record("cpu", [1.0], P=16), record("sdpa", [0.1], P=16)]
    first, second = regrets(both + noisy + alone)
    assert (first.chosen, first.best, first.regret) == ("cpu", "composed", pytest.approx(0.2))
    assert second.regret == 0.0
    assert first.regret > LIMIT
    assert "2 cases: mean 10.0%, largest 20.0%" in summary([first, second])
    assert "1 above 10%" in summary([first, second])


def test_comparing_two_files(tmp_path: Path) -> None:
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, seconds in zip(paths, ([1.0, 2.0], [0.5, 4.0])):
        log = results.Results("operator", path, noise_floor=0.1, machine={"device": path.stem})
        for way, s in zip(("cpu", "sdpa"), seconds):
            log.add({"P": 4}, "decode", way, seconds=[s], **spread([s]))
        log.save()
    text = compare.table(*paths)
    assert "not the same: device: a -> b" in text
    assert "| decode | P 4 | cpu | 1000 | 500 | 0.500 | 0.500 | 0.125 |" in text
    assert "| decode | P 4 | sdpa | 2000 | 4000 | 2.000 | - | - |" in text
    other = results.Results("operator", tmp_path / "c.json")
    other.save()
    with pytest.raises(ValueError, match="no case in common"):
        compare.table(paths[0], tmp_path / "c.json")
