"""The public functions: every argument error by table, varlen against one call per sequence, the gate, explain."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prefix_attn import dispatch, explain, prefix_attention, prefix_attention_varlen
from tests.numerics import DOUBLE, Case, close

PLAIN = Case(B=2, Hq=4, Hkv=2, S=3, T=5, P=2, D=8, Dv=8)
BANK = Case(B=2, Hq=4, Hkv=2, S=3, T=5, P=2, D=8, Dv=8, N=3)
IDS = {"prefix_ids": torch.tensor([0, 1])}
r = torch.randn


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


# name: (case, arguments that replace the good ones, exception, what the message must say)
ERRORS: dict[str, tuple[Case, dict[str, Any], type[Exception], str]] = {
    "query is no tensor": (PLAIN, {"query": 3}, TypeError, "query must be a tensor, got int"),
    "query dim": (PLAIN, {"query": r(2, 3, 8)}, ValueError, r"query must be \(B, Hq, S, D\) .* got \(2, 3, 8\)"),
    "query dtype": (
        PLAIN,
        {"query": r(2, 4, 3, 8).long()},
        TypeError,
        "query must be torch.float16 or .* got torch.int64",
    ),
    "key batch": (
        PLAIN,
        {"key": r(3, 2, 5, 8)},
        ValueError,
        r"key must be \(B, Hkv, T, D\) = \(2, \*, \*, 8\), got \(3",
    ),
    "key head size": (PLAIN, {"key": r(2, 2, 5, 7)}, ValueError, r"key must be .* got \(2, 2, 5, 7\)"),
    "key dtype": (PLAIN, {"key": r(2, 2, 5, 8).half()}, TypeError, "key must be torch.float32, got torch.float16"),
    "key heads": (
        PLAIN,
        {"key": r(2, 3, 5, 8), "value": r(2, 3, 5, 8), "prefix_key": None, "prefix_value": None},
        ValueError,
        "multiple of key heads, got Hq = 4, Hkv = 3",
    ),
    "no key heads": (
        PLAIN,
        {"key": r(2, 0, 5, 8), "value": r(2, 0, 5, 8), "prefix_key": None, "prefix_value": None},
        ValueError,
        "multiple of key heads, got Hq = 4, Hkv = 0",
    ),
    "value length": (PLAIN, {"value": r(2, 2, 6, 8)}, ValueError, r"value must be \(B, Hkv, T, Dv\) = \(2, 2, 5, \*\)"),
    "value dtype": (PLAIN, {"value": r(2, 2, 5, 8).double()}, TypeError, "value must be torch.float32"),
    "head size 0": (
        PLAIN,
        {"query": r(2, 4, 3, 0), "key": r(2, 2, 5, 0), "prefix_key": r(2, 2, 0)},
        ValueError,
        "head size D must lie in 1..256, got 0",
    ),
    "head size 257": (
        PLAIN,
        {"value": r(2, 2, 5, 257), "prefix_value": r(2, 2, 257)},
        ValueError,
        "head size Dv must lie in 1..256, got 257",
    ),
    "strided rows": (PLAIN, {"query": r(2, 4, 8, 3).mT}, ValueError, "query's last dimension must be contiguous"),
    "prefix_key alone": (
        PLAIN,
        {"prefix_value": None},
        ValueError,
        "prefix_key and prefix_value must be given together",
    ),
    "prefix_key heads": (
        PLAIN,
        {"prefix_key": r(4, 2, 8)},
        ValueError,
        r"prefix_key must be \(Hkv, P, D\) = \(2, \*, 8\)",
    ),
    "prefix_key dim": (PLAIN, {"prefix_key": r(2, 8)}, ValueError, "prefix_key must be"),
    "prefix_key dtype": (PLAIN, {"prefix_key": r(2, 2, 8).half()}, TypeError, "prefix_key must be torch.float32"),
    "prefix_value length": (PLAIN, {"prefix_value": r(2, 3, 8)}, ValueError, r"prefix_value must be .* = \(2, 2, 8\)"),
    "prefix_ids without bank": (PLAIN, IDS, ValueError, "prefix_ids needs a bank"),
    "prefix_lengths without bank": (PLAIN, {"prefix_lengths": ints(1)}, ValueError, "prefix_lengths needs a bank"),
    "bank without ids": (BANK, {}, ValueError, "prefix_ids is needed for a bank of N = 3 entries and a batch of B = 2"),
    "prefix_ids shape": (BANK, {"prefix_ids": ints(0)}, ValueError, r"prefix_ids must be \(B\) = \(2\), got \(1,\)"),
    "prefix_ids dtype": (BANK, {"prefix_ids": r(2)}, TypeError, "prefix_ids must be torch.int32 or torch.int64"),
    "prefix_ids range": (BANK, {"prefix_ids": ints(0, 3)}, ValueError, r"prefix_ids must lie in -1..2, got \[0, 3\]"),
    "prefix_lengths shape": (
        BANK,
        IDS | {"prefix_lengths": ints(1)},
        ValueError,
        r"prefix_lengths must be \(N\) = \(3\)",
    ),
    "prefix_lengths range": (
        BANK,
        IDS | {"prefix_lengths": ints(1, 3, 0)},
        ValueError,
        r"prefix_lengths must lie in 0..2, got \[1, 3, 0\]",
    ),
    "prefix_start shape": (PLAIN, {"prefix_start": ints(1)}, ValueError, r"prefix_start must be \(B\) = \(2\)"),
    "prefix_start dtype": (PLAIN, {"prefix_start": r(2)}, TypeError, "prefix_start must be torch.int32"),
    "prefix_gate shape": (PLAIN, {"prefix_gate": r(2)}, ValueError, r"prefix_gate must be \(Hq\) = \(4\), got \(2,\)"),
    "prefix_gate dtype": (PLAIN, {"prefix_gate": r(4).half()}, TypeError, "prefix_gate must be torch.float32"),
    "prefix_gate type": (PLAIN, {"prefix_gate": 0.5}, TypeError, "prefix_gate must be a tensor, got float"),
    "key_lengths shape": (PLAIN, {"key_lengths": ints(1, 1, 1)}, ValueError, r"key_lengths must be \(B\) = \(2\)"),
    "key_lengths range": (
        PLAIN,
        {"key_lengths": ints(6, 1)},
        ValueError,
        r"key_lengths must lie in 0..5, got \[6, 1\]",
    ),
    "key_mask shape": (PLAIN, {"key_mask": r(2, 4) > 0}, ValueError, r"key_mask must be \(B, T\) = \(2, 5\)"),
    "key_mask dtype": (PLAIN, {"key_mask": r(2, 5)}, TypeError, "key_mask must be torch.bool, got torch.float32"),
    "is_causal": (PLAIN, {"is_causal": 1}, TypeError, "is_causal must be a bool, got int"),
    "window type": (PLAIN, {"window": 2.0}, TypeError, "window must be an int or None, got float"),
    "window range": (PLAIN, {"window": 0}, ValueError, "window must be at least 1, got 0"),
    "scale type": (PLAIN, {"scale": "1"}, TypeError, "scale must be a number, got str"),
    "scale range": (PLAIN, {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "softcap": (PLAIN, {"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
    "softcap type": (PLAIN, {"softcap": True}, TypeError, "softcap must be a number, got bool"),
    "sinks shape": (PLAIN, {"sinks": r(2)}, ValueError, r"sinks must be \(Hq\) = \(4\)"),
    "sinks dtype": (PLAIN, {"sinks": r(4).double()}, TypeError, "sinks must be torch.float32"),
    "bias batch": (
        PLAIN,
        {"bias": r(3, 4, 3, 5)},
        ValueError,
        r"bias must be \(B, Hq, S, T\) = \(2, 4, 3, 5\), got \(3",
    ),
    "bias heads": (PLAIN, {"bias": r(1, 1, 3, 5)}, ValueError, r"bias must be \(1, Hq, S, T\) = \(1, 4, 3, 5\)"),
    "bias dtype": (PLAIN, {"bias": r(1, 4, 3, 5).half()}, TypeError, "bias must be torch.float32"),
    "dropout range": (PLAIN, {"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
    "dropout type": (PLAIN, {"dropout_p": "0"}, TypeError, "dropout_p must be a number, got str"),
    "device": (PLAIN, {"key": torch.empty(2, 2, 5, 8, device="meta")}, ValueError, "key must be on query's device cpu"),
    "backend name": (PLAIN, {"backend": "flash"}, ValueError, "backend must be 'auto' or one of .* got 'flash'"),
    "backend without a device": (
        PLAIN,
        {"backend": "cuda"},
        NotImplementedError,
        "backend='cuda' cannot run this call: tensors are on cpu; the kernel needs a GPU",
    ),
    "backend limits": (
        PLAIN,
        {"backend": "composed", "softcap": 1.0, "dropout_p": 0.5},
        NotImplementedError,
        "backend='composed' cannot run this call: .*softcap; .*dropout",
    ),
}


@pytest.mark.parametrize(("case", "bad", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_error_messages(case: Case, bad: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = case.arguments(torch.float32) | bad
    with pytest.raises(error, match=message):
        prefix_attention(**arguments)


def test_unknown_argument_is_not_swallowed() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        explain(**PLAIN.arguments(torch.float32), causal=True)


PACKED: dict[str, Any] = {
    "query": r(5, 4, 8),
    "key": r(6, 2, 8),
    "value": r(6, 2, 8),
    "prefix_key": r(2, 2, 8),
    "prefix_value": r(2, 2, 8),
    "cu_seqlens_q": ints(0, 2, 5),
    "cu_seqlens_k": ints(0, 2, 6),
    "max_seqlen_q": 3,
    "max_seqlen_k": 4,
}
VARLEN_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query dim": ({"query": r(1, 5, 4, 8)}, ValueError, r"query must be \(Nq, heads, D\), got \(1, 5, 4, 8\)"),
    "cu_seqlens type": ({"cu_seqlens_q": [0, 5]}, TypeError, "query and cu_seqlens_q must be tensors"),
    "cu_seqlens dtype": ({"cu_seqlens_k": r(3)}, TypeError, "cu_seqlens_k must be torch.int32 or torch.int64"),
    "cu_seqlens dim": (
        {"cu_seqlens_q": ints(0, 5)[None]},
        ValueError,
        r"cu_seqlens_q must be \(B \+ 1\,\), got \(1, 2\)",
    ),
    "cu_seqlens batch": (
        {"cu_seqlens_k": ints(0, 6), "max_seqlen_k": 6},
        ValueError,
        r"cu_seqlens_k must be \(B \+ 1,\) = \(3,\), got \(2,\)",
    ),
    "cu_seqlens start": ({"cu_seqlens_q": ints(1, 2, 5)}, ValueError, "first of cu_seqlens_q must lie in 0..0"),
    "cu_seqlens end": ({"cu_seqlens_q": ints(0, 2, 4)}, ValueError, "last of cu_seqlens_q must lie in 5..5, got"),
    "cu_seqlens order": ({"cu_seqlens_k": ints(0, 8, 6)}, ValueError, "lengths in cu_seqlens_k must lie in 0..4"),
    "max_seqlen": ({"max_seqlen_k": 3}, ValueError, r"lengths in cu_seqlens_k must lie in 0..3, got \[2, 4\]"),
    "max_seqlen type": ({"max_seqlen_q": 3.0}, TypeError, "max_seqlen_q must be an int, got float"),
    "prefix_start": ({"prefix_start": ints(0)}, ValueError, r"prefix_start must be \(B\) = \(2\)"),
}


@pytest.mark.parametrize(("bad", "error", "message"), VARLEN_ERRORS.values(), ids=VARLEN_ERRORS)
def test_varlen_error_messages(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prefix_attention_varlen(**PACKED | bad)


VARLEN = {
    "plain": {},
    "full": {"is_causal": False},
    "window": {"window": 2},
    "infix": {"prefix_start": ints(1, 0, 3, 2)},
    "sinks gate": {"sinks": r(4), "prefix_gate": r(4)},
}


@pytest.mark.parametrize("backend", ["eager", "composed", "cpu", "triton"])
@pytest.mark.parametrize("options", VARLEN.values(), ids=VARLEN)
def test_varlen_equals_one_call_per_sequence(options: dict[str, Any], backend: str) -> None:
    """Lengths of queries and keys differ, one sequence has no query and one no key; gradients too."""
    queries, keys = [2, 0, 5, 3], [4, 3, 5, 0]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (queries, keys))
    tensors = [r(10, 4, 8), r(12, 2, 8), r(12, 2, 8), r(2, 3, 8), r(2, 3, 8)]
    packed, single = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    out, lse = prefix_attention_varlen(
        *packed,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=5,
        max_seqlen_k=6,
        return_lse=True,
        backend=backend,
        **options,
    )
    expected, expected_lse = [], []
    for b in range(4):
        own = dict(options)
        if "prefix_start" in own:
            own["prefix_start"] = own["prefix_start"][b : b + 1]
        q = single[0][cu_q[b] : cu_q[b + 1]].transpose(0, 1)[None]
        k, v = (t[cu_k[b] : cu_k[b + 1]].transpose(0, 1)[None] for t in single[1:3])
        part, part_lse = prefix_attention(q, k, v, *single[3:], return_lse=True, backend=backend, **own)
        expected.append(part[0].transpose(0, 1))
        expected_lse.append(part_lse[0])
    torch.testing.assert_close(out, torch.cat(expected))
    torch.testing.assert_close(lse, torch.cat(expected_lse, dim=-1))
    upstream = r(out.shape)
    got = torch.autograd.grad((out * upstream).sum(), packed)
    torch.testing.assert_close(got, torch.autograd.grad((torch.cat(expected) * upstream).sum(), single))


def test_gate_of_each_row() -> None:
    """One call per row, with that row's gate, gives the same; its gradient too."""
    arguments, gate = Case(B=3).arguments(torch.float64), r(3, 4).double().requires_grad_()
    rows = ("query", "key", "value")
    out = prefix_attention(**arguments, prefix_gate=gate)
    parts = [
        prefix_attention(**arguments | {n: arguments[n][b : b + 1] for n in rows}, prefix_gate=gate[b])
        for b in range(3)
    ]
    close(out, torch.cat(parts), DOUBLE)
    upstream = r(out.shape)
    grads = (torch.autograd.grad((o * upstream).sum(), gate)[0] for o in (out, torch.cat(parts)))
    close(*grads, DOUBLE)
    with pytest.raises(ValueError, match=r"prefix_gate must be \(B, Hq\) = \(3, 4\), got \(2, 4\)"):
        prefix_attention(**arguments, prefix_gate=r(2, 4).double())


def test_varlen_without_tokens() -> None:
    empty = {"query": r(0, 4, 8), "key": r(0, 2, 8), "value": r(0, 2, 8), "cu_seqlens_q": ints(0, 0, 0)}
    out, lse = prefix_attention_varlen(**PACKED | empty | {"cu_seqlens_k": ints(0, 0, 0)}, return_lse=True)
    assert out.shape == (0, 4, 8)
    assert lse.shape == (4, 0)


def test_explain_says_who_and_why() -> None:
    said = explain(**PLAIN.arguments(torch.float32), softcap=2.0)
    assert said.backend == "cpu"  # torch's kernels cannot run it, on any processor
    assert said.refused["composed"] == ("torch's flash attention has no softcap",)
    assert "cuda: tensors are on cpu; the kernel needs a GPU" in str(said)
    assert explain(**PLAIN.arguments(torch.float64)).backend == "composed"
    assert explain(**PLAIN.arguments(torch.float64), softcap=2.0).backend == "eager"


def test_dropout_drops_the_prefix_too_and_keeps_the_mean() -> None:
    arguments = Case(B=1, Hq=1, Hkv=1, S=1, T=0, P=4, D=8, Dv=8).arguments(torch.float64)
    expected, lse = prefix_attention(**arguments, return_lse=True)
    draws = [prefix_attention(**arguments, dropout_p=0.5, return_lse=True) for _ in range(2000)]
    assert torch.equal(draws[0][1], lse)
    outs = torch.stack([out for out, _ in draws])
    assert outs.std(0).min() > 0.05
    standard_error = outs.std(0) / len(draws) ** 0.5
    assert ((outs.mean(0) - expected).abs() < 5 * standard_error).all()


def test_autocast_casts_the_sequence_and_keeps_the_prefix() -> None:
    """Models hand over mixed dtypes under autocast; torch's own attention then computes in autocast's."""
    arguments = PLAIN.arguments(torch.float32)
    arguments["value"] = arguments["value"].bfloat16()
    leaf = arguments["prefix_key"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = prefix_attention(**arguments)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32
    half = {n: a.bfloat16() if n in ("query", "key", "value") else a for n, a in arguments.items()}
    assert torch.equal(out, prefix_attention(**half))


def argument(function: Callable[..., Any], name: str) -> str:
    """What the docstring says about one argument."""
    found = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", inspect.getdoc(function) or "", re.MULTILINE)
    assert found is not None, name
    return found[1]


def test_docstrings_name_the_backends() -> None:
    assert set(re.findall(r'"(\w+)"', argument(prefix_attention, "backend"))) == {"auto", *dispatch.BY_NAME}
    said = argument(prefix_attention_varlen, "backend")
    packed = {name for name, module in dispatch.BY_NAME.items() if module.PACKED}
    assert {name for name in dispatch.BY_NAME if re.search(rf"\b{name}\b", said)} == packed


@pytest.mark.parametrize("number", [np.int64(3), np.int32(3), torch.tensor(3)], ids=["int64", "int32", "tensor"])
def test_integers_of_other_libraries(number: Any) -> None:
    query, prefix, cu = torch.randn(2, 4, 5, 16), torch.randn(4, 3, 16), torch.tensor([0, 2, 5])
    got = prefix_attention(query, query, query, prefix, prefix, window=number)
    assert torch.equal(got, prefix_attention(query, query, query, prefix, prefix, window=3))
    packed = query[0].transpose(0, 1)
    call = partial(prefix_attention_varlen, packed, packed, packed, prefix, prefix, cu_seqlens_q=cu, cu_seqlens_k=cu)
    got = call(max_seqlen_q=number, max_seqlen_k=number)
    assert torch.equal(got, call(max_seqlen_q=3, max_seqlen_k=3))


@pytest.mark.parametrize("make", [np.float32, Fraction, torch.tensor], ids=["float32", "fraction", "tensor"])
def test_numbers_of_other_libraries(make: Callable[[float], Any]) -> None:
    query, prefix = torch.randn(2, 4, 5, 16), torch.randn(4, 3, 16)
    for name in ("scale", "softcap"):
        got = prefix_attention(query, query, query, prefix, prefix, **{name: make(0.5)})
        assert torch.equal(got, prefix_attention(query, query, query, prefix, prefix, **{name: 0.5}))
    dropped = []
    for p in (make(0.5), 0.5):
        torch.manual_seed(0)
        dropped.append(prefix_attention(query, query, query, prefix, prefix, dropout_p=p, backend="eager"))
    assert torch.equal(*dropped)
    with pytest.raises(TypeError, match="scale must be a number, got Tensor"):  # there is no gradient of it
        prefix_attention(query, query, query, prefix, prefix, scale=torch.tensor(0.5, requires_grad=True))
