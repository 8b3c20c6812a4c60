"""The overhead suite: microseconds per call of prefix_attention on one token, where there is almost nothing to compute.

The arithmetic is 4 * B * H * S * (P + T) * D = 1,536 FLOP, nanoseconds on any device. So the time is that of Python and
the dispatcher. Peers: scaled_dot_product_attention on tensors that already hold prefix and sequence (no model gets
those for free), and with the concatenation inside the call (what models do). One thread: more have nothing to do.

On a CPU it also decodes for one conversation to four, on one thread and two: sharing saves little there. ``missed`` is
the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Way, back_to_back, spread
from benchmarks.results import Case, Plan, Results, title
from prefix_attn import explain, prefix_attention
from prefix_attn.dispatch import AUTO

CASE: Case = {"B": 1, "H": 2, "S": 1, "T": 8, "P": 4, "D": 16}
WHAT = ("forward", "prefix gradient")
CALLS = 300
DECODE = "decode"
SECONDS = 5e-4  # of a sample of decoding
REFERENCE = "sdpa, concatenated before"
Call = Callable[[], Any]


def grid(device: str, size: str) -> Plan:
    """The (case, what) pairs. Decoding few rows is a matter of the CPU: a GPU's answer is a CUDA graph."""
    pairs: Plan = [(CASE, what) for what in WHAT]
    if device != "cpu":
        return pairs
    B, T, P = ((1,), (32,), (10,)) if size == "quick" else ((1, 2, 4), (32, 128, 512), (0, 10, 128, 512, 2048))
    sizes = product((1, 2), ("float32", "bfloat16"), B, T, P)
    names = ("threads", "dtype", "B", "H", "S", "T", "P", "D")
    return pairs + [(dict(zip(names, (n, t, b, 12, 1, T, P, 64))), DECODE) for n, t, b, T, P in sizes]


def missed(seconds: float, peer: float) -> bool:
    """Whether decoding takes longer than 1.15 times as long as torch's attention, and more than 8 us longer."""
    return seconds > max(1.15 * peer, peer + 8e-6)


def tensors(device: str) -> tuple[Tensor, ...]:
    """Query, key, value, prefix_key, prefix_value."""
    B, H, S, T, P, D = CASE.values()
    shapes = ((B, H, S, D), (B, H, T, D), (B, H, T, D), (H, P, D), (H, P, D))
    return tuple(torch.randn(shape, device=device) for shape in shapes)


def concatenate(key: Tensor, prefix: Tensor) -> Tensor:
    """[prefix ; sequence], the prefix repeated for each row."""
    return torch.cat([prefix.expand(key.shape[0], -1, -1, -1), key], dim=2)


def backends(*tensors: Tensor) -> list[str]:
    """The backends that can run on this device, without Triton's interpreter."""
    refused = explain(*tensors).refused
    return ["auto", *(backend.NAME for backend in AUTO if backend.NAME not in refused)]


def forward_ways(device: str) -> dict[str, Call]:
    """Without gradients. One query at the end of the sequence sees every key, so no mask is needed."""
    q, k, v, pk, pv = tensors(device)
    whole_k, whole_v = concatenate(k, pk), concatenate(v, pv)
    ways: dict[str, Call] = {
        REFERENCE: lambda: F.scaled_dot_product_attention(q, whole_k, whole_v),
        "sdpa, concatenated in the call": lambda: F.scaled_dot_product_attention(
            q, concatenate(k, pk), concatenate(v, pv)
        ),
    }
    for name in backends(q, k, v, pk, pv):
        ways[f"prefix_attention, {name}"] = lambda name=name: prefix_attention(q, k, v, pk, pv, backend=name)
    return ways


def training_ways(device: str) -> dict[str, Call]:
    """Forward and backward to the prefix; the reference's leaf is the concatenated tensor."""
    q, k, v, pk, pv = tensors(device)
    leaves = (pk.requires_grad_(), pv.requires_grad_())
    whole = tuple(concatenate(s, p).detach().requires_grad_() for s, p in ((k, pk), (v, pv)))
    grad = torch.randn_like(q)

    def step(out: Any, inputs: tuple[Tensor, ...]) -> Tensor:
        torch.autograd.grad(out, inputs, grad)
        return out.detach()

    ways: dict[str, Call] = {
        REFERENCE: lambda: step(F.scaled_dot_product_attention(q, whole[0], whole[1]), whole),
        "sdpa, concatenated in the call": lambda: step(
            F.scaled_dot_product_attention(q, concatenate(k, pk), concatenate(v, pv)), leaves
        ),
    }
    for name in backends(q, k, v, pk, pv):
        ways[f"prefix_attention, {name}"] = lambda name=name: step(
            prefix_attention(q, k, v, pk, pv, backend=name), leaves
        )
    return ways


def same_results(ways: dict[str, Call]) -> None:
    """Raises unless all ways compute the same: only then are they timed."""
    expected = ways[REFERENCE]()
    for name, way in ways.items():
        error = (way() - expected).abs().max().item()
        if not error < 1e-5:
            raise RuntimeError(f"{name} differs from {REFERENCE} by {error}")


def decode_ways(case: Case) -> dict[str, Call]:
    """The backend ``cpu``, and torch's attention on tensors that already hold prefix and sequence."""
    B, H, T, P, D = (case[name] for name in ("B", "H", "T", "P", "D"))
    shapes = ((B, H, 1, D), (B, H, T, D), (B, H, T, D), (H, P, D), (H, P, D))
    q, k, v, pk, pv = (torch.randn(shape).to(getattr(torch, case["dtype"])) for shape in shapes)
    whole_k, whole_v = concatenate(k, pk).contiguous(), concatenate(v, pv).contiguous()
    return {
        REFERENCE: lambda: F.scaled_dot_product_attention(q, whole_k, whole_v),
        "prefix_attention, cpu": lambda: prefix_attention(q, k, v, pk, pv, backend="cpu"),
    }


def measure_decode(pairs: Plan, results: Results, rounds: int) -> None:
    """Times decoding of few rows, one line a case: minima of both, and which are above the target."""
    print("\ndecode, us per call: sdpa on the concatenation, prefix_attention")
    above = 0
    for case, what in pairs:
        torch.set_num_threads(case["threads"])
        ways = decode_ways(case)
        timed = {name: Way(lambda _, call=call: call()) for name, call in ways.items()}
        with torch.no_grad():
            once = min(back_to_back({"": timed[REFERENCE]}, "cpu", rounds=3)[""])
            samples = back_to_back(timed, "cpu", rounds=rounds, calls=max(1, int(SECONDS / once)))
        peer, ours = (min(samples[name]) for name in ways)
        for name, seconds in samples.items():
            results.add(case, what, name, seconds=seconds, **spread(seconds))
        above += missed(ours, peer)
        mark = "  above the target" if missed(ours, peer) else ""
        print(f"  {title(case.items()):66}{1e6 * peer:9.1f}{1e6 * ours:9.1f}{ours / peer:7.2f}x{mark}", flush=True)
    print(f"{above} of {len(pairs)} above the target: 1.15x or 8 us more, whichever is longer")


def measure(pairs: Iterable[tuple[Case, str]], results: Results, device: str, rounds: int, calls: int = CALLS) -> None:
    """Times a call, forward and with the prefix's gradient, and decoding."""
    threads, pairs = torch.get_num_threads(), list(pairs)
    torch.set_num_threads(1)
    for what in (what for _, what in pairs if what != DECODE):
        ways = forward_ways(device) if what == "forward" else training_ways(device)
        same_results(ways)
        grad = what != "forward"
        timed = {name: Way(lambda _, call=call: call()) for name, call in ways.items()}
        with torch.set_grad_enabled(grad):
            samples = back_to_back(timed, device, rounds=rounds, calls=calls)
        print(f"\n{what}, {CASE}, us per call")
        for name, seconds in samples.items():
            row = spread(seconds)
            results.add(CASE | {"on": device}, what, name, seconds=seconds, **row)
            print(f"  {name:32}{1e6 * (row['minimum'] or 0):10.2f} min{1e6 * (row['median'] or 0):10.2f} median")
    if few := [(case, what) for case, what in pairs if what == DECODE]:
        measure_decode(few, results, rounds)
    torch.set_num_threads(threads)
