"""Makes this process believe in a GPU that is not there, so that gpu.sh runs from end to end: see test_gpu_sh.py.

What is real: the script, every stage's own code, Triton's host code (specialisation, caches, its launcher in C), and
the checks of results. What is not:

    torch       "cuda" is the CPU, in every function of torch; streams, events and graphs do nothing but tell the time,
                and the profiler sees no launch
    libcuda     stub_cuda.c: launches reach it, and run nothing
    compiler    stops behind Triton's own IR. Tiles are compiled to the end by test_triton_offline.py
    results     the backend ``triton`` launches its kernels, then takes what ``composed`` computes
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PTX = ".version 8.0\n.target sm_90a\n.address_size 64\n// wgmma.mma_async\n.visible .entry stub()\n{\nret;\n}\n"
LARGE = 1 << 20  # elements: of such tensors nobody looks at the numbers, so they are not drawn, nor computed with


def on_host(argument: Any) -> Any:
    """The argument, with the CPU in the place of the GPU."""
    is_device = isinstance(argument, (str, torch.device)) and str(argument).split(":")[0] == "cuda"
    return "cpu" if is_device else argument


class OnHost(TorchFunctionMode):
    """Every function of torch, with the CPU in the place of the GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(map(on_host, args)), {name: on_host(value) for name, value in (kwargs or {}).items()}
        if func is torch.randn and isinstance(args[0], tuple) and torch.Size(args[0]).numel() > LARGE:
            return torch.empty(args[0])
        if func is torch.randn_like and args[0].numel() > LARGE:
            return torch.empty_like(args[0])
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """A generator of the CPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, on_host(device))


class Event:
    """A time of the host."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.time - self.time) * 1e3


class Stream:
    """Everything runs at once, so there is nothing to wait for."""

    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    """A replay runs nothing."""

    def replay(self) -> None:
        pass


def stages(*asked: Any) -> Any:
    """Triton's hook for the passes of its compiler, or without arguments for its key in the cache."""
    if not asked:
        return "stub", "stub"
    _, found, options, *_ = asked
    known = {"name": "stub", "shared": 0, "num_warps": options.num_warps, "tmem_size": 0} | dict.fromkeys(
        ("global_scratch_size", "profile_scratch_size"), 0) | dict.fromkeys(
        ("global_scratch_align", "profile_scratch_align"), 1)  # fmt: skip

    def described(source: Any, metadata: dict[str, Any]) -> Any:
        metadata |= known
        return source

    found |= {"ttgir": described, "llir": described, "ptx": lambda *_: PTX, "cubin": lambda *_: b"stub"}
    return None


def install() -> None:
    """In the whole process; gpu.sh's processes call it from a sitecustomize.py."""
    from benchmarks import measure

    OnHost().__enter__()
    torch.Generator = Generator
    nothing = lambda *_, **__: None
    properties = SimpleNamespace(multi_processor_count=132, name="stub", major=9, minor=0)
    fakes = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_name": lambda *_: "stub", "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties, "synchronize": nothing, "_sleep": nothing,
        "empty_cache": nothing, "mem_get_info": lambda *_: (1 << 36, 1 << 36), "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0, "reset_peak_memory_stats": nothing, "Event": Event, "Stream": Stream,
        "current_stream": Stream, "stream": lambda _: nullcontext(), "CUDAGraph": Graph,
        "graph": lambda _: nullcontext(), "profiler": SimpleNamespace(start=nothing, stop=nothing),
    }  # fmt: skip
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    profile = torch.profiler.profile
    torch.profiler.profile = lambda **_: profile(activities=[torch.profiler.ProfilerActivity.CPU])
    measure.FLUSH_BYTES = 1 << 16
    if "STUB_CUDA" in os.environ:
        install_driver()


def activate_driver() -> None:
    """Triton's own driver, on the stub in $TRITON_LIBCUDA_PATH; what is compiled is cut short."""
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from prefix_attn.backends import triton as backend

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda *_: (9, 0)
            self.get_current_stream = lambda *_: 0
            self.get_current_device = lambda: 0

    knobs.runtime.add_stages_inspection_hook = stages
    driver.set_active(Driver())
    backend.refuse = lambda call: iter(())


def install_driver() -> None:
    """The driver, and behind each launch the results that it would have had."""
    from prefix_attn.backends import composed
    from prefix_attn.backends import triton as backend

    def forward(call: Any) -> tuple[Tensor, Tensor]:
        from prefix_attn.backends.triton import launch

        launched = launch.forward(call)
        return launched if call.key.numel() > LARGE else composed.forward(call)

    def backward(*arguments: Any) -> list[Tensor | None]:
        from prefix_attn.backends.triton import launch

        launch.backward(*arguments)
        return composed.backward(*arguments)

    activate_driver()
    backend.forward, backend.backward = forward, backward
