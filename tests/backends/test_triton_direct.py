"""A launch past Triton's own search for the compiled kernel runs the kernel that the search would have found.

Triton says what it would compile without compiling it: its hook gives the key of its cache. No GPU is needed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_attn.backends.triton import direct

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> str:
    """Triton's interpreter, which the other tests run in, cannot be left in this process."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_whatever_changes_the_kernel_is_the_one_that_triton_finds() -> None:
    """Forward and backward of random calls, each of which differs from the one before in a thing or more."""
    kernels, keys, again, grown = map(int, python(RANDOM_CALLS).split())
    assert kernels > 100  # that Triton tells apart
    assert keys >= kernels
    assert again > keys  # launches whose key was known: the test sees what a stale key would do
    assert grown == 0  # keys that a longer sequence added


RANDOM_CALLS = """
import random
import torch
from triton import knobs
from benchmarks.kernels import compile_kernels
from prefix_attn.backends.triton import direct, launch
from prefix_attn.call import Call

draw = random.Random(0)
found, launches, asked = {}, [0], []
knobs.runtime.jit_cache_hook = lambda key, fn, **_: asked.append((fn.name, key)) or True


def spy(kernel, programs, args, sizes, constants):
    "What is launched, by our key and by Triton's."
    asked.clear()
    kernel[(programs,)](*args, *sizes, **constants)
    (theirs,) = asked
    ours = direct.key(kernel, args, sizes, constants)
    assert found.setdefault(ours, theirs) == theirs, (kernel, args, sizes, constants)
    launches[0] += 1


def laid(shape, dtype=torch.bfloat16):
    "A tensor of this shape: contiguous, rows of a wider one, heads inside, or from the middle of a larger one."
    way = draw.randrange(4)
    if way == 0 or len(shape) == 1:
        size, first = torch.Size(shape).numel(), draw.choice((0, 1, 4, 8))
        return torch.zeros(size + 16, dtype=dtype)[first : first + size].view(shape)
    if way == 1:
        return torch.zeros(*shape[:-1], shape[-1] + draw.choice((1, 8, 16)), dtype=dtype)[..., : shape[-1]]
    if way == 2:
        *more, H, S, D = shape
        return torch.zeros(*more, S, H, D, dtype=dtype).transpose(-3, -2)
    t = torch.zeros(shape, dtype=dtype)  # a stride beyond 32 bits, of a dimension of one
    return t.as_strided(shape, [2**31 if n == 1 else s for n, s in zip(shape[:-1], t.stride())] + [1])


def integers(n):
    return laid((n,), draw.choice((torch.int32, torch.int64)))


def call(S, T):
    dtype, D = draw.choice((torch.bfloat16, torch.float32)), draw.choice((1, 16, 24))
    B, G, H, P = draw.choice((1, 2)), draw.choice((1, 2)), draw.choice((1, 2)), draw.choice((1, 16, 600))
    bank = (3,) if draw.random() < 0.3 else ()
    prefix = [laid((*bank, H, P, D), draw.choice((dtype, torch.float32))) for _ in range(2)]
    choices = {
        "prefix_start": lambda: integers(B),
        "key_lengths": lambda: integers(B),
        "window": lambda: draw.choice((1, 16, 17)),
        "key_mask": lambda: laid((B, T), torch.bool),
        "softcap": lambda: 2.0,
        "scale": lambda: draw.choice((1, 1.0, -1, 0.5)),
        "sinks": lambda: laid((H * G,), draw.choice((dtype, torch.float32))),
        "is_causal": lambda: False,
        "bias": lambda: laid((draw.choice((1, B)), H * G, S, T), dtype),
        "seed": lambda: laid((1,), torch.int64),
    }
    options = {name: choices[name]() for name in draw.sample(sorted(choices), draw.choice((0, 0, 1, 2)))}
    if bank:
        options |= {"prefix_ids": integers(B), "prefix_lengths": draw.choice((None, integers(3)))}
    return Call(laid((B, H * G, S, D), dtype), laid((B, H, T, D), dtype), laid((B, H, T, D), dtype), *prefix, **options)


def changed(one):
    "The call with one tensor that lies elsewhere, or one number that is another."
    names = [n for n, value in one._asdict().items() if isinstance(value, torch.Tensor)]
    name = draw.choice([*names, "window", "scale"])
    if name not in names:
        return one._replace(**{name: draw.choice({"window": (1, 16, 17, None), "scale": (1, 0.5, -1.0)}[name])})
    tensor = getattr(one, name)
    dtype = tensor.dtype
    if dtype in (torch.int32, torch.int64):
        dtype = draw.choice((torch.int32, torch.int64))
    return one._replace(**{name: laid(tuple(tensor.shape), dtype)})


with compile_kernels.target("sm_90"):
    direct.launch = spy
    for _ in range(9):
        one = call(draw.choice((1, 3, 40)), draw.choice((1, 40, 48)))
        for _ in range(8):
            out, lse = launch.forward(one)
            grad = laid(tuple(out.shape), out.dtype)
            launch.backward(one, out, lse, grad, draw.choice((None, lse)), [True] * 5 + [one.sinks is not None, False])
            one = changed(one)
    for most in (64, 2**31):
        tokens, prefix, cu = torch.zeros(1, 2, 64, 16), torch.zeros(2, 3, 16), torch.tensor([0, 64])
        packed = Call(tokens, tokens, tokens, prefix, prefix, cu_seqlens_q=cu, cu_seqlens_k=cu)
        launch.forward(packed._replace(max_seqlen_q=most, max_seqlen_k=most))
    for T in range(512, 1536, 64):
        query, keys = torch.zeros(4, 2, 1, 64), torch.zeros(4, 2, T, 64)
        launch.forward(Call(query, keys, keys, query[0], query[0]))
        if T == 512:
            before = len(found)
print(len(set(found.values())), before, launches[0], len(found) - before)
"""


class Kernel:
    """Stands in for Triton's: notes who is called, with what."""

    arg_names = ("data", "size", "BLOCK", "DEEP")

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.calls.append(("searched", grid, args, constants))
            return Compiled(self.calls)

        return launch


class Compiled:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: self.calls.append(("found", grid, args))


def test_a_known_kernel_is_launched_with_all_arguments_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "JITFunction", Kernel)
    monkeypatch.setattr(direct, "MOST", 2)
    monkeypatch.setattr(direct, "_compiled", {})
    kernel, data = Kernel(), torch.zeros(8)
    for size in (5, 7):
        direct.launch(kernel, 3, (data,), (size,), {"DEEP": True, "BLOCK": 16, "num_warps": 4})
    assert kernel.calls[0][:2] == ("searched", (3,))
    assert kernel.calls[1] == ("found", (3, 1, 1), (data, 7, 16, True))
    for warps in (1, 2, 2, 8):
        direct.launch(kernel, 3, (data,), (5,), {"DEEP": True, "BLOCK": 16, "num_warps": warps})
        assert len(direct._compiled) <= 2
    assert [call[0] for call in kernel.calls[2:]] == ["searched", "searched", "found", "searched"]
