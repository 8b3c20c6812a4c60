"""The CUDA C++ kernel of csrc/cuda: decoding in one launch, without Triton.

Few queries per row, over [prefix ; sequence]; ``csrc/cuda/decode.cuh`` derives it and ``csrc/cuda/plan.h`` cuts calls
into blocks. It runs when it is named, and ``auto`` never picks it: no device has yet shown where it wins.

PREFIX_ATTN_EMULATE=1 runs the same op on CPU tensors, each CUDA thread as a fiber: slow, and only for tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from prefix_attn.backends import _native_cuda
from prefix_attn.call import DIFFERENTIABLE, Call

NAME = "cuda"
PACKED = False
HEAD_SIZES = (64, 80, 96, 128)
ALIGNED = 8  # elements: copies move 16 bytes


def emulated() -> bool:
    """Whether CPU tensors run on the emulated GPU."""
    return os.environ.get("PREFIX_ATTN_EMULATE") == "1"


def by_name_only() -> str:
    """Why ``auto`` does not pick it."""
    return "it runs when it is named: no device has shown where it wins"


def lacks(call: Call) -> Iterator[str]:
    """Reasons why the kernel cannot run this call, if it is built."""
    yield from _device(call)
    yield from _call(call)


def refuse(call: Call) -> Iterator[str]:
    """Those, or why it cannot be built: asked last, since that may take minutes."""
    reasons = list(lacks(call))
    yield from reasons
    if not reasons and not torch.compiler.is_compiling() and (reason := _native_cuda.missing(_kind(call))):
        yield reason


def is_ready(call: Call) -> bool:
    """Whether the op checks all that is asked of a call that nobody has checked, and is loaded.

    It reads no ids or lengths: on a GPU nobody does. On the CPU, where they are checked, the call takes the long way.
    """
    if call.prefix_start is not None or not _has_own_dtype(call):
        return False
    if call.query.is_cpu:
        unread = call.prefix_ids is None and call.prefix_lengths is None and call.key_lengths is None
        return unread and emulated() and "emulated" in _native_cuda.loaded
    return call.query.is_cuda and "cuda" in _native_cuda.loaded


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call."""
    if reason := _native_cuda.missing(_kind(call)):
        raise NotImplementedError(f"backend='cuda' cannot run this call: {reason}")
    small = (*call[5:6], *call[7:9], *call[10:12])
    sinks, ids, prefix_lengths, key_lengths, key_mask = (t if t is None else t.contiguous() for t in small)
    return _native_cuda.op(_kind(call))(
        *call[:3],
        *_prefix(call),
        sinks,
        ids,
        prefix_lengths,
        key_lengths,
        key_mask,
        call.is_causal,
        call.window,
        call.scale,
        call.softcap,
    )


def _kind(call: Call) -> str:
    return "emulated" if call.query.device.type == "cpu" else "cuda"


def _prefix(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """One small copy where a float32 prefix meets a half-precision model."""
    if call.prefix_key is None or call.prefix_value is None:
        return call.prefix_key, call.prefix_value  # both None, or the op refuses
    dtype = call.query.dtype
    key, value = (t if t.dtype == dtype else t.to(dtype) for t in (call.prefix_key, call.prefix_value))
    return key, value


def _device(call: Call) -> Iterator[str]:
    device = call.query.device
    if device.type == "cuda":
        # torch.compile need not trace the question.
        major, minor = (8, 0) if torch.compiler.is_compiling() else torch.cuda.get_device_capability(device)
        if torch.version.hip:
            yield "the kernel is written for NVIDIA's GPUs"
        elif major < 8:
            yield f"the GPU is sm_{major}{minor}; the kernel is made for sm_80 and newer"
    elif not (emulated() and device.type == "cpu"):
        yield f"tensors are on {device.type}; the kernel needs a GPU (or PREFIX_ATTN_EMULATE=1)"


def _call(call: Call) -> Iterator[str]:
    dtype, size = call.query.dtype, call.query.shape[-1]
    if dtype not in (torch.float16, torch.bfloat16):
        yield f"the kernel multiplies float16 and bfloat16, not {dtype}"
    if size not in HEAD_SIZES:
        yield f"head size {size} is none of {HEAD_SIZES}"
    if call.value.shape[-1] != size:
        yield f"keys have head size {size} and values {call.value.shape[-1]}; the kernel has one for both"
    if call.cu_seqlens_q is not None:
        yield "the kernel has no packed sequences"
    if call.bias is not None:
        yield "the kernel has no bias"
    if call.prefix_start is not None:
        yield "the kernel has no prefix_start"
    if call.dropout_p:
        yield "the kernel has no dropout"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:DIFFERENTIABLE]):
        yield "the kernel has no gradients: decode under torch.no_grad()"
    if call.has_bank() and not _has_own_dtype(call):
        yield f"a bank must have query's dtype {dtype}: it may be large, and is not copied"
    for name, tensor in zip(Call._fields, call[:5]):
        if tensor is not None and tensor.numel() and not _is_aligned(tensor):
            yield f"rows of {name} do not begin at multiples of 16 bytes"


def _has_own_dtype(call: Call) -> bool:
    """Whether the prefix has the query's dtype, as the op needs it."""
    return all(t is None or t.dtype == call.query.dtype for t in (call.prefix_key, call.prefix_value))


def _is_aligned(tensor: Tensor) -> bool:
    # Where a view begins is not traced. The op looks at the address itself.
    start = 0 if torch.compiler.is_compiling() else tensor.storage_offset()
    return not any(n % ALIGNED for n in (start, *tensor.stride()[:-1]))
