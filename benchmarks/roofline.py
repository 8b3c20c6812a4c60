"""What an H100 can at best do for each target of the sweeps, and what we expect: to be held against a measurement.

    python -m benchmarks.roofline

Each row counts the floating-point operations that the result needs and the bytes that must cross device memory, each
input once and each output once; the larger of the two times is the floor. The prediction divides it by the share of it
that published Triton kernels of the same kind reach, and adds launches and reads from the L2 cache. Nothing here is
measured.
"""

from __future__ import annotations

from typing import NamedTuple

PEAK_FLOPS = 989e12  # dense bfloat16, H100 SXM
BANDWIDTH = 3.0e12  # bytes per second that a large copy sustains, of 3.35e12
L2_BANDWIDTH = 5.5e12  # bytes per second; published microbenchmarks, least certain of the constants
LAUNCH = 4e-6  # seconds: the shortest kernel, seen from the stream
BF16 = 2


class Target(NamedTuple):
    """One row: what must be done, and the share of the floor's rate that we expect."""

    name: str
    wanted: str
    flops: float
    bytes: float
    efficiency: float
    launches: int = 1
    l2_bytes: float = 0.0

    @property
    def floor(self) -> float:
        """Seconds below which no implementation can be."""
        return max(self.flops / PEAK_FLOPS, self.bytes / BANDWIDTH)

    @property
    def predicted(self) -> float:
        """Seconds that we expect."""
        return self.floor / self.efficiency + self.l2_bytes / L2_BANDWIDTH + LAUNCH * self.launches


def attention_flops(B: int, Hq: int, S: int, T: int, P: int, D: int, *, causal: bool) -> float:
    """Operations of the two products of forward: 4 B Hq D (query, key) pairs; causal ones with S = T are about half."""
    pairs = S * P + (S * (S + 1) / 2 + S * (T - S) if causal else S * T)
    return 4.0 * B * Hq * pairs * D


def attention_bytes(B: int, Hq: int, Hkv: int, S: int, T: int, P: int, D: int) -> float:
    """q and out, every sequence's k and v, and one prefix."""
    return BF16 * D * (2.0 * B * Hq * S + 2.0 * B * Hkv * T + 2.0 * Hkv * P)


def training(D: int, causal: bool, wanted: str, efficiency: float, *, backward: bool = False) -> Target:
    """S = 8192, 16 k tokens, 16 heads, P = 128; backward counts 2.5 times forward's operations."""
    B, H, S, P = 2, 16, 8192, 128
    flops = attention_flops(B, H, S, S, P, D, causal=causal)
    moved = attention_bytes(B, H, H, S, S, P, D)
    name = f"{'backward' if backward else 'forward'} S=8192 D={D} {'causal' if causal else 'full'}"
    factor, launches = (2.5, 5) if backward else (1.0, 1)
    return Target(name, wanted, flops * factor, moved * (2.5 if backward else 1), efficiency, launches)


def decoding(B: int, S: int, P: int, wanted: str, efficiency: float) -> Target:
    """One query per row over S keys, Hq = 32, Hkv = 8, D = 128; the prefix is folded from 32 MiB of L2 reads on."""
    Hq, Hkv, D = 32, 8, 128
    flops, moved = attention_flops(B, Hq, 1, S, P, D, causal=False), attention_bytes(B, Hq, Hkv, 1, S, P, D)
    in_loop = BF16 * 2.0 * B * Hkv * P * D
    folded = in_loop >= 2**25
    tiles = -(-B * Hq // Hkv // 64)  # of 64 folded query rows, per key head
    l2 = BF16 * 2.0 * tiles * Hkv * P * D if folded else in_loop
    return Target(f"decode B={B} S={S} P={P}", wanted, flops, moved, efficiency, 2 if folded else 1, l2)


def prefix_only(S: int = 1024, P: int = 128) -> tuple[Target, Target]:
    """The prefix-only and the full backward: five products over P columns against five over P + S, causal."""
    B, H, D = 16, 16, 128
    moved = attention_bytes(B, H, H, S, S, P, D)
    # S -> p, dp, dk, dv of the prefix: four products, without dq
    alone = 2.0 * attention_flops(B, H, S, 0, P, D, causal=False)
    full = 2.5 * attention_flops(B, H, S, S, P, D, causal=True)
    return (
        Target(f"prefix-only backward S={S} P={P}", "<= 1/3 of full", alone, moved / 2, 0.33, 3),
        Target(f"full backward S={S} P={P}", "", full, 2.5 * moved, 0.33, 5),
    )


def targets() -> list[Target]:
    """Every target that the sweeps are measured against."""
    return [
        training(128, False, ">= 450 TFLOP/s", 0.46),
        training(128, True, ">= 400 TFLOP/s", 0.40),
        training(64, False, ">= 370 TFLOP/s", 0.36),
        training(128, False, ">= 290 TFLOP/s", 0.30, backward=True),
        decoding(64, 2048, 0, ">= 85 % of copy", 0.88),
        decoding(256, 512, 0, "P=0 <= 3 % over best", 0.85),
        decoding(256, 512, 128, "", 0.85),
        decoding(256, 512, 512, "<= 10 us over P=0", 0.85),
        *prefix_only(),
    ]


def table(rows: list[Target]) -> str:
    """Markdown."""
    lines = [
        "| target | wanted | GFLOP | MB | bound by | floor us | expected share | expected us | expected rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        compute = row.flops / PEAK_FLOPS > row.bytes / BANDWIDTH
        rate = f"{row.flops / row.predicted / 1e12:.0f} TFLOP/s" if compute else (
            f"{row.bytes / row.predicted / 1e9:.0f} GB/s"
        )  # fmt: skip
        lines.append(
            f"| {row.name} | {row.wanted} | {row.flops / 1e9:.1f} | {row.bytes / 1e6:.1f} | "
            f"{'arithmetic' if compute else 'memory'} | {row.floor * 1e6:.1f} | {row.efficiency:.2f} | "
            f"{row.predicted * 1e6:.1f} | {rate} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(targets()))
