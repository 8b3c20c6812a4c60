"""The C++ CPU kernels beside torch's: one thread, forward, backward and decoding, and how far from the roofline.

    sdpa         scaled_dot_product_attention on [prefix ; sequence], concatenated before the call, key heads expanded
    cat + sdpa   the same with the concatenation in the call: the peer of forward and backward, where the prefix trains
    composed     prefix_attention(backend="composed"): torch's kernels for both parts, merged
    cpu          prefix_attention(backend="cpu")

The roofline of a case is the larger of its FLOPs over the rate of a large product and its bytes over the bandwidth of a
large read, both measured in the same run: float32, whatever the storage, but for products of bfloat16, which count at
the rate of torch's own. Hidden pairs of a causal mask are not counted. A percentage is roofline over our time.

    python -m benchmarks.cpu_kernel [--out results.jsonl] [--rounds 20] [--only decode]

malloc is told to keep what is freed (a page touched for the first time costs far more than what is computed on it), so
the command starts itself again with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ set.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import interleave, summarise, write
from prefix_attn import prefix_attention

MALLOC = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 33))
H, D = 12, 64
Way = Callable[[], Any]


class Case(NamedTuple):
    """One row of the table. Decoding has one query per row; the targets are ratios of minima, peer over ours."""

    what: str  # decode, forward, both or prefix-only
    dtype: torch.dtype
    B: int
    P: int
    S: int
    over_sdpa: float
    over_composed: float | None = None

    @property
    def title(self) -> str:
        """As the table shows it."""
        return f"{self.what} {str(self.dtype)[6:]} B={self.B} P={self.P} S={self.S}"


FP32, BF16 = torch.float32, torch.bfloat16
CASES = (
    Case("decode", FP32, 64, 512, 128, 5.0, 1.6),
    Case("decode", FP32, 64, 2048, 128, 7.0, 1.4),
    Case("decode", BF16, 64, 2048, 128, 30.0, 2.0),
    Case("decode", FP32, 16, 10, 128, 1.4, 1.2),
    Case("forward", FP32, 8, 100, 128, 1.4, 1.25),
    Case("both", FP32, 8, 100, 128, 1.3, 1.15),
    Case("both", BF16, 8, 100, 128, 2.5, 1.8),
    Case("decode", FP32, 32, 0, 512, 0.97, 0.97),
    Case("prefix-only", FP32, 8, 10, 128, 3.0),
)


def flops(case: Case) -> float:
    """Products that the result needs: 4 D per visible pair forward, 10 D backward, 8 D to the prefix alone."""
    queries = 1 if case.what == "decode" else case.S
    pairs = queries * case.P + (case.S if case.what == "decode" else case.S * (case.S + 1) / 2)
    if case.what == "prefix-only":
        return 8.0 * D * case.B * H * case.S * case.P
    return (14.0 if case.what == "both" else 4.0) * D * case.B * H * pairs


def size(case: Case) -> float:
    """Bytes that must pass at least once: inputs and results."""
    queries = 1 if case.what == "decode" else case.S
    one = 2 * case.B * queries + 2 * case.B * case.S + 2 * case.P
    if case.what == "prefix-only":
        one = 3 * case.B * case.S + 4 * case.P
    return case.dtype.itemsize * H * D * one * (2.5 if case.what == "both" else 1.0)


def tensors(case: Case) -> list[Tensor]:
    """Query, key, value, prefix_key, prefix_value."""
    queries = 1 if case.what == "decode" else case.S
    shapes = ((case.B, H, queries, D), (case.B, H, case.S, D), (case.B, H, case.S, D), (H, case.P, D), (H, case.P, D))
    return [torch.randn(shape).to(case.dtype) for shape in shapes]


def ways(case: Case) -> dict[str, Way]:
    """What is compared, the reference first."""
    q, k, v, pk, pv = tensors(case)
    cat = lambda prefix, t: torch.cat([prefix.expand(case.B, -1, -1, -1), t], dim=2)
    causal = case.what != "decode"
    mask = None
    if causal:  # a prefix before a causal mask: torch's kernel takes it as numbers
        mask = torch.zeros(case.S, case.P + case.S, dtype=case.dtype)
        mask[:, case.P :].masked_fill_(torch.ones(case.S, case.S, dtype=torch.bool).triu(1), -torch.inf)
    sdpa = lambda key, value: F.scaled_dot_product_attention(q, key, value, attn_mask=mask)
    if case.what in ("decode", "forward"):
        whole = cat(pk, k), cat(pv, v)
        found: dict[str, Way] = {"sdpa": lambda: sdpa(*whole)}
        for name in ("composed", "cpu"):
            found[name] = lambda name=name: prefix_attention(q, k, v, pk, pv, backend=name)
        return found
    leaves = [t.requires_grad_() for t in (q, k, v, pk, pv)]
    grad = torch.randn_like(q)
    if case.what == "prefix-only":
        found = {}
        for title, wanted in (("all gradients", leaves), ("cpu", leaves[3:])):
            inputs = [t if any(t is w for w in wanted) else t.detach() for t in leaves]
            out = prefix_attention(*inputs, backend="cpu")
            found[title] = lambda out=out, wanted=wanted: torch.autograd.grad(out, wanted, grad, retain_graph=True)
        return found
    found = {"cat + sdpa": lambda: torch.autograd.grad(sdpa(cat(pk, k), cat(pv, v)), leaves, grad)}
    for name in ("composed", "cpu"):
        found[name] = lambda name=name: torch.autograd.grad(
            prefix_attention(q, k, v, pk, pv, backend=name), leaves, grad
        )
    return found


def same(found: dict[str, Way], dtype: torch.dtype) -> None:
    """Speed is only shown of ways that compute the same."""
    first, *others = (way() for way in found.values())
    as_list = lambda result: list(result) if isinstance(result, tuple) else [result]
    for name, result in zip(list(found)[1:], others):
        for a, b in zip(as_list(result)[::-1], as_list(first)[::-1]):  # from the prefix on: fewer may be asked for
            error = (a.float() - b.float()).abs().max() / b.float().abs().max()
            if not error < 20 * torch.finfo(dtype).eps * (50 if dtype == FP32 else 1):
                raise RuntimeError(f"{name} differs by {error:.1e}")


def fastest(way: Way, rounds: int = 7) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        way()
        times.append(time.perf_counter() - begin)
    return min(times)


def machine() -> dict[str, float]:
    """FLOP/s of large products and bytes/s of a large read, one thread."""
    a, b = (torch.randn(1024, 1024) for _ in range(2))
    x, y = a.bfloat16(), b.bfloat16()
    large = torch.ones(1 << 26)
    return {
        "float32": 2 * 1024**3 / fastest(lambda: a @ b),
        "bfloat16": 2 * 1024**3 / fastest(lambda: x @ y),
        "bandwidth": large.nbytes / fastest(large.sum),
    }


def roofline(case: Case, rates: dict[str, float]) -> float:
    """Seconds below which this machine cannot be."""
    rate = max(rates["float32"], rates["bfloat16"] if case.dtype == BF16 else 0.0)
    return max(flops(case) / rate, size(case) / rates["bandwidth"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose title begins like this")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.cpu_kernel", *sys.argv[1:]], os.environ | MALLOC)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rates = machine()
    isa = prefix_attention(*tensors(CASES[3]), backend="cpu") is not None and torch.ops.prefix_attn_cpu.isa()
    print(
        f"{isa}; products {rates['float32'] / 1e9:.0f} GFLOP/s in float32, {rates['bfloat16'] / 1e9:.0f} in bfloat16; "
        f"read {rates['bandwidth'] / 1e9:.1f} GB/s\n"
    )
    print("| case | ours ms | over the peer | target | over composed | target | of the roofline |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        if not case.title.startswith(options.only):
            continue
        found = ways(case)
        same(found, case.dtype)
        with torch.set_grad_enabled(case.what in ("both", "prefix-only")):
            samples = interleave(found, rounds=options.rounds, warmup=2)
        rows = summarise(samples, reference="cpu")
        share = roofline(case, rates) / rows["cpu"].minimum
        ours, peer = 1e3 * rows["cpu"].minimum, rows[next(iter(found))].ratio
        composed = f"{rows['composed'].ratio:.2f} | {case.over_composed}" if case.over_composed else " | "
        print(f"| {case.title} | {ours:.2f} | {peer:.2f} | {case.over_sdpa} | {composed} | {share:.0%} |", flush=True)
        if options.out:
            shared = {"H": H, "D": D, "isa": isa, "rates": rates, "roofline": roofline(case, rates)}
            described = case._asdict() | {"dtype": str(case.dtype)[6:]}
            write(options.out, "cpu_kernel", described | shared, samples)


if __name__ == "__main__":
    main()
