"""The overhead suite: microseconds per call of prefix_attention on one token, where there is almost nothing to compute.

The arithmetic is 4 * B * H * S * (P + T) * D = 1,536 FLOP, nanoseconds on any device. So the time is that of Python and
the dispatcher. Peers: scaled_dot_product_attention on tensors that already hold prefix and sequence (no model gets
those for free), and with the concatenation inside the call (what models do). One thread: more have nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Way, back_to_back, spread
from benchmarks.results import Case, Results
from prefix_attn import explain, prefix_attention
from prefix_attn.dispatch import AUTO

CASE: Case = {"B": 1, "H": 2, "S": 1, "T": 8, "P": 4, "D": 16}
WHAT = ("forward", "prefix gradient")
CALLS = 300
REFERENCE = "sdpa, concatenated before"
Call = Callable[[], Any]


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


def measure(kinds: Sequence[str], results: Results, device: str, rounds: int, calls: int = CALLS) -> None:
    """Times a call, forward and with the prefix's gradient."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for what in kinds:
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
    torch.set_num_threads(threads)
