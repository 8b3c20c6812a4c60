"""``composed`` on a GPU, without one: torch's kernels there are played by the one for CPUs, which asks what they ask.

On a device tests/test_gpu.py compares the numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode  # for tensors on a GPU that is not there

from prefix_attn import dispatch
from prefix_attn.backends import composed, gpu_attention, triton
from prefix_attn.call import Call
from tests.backends.test_numerics import compare
from tests.numerics import CASES, Case, random_case

CHOSEN = ("plain", "full", "one-query", "odd", "tiny-head", "Dv<D", "Dv>D", "nothing", "S>T no-prefix", "key-mask",
          "left-padding P=0", "key-lengths", "window", "sinks only", "bias mask", "bank ragged", "infix bank",
          "gate infix sinks", "float32 prefix", "everything", "multi-query")  # fmt: skip


def placed(*tensors: Tensor) -> None:
    """Rows begin at multiples of 16 bytes, or of 8 elements."""
    for tensor in tensors:
        assert tensor.stride(-1) == 1
        assert not any(n % 8 for n in (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1]))


class Stub:
    """torch's kernels for GPUs: what their source demands of arguments, and numbers of the one for CPUs."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def flash(self, query: Tensor, key: Tensor, value: Tensor, p: float, causal: bool, *, scale: float) -> Any:
        placed(query, key, value)
        assert query.dtype.itemsize == 2
        assert query.shape[-1] == value.shape[-1] <= 256
        assert not causal or query.shape[2] == key.shape[2]
        self.calls.append("flash")
        return *composed._forward(query, key, value, p, causal, scale=scale), None, None, 0, 0, None, None, None

    def flash_backward(self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                       *rest: Any, scale: float) -> Any:  # fmt: skip
        placed(query, key, value)
        assert query.dtype.itemsize == 2
        assert query.shape[-1] <= 192
        assert lse.is_contiguous()
        assert rest[2:4] == (query.shape[2], key.shape[2])
        self.calls.append("flash_backward")
        return composed._backward(grad, query, key, value, out, lse, 0.0, rest[5], scale=scale)

    def efficient(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, wanted: bool, p: float,
                  causal: bool, *, scale: float) -> Any:  # fmt: skip
        self.masked(query, key, value, bias)
        assert wanted
        self.calls.append("efficient")
        out, lse = composed._forward(query, key, value, p, causal, attn_mask=bias, scale=scale)
        if bias is not None:  # what the kernel leaves in rows that see nothing is not known
            hidden = bias + torch.ones_like(bias).tril().log() if causal else bias
            nothing = (hidden == -torch.inf).all(-1)
            out, lse = out.masked_fill(nothing[..., None], torch.nan), lse.masked_fill(nothing, torch.nan)
        return out, F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf), None, None

    def efficient_backward(self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
                           out: Tensor, lse: Tensor, *rest: Any, scale: float) -> Any:  # fmt: skip
        self.masked(query, key, value, bias)
        S = query.shape[2]
        assert out.transpose(1, 2).is_contiguous()
        assert lse.is_contiguous()
        assert lse.shape[-1] % 32 == 0
        assert (lse[..., S:] == torch.inf).all()
        self.calls.append("efficient_backward")
        lse = lse[..., :S].contiguous()
        return composed._backward(grad, query, key, value, out, lse, 0.0, rest[4], attn_mask=bias, scale=scale)

    @staticmethod
    def masked(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
        placed(query, key, value)
        assert query.shape[1] == key.shape[1] == value.shape[1]
        if bias is not None:
            assert bias.dtype == query.dtype
            assert bias.shape == (*query.shape[:3], key.shape[2])
            assert bias.stride(-1) == 1
            assert not any(n % 8 for n in (bias.storage_offset(), *bias.stride()[:-1]))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    found = Stub()
    monkeypatch.setattr(composed, "_on_gpu", lambda tensor: True)
    for name in ("flash", "flash_backward", "efficient", "efficient_backward"):
        monkeypatch.setattr(gpu_attention, f"_{name}", getattr(found, name))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHOSEN)
def test_matches_float64(stub: Stub, name: str, dtype: torch.dtype) -> None:
    compare("composed", CASES[name].arguments(dtype))
    assert bool(stub.calls) == (name != "nothing")


@pytest.mark.parametrize("seed", range(12))
def test_matches_float64_on_random_calls(stub: Stub, seed: int) -> None:
    compare("composed", random_case(seed).arguments((torch.float32, torch.bfloat16)[seed % 2]))


def test_flash_attention_runs_what_it_can(stub: Stub) -> None:
    """Half precision without a mask: both parts forward, the sequence backward. The prefix's gradient is float32."""
    compare("composed", Case().arguments(torch.bfloat16))
    assert stub.calls == ["flash", "flash", "flash_backward", "efficient_backward"]
    stub.calls.clear()
    compare("composed", Case().arguments(torch.float32))
    assert set(stub.calls) == {"efficient", "efficient_backward"}


@pytest.mark.parametrize(("dtype", "D"), [(torch.bfloat16, 64), (torch.bfloat16, 250), (torch.float32, 20)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_ops_of_torch_take_these_arguments(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, D: int, masked: bool
) -> None:
    """Their own rules for shapes, on tensors without memory."""
    monkeypatch.setattr(composed, "_on_gpu", lambda tensor: True)
    query, key = (torch.empty(2, H, 33, D, dtype=dtype, device="meta") for H in (4, 2))
    prefix = torch.empty(2, 5, D, dtype=dtype, device="meta")
    mask = torch.ones(2, 33, dtype=torch.bool, device="meta") if masked else None
    call = Call(query, key, key, prefix, prefix, key_mask=mask)
    out, lse = composed.forward(call)
    grads = composed.backward(call, out, lse, out, lse, [True] * 5 + [False] * 2)
    for got, like in zip((out, *grads), (query, query, key, key, prefix, prefix)):
        assert got is not None
        assert (got.shape, got.dtype) == (like.shape, like.dtype)
    assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)


def on_cuda(dtype: torch.dtype = torch.bfloat16) -> Call:
    with FakeTensorMode():
        query = torch.empty(2, 4, 8, 16, dtype=dtype, device="cuda")
        return Call(query, query, query)


def test_on_a_gpu_it_runs_by_its_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(triton, "refuse", lambda call: iter(()))
    monkeypatch.setattr(dispatch, "AUTO", dispatch.ORDER)
    call = on_cuda()
    assert dispatch.select(call).NAME == "triton"
    assert dispatch.select(call, "composed") is composed
    monkeypatch.setattr(triton, "refuse", lambda call: iter(("no",)))
    assert dispatch.select(call).NAME == "eager"


def test_what_it_refuses_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert list(composed.refuse(on_cuda())) == ["the GPU is sm_75; torch's flash attention is made for sm_80 and newer"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert list(composed.refuse(on_cuda())) == []
    said = list(composed.refuse(on_cuda(torch.float64)))
    assert said == ["torch's attention with a log-sum-exp has no float64 on GPUs"]
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert list(composed.refuse(on_cuda())) == ["torch's attention with a log-sum-exp is wired for NVIDIA's GPUs"]
