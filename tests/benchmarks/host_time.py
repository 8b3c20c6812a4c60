"""Host time of the backend ``triton``, on a machine without a GPU: what a call takes before its kernels run.

    python -m tests.benchmarks.host_time            microseconds per call, the minimum of many
    python -m tests.benchmarks.host_time --profile  and where they go

Real are the operator, Triton's host code and its launcher in C. Launches reach stub_cuda.c, which runs nothing. Needs a
C compiler. On a GPU ``python -m benchmarks run --suite overhead --device cuda`` is the measurement.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from prefix_attn import prefix_attention
from prefix_attn.backends.triton import direct

TARGETS = {"decode": 60, "decode, folded": 85, "forward": None, "forward + backward": 400, "to the prefix alone": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if "STUB_CUDA" in os.environ:
        measure(args.calls, args.profile)
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", **built(Path(folder))}
        subprocess.run([sys.executable, "-m", "tests.benchmarks.host_time", *sys.argv[1:]], env=environment, check=True)


def built(folder: Path) -> dict[str, str]:
    """The environment in which Triton loads the stub, built in ``folder``, for libcuda."""
    import triton

    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("needs a C compiler, cc")
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    source, library = Path(__file__).with_name("stub_cuda.c"), folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    names = ("STUB_CUDA", "TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH")
    return dict.fromkeys(names, str(folder)) | {"TRITON_CACHE_DIR": str(folder / "cache")}


def cases() -> dict[str, Callable[[], object]]:
    """The calls by name; as small as they may be, since no kernel runs."""
    half = torch.bfloat16
    few = [torch.randn(64, H, S, 128, dtype=half) for H, S in ((32, 1), (8, 64), (8, 64))]
    many = [few[0], *(torch.randn(64, 8, 256, 128, dtype=half) for _ in range(2))]
    short, long = ([torch.randn(8, P, 128, dtype=half) for _ in range(2)] for P in (16, 512))
    leaves = [torch.randn(8, 12, 128, 64, dtype=half) for _ in range(3)]
    leaves += [torch.randn(12, 128, 64, dtype=half) for _ in range(2)]
    prefix = [leaf.clone().requires_grad_() for leaf in leaves[3:]]
    trained = [leaf.clone().requires_grad_() for leaf in leaves]
    grad = torch.randn_like(leaves[0])

    def attend(*tensors: Tensor) -> Tensor:
        return prefix_attention(*tensors, backend="triton")

    def inferred(*tensors: Tensor) -> Callable[[], Tensor]:
        return torch.inference_mode()(lambda: attend(*tensors))

    return {
        "decode": inferred(*few, *short),
        "decode, folded": inferred(*many, *long),
        "forward": inferred(*leaves),
        "forward + backward": lambda: torch.autograd.grad(attend(*trained), trained, grad),
        "to the prefix alone": lambda: torch.autograd.grad(attend(*leaves[:3], *prefix), prefix, grad),
    }


def measure(calls: int, profile: bool) -> None:
    """Prints the minimum and the 5th percentile of each case, beside its target."""
    from tests.benchmarks import stub_gpu

    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=132)
    stub_gpu.activate_driver()
    launches = [0]
    launch = direct.launch

    def counted(*args: object) -> None:
        launches[0] += 1
        launch(*args)

    print(f"{'us per call':22}{'minimum':>9}{'5 %':>7}{'target':>8}{'launches':>10}")
    for name, run in cases().items():
        direct.launch = counted
        launches[0] = 0
        run()
        count, direct.launch = launches[0], launch
        seconds = []
        for _ in range(calls):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        low, fifth = sorted(seconds)[0], sorted(seconds)[calls // 20]
        print(f"{name:22}{1e6 * low:9.1f}{1e6 * fifth:7.1f}{TARGETS[name] or '-':>8}{count:>10}", flush=True)
        if profile:
            with cProfile.Profile() as found:
                for _ in range(calls):
                    run()
            pstats.Stats(found).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
