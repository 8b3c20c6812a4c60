"""What the loops of the compiled kernels spend: instructions, matrix products, exponentials; and a rate predicted.

    python -m benchmarks.kernels.inner_loops                  every kernel that an H100 (sm_90) runs in half precision
    python -m benchmarks.kernels.inner_loops --size 128 --kernel forward --tile 128 128 8 2
    python -m benchmarks.kernels.inner_loops --padded --entry "*" --entry "+"    a training with a key_mask

No GPU is needed: the shipped kernels are compiled offline and disassembled, and the loop that walks whole tiles is
counted. A processor issues 4 instructions of a warp per cycle, finishes 16 exponentials, and multiplies at the rate of
its tensor cores. One block multiplies, then exponentiates, so its times add; blocks that share a processor overlap as
customers of two queues do (``overlapped``). A product takes as long as it multiplies or as its operands are read from
shared memory, whichever is longer. Meanwhile tiles of keys or queries come from the L2 cache:

    cycles of an iteration = max(overlapped(matrix, max(issue, exponentials)), bytes from L2 / its rate)

Of the peak = useful products / (cycles * rate). Latencies and barriers are not in it: it is a ceiling to rank tiles by,
and a measured rate lies below. Products that a kernel makes twice (two groups of warps on one tile of 64 rows) count as
cycles and not as useful.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kernels import compile_kernels as offline

ARCH = "sm_90"  # mma.sync of older ones does not make a whole block wait, so times would not add
MATRIX = 4096  # FLOP per cycle and processor in half precision
SHARED = 233472  # bytes of a processor; it has 65536 registers and 64 warps
L2 = 22.8  # bytes per cycle and processor: 5.5 TB/s
BANKS = 128  # bytes per cycle that a processor reads from shared memory
HALF_RATE = 0.62  # of the peak that mma.sync reaches, by published microbenchmarks
PRODUCTS = {"forward": 2, "grad_query": 3, "grad_sequence": 4, "grad_prefix": 4, "split_keys": 2, "fold_prefix": 2}


class Loop(NamedTuple):
    """One iteration: of a warp, but for ``flops``, which are those of the block."""

    instructions: int
    flops: float
    exponentials: int
    matrix: float  # cycles that the tensor cores are busy with the block
    counts: Counter[str]


def disassembled(kernel: Any) -> str:
    """The SASS of a compiled kernel, by the disassembler in Triton's wheel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        return subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", str(path)], capture_output=True, text=True, check=True
        ).stdout


def loops(sass: str, warps: int) -> list[Loop]:
    """The innermost loops that multiply matrices."""
    places: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            places[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1].strip()))
    jumps = [(i, re.search(r"`\((\.L_\w+)\)", text)) for i, text in enumerate(code) if text.startswith("BRA")]
    spans = [(places[to[1]], i) for i, to in jumps if to and places.get(to[1], i) < i]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    found = [_loop(code[first : last + 1], warps) for first, last in inner]
    return [loop for loop in found if loop.flops]


def _loop(code: list[str], warps: int) -> Loop:
    counts = Counter(text.split()[0].split(".")[0] for text in code)
    flops = matrix = 0.0
    for text in code:
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\S*\s+R\d+,\s*(gdesc)?", text):
            m, n, k = map(int, shape.groups()[:3])
            read = (n + (m if shape[4] else 0)) * k * 2  # bytes; else the rows lie in registers
            flops += 2 * m * n * k * warps / 4
            matrix += max(2 * m * n * k / MATRIX, read / BANKS) * warps / 4
        elif text.startswith("HMMA.16816"):
            flops += 2 * 16 * 8 * 16 * warps
            matrix += 2 * 16 * 8 * 16 * warps / MATRIX / HALF_RATE
    return Loop(len(code), flops, counts["MUFU"], matrix, counts)


def resident(registers: int, shared: int, warps: int) -> int:
    """Blocks that a processor holds at once."""
    granted = -(-registers // 8) * 8 * 32 * warps
    return max(1, min(65536 // granted, SHARED // (shared + 1024), 64 // warps))


def overlapped(first: float, second: float, blocks: int) -> float:
    """Cycles per iteration of blocks that go back and forth between two units (mean value analysis)."""
    waiting, time = [0.0, 0.0], first + second
    for n in range(1, blocks + 1):
        stays = [unit * (1 + queue) for unit, queue in zip((first, second), waiting)]
        time = sum(stays) / n
        waiting = [stay / time for stay in stays]
    return time


def demands(kernel: offline.Kernel, loop: Loop) -> tuple[float, float, float]:
    """Cycles of one iteration that the tensor cores, the other units and the L2 cache are busy."""
    m, n, warps = tile(kernel.tile)
    walked = m if kernel.kernel in ("grad_sequence", "grad_prefix") else n  # rows of two matrices
    return (
        loop.matrix,
        max(loop.instructions * warps / 4, loop.exponentials * warps * 2),
        walked * kernel.size * 4 / L2,
    )


def of_peak(kernel: offline.Kernel, loop: Loop) -> float:
    """Useful products over what the tensor cores could make meanwhile."""
    m, n, warps = tile(kernel.tile)
    useful = PRODUCTS[kernel.kernel] * 2 * m * n * kernel.size
    matrix, rest, l2 = demands(kernel, loop)
    blocks = resident(kernel.registers, kernel.shared, warps)
    return useful / MATRIX / max(overlapped(matrix, rest, blocks), l2)


def tile(text: str) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, warps) of "128x64 w8 s3"."""
    m, n, warps = map(int, re.findall(r"\d+", text)[:3])
    return m, n, warps


def fastest(kernel: Any, warps: int) -> Loop:
    """The loop that walks whole tiles: it has no masks, and the fewest instructions."""
    return min(loops(disassembled(kernel), warps), key=lambda loop: loop.instructions)


def slowest(kernel: Any, warps: int) -> Loop:
    """The loop with the most instructions: with a key_mask that over the sequence, every tile of which is masked."""
    return max(loops(disassembled(kernel), warps), key=lambda loop: loop.instructions)


def table(rows: Sequence[tuple[offline.Kernel, Loop]]) -> str:
    """Markdown."""
    heads = ("kernel", "D", "tile", "registers", "spilled", "blocks", "instructions", "exponentials",
             "matrix cycles", "other cycles", "L2 cycles", "of the peak")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for k, loop in rows:
        _, _, warps = tile(k.tile)
        blocks = resident(k.registers, k.shared, warps)
        matrix, rest, l2 = demands(k, loop)
        lines.append(
            f"| {k.kernel} | {k.size} | {k.tile} | {k.registers} | {k.spills} | {blocks} | "
            f"{loop.instructions} | {loop.exponentials} | {matrix:.0f} | {rest:.0f} | {l2:.0f} | "
            f"{of_peak(k, loop):.0%} |"
        )
    return "\n".join(lines)


def padded(size: int, entry: str) -> list[tuple[offline.Kernel, Loop]]:
    """The kernels of a training with a key_mask in half precision, with the tiles of one class of the table."""
    from prefix_attn.backends.triton import launch, plan
    from prefix_attn.backends.triton.table import tile as of_table

    before = plan.options
    plan.options = lambda call, name: before(call, name) | of_table(ARCH, name, call.query.dtype, size, entry)
    try:
        with offline.target(ARCH) as compiled:
            call = offline.single(offline.DTYPES["half"], size)[0]
            out, lse = launch.forward(call)
            launch.backward(call, out, lse, out, None, [True] * 5 + [False, False])
    finally:
        plan.options = before
    rows = []
    for name, kernel, text in compiled:
        row = offline.Kernel(ARCH, name, "half", size, entry, text, *offline.resources(kernel, ARCH))
        rows.append((row, slowest(kernel, tile(text)[2])))
    return rows


def shipped(size: int) -> list[tuple[offline.Kernel, Loop]]:
    """The plain kernels in half precision as the table's tiles make them."""
    from prefix_attn.backends.triton import launch, plan

    found: dict[tuple[str, str], tuple[offline.Kernel, Loop]] = {}
    with offline.target(ARCH) as compiled:
        for call in offline.plain(offline.DTYPES["half"], size):
            compiled.clear()
            out, lse = launch.forward(call)
            if call.query.shape[2] > plan.MAX_DECODE_QUERIES:
                launch.backward(call, out, lse, out, None, [True] * 5 + [False, False])
            for name, kernel, text in compiled:
                row = offline.Kernel(ARCH, name, "half", size, "plain", text, *offline.resources(kernel, ARCH))
                found.setdefault((name, text), (row, fastest(kernel, tile(text)[2])))
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=offline.SIZES, action="append", help="default: all")
    parser.add_argument("--kernel", choices=PRODUCTS, help="with --tile")
    parser.add_argument("--tile", type=int, nargs=4, action="append", metavar=("M", "N", "WARPS", "STAGES"))
    parser.add_argument("--padded", action="store_true", help="a training with a key_mask")
    parser.add_argument("--entry", choices=("", "*", "+"), action="append", help="with --padded: class of tiles")
    args = parser.parse_args(arguments)
    rows = []
    for size in args.size or offline.SIZES:
        if args.padded:
            rows += [row for entry in args.entry or ("*",) for row in padded(size, entry)]
        elif args.tile:
            for one in args.tile:
                built = offline.built(ARCH, args.kernel, "half", size, "", one)
                rows += [(row, fastest(kernel, one[2])) for row, kernel in built]
        else:
            rows += shipped(size)
    print(table(rows))


if __name__ == "__main__":
    main()
