"""What a number depends on: the machine, its clocks, versions, threads; and how fast the machine can be."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import Way, interleave

# malloc keeps what is freed: a page that is touched for the first time costs far more than what is computed on it.
MALLOC = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 33))
PACKAGES = ("torch", "triton", "transformers", "peft", "adapters", "flashinfer-python", "flash-attn", "xformers")


def tune_malloc(command: list[str]) -> None:
    """Starts ``command`` in the place of this process, with a malloc that keeps what is freed, if it does not yet."""
    if sys.platform.startswith("linux") and any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *command], os.environ | MALLOC)


def _cpuinfo(field: str) -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return re.findall(rf"^{field}\s*: (.*)$", text, re.MULTILINE)


def processor() -> str:
    """The processor's name as the system gives it."""
    return next(iter(_cpuinfo("model name")), "") or platform.processor() or platform.machine()


def instruction_set() -> str | None:
    """Which of the C++ kernels run here; None if none was built."""
    from prefix_attn.backends import _native

    return None if _native.cpu_ops_missing() else _native.isa


def versions() -> dict[str, str | None]:
    """Of every package that is timed; None = not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def clocks(device: str) -> dict[str, Any]:
    """Clocks, and of a GPU driver, power and temperature, as the system gives them now."""
    if device != "cuda":
        return {"cpu_mhz": [float(value) for value in _cpuinfo("cpu MHz")]}
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit",
              "temperature.gpu")  # fmt: skip
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    values = done.stdout.strip().split(", ")
    return dict(zip(fields, values)) if done.returncode == 0 and len(values) == len(fields) else {}


def describe(device: str) -> dict[str, Any]:
    """Everything of this module but ``ceilings``."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "clocks": clocks(device),
        "malloc": {name: os.environ.get(name) for name in MALLOC},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "versions": versions(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def ceilings(device: str, *, quick: bool = False) -> dict[str, float]:
    """FLOP/s of large products, by dtype, and bytes/s ("memory"): of a large copy on a GPU, of a large read on a CPU.

    What is read is at least eight times as large as the last level of the cache.

    The products are torch's own, on as many threads as everything else. On a CPU the fastest of seven, and of torch's
    two libraries for them: ``@`` is MKL's, which does not use AVX-512 on every processor that has it, and a convolution
    of 1 x 1 is oneDNN's.
    """
    if device == "cuda":
        n, size = (256, 1 << 20) if quick else (8192, 2 << 30)
        return {"memory": copy_bandwidth(device, size)} | {
            str(dtype)[6:]: 2 * n**3 / _seconds(_product(n, dtype, device), device)
            for dtype in (torch.float32, torch.bfloat16)
        }
    n, large = (128, torch.ones(1 << 16)) if quick else (1536, torch.ones(max(1 << 26, 2 * last_cache())))
    found = {"memory": large.nbytes / _fastest(large.sum)}
    for dtype in (torch.float32, torch.bfloat16):
        ways = (_product(n, dtype, device), _convolution(n, dtype))
        found[str(dtype)[6:]] = 2 * n**3 / min(map(_fastest, ways))
    return found


def last_cache() -> int:
    """Bytes of the largest cache, as Linux gives them; 0 where it does not."""
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-2]) * units[size[-2]] for size in sizes if size[-2:-1] in units), default=0)


def _convolution(n: int, dtype: torch.dtype) -> Callable[[], Any]:
    image = torch.randn(1, n, n, 1).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(n, n, 1, 1).to(dtype)
    return lambda: torch.nn.functional.conv2d(image, weight)


def _product(n: int, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _fastest(call: Callable[[], Any], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def _seconds(call: Callable[[], Any], device: str, rounds: int = 20) -> float:
    return median(interleave({"call": Way(lambda _: call())}, device, rounds=rounds)["call"])


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes per second, read plus written, of a large copy."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).fill_(i) for i in (1, 2))
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def free_bytes(device: str) -> float:
    """Memory that can still be allocated; unknown, so infinite, where the system does not say."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.is_file() else ""
    available = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(available[1]) * 1024 if available else math.inf
