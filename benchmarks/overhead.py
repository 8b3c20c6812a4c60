"""Microseconds per call of prefix_attention where there is nearly nothing to compute: one token, as in decoding.

The arithmetic is 4 * B * H * S * (P + T) * D = 1,536 FLOP, nanoseconds on any device: what is timed is the way through
Python and the dispatcher. Peers: scaled_dot_product_attention on tensors that already hold prefix and sequence (what
no model has for free), and the same with the concatenation inside the call (what models do).

    python -m benchmarks.overhead [--out results.jsonl] [--rounds 30] [--calls 300] [--threads 1]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import interleave, summarise, table, write
from prefix_attn import explain, prefix_attention
from prefix_attn.dispatch import AUTO

CASE = {"B": 1, "H": 2, "S": 1, "T": 8, "P": 4, "D": 16}
REFERENCE = "sdpa, concatenated before"
Way = Callable[[], Tensor]


def tensors(device: str) -> tuple[Tensor, ...]:
    """Query, key, value, prefix_key, prefix_value."""
    B, H, S, T, P, D = CASE.values()
    shapes = ((B, H, S, D), (B, H, T, D), (B, H, T, D), (H, P, D), (H, P, D))
    return tuple(torch.randn(shape, device=device) for shape in shapes)


def concatenate(key: Tensor, prefix: Tensor) -> Tensor:
    """[prefix ; sequence], the prefix repeated for each row."""
    return torch.cat([prefix.expand(key.shape[0], -1, -1, -1), key], dim=2)


def backends(*tensors: Tensor) -> list[str]:
    """What ``backend=`` may name on this device, Triton's interpreter excepted."""
    refused = explain(*tensors).refused
    return ["auto", *(backend.NAME for backend in AUTO if backend.NAME not in refused)]


def forward_ways(device: str) -> dict[str, Way]:
    """Without gradients. One query at the end of the sequence sees every key, so no mask is needed."""
    q, k, v, pk, pv = tensors(device)
    whole_k, whole_v = concatenate(k, pk), concatenate(v, pv)
    ways: dict[str, Way] = {
        REFERENCE: lambda: F.scaled_dot_product_attention(q, whole_k, whole_v),
        "sdpa, concatenated in the call": lambda: F.scaled_dot_product_attention(
            q, concatenate(k, pk), concatenate(v, pv)
        ),
    }
    for name in backends(q, k, v, pk, pv):
        ways[f"prefix_attention, {name}"] = lambda name=name: prefix_attention(q, k, v, pk, pv, backend=name)
    return ways


def training_ways(device: str) -> dict[str, Way]:
    """Forward and backward to the prefix; the reference's leaf is the concatenated tensor."""
    q, k, v, pk, pv = tensors(device)
    leaves = (pk.requires_grad_(), pv.requires_grad_())
    whole = tuple(concatenate(s, p).detach().requires_grad_() for s, p in ((k, pk), (v, pv)))
    grad = torch.randn_like(q)

    def step(out: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        torch.autograd.grad(out, inputs, grad)
        return out.detach()

    ways: dict[str, Way] = {
        REFERENCE: lambda: step(F.scaled_dot_product_attention(q, *whole), whole),
        "sdpa, concatenated in the call": lambda: step(
            F.scaled_dot_product_attention(q, concatenate(k, pk), concatenate(v, pv)), leaves
        ),
    }
    for name in backends(q, k, v, pk, pv):
        ways[f"prefix_attention, {name}"] = lambda name=name: step(
            prefix_attention(q, k, v, pk, pv, backend=name), leaves
        )
    return ways


def same_results(ways: dict[str, Way]) -> None:
    """Speed is only shown of ways that compute the same."""
    expected = ways[REFERENCE]()
    for name, way in ways.items():
        error = (way() - expected).abs().max().item()
        if not error < 1e-5:
            raise RuntimeError(f"{name} differs from {REFERENCE} by {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=300, help="calls in one sample")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for what, ways in (("forward", forward_ways(options.device)), ("prefix gradient", training_ways(options.device))):
        same_results(ways)
        with torch.set_grad_enabled(what != "forward"):
            samples = interleave(ways, rounds=options.rounds, calls=options.calls, warmup=options.calls)
        print(f"\n{what}, {CASE}, {options.device}, {options.threads} threads")
        print(table(summarise(samples, reference=REFERENCE)))
        if options.out:
            write(options.out, "overhead", CASE | {"what": what, "on": options.device}, samples)


if __name__ == "__main__":
    main()
