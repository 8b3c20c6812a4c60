"""Timing on a device: events around the call, a cold L2, peers in turn; and what else a number depends on.

On a CPU the same functions run with the host's clock, so that the logic is tested without a GPU.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from benchmarks.measure import Samples, environment, rotations

FLUSH_BYTES = 256 << 20  # five times an H100's L2
AHEAD_CYCLES = 1_000_000  # about half a millisecond


class Way(NamedTuple):
    """What is timed: ``run`` on what ``setup``, not timed, returns. ``context`` is entered outside as well."""

    run: Callable[[Any], Any]
    setup: Callable[[], Any] = lambda: None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def interleave(
    ways: Mapping[str, Way],
    device: str,
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Seconds of each way in every round: on the device alone, with a cold L2.

    Before each sample the device sleeps while the host enqueues what follows, then overwrites a buffer larger than its
    L2. So the launches wait in the queue and the host's own time is not in the sample; ``eager`` measures that.
    """
    cuda = torch.device(device).type == "cuda"
    buffer = torch.empty(FLUSH_BYTES if cuda else 1, dtype=torch.uint8, device=device)
    for way in ways.values():
        with way.context():
            for _ in range(warmup):
                way.run(way.setup())
    samples: Samples = {name: [] for name in ways}
    for order in rotations(list(ways), rounds):
        events: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        for name in order:
            way = ways[name]
            with way.context():
                state = way.setup()
                if cuda:
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    torch.cuda._sleep(AHEAD_CYCLES)
                    buffer.zero_()
                    start.record()
                    way.run(state)
                    end.record()
                    events[name] = start, end
                else:
                    begin = clock()
                    way.run(state)
                    samples[name].append(clock() - begin)
        if cuda:
            torch.cuda.synchronize()
            for name, (start, end) in events.items():
                samples[name].append(start.elapsed_time(end) * 1e-3)
    return samples


def eager(ways: Mapping[str, Way], *, rounds: int, calls: int) -> Samples:
    """Seconds per call as a program sees them: ``calls`` calls one after the other, by the host's clock, L2 warm."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    samples: Samples = {name: [] for name in ways}
    for order in rotations(list(ways), rounds):
        for name in order:
            way = ways[name]
            with way.context():
                state = way.setup()
                way.run(state)
                synchronize()
                begin = time.perf_counter()
                for _ in range(calls):
                    way.run(state)
                synchronize()
                samples[name].append((time.perf_counter() - begin) / calls)
    return samples


def captured(way: Way) -> Callable[[], None]:
    """The call as a CUDA graph's replay; on a CPU the call itself."""
    if not torch.cuda.is_available():
        return lambda: way.run(way.setup())
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
    """The kernels, copies and fills that one call puts on the device, by name."""
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


def copy_bandwidth(device: str, size: int = 2 << 30, rounds: int = 20) -> float:
    """Bytes per second, read plus written, of a large copy: the ceiling that percentages refer to."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).fill_(i) for i in (1, 2))
    samples = interleave({"copy": Way(lambda _: target.copy_(source))}, device, rounds=rounds)
    return 2 * size / median(samples["copy"])


def free_bytes(device: str) -> float:
    """Memory that can still be allocated; unlimited on a CPU, where only tiny shapes run."""
    if torch.device(device).type != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def smi() -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi gives them now; empty without it."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit",
              "temperature.gpu")  # fmt: skip
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    values = done.stdout.strip().split(", ")
    return dict(zip(fields, values)) if done.returncode == 0 and len(values) == len(fields) else {}


def versions() -> dict[str, Any]:
    """What was installed: torch is in ``environment``."""
    try:
        import triton

        found = triton.__version__
    except ImportError:
        found = None
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {"triton": found, "cuda": torch.version.cuda, "cudnn": cudnn, "system": platform.platform()}


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median, and the distance of the quartiles, which one sample does not have."""
    if len(seconds) < 2:
        return {"median": median(seconds), "iqr": None}
    low, _, high = quantiles(seconds, n=4)
    return {"median": median(seconds), "iqr": high - low}


class Log:
    """JSON lines of one sweep: every record carries the environment."""

    def __init__(self, bench: str, out: Path | None) -> None:
        self.bench, self.out = bench, out
        self.shared = environment() | versions()
        self.records: list[dict[str, Any]] = []

    def add(self, case: Mapping[str, Any], what: str, way: str, **values: Any) -> dict[str, Any]:
        """One line, written at once: what follows may end the process."""
        smi_now = values.pop("smi", {})
        record = {"bench": self.bench, "case": dict(case), "what": what, "way": way, **values, **self.shared, **smi_now}
        self.records.append(record)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return record


class Budget:
    """Seconds that a sweep may take. What no longer fits is listed, not dropped silently."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.start = seconds, clock, clock()

    def spent(self) -> bool:
        """Whether the time is up."""
        return self.seconds is not None and self.clock() - self.start > self.seconds
