"""torch's attention kernels for GPUs, called so that they give and take the log-sum-exp.

``scaled_dot_product_attention`` runs the same two. Flash attention takes half precision and no mask. Memory-efficient
attention takes the rest, with the key heads of a group repeated. They ask more of their arguments than the one for
CPUs, and check some of it only on the device, so all of it is seen to here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.call import Call

ALIGNED = 8  # elements: head sizes, strides and rows of a mask are multiples
LSE_ROWS = 32  # memory-efficient attention reads so many rows of an lse at a time
LARGEST = 192  # head size that flash attention differentiates on every GPU from sm_80 on

_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default


def refuse(call: Call) -> Iterator[str]:
    """Reasons why these kernels cannot run this call."""
    if call.query.dtype == torch.float64:
        yield "torch's attention with a log-sum-exp has no float64 on GPUs"
    if torch.version.hip:
        yield "torch's attention with a log-sum-exp is wired for NVIDIA's GPUs"
    elif not torch.compiler.is_compiling():  # which need not trace the question
        major, minor = torch.cuda.get_device_capability(call.query.device)
        if major < 8:
            yield f"the GPU is sm_{major}{minor}; torch's flash attention is made for sm_80 and newer"


def head_size(size: int) -> int:
    """The smallest head size that the kernels take and that holds ``size``."""
    return size + -size % ALIGNED


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """(out, lse) of (B, H, S, D) tensors of equal head sizes. Rows that see no key are undefined in both."""
    query, key, value = map(_placed, (query, key, value))
    if _by_flash(query, mask):
        out, lse = _flash(query, key, value, 0.0, causal, scale=scale)[:2]
        return out, lse
    key, value = (_repeated(t, query.shape[1]) for t in (key, value))
    out, lse = _efficient(query, key, value, _full(mask, query, key), True, 0.0, causal, scale=scale)[:2]
    return out, lse[..., : query.shape[2]]


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. A row whose lse is +inf gives none."""
    query, key, value = map(_placed, (query, key, value))
    seed = offset = query.new_empty(0, dtype=torch.int64)  # of dropout, which there is not
    if _by_flash(query, mask):
        S, T = query.shape[2], key.shape[2]
        rest = None, None, S, T, 0.0, causal, seed, offset
        return _flash_backward(grad_out, query, key, value, out, lse.contiguous(), *rest, scale=scale)
    heads = key.shape[1]
    key, value = (_repeated(t, query.shape[1]) for t in (key, value))
    # The kernel takes the rows of ``out`` to lie H * D elements apart, whatever its strides say.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    lse = F.pad(lse, (0, -lse.shape[-1] % LSE_ROWS), value=torch.inf).contiguous()
    rest = out, lse, seed, offset, 0.0, [True, True, True, False], causal
    grads = _efficient_backward(grad_out, query, key, value, _full(mask, query, key), *rest, scale=scale)
    grad_key, grad_value = (g.unflatten(1, (heads, -1)).sum(2) for g in grads[1:3])
    return grads[0], grad_key, grad_value


def _by_flash(query: Tensor, mask: Tensor | None) -> bool:
    return mask is None and query.dtype.itemsize == 2 and query.shape[-1] <= LARGEST


def _placed(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its rows do not begin at multiples of 16 bytes, as vectors of the kernels do."""
    places = (tensor.storage_offset(), *tensor.stride()[:-1])
    return tensor.clone(memory_format=torch.contiguous_format) if any(n % ALIGNED for n in places) else tensor


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    """The heads of keys or values, each once for every query head that reads it."""
    group = heads // tensor.shape[1]
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)


def _full(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask in all four dimensions, with aligned rows; what broadcasts takes no memory."""
    if mask is None:
        return None
    T = mask.shape[-1]
    return F.pad(mask.contiguous(), (0, -T % ALIGNED))[..., :T].expand(*query.shape[:3], key.shape[2])
