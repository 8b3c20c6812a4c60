"""The C++ kernels of csrc/cpu: one pass over [prefix ; sequence] in float32, for every instruction set.

The prefix is packed once per call and read by all rows; tiles that no query sees are not visited. Half precision is
only how tensors are stored, but for bfloat16 on a processor that multiplies it (isa avx512bf16): there the operands of
every product are bfloat16, probabilities and a float32 prefix among them, and sums are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prefix_attn.backends import _native
from prefix_attn.backends.outputs import empty_like, grad_sinks
from prefix_attn.call import Call

NAME = "cpu"
PACKED = True
MAX_SLOTS = 16  # runs of the batch whose prefix gradients are summed apart, so that threads need not wait
UNITS = 48  # (run, key head) pairs are enough for as many threads
SLOT_FLOATS = 1 << 22  # and what all of them may hold together


def refuse(call: Call) -> Iterator[str]:
    """Reasons why the kernels cannot run this call."""
    if call.query.device.type != "cpu":
        yield f"tensors are on {call.query.device.type}"
    elif reason := _native.cpu_ops_missing():
        yield reason
    if call.query.dtype == torch.float64:
        yield "the kernels compute in float32, not torch.float64"
    if call.bias is not None:
        yield "the kernels have no bias"
    if call.dropout_p:
        yield "the kernels have no dropout"


def slow() -> str | None:
    """Why torch's own kernels are faster, if they are: measured by ``benchmarks.operator``."""
    return "without AVX2 it is slower than torch's kernels" if _native.isa == "generic" else None


def forward(call: Call, *, strict: bool = False) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call. ``strict``: it was not checked, and the op raises RuntimeError where it is wrong."""
    return torch.ops.prefix_attn_cpu.forward.default(*_arguments(call), strict)


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of query, key, value, prefix_key, prefix_value and sinks, where needed."""
    wants = (needs[0], needs[1] or needs[2], needs[1] or needs[2])
    sequence = [empty_like(call, t, t.shape[-1]) if w else None for t, w in zip(call[:3], wants)]
    prefix = [t if t is not None and (needs[3] or needs[4]) else None for t in (call.prefix_key, call.prefix_value)]
    slots = _slots(call)
    partials = [None if t is None else _partials(t, slots) for t in prefix]
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    share = torch.zeros_like(lse) if needs[5] else None
    if lse.numel():
        torch.ops.prefix_attn_cpu.backward.default(
            *_arguments(call), False, out, lse, grad_out, grad_lse, *sequence, *partials, slots, share
        )
    else:
        for grad in sequence:
            if grad is not None:
                grad.zero_()
    units = (call.softcap or 1.0, 1.0)  # the kernels sum over queries that are divided by the softcap
    grads: list[Tensor | None] = [*sequence, *(_total(*one) for one in zip(partials, prefix, units)), None, None]
    if call.sinks is not None and share is not None:
        grads[5] = grad_sinks(call.sinks, lse, share, grad_lse)
    return [grad if needed else None for grad, needed in zip(grads, needs)]


def _arguments(call: Call) -> tuple[Any, ...]:
    """What both ops take first."""
    packed = (call.cu_seqlens_q, call.cu_seqlens_k)
    return (*call[:6], *call[7:12], *packed, call.is_causal, call.window, call.scale, call.softcap)


def _slots(call: Call) -> int:
    """Runs of the batch. It depends on the call alone, never on threads, so neither does any sum."""
    B = call.batch()
    if call.prefix_key is None or call.prefix_value is None:
        return max(B, 1)
    size = call.prefix_key.numel() + call.prefix_value.numel()
    heads = max(call.key.shape[1], 1)
    return max(1, min(B, MAX_SLOTS, -(-UNITS // heads), SLOT_FLOATS // max(size, 1)))


def _partials(prefix: Tensor, slots: int) -> Tensor:
    """(slots, N, Hkv, P, D rounded up to the widest vector), zeros."""
    *shape, size = prefix.shape if prefix.dim() == 4 else (1, *prefix.shape)
    return prefix.new_zeros(slots, *shape, -(-size // 16) * 16, dtype=torch.float32)


def _total(partials: Tensor | None, prefix: Tensor | None, unit: float) -> Tensor | None:
    if partials is None or prefix is None:
        return None
    total = partials.sum(0)[..., : prefix.shape[-1]]
    return (total if unit == 1 else total * unit).reshape(prefix.shape).to(prefix.dtype)
