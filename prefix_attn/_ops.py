"""The registered ops: one schema per direction, their fakes, and the gradient formula of every fused backend.

``eager`` is not here: it is plain PyTorch, which autograd and torch.compile take apart by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from prefix_attn.backends import _native, cpu, cuda
from prefix_attn.call import DIFFERENTIABLE, TENSORS, Call
from prefix_attn.dispatch import BY_NAME

_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? prefix_value, Tensor? sinks, Tensor? bias, "
    "Tensor? prefix_ids, Tensor? prefix_lengths, Tensor? prefix_start, Tensor? key_lengths, Tensor? key_mask, "
    "Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "bool is_causal, SymInt? window, float scale, float? softcap, float dropout_p, str backend"
)
torch.library.define("prefix_attn::forward", f"({_CALL}) -> (Tensor out, Tensor lse)")
torch.library.define(
    "prefix_attn::backward",
    f"({_CALL}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, bool[] needs) -> Tensor[]",
)
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_forward = torch.ops.prefix_attn.forward.default
_backward = torch.ops.prefix_attn.backward.default


def at_once(call: Call, backend: str) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of a call that was not checked, straight from the op of ``cpu`` or ``cuda``, which checks it, or None.

    Most of a tiny call's time is spent before its kernel. None means the long way, for all that somebody else has to
    see, and for all that is wrong: there the checks say what it was. No call is remembered, so none can be stale.
    """
    chosen = backend in (cpu.NAME, cuda.NAME) or (backend == "auto" and not cpu.slow())
    if torch.compiler.is_compiling() or not chosen or not _is_plain(call):
        return None
    try:
        if backend == cuda.NAME:
            return cuda.forward(call) if cuda.is_ready(call) else None
        return cpu.forward(call, strict=True) if call.query.is_cpu and _native.isa != "" else None
    except RuntimeError:
        return None


def _is_plain(call: Call) -> bool:
    """Whether nobody but the op has to see the call, and its options are of the types they must be."""
    return (
        _PLAIN.issuperset(map(type, call[:TENSORS]))
        and call.query is not None
        and call.query.dtype is not torch.float64
        and call.bias is None
        and type(call.is_causal) is bool
        and type(call.window) in (int, type(None))
        and type(call.scale) in (float, type(None))
        and type(call.softcap) in (float, type(None))
        and type(call.dropout_p) in (float, int)
        and not call.dropout_p
        and not torch.is_autocast_enabled("cpu" if call.query.is_cpu else "cuda")
        and not _watched()
        and not _requires_grad(call)
    )


def attend(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of ``call``, differentiable once: through the registered op, or as it would if somebody must see that.

    The dispatcher takes longer over 23 arguments than a short kernel runs, twice of them with a gradient.
    """
    if torch.compiler.is_compiling() or not _is_direct(call[:TENSORS]):
        return _forward(*call, backend)
    if _requires_grad(call):
        return PrefixAttentionFunction.apply(*call, backend)
    return _run_forward(call, backend)


def _watched() -> bool:
    """Whether a mode, a tracer, a transform or the profiler has to see the op."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()  # of them one traces before dispatch
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    )


def _is_direct(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher would do nothing but call the backend: nobody watches, and memory holds the numbers."""
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or t._is_zerotensor()):
            return False
    return not _watched()


def _requires_grad(call: Call) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:DIFFERENTIABLE])


def _run_forward(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    out, lse = BY_NAME[backend].forward(call)
    return _as_models(out), lse.contiguous()


def _run_backward(*args: Any) -> list[Tensor]:
    *call, backend, out, lse, grad_out, grad_lse, needs = args
    grads = BY_NAME[backend].backward(Call(*call), out, lse, grad_out, grad_lse, needs)
    return [_as_models(grad) if i < 3 else grad.contiguous() for i, grad in enumerate(grads) if grad is not None]


torch.library.impl("prefix_attn::forward", "CompositeExplicitAutograd")(
    lambda *args: _run_forward(Call(*args[:-1]), args[-1])
)
torch.library.impl("prefix_attn::backward", "CompositeExplicitAutograd")(_run_backward)


@torch.library.register_fake("prefix_attn::forward")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    query, value = args[0], args[2]
    B, Hq, S, _ = query.shape
    lse = query.new_empty(B, Hq, S, dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(B, S, Hq, value.shape[-1]).transpose(1, 2), lse


@torch.library.register_fake("prefix_attn::backward")
def _(*args: Any) -> list[Tensor]:
    wanted = [(i, tensor) for i, (tensor, needed) in enumerate(zip(args, args[-1])) if needed]
    grads = ((i, tensor.new_empty(tensor.shape)) for i, tensor in wanted)
    return [_as_models(grad) if i < 3 else grad for i, grad in grads]


def _as_models(tensor: Tensor) -> Tensor:
    """(B, H, S, D) with the memory order (B, S, H, D), which models reshape for free; a copy if it had another."""
    _, H, S, size = tensor.shape
    if tensor.stride() == (S * H * size, size, H * size, 1):
        return tensor
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


class PrefixAttentionFunction(torch.autograd.Function):
    """The gradient rule: to the prefix, and to query, key and value exactly where the graph asks for them.

    A frozen model's first prefixed layer asks for the prefix's alone, and then only the prefix kernels run. Every later
    layer also needs those of query, key and value: through them its loss reaches the prefixes below.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """``args`` are the op's: a Call and a backend's name."""
        if torch.compiler.is_compiling() or not _is_direct(args[:TENSORS]):
            with torch._C._AutoDispatchBelowAutograd():
                out, lse = _forward(*args)
        else:
            out, lse = _run_forward(Call(*args[:-1]), args[-1])
        ctx.save_for_backward(*args[:TENSORS], out, lse)
        ctx.options = args[TENSORS:]
        ctx.set_materialize_grads(False)  # most calls have no gradient of the lse, and save its work
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """One gradient per argument; None where it was not asked for."""
        *tensors, out, lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:DIFFERENTIABLE])
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_lse is not None:  # a query that sees nothing adds nothing, whatever a merge of two such made of it
            grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0)
        arguments = (*tensors, *ctx.options, out, lse, grad_out, grad_lse, needs)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # create_graph: the op refuses a second derivative
            grads = iter(_backward(*arguments))
        elif _is_direct((*tensors, out, lse, grad_out, grad_lse)):
            grads = iter(_run_backward(*arguments))
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = iter(_backward(*arguments))
        rest = TENSORS - DIFFERENTIABLE + len(ctx.options)
        return *(next(grads) if needed else None for needed in needs), *(None,) * rest


class _Once(torch.autograd.Function):
    """The backward op, which refuses a second derivative: without a formula autograd would return wrong numbers."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_backward(*args))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise NotImplementedError("fused backends are differentiable once; backend='eager' any number of times")


torch.library.impl("prefix_attn::forward", "Autograd")(lambda *args: PrefixAttentionFunction.apply(*args))
torch.library.impl("prefix_attn::backward", "Autograd")(lambda *args: list(_Once.apply(*args)))
