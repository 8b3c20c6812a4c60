"""Fused Triton kernels: the whole call in one launch forward, gradients of exactly what is asked.

``launch`` chooses tiles, allocates and launches; the kernels and Triton itself are imported with the first call.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from prefix_attn.backends.triton import interpreter
from prefix_attn.call import Call

NAME = "triton"


INSTALLED = find_spec("triton") is not None


@torch.compiler.assume_constant_result  # torch.compile need not trace the question
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU is sm_{major}{minor}; the kernels are made for sm_80 and newer"


def refuse(call: Call) -> Iterator[str]:
    """Reasons why the kernels cannot run this call."""
    if not INSTALLED:
        yield "triton is not installed: pip install 'prefix-attn[triton]'"
    if call.query.device.type == "cuda":
        if reason := _too_old(call.query.device):
            yield reason
    elif not (interpreter.ACTIVE and call.query.device.type == "cpu"):
        yield f"tensors are on {call.query.device.type}; the kernels need a GPU (or TRITON_INTERPRET=1)"
    if call.query.dtype == torch.float64:
        yield "the kernels compute in float32, not torch.float64"
    if call.bias is not None and call.bias.requires_grad and torch.is_grad_enabled():
        yield "the kernels give no gradient of bias"


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call."""
    from prefix_attn.backends.triton import launch

    return launch.forward(call)


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of query, key, value, prefix_key, prefix_value, sinks and bias, where needed."""
    from prefix_attn.backends.triton import launch

    return launch.backward(call, out, lse, grad_out, grad_lse, needs)
