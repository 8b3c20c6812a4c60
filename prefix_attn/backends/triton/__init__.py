"""Fused Triton kernels: the whole call in one launch forward, gradients of exactly what is asked.

``plan`` chooses tiles, ``arguments`` makes what kernels take, ``launch`` allocates and launches. The
kernels and Triton itself are imported with the first call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from prefix_attn.backends.triton import interpreter
from prefix_attn.call import Call

NAME = "triton"
PACKED = True


INSTALLED = find_spec("triton") is not None
_HERE = nullcontext()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else _HERE


def refuse(call: Call) -> Iterator[str]:
    """Reasons why the kernels cannot run this call."""
    if not INSTALLED:
        yield "triton is not installed: pip install 'prefix-attn[triton]'"
    if call.query.device.type == "cuda":
        # torch.compile need not trace the question.
        major, minor = (8, 0) if torch.compiler.is_compiling() else torch.cuda.get_device_capability(call.query.device)
        if major < 8 and not torch.version.hip:
            yield f"the GPU is sm_{major}{minor}; the kernels are made for sm_80 and newer"
    elif not (interpreter.ACTIVE and call.query.device.type == "cpu"):
        yield f"tensors are on {call.query.device.type}; the kernels need a GPU (or TRITON_INTERPRET=1)"
    if call.query.dtype == torch.float64:
        yield "the kernels compute in float32, not torch.float64"
    if call.bias is not None and call.bias.requires_grad and torch.is_grad_enabled():
        yield "the kernels give no gradient of bias"


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call."""
    from prefix_attn.backends.triton import launch

    with _current(call.query.device):
        return launch.forward(call)


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of query, key, value, prefix_key, prefix_value, sinks and bias, where needed."""
    from prefix_attn.backends.triton import launch

    with _current(call.query.device):
        return launch.backward(call, out, lse, grad_out, grad_lse, needs)
