"""The registered ops: opcheck, torch.compile, torch.export, fake tensors, and a call through the raw op."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from prefix_attn import PrefixAttentionFunction, prefix_attention
from prefix_attn._ops import attend
from prefix_attn.call import Call
from prefix_attn.functional import _call
from tests.numerics import Case

OPS = {
    "plain": Case(S=5, T=5),
    "sinks and a mask": Case(S=3, T=5, with_=("sinks", "key_mask")),
    "bank": Case(B=3, N=3, S=5, T=5, with_=("prefix_ids", "prefix_lengths", "prefix_start")),
    "no prefix": Case(S=5, T=5, with_=("no_prefix",)),
}
NEEDS = list(product((False, True), repeat=3))


def op_arguments(case: Case, needs: tuple[bool, bool, bool], backend: str = "composed") -> tuple[Any, ...]:
    arguments = case.arguments(torch.float32)
    groups = (("query",), ("key", "value"), ("prefix_key", "prefix_value", "sinks"))
    for names, needed in zip(groups, needs):
        for name in names:
            if isinstance(arguments.get(name), Tensor):
                arguments[name].requires_grad_(needed)
    return (*_call(**{n: arguments.get(n) for n in Call._fields} | _defaults(arguments)), backend)


def _defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: arguments.get(n, default) for n, default in (("is_causal", True), ("dropout_p", 0.0))}


@pytest.mark.parametrize("needs", NEEDS, ids=["".join("qsp"[i] for i in range(3) if n[i]) or "none" for n in NEEDS])
@pytest.mark.parametrize("case", OPS.values(), ids=OPS)
def test_opcheck_forward(case: Case, needs: tuple[bool, bool, bool]) -> None:
    results = torch.library.opcheck(torch.ops.prefix_attn.forward.default, op_arguments(case, needs))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("needs", [(False, False, False), (False, False, True), (True, True, True)])
def test_opcheck_triton(needs: tuple[bool, bool, bool]) -> None:
    case = Case(B=3, N=3, S=5, T=5, D=8, Dv=8, with_=("prefix_ids", "sinks", "key_mask"))
    results = torch.library.opcheck(torch.ops.prefix_attn.forward.default, op_arguments(case, needs, "triton"))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("backend", ["composed", "cpu", "triton"])
@pytest.mark.parametrize("case", OPS.values(), ids=OPS)
def test_opcheck_backward(case: Case, backend: str, with_lse: bool) -> None:
    arguments = op_arguments(case, (False, False, False), backend)
    out, lse = torch.ops.prefix_attn.forward.default(*arguments)
    grad_lse = torch.ones_like(lse) if with_lse else None
    for needs in ([True] * 7, [False] * 3 + [True, True, False, False]):
        asked = [need and isinstance(tensor, Tensor) for need, tensor in zip(needs, arguments)]
        rest = (out, lse, torch.ones_like(out), grad_lse, asked)
        results = torch.library.opcheck(torch.ops.prefix_attn.backward.default, (*arguments, *rest))
        assert set(results.values()) == {"SUCCESS"}


def test_raw_op_and_function_differentiate() -> None:
    """A direct torch.ops call, and the autograd.Function by name, give the gradients of the public function."""
    arguments = Case().arguments(torch.float32)
    leaf = arguments["prefix_key"].requires_grad_()
    (expected,) = torch.autograd.grad(prefix_attention(**arguments, backend="composed").sum(), leaf)
    call = _call(**{n: arguments.get(n) for n in Call._fields} | _defaults(arguments))
    for out, _ in (attend(call, "composed"), PrefixAttentionFunction.apply(*call, "composed")):
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert torch.equal(grad, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use, in make_dual
@pytest.mark.parametrize("backend", ["cpu", "composed"])
def test_transforms_are_refused(backend: str) -> None:
    """What has no formula raises, also where no input requires a gradient: a dropped tangent would be a silent zero."""
    arguments = Case().arguments(torch.float32)
    step = lambda key: prefix_attention(**arguments | {"prefix_key": key}, backend=backend)
    key = arguments["prefix_key"]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
        step(forward_ad.make_dual(key, torch.ones_like(key)))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda key: step(key).sum())(key)


@pytest.mark.parametrize("backend", ["auto", "eager", "triton"])
def test_compile_fullgraph_dynamic(backend: str) -> None:
    """One graph for all batch sizes and lengths, equal results and gradients."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(query: Tensor, key: Tensor, value: Tensor, pk: Tensor, pv: Tensor, mask: Tensor) -> Tensor:
        return prefix_attention(query, key, value, pk, pv, key_mask=mask, backend=backend).square()

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for B, S in ((3, 9), (6, 11), (7, 23)):  # no size equals another's: dynamo takes equal sizes for the same one
        tensors = Case(B=B, S=S, T=S).arguments(torch.float32)
        leaves = [t.requires_grad_() for t in tensors.values()]
        mask = torch.arange(S) > torch.arange(B)[:, None] - 1
        results = [f(*leaves, mask) for f in (compiled, step)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), leaves) for out in results))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1], f"compiled again for a new batch size: {frames}"


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
            return prefix_attention(query, key, value, pk, pv)

    tensors = tuple(Case().arguments(torch.float32).values())
    program = torch.export.export(Module(), tensors)
    assert "prefix_attn.forward" in str(program.graph)
    torch.testing.assert_close(program.module()(*tensors), prefix_attention(*tensors))


def test_activation_checkpointing() -> None:
    arguments = Case().arguments(torch.float32)
    leaf = arguments["prefix_value"].requires_grad_()
    names = list(arguments)

    def step(*tensors: Tensor) -> Tensor:
        return prefix_attention(**dict(zip(names, tensors)))

    out = torch.utils.checkpoint.checkpoint(step, *arguments.values(), use_reentrant=False)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    (expected,) = torch.autograd.grad(step(*arguments.values()).square().sum(), leaf)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("trace", ["jit", "make_fx", "export"])
@pytest.mark.filterwarnings(
    "ignore"
)  # of torch.jit.trace, which says that it is deprecated, and that sizes are constants
def test_traces_without_a_scale(trace: str) -> None:
    """The default scale is that of a head size that is traced."""
    query, prefix = torch.randn(2, 4, 5, 16), torch.randn(4, 3, 16)

    def call(query: Tensor, prefix: Tensor) -> Tensor:
        out = prefix_attention(query, query, query, prefix, prefix)
        assert isinstance(out, Tensor)
        return out

    if trace == "jit":
        traced = torch.jit.trace(call, (query, prefix))
    elif trace == "make_fx":
        traced = make_fx(call, tracing_mode="symbolic")(query, prefix)
    else:
        module = torch.nn.Module()
        module.forward = call
        sizes = ({3: torch.export.Dim.AUTO}, {2: torch.export.Dim.AUTO})
        traced = torch.export.export(module, (query, prefix), dynamic_shapes=sizes).module()
    torch.testing.assert_close(traced(query, prefix), call(query, prefix))


def test_meta_tensors_have_shapes() -> None:
    query, prefix = torch.empty(2, 4, 5, 16, device="meta"), torch.empty(4, 3, 16, device="meta")
    out, lse = prefix_attention(query, query, query, prefix, prefix, return_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", (2, 4, 5, 16), (2, 4, 5))


@pytest.mark.parametrize("backend", ["eager", "composed", "cpu"])
@pytest.mark.parametrize("name", ["prefix_ids", "prefix_lengths", "key_lengths"])
def test_vmap_over_integers(name: str, backend: str) -> None:
    """Their values cannot be read while they are mapped over."""
    query, bank = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 6, 16)
    values = torch.tensor([[0, 1], [1, 0], [1, 1]])

    def call(value: Tensor) -> Tensor:
        return prefix_attention(query, query, query, bank, bank, **{name: value}, backend=backend)

    torch.testing.assert_close(torch.vmap(call)(values), torch.stack([call(value) for value in values]))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("backend", ["eager", "composed", "cpu"])
def test_make_fx_over_integers(backend: str, mode: str) -> None:
    """What is traced with some ids and lengths runs with others: their values are no part of the graph."""
    query, bank = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 6, 16)

    def call(query: Tensor, bank: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        return prefix_attention(
            query, query, query, bank, bank, prefix_ids=ids, key_lengths=lengths, prefix_start=lengths, backend=backend
        )

    traced = make_fx(call, tracing_mode=mode)(query, bank, torch.tensor([0, 1]), torch.tensor([5, 3]))
    others = torch.tensor([1, -1]), torch.tensor([1, 4])
    torch.testing.assert_close(traced(query, bank, *others), call(query, bank, *others))


@pytest.mark.parametrize(("option", "values", "graphs"), [("window", (2, 3, 4, 5), 2), ("scale", (0.2, 0.3, 0.4), 3)])
def test_what_compiles_anew(option: str, values: tuple[float, ...], graphs: int) -> None:
    """One graph serves all windows from the second on. torch makes a constant of each float that an op is given."""
    query, prefix, counter = torch.randn(2, 4, 8, 16), torch.randn(4, 3, 16), CompileCounter()

    def call(query: Tensor, prefix: Tensor, value: float) -> Tensor:
        out = prefix_attention(query, query, query, prefix, prefix, backend="cpu", **{option: value})
        assert isinstance(out, Tensor)
        return out

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for value in values:
        torch.testing.assert_close(compiled(query, prefix, value), call(query, prefix, value))
    assert counter.frame_count == graphs
