"""The backend ``cuda`` on the emulated GPU: the cases of all backends against float64, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import platform
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import compile_cuda
from prefix_attn import _ops, explain, prefix_attention, prefix_attention_varlen
from prefix_attn.backends import _native_cuda, cuda
from prefix_attn.call import Call
from tests.backends import test_hidden_values as hidden
from tests.numerics import CASES, FINE, FLOAT, HALF, Case, close, random_case, widen, within_eps

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# order, seed, late copies, blocks at a time, processors, bytes from which a prefix is folded, fewest keys of a run
PLAIN = (0, 1, True, 4, 4, 1 << 14, 64, True)
ORDERS = [(order, 5, late, 3, *PLAIN[4:]) for order in range(3) for late in (True, False)]
WAYS = {
    "folded": (*PLAIN[:5], 0, 32, True),
    "not folded": (*PLAIN[:5], 1 << 40, 32, True),
    "whole": (*PLAIN[:4], 1, 0, 999, True),
}
LACKS = {
    "bias": "bias", "bias mask": "bias", "infix": "prefix_start", "infix bank": "prefix_start",
    "gate infix sinks": "prefix_start", "everything": "bias; the kernel has no prefix_start",
}  # fmt: skip


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PREFIX_ATTN_EMULATE", "1")
    assert _native_cuda.missing("emulated") is None
    configure(PLAIN)
    yield
    configure(PLAIN)


def configure(settings: tuple[Any, ...]) -> None:
    torch.ops.prefix_attn_emulated.configure(*settings)


def decoding(case: Case) -> Case:
    """The case with a head size that the kernel has."""
    size = case.D if case.D in cuda.HEAD_SIZES else 64
    return dataclasses.replace(case, D=size, Dv=size)


def attend(arguments: dict[str, Any], backend: str = "cuda") -> tuple[Tensor, Tensor]:
    out, lse = prefix_attention(**arguments, return_lse=True, backend=backend)
    return out, lse


def exactly(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64, of the prefix as the kernel reads it."""
    dtype = arguments["query"].dtype
    prefix = {n: arguments[n].to(dtype) for n in ("prefix_key", "prefix_value") if arguments[n] is not None}
    return attend(widen(arguments | prefix), "eager")


def compare(arguments: dict[str, Any]) -> None:
    (out, lse), (exact, exact_lse) = attend(arguments), exactly(arguments)
    unit = None
    if (gate := arguments.get("prefix_gate")) is not None:  # two outputs are rounded, scaled and added
        parts = [attend(widen(arguments) | {"prefix_gate": gate * factor}, "eager")[0] for factor in (0.0, 1.0)]
        unit = (parts[0].abs() + (parts[1] - parts[0]).abs()).amax(-1, keepdim=True)
    within_eps(out, exact, unit)
    close(lse.double(), exact_lse, FINE)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name: str, dtype: torch.dtype) -> None:
    arguments = decoding(CASES[name]).arguments(dtype)
    if name in LACKS:
        with pytest.raises(NotImplementedError, match=f"cannot run this call: the kernel has no {LACKS[name]}$"):
            attend(arguments)
        return
    compare(arguments)


@pytest.mark.parametrize("seed", range(30))
def test_matches_float64_on_random_calls(seed: int) -> None:
    case = decoding(random_case(seed))
    with_ = tuple(name for name in case.with_ if name not in ("bias", "prefix_start"))
    case = dataclasses.replace(
        case, with_=with_, prefix_dtype=None, D=(64, 80, 96, 128)[seed % 4], Dv=(64, 80, 96, 128)[seed % 4]
    )
    compare(case.arguments((torch.bfloat16, torch.float16)[seed % 2]))


MANY = {
    "bank": Case(B=9, N=2, Hq=4, Hkv=2, S=1, T=70, P=70, D=64, Dv=64, with_=("prefix_ids", "prefix_lengths", "sinks")),
    "shared": Case(B=3, Hq=4, Hkv=1, S=2, T=150, P=130, D=64, Dv=64, layout="bshd", with_=("key_lengths",)),
    "wide": Case(B=2, Hq=9, Hkv=1, S=3, T=90, P=70, D=80, Dv=80, with_=("key_mask",), options={"window": 40}),
    "chunks": Case(B=2, Hq=71, Hkv=1, S=1, T=70, P=65, D=64, Dv=64),
}  # fmt: skip


@pytest.mark.parametrize("name", MANY)
def test_orders_of_threads_change_no_bit(name: str) -> None:
    """Random, greedy and fair, with copies that arrive late and at once."""
    arguments = MANY[name].arguments(torch.bfloat16)
    compare(arguments)
    first = attend(arguments)
    for settings in ORDERS:
        configure(settings)
        assert all(map(torch.equal, attend(arguments), first))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MANY)
def test_every_way_to_cut_a_call(name: str, way: str) -> None:
    """A prefix that is folded or not, runs of 32 keys or of all."""
    configure(WAYS[way])
    compare(MANY[name].arguments(torch.float16))


def test_no_bank_conflicts() -> None:
    torch.ops.prefix_attn_emulated.counted()
    for D in cuda.HEAD_SIZES:
        compare(Case(S=2, T=70, P=70, D=D, Dv=D).arguments(torch.bfloat16))
    mma, ldmatrix, conflicts, *_ = map(int, torch.ops.prefix_attn_emulated.counted().split())
    assert mma > 0
    assert ldmatrix > 0
    assert conflicts == 0


@pytest.mark.skipif(compile_cuda.nvcc() is None, reason="needs nvcc")
@pytest.mark.skipif(compile_cuda.cuobjdump() is None, reason="needs cuobjdump, of CUDA or of triton")
def test_the_kernel_compiles_without_a_spill() -> None:
    """One of the 32; `make nightly` compiles them all."""
    found = compile_cuda.compiled("90", "bf16/128/16")
    assert found.problems() == []
    assert 0 < found.registers <= compile_cuda.MOST_REGISTERS
    counts = found.instructions | {"LDSM": 0, "LDL": 1}
    broken = found._replace(spilled=8, stack=8, registers=256, instructions=counts)
    assert broken.problems() == [
        f"sm_90 bf16/128/16: {problem}"
        for problem in ("8 bytes spilled", "8 bytes of local memory", "256 registers", "no LDSM", "1 LDL")
    ]


def test_the_table_of_resources_is_whole() -> None:
    text = (compile_cuda.CSRC.parent / "docs/kernel-resources.md").read_text()
    rows = re.findall(r"^\| sm_(\d+) \| (\w+/\d+/\d+) \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert [row[:2] for row in rows] == list(itertools.product(_native_cuda.ARCHITECTURES, compile_cuda.KERNELS))
    assert all(int(registers) <= 255 and spilled == local == "0" for _, _, registers, spilled, local in rows)


@pytest.mark.parametrize("name", [n for n in hidden.CASES if "prefix_start" not in n])
def test_hidden_values_change_nothing(name: str) -> None:
    case, g = hidden.CASES[name], torch.Generator().manual_seed(0)
    B, H, S, T, P, D = hidden.B, hidden.H, 3, hidden.T, hidden.P, 64
    prefix = (H, P, D) if case.prefix is None else (*case.prefix.shape[:-1], D)
    shapes = ((B, 2 * H, S, D), (B, H, T, D), (B, H, T, D), prefix, prefix)
    drawn = [torch.randn(shape, generator=g).bfloat16() for shape in shapes]
    masks = (None, case.keys, case.keys, case.prefix, case.prefix)
    # The last S of T queries: causality hides the last key from all but one of them.
    blind = slice(None, -1) if name == "causality" else slice(None)

    def result(fill: float) -> tuple[Tensor, ...]:
        filled = [t if m is None else t.masked_fill(m, fill) for t, m in zip(drawn, masks)]
        results = prefix_attention(*filled, **case.options, backend="cuda", return_lse=True)
        return tuple(t[:, :, blind] for t in results)

    expected = result(0.0)
    assert expected[0].isfinite().all()
    for fill in case.fills:
        assert all(map(torch.equal, result(fill), expected)), fill


def test_a_nan_that_is_seen_is_not_hidden_and_stays_in_its_row() -> None:
    for name in ("key", "value"):
        arguments = Case(B=3, S=1, D=64, Dv=64).arguments(torch.bfloat16)
        clean = attend(arguments)[0]
        arguments[name][1, :, 4] = torch.nan
        out, lse = attend(arguments)
        assert out[1].isnan().all()
        assert lse[1].isnan().all() or name == "value"
        assert all(torch.equal(out[b], clean[b]) for b in (0, 2))


def test_a_nan_in_an_entry_reaches_its_own_rows_alone() -> None:
    """All rows share a folded tile."""
    configure(WAYS["folded"])
    case = Case(B=8, N=2, S=1, P=70, D=64, Dv=64)
    arguments = case.arguments(torch.bfloat16) | {"prefix_ids": torch.tensor([0, 1, -1, 0, 1, 1, 0, 7])}
    arguments["prefix_ids"][-1] = -1
    clean = attend(arguments)[0]
    for name in ("prefix_key", "prefix_value"):
        dirty = arguments | {name: arguments[name].clone()}
        dirty[name][1, :, 3] = torch.nan
        out = attend(dirty)[0]
        reads = arguments["prefix_ids"] == 1
        assert out[reads].isnan().all()
        assert torch.equal(out[~reads], clean[~reads])


def test_numbers_that_lie_read_nothing_else() -> None:
    """Ids and lengths out of range, as a program on a GPU may pass them: an id counts as -1, a length is clamped."""
    tensors = Case(B=4, N=2, S=1, T=9, D=64, Dv=64).arguments(torch.bfloat16)
    query, key, value, *bank = tensors.values()
    wrong = Call(
        query, key, value, *bank, prefix_ids=torch.tensor([7, 1, -9, 2**40]), prefix_lengths=torch.tensor([99, -3]),
        key_lengths=torch.tensor([-5, 99, 2**40, 3], dtype=torch.int64), scale=0.125,
    )  # fmt: skip
    right = wrong._replace(
        prefix_ids=torch.tensor([-1, 1, -1, -1]), prefix_lengths=torch.tensor([5, 0]),
        key_lengths=torch.tensor([0, 9, 9, 3], dtype=torch.int32),
    )  # fmt: skip
    assert all(map(torch.equal, cuda.forward(wrong), cuda.forward(right)))


@pytest.mark.parametrize("softcap", [1.0, 1e3, 1e6])
def test_a_large_softcap_multiplies_no_error(softcap: float) -> None:
    """1 - 2 / (e^2t + 1) has nothing left of a small t."""
    compare(Case(B=2, S=2, T=30, P=9, D=64, Dv=64, options={"softcap": softcap}).arguments(torch.bfloat16))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(axis: int) -> None:
    """Strides of 2**31 elements, in memory that is never touched between the rows."""
    near = Case(B=2, Hq=2, Hkv=2, S=2, T=2, P=3, D=64, Dv=64).arguments(torch.bfloat16)
    torch.use_deterministic_algorithms(False)  # which would fill it
    storage = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    far = dict(near)
    for i, name in enumerate(("query", "key", "value")):
        strides = [512, 256, 64, 1]
        strides[axis] = 2**31
        far[name] = storage.as_strided((2, 2, 2, 64), strides, i * 1024).copy_(near[name])
    assert all(map(torch.equal, attend(near), attend(far)))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "float32": ({}, {}, "multiplies float16 and bfloat16, not torch.float32"),
    "head size": ({"D": 72, "Dv": 72}, {}, "head size 72 is none of"),
    "two head sizes": ({"D": 64, "Dv": 128}, {}, "keys have head size 64 and values 128"),
    "dropout": ({}, {"dropout_p": 0.5}, "the kernel has no dropout"),
    "a float32 bank": ({"N": 2, "prefix_dtype": torch.float32}, {}, "a bank must have query's dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_a_reason(name: str) -> None:
    sizes, options, reason = REFUSED[name]
    case = Case(S=1, **{"D": 64, "Dv": 64} | sizes)
    arguments = case.arguments(torch.float32 if name == "float32" else torch.bfloat16)
    with pytest.raises(NotImplementedError, match=reason):
        prefix_attention(**arguments, **options, backend="cuda")
    assert reason in "".join(explain(**arguments, **options).refused["cuda"])


def test_refuses_rows_that_copies_cannot_read() -> None:
    query = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    odd = torch.zeros(1, 1, 3, 65, dtype=torch.bfloat16)[..., 1:]
    with pytest.raises(NotImplementedError, match="rows of key do not begin at multiples of 16 bytes; rows of value"):
        prefix_attention(query, odd, odd, None, None, backend="cuda")


def test_refuses_gradients_and_runs_without() -> None:
    arguments = decoding(CASES["plain"]).arguments(torch.bfloat16)
    arguments["prefix_key"].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"no gradients: decode under torch.no_grad\(\)"):
        attend(arguments)
    with torch.no_grad():
        compare(arguments)


def test_auto_never_picks_it() -> None:
    said = explain(**decoding(CASES["one-query"]).arguments(torch.bfloat16))
    assert said.backend != "cuda"
    assert said.refused["cuda"] == ("it runs when it is named: no device has shown where it wins",)


def test_needs_a_gpu_unless_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFIX_ATTN_EMULATE")
    arguments = decoding(CASES["one-query"]).arguments(torch.bfloat16)
    with pytest.raises(
        NotImplementedError, match=r"tensors are on cpu; the kernel needs a GPU \(or PREFIX_ATTN_EMULATE=1\)"
    ):
        attend(arguments)
    if torch.version.cuda is None:
        assert _native_cuda.missing("cuda") == "torch was built without CUDA"


def test_the_raw_op_checks_what_it_was_not_checked_for() -> None:
    query = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16)
    call = Call(query, query, query, scale=1.0)
    for bad, said in (
        ({"key": query.float()}, "float16 and bfloat16"),
        ({"value": query[:, :1]}, r"key and value must be \(B, HKV, T, D\)"),
        ({"key_lengths": torch.zeros(2, dtype=torch.int64)}, "too many, too few"),
        ({"key_mask": torch.zeros(1, 1)}, r"key_mask must be \(B, T\) bool"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"prefix_key": query[0]}, "a prefix has keys and values"),
        ({"prefix_key": query[0], "prefix_value": query[0, :1]}, r"a prefix must be \(HKV, P, D\)"),
        ({"sinks": torch.zeros(2, dtype=torch.float64)}, "sinks are float32 or in query's dtype"),
    ):
        with pytest.raises(RuntimeError, match=said):
            cuda.forward(call._replace(**bad))


def test_a_call_that_nobody_checked_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Straight from the op, and the long way: the same bits. What is wrong is said by the checks."""
    for name in ("one-query", "sinks", "softcap", "key-mask", "window", "key-lengths", "bank ids"):
        arguments = decoding(CASES[name]).arguments(torch.bfloat16)
        direct = _ops.at_once(Call(**arguments, scale=None), "cuda")  # pyrefly: ignore[bad-argument-type]
        assert (direct is None) is (name in ("key-lengths", "bank ids"))
        with monkeypatch.context() as patch:
            patch.setattr(_native_cuda, "loaded", set())
            expected = attend(arguments)
        assert all(map(torch.equal, attend(arguments), expected))
    with pytest.raises(ValueError, match="key must be"):
        attend(arguments | {"key": arguments["key"][..., :-8]})
    with pytest.raises(ValueError, match="must be given together"):
        attend(arguments | {"prefix_value": None, "prefix_ids": None})
    with pytest.raises(ValueError, match=r"prefix_ids must lie in -1..2"):
        attend(arguments | {"prefix_ids": torch.full((5,), 3)})


def test_compiles_whole_and_passes_opcheck() -> None:
    arguments = decoding(CASES["sinks"]).arguments(torch.bfloat16)

    def step(query: Tensor) -> Tensor:
        return prefix_attention(**arguments | {"query": query}, backend="cuda")

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(arguments["query"]), step(arguments["query"]))
    call = Call(**arguments, scale=0.125)
    found = torch.library.opcheck(torch.ops.prefix_attn.forward.default, (*call, "cuda"))
    assert set(found.values()) == {"SUCCESS"}


def test_packed_sequences_are_padded() -> None:
    query, key, value = (torch.randn(5, heads, 64).bfloat16() for heads in (4, 2, 2))
    prefix = torch.randn(2, 2, 3, 64).bfloat16()
    cu = torch.tensor([0, 2, 5])
    sizes = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 3, "max_seqlen_k": 3}
    results = [prefix_attention_varlen(query, key, value, *prefix, **sizes, backend=b) for b in ("cuda", "eager")]
    close(*results, HALF)


def test_sinks_in_half_precision_and_narrow_lengths() -> None:
    """float32 or the query's dtype, int32 or int64, contiguous or not."""
    arguments = Case(B=3, S=1, T=20, D=64, Dv=64, with_=("sinks", "key_lengths")).arguments(torch.bfloat16)
    sinks, lengths = arguments["sinks"].bfloat16(), arguments["key_lengths"]
    arguments["sinks"] = sinks.float()
    expected = attend(arguments)
    spread = torch.stack([lengths, lengths], -1)[:, 0]
    for got in (
        {"sinks": sinks},
        {"sinks": sinks.float(), "key_lengths": lengths.int()},
        {"sinks": sinks, "key_lengths": spread},
    ):
        close(attend(arguments | got), expected, FLOAT)
