"""The C++ kernels: that they are there, every instruction set, threads, memory, far offsets, building at first use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefix_attn import explain, prefix_attention
from prefix_attn.backends import _native, cpu
from prefix_attn.call import Call
from tests.numerics import Case, run

ROOT = Path(__file__).resolve().parent.parent.parent
ISAS = ("generic", "avx2", "avx512", "avx512bf16")
CASES = {
    "plain": Case(B=3, Hq=4, Hkv=2, S=70, T=90, P=33, D=40, Dv=24),
    "decode": Case(B=70, Hq=6, Hkv=3, S=1, T=130, P=70, D=64, Dv=64),
    "bank": Case(B=5, N=3, S=50, T=50, P=70, with_=("prefix_ids", "prefix_lengths", "key_mask", "sinks")),
}
# Runs in a process of its own: the instruction set is chosen once, a sanitizer is loaded before all else.
NUMERICS = """
import sys, torch
from tests.backends.test_numerics import compare
from tests.numerics import CASES, random_case
assert torch.ops.prefix_attn_cpu.isa() == sys.argv[1]
cases = [*CASES.values(), *map(random_case, range(int(sys.argv[2])))]
for case in cases:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compare("cpu", case.arguments(dtype))
print(len(cases))
"""


def here(isa: str) -> bool:
    """Whether this processor has the instruction set."""
    return isa == "generic" or isa in Path("/proc/cpuinfo").read_text().replace("_", "")


def in_a_process(code: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_is_there_and_auto_takes_it() -> None:
    """Every other test of the backend would pass on a machine that refused all its calls."""
    assert _native.cpu_ops_missing() is None
    said = explain(**Case().arguments(torch.bfloat16))
    assert (said.backend, said.refused.get("cpu")) == ("cpu", None) or _native.isa == "generic"


def test_a_library_of_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "INTERFACE", 0)
    assert "was built from other sources than these: build it again" in (_native._load() or "")


def test_auto_prefers_torch_without_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "isa", "generic")
    arguments = Case().arguments(torch.float32)
    said = explain(**arguments)
    assert (said.backend, said.refused["cpu"]) == ("composed", ("without AVX2 it is slower than torch's kernels",))
    assert explain(**arguments, softcap=2.0).backend == "cpu"
    torch.testing.assert_close(*(prefix_attention(**arguments, backend=name) for name in ("cpu", "auto")))


@pytest.mark.parametrize(("B", "H", "P"), [(1, 2, 1024), (1, 2, 4096), (2, 2, 1024), (1, 4, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_keeps_a_long_prefix_that_nobody_shares(
    B: int, H: int, P: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query per key head leaves no lane of ``cpu`` empty: it takes about half as long as torch's kernels."""
    monkeypatch.setattr(cpu, "slow", lambda: None)
    query, key, prefix = torch.ones(B, H, 1, 8), torch.ones(B, 2, 3, 8), torch.ones(2, P, 8)
    said = explain(*(t.to(dtype) for t in (query, key, key, prefix, prefix)))
    assert (said.backend, "cpu" in said.refused) == ("cpu", False)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_matches_float64(isa: str) -> None:
    done = in_a_process(NUMERICS, isa, "40", PREFIX_ATTN_ISA=isa)
    if here(isa):
        assert done.stdout.strip() == "87", done.stderr
    else:
        assert "this processor lacks" in done.stderr


def test_an_unknown_instruction_set_is_a_reason_not_a_crash() -> None:
    code = "import prefix_attn, torch; t = torch.ones(1, 1, 1, 8); print(prefix_attn.explain(t, t, t, None, None))"
    done = in_a_process(code, PREFIX_ATTN_ISA="sse9")
    assert "auto -> composed" in done.stdout, done.stderr
    assert "none of avx512bf16, avx512, avx2, generic" in done.stdout


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run("cpu", arguments, lse_gradient=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_a_row_does_not_depend_on_its_batch() -> None:
    arguments = CASES["decode"].arguments(torch.float32)
    whole = prefix_attention(**arguments, backend="cpu")
    own = ("query", "key", "value")
    some = prefix_attention(**arguments | {n: arguments[n][17:20] for n in own}, backend="cpu")
    assert torch.equal(whole[17:20], some)


def test_partial_sums_do_not_grow_with_the_batch() -> None:
    sizes = []
    for B in (16, 64, 1024):
        query, key, prefix = torch.empty(B, 4, 1, 64), torch.empty(B, 2, 1, 64), torch.empty(2, 512, 64)
        slots = cpu._slots(Call(query, key, key, prefix, prefix))
        sizes.append(cpu._partials(prefix, slots).numel())
    assert sizes == [16 * prefix.numel()] * 3
    large = torch.empty(64, 64, 2048, 64)  # a bank of 2 GiB is not multiplied at all
    assert cpu._slots(Call(query, key, key, large.expand(1, -1, -1, -1, -1)[0], large)) == 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(axis: int) -> None:
    """Strides of 2**31 elements and more, in memory that is never touched between the rows."""
    near = Case(B=2, Hq=2, Hkv=2, S=2, T=2, P=3, D=8, Dv=8).arguments(torch.bfloat16)
    storage = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    far = dict(near)
    for i, name in enumerate(("query", "key", "value")):
        strides = [64, 32, 8, 1]
        strides[axis] = 2**31
        far[name] = storage.as_strided((2, 2, 2, 8), strides, i * 1024).copy_(near[name])
    a, b = (run("cpu", arguments, lse_gradient=False) for arguments in (near, far))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("S", [1, 50])
def test_what_lies_behind_a_length_is_nowhere(dtype: torch.dtype, S: int) -> None:
    """NaN in what nobody filled of a bank and of a static cache: the same bits in the output and in every gradient."""
    case = Case(B=4, N=3, S=S, T=70, P=70, D=33, Dv=17, with_=("sinks", "prefix_ids", "prefix_lengths", "key_lengths"))
    clean = case.arguments(dtype) | {
        "prefix_ids": torch.tensor([0, 1, 2, 0]),
        "prefix_lengths": torch.tensor([5, 64, 69]),
        "key_lengths": torch.tensor([0, 51, 64, 69]),
    }
    garbage = dict(clean)
    for name, lengths in (("prefix", clean["prefix_lengths"]), ("", clean["key_lengths"])):
        behind = torch.arange(70) >= lengths[:, None, None]
        for tensor in (f"{name}_key".lstrip("_"), f"{name}_value".lstrip("_")):
            garbage[tensor] = clean[tensor].masked_fill(behind[..., None], torch.nan)
    a, b = (run("cpu", arguments, lse_gradient=True) for arguments in (clean, garbage))
    assert a["grad prefix_key"].abs().amax() > 0
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_entries_that_nobody_reads_are_not_packed() -> None:
    """One row of a bank of 128: forward and backward touch the memory of one packed entry, not of 256 MiB of them."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    query = torch.randn(1, 8, 8, 64, requires_grad=True)
    entry = torch.randn(8, 512, 64)
    bank = entry.expand(128, -1, -1, -1)
    before = resident()
    out = prefix_attention(query, query, query, bank, bank, prefix_ids=torch.tensor([77]), backend="cpu")
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert resident() - before < 2**26
    alone = prefix_attention(query, query, query, entry, entry, backend="cpu")
    assert torch.equal(alone, out)
    assert torch.equal(torch.autograd.grad(alone.sum(), query)[0], grad)


def test_lengths_that_lie_touch_nothing_else() -> None:
    """cu_seqlens out of order or past the end, ids out of range, as a compiled program may pass: no other memory."""
    query, prefix = torch.randn(1, 2, 20, 8), torch.randn(3, 2, 4, 8)
    call = Call(
        query, query, query, prefix, prefix, prefix_ids=torch.tensor([-1, 99, 1]),
        cu_seqlens_q=torch.tensor([0, 5, 3, 90]), cu_seqlens_k=torch.tensor([-7, 5, 2**40, 90]),
    )  # fmt: skip
    out, lse = cpu.forward(call)
    grads = cpu.backward(call, out, lse, torch.ones_like(out), None, [True] * 5 + [False] * 2)
    assert not any(t.isnan().any() for t in (out, lse, *grads[:5]))


def test_the_raw_op_checks_what_it_was_not_checked_for() -> None:
    """A compiled program may call the op itself: heads that no buffer holds raise, an lse in another order is read."""
    wide = torch.ones(1, 1, 1, 1024)
    with pytest.raises(RuntimeError, match="heads of up to 256"):
        cpu.forward(Call(wide, wide, wide))
    query = torch.randn(3, 4, 5, 8)
    call = Call(query, query, query)
    out, lse = cpu.forward(call)
    other = lse.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    needs = [True] * 3 + [False] * 4
    for a, b in zip(*(cpu.backward(call, out, x, torch.ones_like(out), None, needs)[:3] for x in (lse, other))):
        assert torch.equal(a, b)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The package, its native sources and the tests' numerics, with nothing built."""
    for name in ("prefix_attn", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    return tmp_path


def test_builds_at_first_use_or_says_why_not(checkout: Path) -> None:
    """Without an installation ninja builds; where it cannot, ``explain`` has the reason."""
    code = (
        "import prefix_attn, torch; t = torch.ones(1, 1, 1, 8); print(prefix_attn.explain(t, t, t, None, None));"
        "prefix_attn.prefix_attention(t, t, t, None, None)"
    )
    forbidden = in_a_process(code, cwd=checkout, PREFIX_ATTN_BUILD="0")
    assert "cpu: it was not built at installation\n" in forbidden.stdout, forbidden.stderr
    alone = in_a_process(code, cwd=checkout, PATH="/nonexistent")
    assert "and building it now needs ninja on the PATH: pip install 'prefix-attn[jit]'\n" in alone.stdout, alone.stderr
    failed = in_a_process(code, cwd=checkout, CXX="/nonexistent", TORCH_EXTENSIONS_DIR=str(checkout / "failed"))
    assert "and building it now failed" in failed.stdout, failed.stderr
    assert "auto -> composed" in failed.stdout
    built = in_a_process(code, cwd=checkout, TORCH_EXTENSIONS_DIR=str(checkout / "built"))
    assert "auto -> cpu" in built.stdout, built.stderr
    assert built.stderr.strip() == "building the CPU kernels: once, about 20 seconds"


def test_sanitizers_find_nothing(checkout: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer over the numerics, and over packed lengths that lie.

    On every instruction set of this processor, with products of bfloat16 pairs, written out where there is no
    instruction for them: not every machine that tests has AVX512-BF16.
    """
    compiler, torch_folder = os.environ.get("CXX", "c++"), Path(torch.__file__).parent
    flags = [
        "-O1",
        "-g1",
        "-shared",
        "-fPIC",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-DPA_PAIRS=1",
    ]
    sources = [ROOT / "csrc/bind_cpu.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    paths = ["-isystem", torch_folder / "include", f"-L{torch_folder / 'lib'}"]
    command = [compiler, *flags, *_native.FLAGS[1:], *paths, *sources, "-o", checkout / "prefix_attn/_C_cpu.so"]
    subprocess.run([str(part) for part in [*command, "-ltorch_cpu"]], check=True, capture_output=True)
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    assert all(Path(library).is_absolute() for library in libraries), "the sanitizers' libraries are not installed"
    code = NUMERICS + "from tests.backends import test_native; test_native.test_lengths_that_lie_touch_nothing_else()"
    loaded = {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    for isa in filter(here, ISAS):
        done = in_a_process(code, isa, "10", cwd=checkout, PREFIX_ATTN_ISA=isa, **loaded)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.strip() == "57"
