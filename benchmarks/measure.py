"""Interleaved timing: every way runs in every round, in rotating order, so that drift of the machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median, quantiles
from typing import Any, NamedTuple, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
FLUSH_BYTES = 256 << 20  # five times an H100's L2
AHEAD_CYCLES = 1_000_000  # about half a millisecond
FEWEST = 5  # rounds, however long they take


class Way(NamedTuple):
    """What is timed: ``run`` on what ``setup``, not timed, returns. ``context`` is entered outside as well."""

    run: Callable[[Any], Any]
    setup: Callable[[], Any] = lambda: None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class Ratio(NamedTuple):
    """How many times as long the one took as the other, round by round."""

    median: float
    low: float  # of the middle eight tenths
    high: float
    of_minima: float

    @property
    def cautious(self) -> float:
        """The ratio nearer to 1: noise has to move both to make a difference."""
        return min(self.median, self.of_minima, key=lambda ratio: abs(ratio - 1))


def rotations(names: Sequence[Name], rounds: int) -> list[list[Name]]:
    """The order of each round: each way is first in turn."""
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
    """Seconds per call as a program sees them, by the host's clock.

    Args:
        ways: what to time, by name.
        device: a sample on "cuda" ends with a synchronisation.
        rounds: samples of each way.
        calls: calls in one sample, one after the other; the sample is their mean. More than one for microseconds.
        seconds: after so many no new round begins, but for the first ``FEWEST``.
        warmup: untimed samples of each way before the first round.
        clock: returns seconds; another one in tests.

    Returns:
        Of each way one list of samples, in the order of the rounds.
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
    """Seconds of each way in every round: on a GPU those of the device alone, with a cold L2.

    Before each sample the device sleeps while the host enqueues what follows, then overwrites a buffer larger than its
    L2. So the launches wait in the queue and the host's own time is not in the sample; ``back_to_back`` measures that.
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
    """The call as a CUDA graph's replay."""
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


def launches(way: Way) -> list[str]:
    """The kernels, copies and fills that one call puts on the GPU, by name."""
    from torch.profiler import ProfilerActivity, profile

    with way.context():
        state = way.setup()
        way.run(state)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            way.run(state)
            torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return [event.name for event in found.events() or [] if event.device_type == on_device]


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Minimum, median, and the distance of the quartiles, which one sample does not have."""
    found: dict[str, float | None] = {"minimum": min(seconds), "median": median(seconds), "iqr": None}
    if len(seconds) > 1:
        low, _, high = quantiles(seconds, n=4)
        found["iqr"] = high - low
    return found


def paired(one: Sequence[float], other: Sequence[float]) -> Ratio:
    """``one`` over ``other``, samples of the same rounds."""
    ratios = sorted(a / b for a, b in zip(one, other))
    edge = len(ratios) // 10
    return Ratio(median(ratios), ratios[edge], ratios[-1 - edge], min(one) / min(other))


def noise(way: Way, device: str, *, groups: int = 5, rounds: int = 10) -> float:
    """The noise floor: the largest difference from 1 between a way's median and its own, both timed as two ways."""
    found = []
    for _ in range(groups):
        samples = interleave({"one": way, "other": way}, device, rounds=rounds)
        found.append(abs(median(samples["one"]) / median(samples["other"]) - 1))
    return max(found)
