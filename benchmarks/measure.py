"""Interleaved timing. Every way runs in every round, in rotating order, so drift of the machine affects all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median, quantiles
from typing import Any, NamedTuple, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
FLUSH_BYTES = 256 << 20  # five times an H100's L2
AHEAD_CYCLES = 4_000_000  # about two milliseconds: the host needs one to enqueue a forward and backward
FEWEST = 5  # rounds, however long they take


class Way(NamedTuple):
    """What is timed: ``run`` on the result of ``setup``, which is not timed. Both run inside ``context``."""

    run: Callable[[Any], Any]
    setup: Callable[[], Any] = lambda: None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class Ratio(NamedTuple):
    """How many times as long one way took as another, compared round by round."""

    median: float
    low: float  # the middle 80 % lies between low and high
    high: float
    of_minima: float

    @property
    def cautious(self) -> float:
        """The ratio closer to 1, so that noise must move both to make a difference."""
        return min(self.median, self.of_minima, key=lambda ratio: abs(ratio - 1))


def rotations(names: Sequence[Name], rounds: int) -> list[list[Name]]:
    """The order of each round. The ways take turns at being first."""
    return [[names[(start + i) % len(names)] for i in range(len(names))] for start in range(rounds)]


def back_to_back(
    ways: Mapping[Name, Way],
    device: str,
    *,
    rounds: int,
    calls: int = 1,
    seconds: float | None = None,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Seconds per call on the host's clock.

    Args:
        ways: what to time, by name.
        device: a sample on "cuda" ends with a synchronisation.
        rounds: samples of each way.
        calls: calls per sample; the sample is their mean. Use several for calls of microseconds.
        seconds: no new round begins after this time, except the first ``FEWEST``.
        warmup: untimed samples of each way before the first round.
        clock: returns seconds; tests pass their own.

    Returns:
        The samples of each way, in the order of the rounds.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    samples: dict[Name, list[float]] = {name: [] for name in ways}
    begin = clock()
    for number, order in enumerate(rotations(list(ways), warmup + rounds)):
        if number == warmup:
            begin = clock()
        if number >= warmup + FEWEST and seconds is not None and clock() - begin > seconds:
            break
        for name in order:
            way = ways[name]
            with way.context():
                state = way.setup()
                synchronize()
                start = clock()
                for _ in range(calls):
                    way.run(state)
                synchronize()
                if number >= warmup:
                    samples[name].append((clock() - start) / calls)
    return samples


def interleave(
    ways: Mapping[Name, Way], device: str, *, rounds: int, seconds: float | None = None
) -> dict[Name, list[float]]:
    """Seconds of each way in every round. On a GPU: device time only, with a cold L2.

    Before each sample the device sleeps while the host enqueues the work, then overwrites a buffer larger than its L2.
    The launches are thus already queued, and the host's time is not in the sample. ``back_to_back`` includes it.
    """
    if device != "cuda":
        return back_to_back(ways, device, rounds=rounds, seconds=seconds, warmup=2)
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    samples: dict[Name, list[float]] = {name: [] for name in ways}
    begin = time.perf_counter()
    for number, order in enumerate(rotations(list(ways), 2 + rounds)):
        if number >= 2 + FEWEST and seconds is not None and time.perf_counter() - begin > seconds:
            break
        events: dict[Name, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        for name in order:
            way = ways[name]
            with way.context():
                state = way.setup()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(AHEAD_CYCLES)
                buffer.zero_()
                start.record()
                way.run(state)
                end.record()
                events[name] = start, end
        torch.cuda.synchronize()
        if number >= 2:  # the first two rounds warm up
            for name, (start, end) in events.items():
                samples[name].append(start.elapsed_time(end) * 1e-3)
    return samples


def captured(way: Way) -> Callable[[], None]:
    """Captures the call in a CUDA graph and returns its replay."""
    with way.context():
        state = way.setup()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                way.run(state)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            way.run(state)
    return graph.replay


def launches(ways: Mapping[Name, Way]) -> dict[Name, list[str]]:
    """Names of the kernels, copies and fills that one call of each way launches on the GPU.

    The ways must be warm. One session of the profiler serves them all, as starting it takes long.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    marks = {name: f"way {number}" for number, name in enumerate(ways)}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for name, way in ways.items():
            with way.context():
                state = way.setup()
                torch.cuda.synchronize()
                with record_function(marks[name]):
                    way.run(state)
                    torch.cuda.synchronize()
    inside = during(found.events() or [], list(marks.values()))
    return {name: inside[mark] for name, mark in marks.items()}


def during(events: Iterable[Any], marks: Sequence[str]) -> dict[str, list[str]]:
    """Names of a profile's device events that start within each mark: a range of the host, with a name of its own."""
    host, device = [], []
    for event in events:
        (device if event.device_type == torch.autograd.DeviceType.CUDA else host).append(event)
    spans = {event.name: event.time_range for event in host if event.name in marks}
    # The profiler repeats the marks among the device's events.
    work = [event for event in device if event.name not in marks]
    return {m: [e.name for e in work if spans[m].start <= e.time_range.start <= spans[m].end] for m in marks}


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Minimum, median, and interquartile range (None for a single sample)."""
    found: dict[str, float | None] = {"minimum": min(seconds), "median": median(seconds), "iqr": None}
    if len(seconds) > 1:
        low, _, high = quantiles(seconds, n=4)
        found["iqr"] = high - low
    return found


def paired(one: Sequence[float], other: Sequence[float]) -> Ratio:
    """``one`` over ``other``; their samples come from the same rounds."""
    ratios = sorted(a / b for a, b in zip(one, other))
    edge = len(ratios) // 10
    return Ratio(median(ratios), ratios[edge], ratios[-1 - edge], min(one) / min(other))


def noise(way: Way, device: str, *, groups: int = 5, rounds: int = 10) -> float:
    """The noise floor: times one way as if it were two. Returns the largest relative difference of their medians."""
    found = []
    for _ in range(groups):
        samples = interleave({"one": way, "other": way}, device, rounds=rounds)
        found.append(abs(median(samples["one"]) / median(samples["other"]) - 1))
    return max(found)
