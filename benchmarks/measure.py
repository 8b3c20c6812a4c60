"""Interleaved timing: every way runs in every round, in rotating order, so that drift of the machine hits all alike."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

Samples = dict[str, list[float]]


class Summary(NamedTuple):
    """Seconds per call of one way, and its minimum over the reference's minimum."""

    minimum: float
    median: float
    ratio: float


def rotations(names: Sequence[str], rounds: int) -> list[list[str]]:
    """The order of each round: each way is first in turn."""
    return [[names[(start + i) % len(names)] for i in range(len(names))] for start in range(rounds)]


def interleave(
    ways: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    calls: int = 1,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Seconds per call of each way.

    Args:
        ways: what to time, by name. On a GPU each sample ends with a synchronisation.
        rounds: samples of each way.
        calls: calls in one sample; the sample is their mean. More than one for calls of microseconds.
        warmup: untimed calls of each way before the first round.
        clock: returns seconds; another one in tests.

    Returns:
        One list of ``rounds`` samples for each way, in the order of the rounds.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for way in ways.values():
        for _ in range(warmup):
            way()
    samples: Samples = {name: [] for name in ways}
    for order in rotations(list(ways), rounds):
        for name in order:
            way = ways[name]
            synchronize()
            start = clock()
            for _ in range(calls):
                way()
            synchronize()
            samples[name].append((clock() - start) / calls)
    return samples


def summarise(samples: Mapping[str, Sequence[float]], *, reference: str) -> dict[str, Summary]:
    """Minimum, median, and the ratio of minima to the reference: noise only ever adds time."""
    floor = min(samples[reference])
    return {name: Summary(min(s), median(s), min(s) / floor) for name, s in samples.items()}


def table(summaries: Mapping[str, Summary], *, unit: str = "us") -> str:
    """The summaries as text; ``unit`` is s, ms or us."""
    factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    width = max(map(len, summaries))
    lines = [f"{'':{width}}  {'min ' + unit:>10}  {'median ' + unit:>10}  {'ratio':>6}"]
    for name, row in summaries.items():
        lines.append(f"{name:{width}}  {row.minimum * factor:10.3f}  {row.median * factor:10.3f}  {row.ratio:6.2f}")
    return "\n".join(lines)


def processor() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a number depends on: devices, versions, threads, time."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write(
    path: Path, bench: str, case: Mapping[str, Any], samples: Mapping[str, Sequence[float]], **extra: Any
) -> None:
    """Appends one JSON line per way: the bench, its case, the environment and every sample in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = {"bench": bench, "case": dict(case), **environment(), **extra}
    lines = [json.dumps({**shared, "way": name, "seconds": list(values)}) for name, values in samples.items()]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that ``write`` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
