"""Every way to attend over [prefix ; sequence] that the GPU benchmarks compare, each prepared at its best.

A peer is a function of (query, key, value, prefix_key, prefix_value, is_causal) that returns a ``Ready`` call. What it
prepares is not timed: concatenation into a buffer, expansion of key heads for a kernel without grouped queries, block
masks, page tables, compilation. A peer that cannot run a call gives the reason, which goes into the results.

    sdpa *          scaled_dot_product_attention on [prefix ; sequence], already concatenated, with its own choice of
                    kernel or a forced one. One query per row: the heads of a group become rows, so keys are read once
    cat + sdpa      the same with the concatenation inside the call: what models do
    flex packed     one row that holds the prefix once and all sequences behind it, under a block mask
    flex merged     the prefix broadcast over the batch and the sequence apart, merged by log-sum-exp
    fa3             FlashAttention 3 on the concatenation, if it is installed
    flashinfer *    paged decoding over shared prefix pages, in one level or as a cascade, if it is installed
    triton, composed    prefix_attention(backend=...); with "frozen" only the prefix needs a gradient
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn import prefix_attention

FIVE = ("query", "key", "value", "prefix_key", "prefix_value")
PREFIX = FIVE[3:]
BASELINE = "sdpa"


class Unable(Exception):
    """The peer cannot run this call; the message is the reason."""


class Inputs(NamedTuple):
    """One call. Sequences have as many keys as queries, or more: queries sit at their end."""

    query: Tensor  # (B, Hq, S, D)
    key: Tensor  # (B, Hkv, T, D)
    value: Tensor  # (B, Hkv, T, D)
    prefix_key: Tensor  # (Hkv, P, D)
    prefix_value: Tensor  # (Hkv, P, D)
    is_causal: bool
    grad: Tensor | None = None  # (B, Hq, S, D), of the output


class Ready(NamedTuple):
    """A prepared call, and how its tensors relate to the five inputs."""

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]  # what it is differentiated with respect to
    output: Callable[[Tensor], Tensor]  # to (B, Hq, S, D)
    gradients: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # of the leaves, to those of the inputs
    # Entered outside the timed region.
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    upstream: Tensor | None = None  # the output's gradient as ``forward`` lays it out; ``prepare`` fills it in

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """The gradient of every leaf."""
        return torch.autograd.grad(out, list(self.leaves.values()), self.upstream)


def inputs(
    B: int, Hq: int, Hkv: int, S: int, T: int, P: int, D: int, *, is_causal: bool, dtype: torch.dtype, device: str
) -> Inputs:
    """Random tensors, contiguous."""
    g = torch.Generator(device).manual_seed(0)
    shapes = ((B, Hq, S, D), (B, Hkv, T, D), (B, Hkv, T, D), (Hkv, P, D), (Hkv, P, D), (B, Hq, S, D))
    *five, grad = (torch.randn(shape, generator=g, device=device).to(dtype) for shape in shapes)
    return Inputs(*five, is_causal=is_causal, grad=grad)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


# prefix_attention


def ours(backend: str, wanted: tuple[str, ...] = FIVE) -> Callable[..., Ready]:
    """The public operator; only ``wanted`` need a gradient."""

    def peer(*call: Any) -> Ready:
        x = Inputs(*call)
        if wanted == PREFIX and not x.prefix_key.numel():
            raise Unable("there is no prefix to train")
        leaves = {name: leaf(getattr(x, name)) for name in wanted}
        five = [leaves.get(name, getattr(x, name)) for name in FIVE]

        def forward() -> Any:
            return prefix_attention(*five, is_causal=x.is_causal, backend=backend)

        return Ready(forward, leaves, lambda out: out, dict)

    return peer


# scaled_dot_product_attention on the concatenation


def concatenate(prefix: Tensor, sequence: Tensor) -> Tensor:
    """[prefix ; sequence], the prefix repeated for each row."""
    return torch.cat([prefix.expand(sequence.shape[0], -1, -1, -1), sequence], dim=2)


# One buffer for all peers of a call: with one each, the largest shapes would not fit. ``prepare`` clears it.
_buffer = functools.lru_cache(maxsize=2)(concatenate)


def concatenated(x: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values, concatenated once."""
    return _buffer(x.prefix_key, x.key), _buffer(x.prefix_value, x.value)


def _apart(P: int, whole_key: Tensor, whole_value: Tensor) -> dict[str, Tensor]:
    """Gradients of the concatenation, taken apart; the prefix's summed over the batch in float64."""
    return {
        "key": whole_key[:, :, P:],
        "value": whole_value[:, :, P:],
        "prefix_key": whole_key[:, :, :P].double().sum(0),
        "prefix_value": whole_value[:, :, :P].double().sum(0),
    }


def sdpa(kernel: str | None = None) -> Callable[..., Ready]:
    """torch's attention; ``kernel`` is a name of torch.nn.attention.SDPBackend, None its own choice."""

    def context() -> AbstractContextManager[Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return contextlib.nullcontext() if kernel is None else sdpa_kernel(getattr(SDPBackend, kernel))

    def peer(*call: Any) -> Ready:
        x = Inputs(*call)
        problems = []
        for expand in (False, True):  # torch's own grouping where the kernel has it
            grouped = x.query.shape[1] != x.key.shape[1] and x.query.shape[2] > 1
            if expand and not grouped:
                break
            ready = _sdpa(x, expand, kernel == "CUDNN_ATTENTION")._replace(context=context)
            try:
                with torch.no_grad(), context(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns once per kernel that it does not take
                    ready.forward()
                return ready
            except RuntimeError as error:
                problems.append(str(error).splitlines()[0])
        raise Unable("; ".join(dict.fromkeys(problems)))

    return peer


def _sdpa(x: Inputs, expand: bool, square: bool) -> Ready:
    B, Hq, S, D = x.query.shape
    Hkv, P, _ = x.prefix_key.shape
    G, query, (whole_key, whole_value) = Hq // Hkv, x.query, concatenated(x)
    options: dict[str, Any] = {}
    first = 0  # the queries' place in the output
    if S == 1:
        query = query.reshape(B, Hkv, G, D)
    elif expand:
        whole_key, whole_value = (t.repeat_interleave(G, dim=1) for t in (whole_key, whole_value))
    elif G > 1:
        options["enable_gqa"] = True
    if x.is_causal and S > 1:
        first = whole_key.shape[2] - S
        if first and not square:
            from torch.nn.attention.bias import causal_lower_right

            options["attn_mask"], first = causal_lower_right(S, whole_key.shape[2]), 0
        else:
            # cuDNN aligns a causal mask top left, so P queries that nobody needs are put before the others.
            query = torch.cat([query.new_zeros(B, Hq, first, D), query], dim=2)
            options["is_causal"] = True
    leaves = {"query": leaf(query), "whole_key": leaf(whole_key), "whole_value": leaf(whole_value)}
    q, k, v = leaves.values()

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)

    def back(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        query = grads["query"][:, :, first:]
        wholes = [grads["whole_key"], grads["whole_value"]]
        if expand:
            wholes = [t.double().unflatten(1, (Hkv, G)).sum(2) for t in wholes]
        return {"query": query.reshape(B, Hq, S, D), **_apart(P, *wholes)}

    return Ready(forward, leaves, lambda out: out[:, :, first:].reshape(B, Hq, S, D), back)


def concatenating(*call: Any) -> Ready:
    """The concatenation inside the call; its gradient to the prefix is torch's own sum over the batch."""
    x = Inputs(*call)
    leaves = {name: leaf(getattr(x, name)) for name in FIVE}
    own = Inputs(**leaves, is_causal=x.is_causal)
    S, T, P = x.query.shape[2], x.key.shape[2], x.prefix_key.shape[1]
    options: dict[str, Any] = {"enable_gqa": True} if x.query.shape[1] != x.key.shape[1] else {}
    if x.is_causal and S > 1:
        from torch.nn.attention.bias import causal_lower_right

        options["attn_mask"] = causal_lower_right(S, P + T)

    def forward() -> Tensor:
        key, value = concatenate(own.prefix_key, own.key), concatenate(own.prefix_value, own.value)
        return F.scaled_dot_product_attention(own.query, key, value, **options)

    return Ready(forward, leaves, lambda out: out, dict)


# FlexAttention: benchmarks/flex.py


def flex(name: str) -> Callable[..., Ready]:
    """``packed`` or ``merged``; torch's module is heavy to import."""

    def peer(*call: Any) -> Ready:
        from benchmarks import flex

        return getattr(flex, name)(Inputs(*call))

    return peer


# Libraries that may not be there


def fa3(*call: Any) -> Ready:
    """FlashAttention 3 on the concatenation; its causal mask is aligned bottom right."""
    try:
        import flash_attn_interface as fa  # type: ignore[import-not-found]
    except ImportError:
        raise Unable("flash_attn_interface is not installed") from None
    x = Inputs(*call)
    P = x.prefix_key.shape[1]
    rows = [t.transpose(1, 2).contiguous() for t in (x.query, *concatenated(x))]
    leaves = dict(zip(("query", "whole_key", "whole_value"), map(leaf, rows)))
    lengths = torch.full((rows[1].shape[0],), rows[1].shape[1], dtype=torch.int32, device=x.query.device)

    def forward() -> Tensor:
        if x.query.shape[2] == 1:  # the entry that splits keys
            out = fa.flash_attn_with_kvcache(*rows, cache_seqlens=lengths, num_splits=0)
        else:
            out = fa.flash_attn_func(*leaves.values(), causal=x.is_causal)
        return out[0] if isinstance(out, tuple) else out

    def back(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        query, *wholes = (t.transpose(1, 2) for t in grads.values())
        return {"query": query, **_apart(P, *wholes)}

    return Ready(forward, leaves, lambda out: out.transpose(1, 2), back)


def flashinfer(*, cascade: bool) -> Callable[..., Ready]:
    """Paged decoding. Both forms keep the prefix's pages once; the cascade also reads them once per batch."""

    def peer(*call: Any) -> Ready:
        try:
            import flashinfer as fi  # type: ignore[import-not-found]
        except ImportError:
            raise Unable("flashinfer is not installed") from None
        x = Inputs(*call)
        B, Hq, S, D = x.query.shape
        (Hkv, P, _), T, page = x.prefix_key.shape, x.key.shape[2], 16
        if S > 1 or P % page or T % page or (cascade and not P):
            raise Unable("set up for decoding, whole pages of 16, and a cascade only with a prefix")

        def pages(prefix: Tensor, own: Tensor) -> Tensor:
            rows = torch.cat([prefix.transpose(0, 1), own.transpose(1, 2).flatten(0, 1)])
            return rows.view(-1, page, Hkv, D)

        def ints(values: Any) -> Tensor:
            return torch.as_tensor(values, dtype=torch.int32, device=x.query.device)

        cache = pages(x.prefix_key, x.key), pages(x.prefix_value, x.value)
        shared, each = P // page, T // page
        own = ints(range(shared, shared + B * each))
        steps, full = ints(range(B + 1)), ints([page] * B)
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=x.query.device)
        sizes, types = (Hq, Hkv, D, page), {"q_data_type": x.query.dtype, "kv_data_type": x.query.dtype}
        if cascade:
            wrapper = fi.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
            wrapper.plan([ints([0, B]), steps], [ints([0, shared]), steps * each], [ints(range(shared)), own],
                         [full[:1], full], *sizes, **types)  # fmt: skip
        else:
            wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=Hq > Hkv)
            table = torch.cat([ints(range(shared)).expand(B, -1), own.view(B, each)], dim=1).flatten()
            wrapper.plan(steps * (shared + each), table, full, *sizes, **types)
        query = x.query[:, :, 0].contiguous()
        return Ready(lambda: wrapper.run(query, cache), {}, lambda out: out[:, :, None], dict)

    return peer


PEERS: dict[str, Callable[..., Ready]] = {
    "triton": ours("triton"),
    "triton, frozen": ours("triton", PREFIX),
    "composed": ours("composed"),
    "composed, frozen": ours("composed", PREFIX),
    "eager": ours("eager"),
    "sdpa": sdpa(),
    "sdpa flash": sdpa("FLASH_ATTENTION"),
    "sdpa cudnn": sdpa("CUDNN_ATTENTION"),
    "sdpa efficient": sdpa("EFFICIENT_ATTENTION"),
    "cat + sdpa": concatenating,
    "flex packed": flex("packed"),
    "flex merged": flex("merged"),
    "fa3": fa3,
    "flashinfer": flashinfer(cascade=False),
    "flashinfer cascade": flashinfer(cascade=True),
}
SLOW_TO_PREPARE = ("flex packed", "flex merged")  # compiled and tuned for every shape


def prepare(names: Iterable[str], x: Inputs, *, gradients: bool) -> tuple[dict[str, Ready], dict[str, str]]:
    """The peers that ran the call once (with its gradients), and the reasons of the others."""
    ready: dict[str, Ready] = {}
    reasons: dict[str, str] = {}
    _buffer.cache_clear()
    if x.query.is_cuda:
        torch.compiler.reset()  # every shape is compiled anew; torch would stop after a few
    for name in names:
        try:
            ready[name] = _prepared(PEERS[name](*x[:6]), x, gradients)
        # Whatever a peer raises is its result. A device that no longer answers fails the synchronisation below.
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), "no message")[:300]
            reasons[name] = line if isinstance(error, Unable) else f"{type(error).__name__}: {line}"
        if x.query.is_cuda:
            torch.cuda.synchronize()
    _buffer.cache_clear()
    return ready, reasons


def _prepared(peer: Ready, x: Inputs, gradients: bool) -> Ready:
    if gradients and not peer.leaves:
        raise Unable("has no backward")
    with peer.context(), torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlexAttention says that it is slow where it is not compiled
        out = peer.forward()
        if gradients:
            # The gradient of ``output`` puts the given one where forward's result has it; the strides are the result's.
            plain = torch.empty_like(out).requires_grad_()
            (placed,) = torch.autograd.grad(peer.output(plain), plain, x.grad)
            peer = peer._replace(upstream=torch.empty_like(out).copy_(placed))
            peer.backward(out)
    return peer
