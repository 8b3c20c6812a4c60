"""What only the Triton kernels have: several paths to one result, tile lists, dropout, 64-bit offsets, who launches.

Without a GPU they run in Triton's interpreter (see conftest.py), which knows no races and no limits of memory.
tests/test_gpu.py repeats the numerics on a device; compile_kernels.py compiles for devices that are not here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_attn import prefix_attention
from prefix_attn.backends.triton import launch, plan
from prefix_attn.backends.triton.primitives import _list_tiles
from prefix_attn.backends.triton.table import table, tile
from prefix_attn.call import Call
from tests import test_gpu
from tests.backends.test_numerics import compare
from tests.numerics import DRAWS, MODEL, Case, as_accurate, close

FEW_QUERIES = {
    "one": Case(B=3, S=1, T=50, P=21),
    "causal": Case(B=3, S=5, T=50, P=21),
    "S>T": Case(B=2, S=7, T=3, P=21),
    "multi-query": Case(B=2, Hq=8, Hkv=1, S=3, T=33, P=40, D=24, Dv=40, layout="bshd"),
    "window": Case(B=2, S=3, T=70, P=21, options={"window": 18}),
    "lengths": Case(B=5, S=2, T=70, P=21, with_=("key_lengths",)),
    "mask sinks": Case(B=3, S=2, T=70, P=5, with_=("key_mask", "sinks")),
    "bank": Case(B=7, N=3, S=3, T=20, P=37, with_=("prefix_ids", "prefix_lengths")),
    "bank with gaps": Case(B=3, N=40, S=2, T=4, P=18, with_=("prefix_ids", "prefix_lengths", "prefix_start")),
    "bank own entry": Case(B=4, N=4, S=2, T=20, P=37),
    "infix": Case(B=5, S=6, T=20, P=37, with_=("prefix_start", "key_lengths")),
    "no keys": Case(B=3, S=2, T=0, P=37),
    "softcap": Case(B=3, S=1, T=50, P=37, options={"softcap": 1.5}),
    "more rows than a tile": Case(B=2, Hq=24, Hkv=2, S=7, T=33, P=21, D=8, Dv=8),  # 84 in two chunks of up to 64
}


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("fold", [False, True], ids=["in the loop", "folded"])
@pytest.mark.parametrize("case", FEW_QUERIES.values(), ids=FEW_QUERIES)
def test_every_way_to_decode(case: Case, fold: bool, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = case.N > 1 and "prefix_ids" not in case.with_
    monkeypatch.setattr(plan, "folds", lambda call: fold and call.prefix_length() > 0 and not own)
    monkeypatch.setattr(plan, "processors", lambda device: splits * case.B * case.Hkv if splits > 1 else 1)
    monkeypatch.setattr(plan, "SPLIT_KEYS", 4)
    compare("triton", case.arguments(torch.float32))


@pytest.mark.parametrize("name", ["causal", "window", "lengths", "mask sinks", "bank", "infix", "S>T"])
def test_few_queries_without_the_decode_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_DECODE_QUERIES", 0)
    compare("triton", FEW_QUERIES[name].arguments(torch.float32))


@pytest.mark.parametrize(
    "options", [{}, {"window": 40}, {"window": 3, "is_causal": False}, {"is_causal": False}], ids=str
)
@pytest.mark.parametrize("with_", [(), ("key_lengths",), ("left_padding",), ("bias",)], ids=str)
def test_many_tiles(with_: tuple[str, ...], options: dict[str, Any]) -> None:
    """Lengths at which every loop of the kernels runs more than once: cut, whole and diagonal tiles."""
    compare(
        "triton",
        Case(B=2, Hq=2, Hkv=1, S=70, T=85, P=40, D=8, Dv=8, with_=with_, options=options).arguments(torch.float32),
    )


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("scale", [-0.7, 0.0, -1e-30])
@pytest.mark.parametrize("S", [1, 20])
def test_a_scale_of_any_sign(S: int, scale: float, options: dict[str, Any]) -> None:
    """The softmax multiplies by the scale after it has looked for the largest product, which needs a positive one."""
    case = Case(S=S, T=20, with_=("key_mask",), options={"scale": scale} | options)
    compare("triton", case.arguments(torch.float32))


def test_tiles_without_a_visible_key_are_not_visited() -> None:
    mask = torch.zeros(3, 70, dtype=torch.bool)
    mask[0, 33:35] = mask[0, 69] = True
    mask[1] = True
    for at_once in (2, 8):
        tiles, before = torch.full((3, 5), -1, dtype=torch.int32), torch.full((3, 6), -1, dtype=torch.int32)
        _list_tiles[(3,)](mask, tiles, before, 70, BLOCK_N=16, TILES=at_once)
        assert tiles.tolist() == [[2, 4, -1, -1, -1], [0, 1, 2, 3, 4], [-1] * 5]
        assert before.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 4, 5], [0] * 6]


def test_a_hole_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of tiles that the mask hides may hold anything: they are not even multiplied by zero."""
    arguments = Case(B=2, S=40, T=80, P=3).arguments(torch.float32)
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[:, 16:64] = False
    clean = prefix_attention(**arguments, key_mask=mask, backend="triton")
    arguments["value"][:, :, 16:64] = torch.nan
    arguments["key"][:, :, 16:64] = torch.nan
    assert torch.equal(prefix_attention(**arguments, key_mask=mask, backend="triton"), clean)


@pytest.mark.parametrize("is_causal", [True, False])
def test_dropout(is_causal: bool) -> None:
    """The mask that forward drew, read off with one-hot values, explains the output and every gradient."""
    P, T, S, p = 5, 27, 20, 0.4
    case = Case(B=2, Hq=4, Hkv=2, S=S, T=T, P=P, Dv=P + T, options={"is_causal": is_causal})
    arguments = case.arguments(torch.float32)
    columns = torch.eye(P + T)
    one_hot = {"prefix_value": columns[:P].expand(2, P, P + T), "value": columns[P:].expand(2, 2, T, P + T)}
    probabilities = prefix_attention(**arguments | one_hot, backend="eager")

    torch.manual_seed(3)
    dropped = prefix_attention(**arguments | one_hot, dropout_p=p, backend="triton")
    keep = dropped != 0
    torch.testing.assert_close(dropped, torch.where(keep, probabilities / (1 - p), 0.0))
    seen = probabilities > 1e-6
    close(float(keep[seen].float().mean()), 1 - p, DRAWS)
    assert keep[0].ne(keep[1])[seen[0] & seen[1]].any(), "rows of the batch share a mask"

    names = ("query", "key", "value", "prefix_key", "prefix_value")
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [arguments[n].detach().to(dtype).requires_grad_() for n in names]
        if dtype == torch.float32:
            torch.manual_seed(3)
            out = prefix_attention(*leaves, is_causal=is_causal, dropout_p=p, backend="triton")
        else:
            wide = [t.to(dtype) for t in one_hot.values()]
            shares = prefix_attention(*leaves[:2], wide[1], leaves[3], wide[0], is_causal=is_causal, backend="eager")
            values = torch.cat([leaves[4].expand(2, -1, -1, -1), leaves[2]], dim=2).repeat_interleave(2, dim=1)
            out = (shares * keep / (1 - p)) @ values
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    got, exact = ({n: t.double() for n, t in zip(("out", *names), result)} for result in results)
    close(got, exact, MODEL)


def test_dropout_follows_the_generator() -> None:
    arguments = Case().arguments(torch.float32) | {"dropout_p": 0.5, "backend": "triton"}
    torch.manual_seed(1)
    first, second = prefix_attention(**arguments), prefix_attention(**arguments)
    torch.manual_seed(1)
    assert torch.equal(prefix_attention(**arguments), first)
    assert not torch.equal(first, second)


def test_offsets_beyond_32_bits() -> None:
    """Index times stride passes 2**31 while both fit in 32 bits: an int32 product would wrap and read elsewhere.

    The storage is never touched but where the views lie, so its pages are never made.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        storage = torch.empty(3 * 2**30, dtype=torch.float16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    small = Case(B=3, Hq=2, Hkv=1, S=3, T=5, P=3, D=16, Dv=16).arguments(torch.float16)
    far = dict(small)
    place = 0
    for name, strides in {
        "query": (2**30, 64, 16),  # a batch stride that fits, times 2
        "key": (128, 64, 2**29),  # a row stride, times 4
        "value": (2**30, 64, 16),
        "prefix_key": (64, 2**30),
        "prefix_value": (64, 2**30),
    }.items():
        place += 4096
        far[name] = storage.as_strided(small[name].shape, (*strides, 1), place)
        far[name].copy_(small[name])
        assert max(s * (n - 1) for s, n in zip(far[name].stride(), far[name].shape)) >= 2**31
    results = []
    for arguments in (small, far):
        leaves = {
            n: arguments[n].detach().requires_grad_() for n in ("query", "key", "value", "prefix_key", "prefix_value")
        }
        for few in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plan, "MAX_DECODE_QUERIES", 16 if few else 0)
                out = prefix_attention(**leaves, backend="triton")
            results.append([out, *torch.autograd.grad(out.float().square().sum(), list(leaves.values()))])
    for near, away in zip(results[:2], results[2:]):
        assert all(torch.equal(x, y) for x, y in zip(near, away))


@pytest.mark.parametrize(
    ("asked", "kernels"),
    [
        (("prefix_key", "prefix_value"), {"_grad_prefix"}),
        (("query",), {"_grad_query"}),
        (("value",), {"_grad_sequence"}),
        (("query", "key", "prefix_value"), {"_grad_query", "_grad_sequence", "_grad_prefix"}),
    ],
)
def test_only_what_is_asked_is_launched(
    asked: tuple[str, ...], kernels: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = set()

    class Spy:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(launch, name)

        def __getitem__(self, grid: Any) -> Any:
            launched.add(self.name)
            return self.kernel[grid]

    arguments = Case().arguments(torch.float32)
    leaves = {n: arguments[n].requires_grad_() for n in asked}
    out = prefix_attention(**arguments | leaves, backend="triton")
    for name in ("_grad_query", "_grad_sequence", "_grad_prefix"):
        monkeypatch.setattr(launch, name, Spy(name))
    out.sum().backward()
    assert launched == kernels


def test_sinks_gradient_in_half_precision() -> None:
    """It is a sum over every query; from an output rounded to bfloat16 it would lose its last digits."""
    arguments = Case(B=4, S=40, T=40, with_=("sinks",)).arguments(torch.bfloat16)
    grads: list[Tensor] = []
    for backend, cast in (("triton", None), ("eager", torch.float64), ("eager", None)):
        leaves = {n: t.to(cast) if cast else t for n, t in arguments.items()}
        leaf = leaves["sinks"].detach().requires_grad_()
        prefix_attention(**leaves | {"sinks": leaf}, backend=backend).float().square().sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    as_accurate("sinks", grads[0], grads[1], [grads[2]])


def test_the_table_is_complete() -> None:
    """Every architecture has a tile for every kernel, precision, head size and kind of call."""
    kernels = {"forward", "grad_query", "grad_sequence", "grad_prefix", "split_keys", "fold_prefix"}
    names = {f"{d}/{s}{plus}" for d in ("half", "float") for s in (64, 128, 256) for plus in ("", "+")}
    assert set(table()) == {"interpreter", "sm_80", "sm_90", "sm_100", "gfx942"}
    for arch, column in table().items():
        assert column["fold_bytes"] > 0
        assert {k for k, v in column.items() if isinstance(v, dict)} == kernels, arch
        for kernel in kernels:
            assert {name for name in column[kernel] if not name.endswith("*")} == names, (arch, kernel)
            assert all(len(tile) == 4 and min(tile) > 0 for tile in column[kernel].values())


def test_float32_is_exact_unless_torch_allows_tf32() -> None:
    arguments = Case().arguments(torch.float32)
    call = Call(*(arguments[n] for n in ("query", "key", "value", "prefix_key", "prefix_value")))
    assert plan.options(call, "forward")["PRECISION"] == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert plan.options(call, "forward")["PRECISION"] == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_options_that_take_registers_run_with_tiles_of_their_own() -> None:
    arguments = Case().arguments(torch.float32)
    plain = Call(*(arguments[n] for n in ("query", "key", "value", "prefix_key", "prefix_value")))
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "constants", lambda *key: asked.append(key) or {})
        plan.options(plain, "forward")
        for options in (
            {"window": 3},
            {"key_mask": torch.ones(2, 17, dtype=torch.bool)},
            {"window": 3, "prefix_start": torch.zeros(2, dtype=torch.int64)},
            {"softcap": 2.0},
        ):
            plan.options(plain._replace(**options), "grad_query")
    assert asked == [
        ("interpreter", "forward", torch.float32, 16, 16, "", "ieee"),
        *(("interpreter", "grad_query", torch.float32, 16, 16, kind, "ieee") for kind in ("*", "*", "+", "+")),
    ]


def test_a_padded_training_runs_with_the_tiles_of_a_plain_one() -> None:
    """Up to D = 128, where that does not spill. Where there is no entry for one option, that for any serves."""
    for kernel in ("forward", "grad_query", "grad_sequence", "grad_prefix"):
        for dtype, size in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)):
            plain, one = (tile("sm_90", kernel, dtype, size, kind) for kind in ("", "*"))
            assert plain == one, (kernel, dtype, size)
        assert tile("sm_90", kernel, torch.bfloat16, 256, "*") == tile("sm_90", kernel, torch.bfloat16, 256, "+")


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**40])
def test_a_window_beyond_32_bits_hides_nothing(window: int) -> None:
    compare("triton", Case(S=9, T=9, P=5).arguments(torch.float32) | {"window": window})


def test_ids_beyond_32_bits_are_no_entry() -> None:
    arguments = Case(B=2, N=3, S=9, T=9, P=5, with_=("prefix_ids",)).arguments(torch.float32)
    call = Call(*(arguments[n] for n in ("query", "key", "value", "prefix_key", "prefix_value")))
    for some in (call, call._replace(query=call.query[:, :, :1])):  # training, and decoding with a folded prefix
        far, none = (some._replace(prefix_ids=torch.tensor(ids)) for ids in ([2**32 + 1, 2**33], [-1, -1]))
        assert all(torch.equal(a, b) for a, b in zip(launch.forward(far), launch.forward(none)))


def test_packed_lengths_that_lie_touch_nothing_else() -> None:
    """Tokens of no sequence: zeros and -inf. Lengths past the end, as a graph may replay: no other memory."""
    query, prefix = torch.randn(1, 2, 10, 8), torch.randn(2, 4, 8)
    call = Call(query, query, query, prefix, prefix, sinks=torch.zeros(2), max_seqlen_q=16, max_seqlen_k=16)
    for ends in ([0, 3, 7], [0, 16, 12], [-5, 4, 2**31 - 1]):
        cu = torch.tensor(ends)
        lying = call._replace(cu_seqlens_q=cu, cu_seqlens_k=cu)
        out, lse = launch.forward(lying)
        grads = launch.backward(lying, out, lse, torch.ones_like(out), None, [True] * 6 + [False])
        assert not any(t.isnan().any() for t in (out, lse, *grads[:6]))
        if ends == [0, 3, 7]:
            assert torch.equal(lse[..., 7:], torch.full((1, 2, 3), -torch.inf))
            assert torch.equal(out[:, :, 7:], torch.zeros(1, 2, 3, 8))


@pytest.mark.parametrize("name", ["plain-f32", "key-mask-bf16", "many elements"])
def test_the_checks_of_a_device_pass_in_the_interpreter(name: str) -> None:
    """Their own logic, on tiny sizes: a check that cannot run shows nothing where it is wanted."""
    _, _, wrong = test_gpu.outcome(name, "cpu")
    assert wrong == ""
