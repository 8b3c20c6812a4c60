"""What float32 by three tf32 products would cost in accuracy, emulated: the error of attention over that of torch.

    python -m benchmarks.kernels.tf32x3

A float32 is cut into two tf32 numbers of 11 bits, and a b = lo hi + hi lo + hi hi, in that order, as Triton's "tf32x3"
does. Products are exact. What decides is how the tensor cores add: 8 products and the accumulator at a time, and then
cut the sum to 24 bits (Fasi et al. 2021; Ootomo and Yokota 2022). "nearest" is what they do not do: they round towards
zero, so errors do not cancel. "ieee" adds one product after another, as fused multiply-adds do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HOW = ("ieee", "nearest", "zero")
STEP = 8  # products that one instruction adds to an accumulator
BLOCK_N = 64


def cut(x: Tensor, bits: int, round_: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    """float64 numbers with ``bits`` significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(round_(torch.ldexp(mantissa, torch.tensor(bits))), exponent - bits)


def added(accumulator: Tensor, a: Tensor, b: Tensor, how: str) -> Tensor:
    """accumulator + a @ b for float32 numbers, which are kept in float64."""
    if how == "ieee":
        for i in range(a.shape[1]):
            accumulator = (accumulator + a[:, i : i + 1] * b[i : i + 1]).float().double()
        return accumulator
    (a_hi, a_lo), (b_hi, b_lo) = ((cut(x, 11), cut(x - cut(x, 11), 11)) for x in (a, b))
    for x, y in ((a_lo, b_hi), (a_hi, b_lo), (a_hi, b_hi)):
        for i in range(0, a.shape[1], STEP):
            total = accumulator + x[:, i : i + STEP] @ y[i : i + STEP]
            accumulator = cut(total, 24, torch.trunc if how == "zero" else torch.round)
    return accumulator


def attention(q: Tensor, k: Tensor, v: Tensor, how: str) -> Tensor:
    """The kernels' online softmax, (M, Dv) in float64; each array but the products is rounded to float32."""
    top = torch.full((len(q), 1), -torch.inf, dtype=torch.float64)
    total, out = torch.zeros_like(top), torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for keys, values in zip(k.split(BLOCK_N), v.split(BLOCK_N)):
        zero = torch.zeros(len(q), len(keys), dtype=torch.float64)
        s = (added(zero, q, keys.T, how) * q.shape[1] ** -0.5).float().double()
        new = torch.maximum(top, s.amax(1, keepdim=True))
        p, shrink = (torch.exp(x - new).float().double() for x in (s, top))
        total = (total * shrink + p.sum(1, keepdim=True)).float().double()
        out = added((out * shrink).float().double(), p, values, how)
        top = new
    return out / total


def ratios(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Of each way to add: its largest error over that of torch in float32. Inputs: float32 numbers in float64."""

    def plain(dtype: torch.dtype) -> Tensor:
        a, b, c = (x.to(dtype) for x in (q, k, v))
        return (torch.softmax(a @ b.T * a.shape[1] ** -0.5, -1) @ c).double()

    exact = plain(torch.float64)
    torchs = (plain(torch.float32) - exact).abs().max()
    return {how: float((attention(q, k, v, how) - exact).abs().max() / torchs) for how in HOW}


def draw(name: str, T: int, D: int) -> tuple[Tensor, ...]:
    """32 queries, T keys and values: float32 numbers in float64."""
    g = torch.Generator().manual_seed(0)
    kinds: dict[str, Callable[..., Tensor]] = {
        "normal": lambda *shape: torch.randn(*shape, generator=g),
        "positive": lambda *shape: torch.rand(*shape, generator=g),
        "large logits": lambda *shape: 4 * torch.randn(*shape, generator=g),
        "near one": lambda *shape: 1 + 2.0**-12 * torch.randn(*shape, generator=g),
    }
    return tuple(kinds[name](length, D).double() for length in (32, T, T))


def main() -> None:
    """Print the table of docs/kernels.md."""
    print("| inputs | T | " + " | ".join(HOW) + " |\n|---|---|" + "---|" * len(HOW))
    for name in ("normal", "positive", "large logits", "near one"):
        for T in (256, 2048):
            found = ratios(*draw(name, T, 64))
            print(f"| {name} | {T} | " + " | ".join(f"{found[how]:.1f}" for how in HOW) + " |", flush=True)


if __name__ == "__main__":
    main()
