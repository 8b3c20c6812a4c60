"""benchmarks/kernels/inner_loops.py, dram.py and what tune.py decides, on made-up kernels: no compiler, no GPU."""

from __future__ import annotations

import pytest

from benchmarks.kernels import dram, inner_loops, tune
from benchmarks.kernels.compile_kernels import Kernel

SASS = """
.L_x_0:
        /*0000*/                   IMAD R1, R2, R3, RZ ;
.L_x_1:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspB, R24 ;
        /*0020*/              @!P0 MUFU.EX2 R5, R5 ;
        /*0030*/                   FFMA R5, R5, R6, -R7 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   FADD R5, R5, R6 ;
        /*0070*/               @P2 BRA `(.L_x_2) ;
"""
KERNEL = Kernel("sm_90", "forward", "half", 128, "plain", "128x64 w8 s3", 246, 0, 131072, "wgmma.mma_async")


def test_a_narrow_product_takes_as_long_as_its_operands_are_read() -> None:
    """Both from shared memory 24 cycles, of 16 to multiply; with rows from registers 16. Two groups of warps."""
    wide = SASS.replace("64x128x16", "64x32x16")
    assert inner_loops.loops(wide, warps=8)[0].matrix == 2 * 24
    assert inner_loops.loops(wide.replace("R24, gdesc", "R24, R4, gdesc"), warps=8)[0].matrix == 2 * 16
    older = SASS.replace("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspB, R24", "HMMA.16816.F32.BF16 R4, R8, R12, R4")
    assert inner_loops.loops(older, warps=4)[0].matrix == pytest.approx(4 / 0.62)


def test_the_innermost_loop_that_multiplies_is_counted() -> None:
    (loop,) = inner_loops.loops(SASS, warps=8)
    assert loop.instructions == 4
    assert loop.flops == 2 * (2 * 64 * 128 * 16)  # by two groups of four warps
    assert loop.exponentials == 1
    assert loop.matrix == 2 * 64
    assert loop.counts == {"HGMMA": 1, "MUFU": 1, "FFMA": 1, "BRA": 1}


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(246, 131072, 8, 1), (118, 65536, 8, 2), (128, 1024, 4, 4), (32, 0, 4, 16), (96, 70000, 4, 3)],
)
def test_blocks_of_a_processor(registers: int, shared: int, warps: int, blocks: int) -> None:
    assert inner_loops.resident(registers, shared, warps) == blocks


def test_one_block_adds_its_units_and_many_hide_all_but_the_busiest() -> None:
    assert inner_loops.overlapped(1024, 750, 1) == 1774
    assert inner_loops.overlapped(1, 1, 2) == pytest.approx(3 / 2)  # n customers at two equal queues: (n + 1) / n
    assert inner_loops.overlapped(1, 1, 9) == pytest.approx(10 / 9)
    assert inner_loops.overlapped(1024, 100, 8) == pytest.approx(1024)


def test_of_the_peak() -> None:
    loop = inner_loops.Loop(375, 2 * 2 * 128 * 64 * 128, 34, 1024.0, inner_loops.Counter())
    assert inner_loops.demands(KERNEL, loop) == (1024, 750, pytest.approx(64 * 128 * 4 / 22.8))
    assert inner_loops.of_peak(KERNEL, loop) == pytest.approx(1024 / 1774)
    twice = loop._replace(
        flops=2 * loop.flops, matrix=2 * loop.matrix
    )  # as two groups of warps on the same rows: nothing useful is added
    assert inner_loops.of_peak(KERNEL, twice) == pytest.approx(1024 / 2798)
    assert "| 246 | 0 | 1 | 375 | 34 | 1024 | 750 | 1437 | 58% |" in inner_loops.table([(KERNEL, loop)])


@pytest.mark.parametrize(
    ("points", "limit"),
    [
        ([(10, 1.0, 2.0), (20, 1.9, 2.0), (40, 4.0, 2.5)], 40),
        ([(10, 1.0, 2.0), (20, 2.5, 2.0), (40, 4.0, 2.5)], 20),
        ([(10, 3.0, 2.0), (20, 2.5, 2.0)], 10),
        ([(10, 1.0, 2.0), (20, 1.0, 2.0)], 40),  # never
    ],
)
def test_folding_begins_where_all_cases_together_take_the_least_time(
    points: list[tuple[int, float, float]], limit: int
) -> None:
    assert tune.crossover(points) == limit


def test_bytes_of_each_kernel_are_read_from_the_profiler() -> None:
    text = (
        "==PROF== Connected\n"
        '"ID","Process ID","Kernel Name","dram__bytes_read.sum"\n'
        '"","","","byte"\n'
        '"0","7","_fold_prefix","2,100,000"\n'
        '"1","7","_split_keys","500000000"\n'
        '"2","7","_split_keys","1"\n'
    )
    assert dram.bytes_read(text) == {"_fold_prefix": 2.1e6, "_split_keys": 500000001.0}
    with pytest.raises(ValueError, match="no table: ==ERROR== ERR_NVGPUCTRPERM"):
        dram.bytes_read("==ERROR== ERR_NVGPUCTRPERM")


def test_needed_bytes_are_those_of_the_tensors() -> None:
    c = {"B": 2, "Hq": 4, "Hkv": 2, "T": 9, "P": 3, "D": 8}
    assert dram.needed(c) == 2 * 8 * (2 * 2 * 2 * 9 + 2 * 2 * 3 + 2 * 4)
