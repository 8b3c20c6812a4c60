"""The short way to the kernels of ``cpu``, which no check and no dispatcher sees first, gives what the long way gives.

It keeps nothing between calls. These tests would also find a plan that is kept, and stale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from prefix_attn import _ops, prefix_attention
from prefix_attn.backends import cpu
from tests.numerics import Case

pytestmark = pytest.mark.skipif(cpu.slow() is not None, reason="needs the kernels of a processor with AVX2")
Arguments = dict[str, Any]
CASES = (
    Case(S=1, T=8),
    Case(S=3, T=5, layout="bshd", with_=("sinks", "key_mask")),
    Case(B=3, N=3, S=2, T=9, P=7, with_=("prefix_ids", "prefix_lengths", "prefix_start")),
    Case(B=4, S=6, T=11, D=24, Dv=8, with_=("key_lengths",), options={"window": 3}),
    Case(Hq=3, Hkv=3, S=1, T=3, with_=("no_prefix",), options={"softcap": 2.0, "is_causal": False}),
    Case(B=1, Hq=2, S=1, T=3, P=1024),
    Case(P=0, T=0, S=2, options={"scale": 0.5}),
)


def outcome(arguments: Arguments) -> Any:
    """What the caller sees, to the bit: results, or an error and its words."""
    try:
        results = prefix_attention(**arguments, return_lse=True)
    except Exception as error:
        return type(error), str(error)
    seen = []
    for t in results:
        bits = t.detach().flatten().contiguous().view(torch.uint8).tolist() if t.device.type == "cpu" else None
        seen.append((type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad, bits))
    return seen


def the_long_way(arguments: Arguments) -> Any:
    with mock.patch.object(_ops, "at_once", return_value=None):
        return outcome(arguments)


def offset(t: Tensor) -> Tensor:
    """The same values in the middle of a larger tensor, with gaps between rows."""
    larger = t.new_zeros([n + 3 for n in t.shape])
    return larger[tuple(slice(1, n + 1) for n in t.shape)].copy_(t)


def every_other(t: Tensor) -> Tensor:
    """The same values, every second one of a larger tensor's last dimension."""
    return t.repeat_interleave(2, dim=-1)[..., ::2]


def of_other_type(t: Tensor) -> Tensor:
    return t.to({torch.int64: torch.int32, torch.float32: torch.bfloat16, torch.bool: torch.uint8}[t.dtype])


class Subclass(Tensor):
    pass


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "offset": offset,
    "every other": every_other,
    "expanded": lambda t: t[:1].expand_as(t),
    "reversed heads": lambda t: t.transpose(0, 1) if t.dim() > 1 else t.flip(0),
    "longer": lambda t: torch.cat([t, t], dim=-2 if t.dim() > 1 else 0),
    "shorter": lambda t: t.narrow(-2 if t.dim() > 1 else 0, 0, t.shape[-2 if t.dim() > 1 else 0] // 2),
    "narrower": lambda t: t[..., :-1],
    "one more dimension": lambda t: t[None],
    "one dimension less": lambda t: t[0] if t.shape[0] else t,
    "empty": lambda t: t[:0],
    "other type": of_other_type,
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "larger": lambda t: t + 1 if t.dtype != torch.bool else ~t,
    "smaller": lambda t: t - 2 if t.dtype != torch.bool else t,
    "huge": lambda t: t + 2**30 if t.dtype != torch.bool else t,
    "requires grad": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "parameter": lambda t: torch.nn.Parameter(t.clone(), requires_grad=False),
    "subclass": lambda t: t.as_subclass(Subclass),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "negated lazily": lambda t: torch._neg_view(t) if t.is_floating_point() else t,
    "none": lambda t: None,
    "a list": lambda t: t.tolist(),
    "an array": lambda t: t.numpy() if t.dtype != torch.bfloat16 else t,
}
OPTIONS: dict[str, list[Any]] = {
    "is_causal": [True, False, 1, None, "yes", np.True_],
    "window": [None, 1, 4, 2**63 - 1, 2**63, 0, -1, True, 2.0, np.int64(3), torch.tensor(2)],
    "scale": [
        None,
        0.25,
        0.0,
        1,
        True,
        -1.0,
        float("inf"),
        float("nan"),
        1e300,
        "1",
        np.float32(0.5),
        torch.tensor(0.5),
    ],
    "softcap": [None, 3.0, 3, True, 0.0, -1.0, float("inf"), float("nan"), np.float64(2.0)],
    "dropout_p": [0.0, 0, False, None, 1.0, -0.5, float("nan"), "0"],
    "backend": ["auto", "cpu", "eager", "composed", "cuda", "gpu", None],
    "prefix_gate": [None, torch.zeros(4), 1.0],
    "bias": [None, torch.zeros(1, 4, 1, 8), 1.0],
}


@contextlib.contextmanager
def surroundings(grad: bool, autocast: bool, inference: bool, threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast), torch.inference_mode(inference):
            yield
    finally:
        torch.set_num_threads(before)


def change(draw: Callable[[Any], Any], arguments: Arguments) -> Arguments:
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(OPTIONS)))
        return arguments | {name: draw(st.sampled_from(OPTIONS[name]))}
    name = draw(st.sampled_from([name for name, a in arguments.items() if isinstance(a, Tensor)]))
    with contextlib.suppress(
        RuntimeError, IndexError, KeyError, TypeError
    ):  # not every change is possible of every one
        return arguments | {name: CHANGES[draw(st.sampled_from(sorted(CHANGES)))](arguments[name])}
    return arguments


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_equals_the_long_way_whatever_changes(data: st.DataObject) -> None:
    """One call, then others that differ in a thing or more: values or errors, memory order, and gradients."""
    draw = data.draw
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    arguments = draw(st.sampled_from(CASES)).arguments(dtype) | {"backend": draw(st.sampled_from(("auto", "cpu")))}
    assert outcome(arguments) == the_long_way(arguments)
    for _ in range(3):
        arguments = change(draw, arguments)
        flags = [draw(st.integers(0, 4)) == 0 for _ in range(3)]
        with surroundings(not flags[0], flags[1], flags[2], draw(st.sampled_from((1, 2)))):
            assert outcome(arguments) == the_long_way(arguments)


def taken(call: Callable[[], Any]) -> bool:
    """Whether ``call`` went the short way."""
    ways = []
    with mock.patch.object(_ops, "at_once", lambda *a, way=_ops.at_once: ways.append(way(*a)) or ways[-1]):
        call()
    return ways != [] and all(way is not None for way in ways)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.with_ + tuple(case.options)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_who_goes_the_short_way(case: Case, dtype: torch.dtype) -> None:
    """Any call that the kernels can run; else the tests above would compare the long way with itself."""
    arguments = case.arguments(dtype) | {"backend": "cpu"}
    arguments = {n: offset(a) if isinstance(a, Tensor) else a for n, a in arguments.items()}
    assert taken(lambda: prefix_attention(**arguments))
    integers = {n: of_other_type(a) for n, a in arguments.items() if isinstance(a, Tensor) and a.dtype == torch.int64}
    assert taken(lambda: prefix_attention(**arguments | integers))
    with torch.no_grad():
        assert taken(lambda: prefix_attention(**arguments | {"query": arguments["query"].clone().requires_grad_()}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    """Notes the ops that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace says that it is deprecated, and that sizes are constants
def test_what_must_see_the_op_sees_it() -> None:
    query, prefix = torch.randn(2, 4, 5, 16), torch.randn(4, 3, 16)

    def call(query: Tensor, prefix: Tensor) -> Tensor:
        out = prefix_attention(query, query, query, prefix, prefix, backend="cpu")
        assert isinstance(out, Tensor)
        return out

    expected = call(query, prefix)
    with Dispatches() as mode:
        call(query, prefix)
    assert "prefix_attn.forward.default" in mode.seen
    with Functions():
        torch.testing.assert_close(call(query, prefix), expected)
    for needs_grad, names in ((False, {"forward"}), (True, {"forward", "backward"})):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = call(query, prefix.clone().requires_grad_(needs_grad)).sum()
            out.backward() if needs_grad else None
        assert {f"prefix_attn::{name}" for name in names} <= {event.key for event in profile.key_averages()}
    for options in ({}, {"tracing_mode": "symbolic"}, {"tracing_mode": "fake"}, {"pre_dispatch": True}):
        graph = make_fx(call, **options)(query, prefix)
        assert "prefix_attn.forward" in graph.code, options
        torch.testing.assert_close(graph(query, prefix), expected)
    assert "prefix_attn::forward" in str(torch.jit.trace(call, (query, prefix)).graph)
    assert not taken(lambda: torch.vmap(call, in_dims=(None, 0))(query, torch.stack([prefix, prefix])))
    assert not taken(lambda: torch.compile(call, backend="eager")(query, prefix))
    assert not taken(lambda: call(query, prefix.clone().requires_grad_()))
    with torch.autocast("cpu"):
        assert not taken(lambda: call(query, prefix))


def test_values_are_read_anew() -> None:
    """The same tensors, given other values, other memory or another shape between two calls."""
    arguments = Case(B=3, N=3, S=1, T=8, with_=("prefix_ids", "key_lengths")).arguments(torch.float32)
    arguments["backend"] = "cpu"
    outcomes = []
    for edit in (
        lambda: None,
        lambda: arguments["prefix_ids"].copy_(torch.tensor([2, -1, 0])),
        lambda: arguments["key_lengths"].fill_(5),
        lambda: arguments["query"].mul_(2),
        lambda: arguments["prefix_key"].set_(torch.randn(3, 2, 5, 16)),
        lambda: [arguments[n].resize_(3, 2, 6, 16) for n in ("key", "value")],
        lambda: arguments["prefix_ids"].fill_(3),
        lambda: arguments["prefix_ids"].fill_(1),
        lambda: arguments["query"].resize_(3, 4, 2, 16).normal_(),
    ):
        edit()
        outcomes.append(outcome(arguments))
        assert outcomes[-1] == the_long_way(arguments)
    assert outcomes[6][0] is ValueError
    assert len({str(one) for one in outcomes}) == len(outcomes)


def test_no_memory_is_kept_where_the_kernels_refuse() -> None:
    """A tensor that is left on the op's stack leaks."""
    key = torch.randn(1, 2, 8, 16)
    before = key._use_count()
    for _ in range(5):
        with pytest.raises(ValueError, match="key must be"):
            prefix_attention(torch.randn(1, 4, 1, 8), key, key, None, None, backend="cpu")
    assert key._use_count() == before
