"""Every way to attend over [prefix ; sequence] that is compared, each prepared at its best.

A peer is a function of ``Inputs`` that returns a ``Ready`` call. What it prepares is not timed: concatenation into a
buffer, expansion of key heads for a kernel without grouped queries, masks, page tables, compilation. A peer that cannot
run a call gives the reason, which goes into the results.

    cpu, triton, composed, eager    prefix_attention(backend=...)
    sdpa *                          scaled_dot_product_attention on [prefix ; sequence], already concatenated, with its
                                    own choice of kernel or a forced one. One query per row: the heads of a group become
                                    rows, so keys are read once
    cat + sdpa                      the same with the concatenation inside the call: what models do
    cat into + sdpa                 the same, into memory that is already there; it has no backward
    flex packed                     one row that holds the prefix once and all sequences, under a block mask
    flex merged                     the prefix broadcast over the batch and the sequence apart, merged by log-sum-exp
    fa3 *, fa* merged, xformers merged, flashinfer *    benchmarks/libraries.py
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
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
    grad: Tensor  # (B, Hq, S, D), of the output
    wanted: tuple[str, ...] = FIVE  # which of the five need a gradient: all, or the prefix alone


class Ready(NamedTuple):
    """A prepared call, and how its tensors relate to the five inputs."""

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]  # what it is differentiated with respect to; empty: it has no backward
    output: Callable[[Tensor], Tensor]  # to (B, Hq, S, D)
    gradients: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # of the leaves, to those of the inputs
    # Entered outside the timed region.
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    buffers: tuple[Tensor, ...] = ()  # what was allocated in preparing, beside the leaves
    upstream: Tensor | None = None  # the output's gradient as ``forward`` lays it out; ``prepare`` fills it in

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """The gradient of every leaf."""
        return torch.autograd.grad(out, list(self.leaves.values()), self.upstream)


Peer = Callable[[Inputs], Ready]


def inputs(
    B: int, Hq: int, Hkv: int, S: int, T: int, P: int, D: int, *, is_causal: bool, dtype: torch.dtype, device: str
) -> Inputs:
    """Random tensors, contiguous."""
    g = torch.Generator(device).manual_seed(0)
    shapes = ((B, Hq, S, D), (B, Hkv, T, D), (B, Hkv, T, D), (Hkv, P, D), (Hkv, P, D), (B, Hq, S, D))
    *five, grad = (torch.randn(shape, generator=g, device=device).to(dtype) for shape in shapes)
    return Inputs(*five, is_causal=is_causal, grad=grad)


def leaf(tensor: Tensor) -> Tensor:
    """The same numbers, to be differentiated with respect to."""
    return tensor.detach().requires_grad_()


# prefix_attention


def ours(backend: str) -> Peer:
    """The public operator."""

    def peer(x: Inputs) -> Ready:
        leaves = {name: leaf(getattr(x, name)) for name in x.wanted}
        query, key, value, prefix_key, prefix_value = (leaves.get(name, getattr(x, name)) for name in FIVE)

        def forward() -> Any:
            return prefix_attention(query, key, value, prefix_key, prefix_value, is_causal=x.is_causal, backend=backend)

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


def apart(P: int, whole_key: Tensor, whole_value: Tensor) -> dict[str, Tensor]:
    """Gradients of the concatenation, taken apart; the prefix's summed over the batch in float64."""
    return {
        "key": whole_key[:, :, P:],
        "value": whole_value[:, :, P:],
        "prefix_key": whole_key[:, :, :P].double().sum(0),
        "prefix_value": whole_value[:, :, :P].double().sum(0),
    }


def sdpa(kernel: str | None = None) -> Peer:
    """torch's attention; ``kernel`` is a name of torch.nn.attention.SDPBackend, None its own choice."""

    def context() -> AbstractContextManager[Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return contextlib.nullcontext() if kernel is None else sdpa_kernel(getattr(SDPBackend, kernel))

    def peer(x: Inputs) -> Ready:
        problems = []
        # torch's own grouping where the kernel has it; on a CPU only the slow one has.
        for expand in (False, True) if x.query.is_cuda else (True,):
            grouped = x.query.shape[1] != x.key.shape[1] and x.query.shape[2] > 1
            ready = _sdpa(x, expand and grouped, kernel == "CUDNN_ATTENTION")._replace(context=context)
            try:
                with torch.no_grad(), context(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns once per kernel that it does not take
                    ready.forward()
                return ready
            except RuntimeError as error:
                problems.append(str(error).splitlines()[0])
            if not grouped:
                break
        raise Unable("; ".join(dict.fromkeys(problems)))

    return peer


def _sdpa(x: Inputs, expand: bool, square: bool) -> Ready:
    B, Hq, S, D = x.query.shape
    Hkv, P, _ = x.prefix_key.shape
    G, query, (whole_key, whole_value) = Hq // Hkv, x.query, concatenated(x)
    options: dict[str, Any] = {}
    first = 0  # the queries' place in the output
    if S == 1:
        query = _rows(query, x.key)
    elif expand:
        whole_key, whole_value = (t.repeat_interleave(G, dim=1) for t in (whole_key, whole_value))
    elif G > 1:
        options["enable_gqa"] = True
    if x.is_causal and S > 1:
        first = whole_key.shape[2] - S
        if first and not square:
            options["attn_mask"], first = lower_right(S, whole_key), 0
        else:
            # cuDNN aligns a causal mask top left, so P queries that nobody needs are put before the others.
            query = torch.cat([query.new_zeros(B, Hq, first, D), query], dim=2)
            options["is_causal"] = True
    q, k, v = query, leaf(whole_key), leaf(whole_value)
    leaves = {"whole_key": k, "whole_value": v}
    if "query" in x.wanted:
        q = leaf(query)
        leaves = {"query": q, **leaves}

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)

    def back(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        wholes = [grads["whole_key"], grads["whole_value"]]
        if expand:
            wholes = [t.double().unflatten(1, (Hkv, G)).sum(2) for t in wholes]
        found = apart(P, *wholes)
        if "query" in grads:
            found["query"] = grads["query"][:, :, first:].reshape(B, Hq, S, D)
        return {name: found[name] for name in x.wanted}

    return Ready(forward, leaves, lambda out: out[:, :, first:].reshape(B, Hq, S, D), back)


def lower_right(S: int, whole_key: Tensor) -> Any:
    """The causal mask of the last S of T queries: torch's own on a GPU; on a CPU, which would make it anew, numbers."""
    from torch.nn.attention.bias import causal_lower_right

    T = whole_key.shape[2]
    if whole_key.is_cuda:
        return causal_lower_right(S, T)
    visible = torch.ones(S, T, dtype=torch.bool).tril(T - S)
    return whole_key.new_zeros(S, T).masked_fill_(~visible, -torch.inf)


def concatenating(x: Inputs) -> Ready:
    """The concatenation inside the call; its gradient to the prefix is torch's own sum over the batch."""
    leaves = {name: leaf(getattr(x, name)) for name in x.wanted}
    query, key, value, prefix_key, prefix_value = (leaves.get(name, getattr(x, name)) for name in FIVE)
    options = _masked(x)

    def forward() -> Tensor:
        whole = concatenate(prefix_key, key), concatenate(prefix_value, value)
        return F.scaled_dot_product_attention(_rows(query, key), *whole, **options)

    return Ready(forward, leaves, lambda out: out.reshape(x.query.shape), dict)


def concatenating_into(x: Inputs) -> Ready:
    """The concatenation inside the call, into buffers that were there before."""
    buffers = [torch.empty_like(t) for t in concatenated(x)]
    pairs = ((x.prefix_key, x.key), (x.prefix_value, x.value))
    options = _masked(x)

    def forward() -> Tensor:
        for buffer, (prefix, own) in zip(buffers, pairs):
            torch.cat([prefix.expand(own.shape[0], -1, -1, -1), own], dim=2, out=buffer)
        return F.scaled_dot_product_attention(_rows(x.query, x.key), buffers[0], buffers[1], **options)

    return Ready(forward, {}, lambda out: out.reshape(x.query.shape), dict, buffers=tuple(buffers))


def _rows(query: Tensor, key: Tensor) -> Tensor:
    """One query per row: the heads of a group become rows."""
    B, _, S, D = query.shape
    return query.reshape(B, key.shape[1], -1, D) if S == 1 else query


def _masked(x: Inputs) -> dict[str, Any]:
    S, T, P = x.query.shape[2], x.key.shape[2], x.prefix_key.shape[1]
    options: dict[str, Any] = {"enable_gqa": True} if x.query.shape[1] != x.key.shape[1] and S > 1 else {}
    if x.is_causal and S > 1:
        options["attn_mask"] = lower_right(S, x.key.new_empty(1, 1, P + T, 0))
    return options


# FlexAttention and libraries: their modules are heavy to import, or not there


def elsewhere(module: str, name: str, *arguments: Any) -> Peer:
    """The peer ``name`` of another module of ``benchmarks``; with ``arguments`` what it returns for them."""

    def peer(x: Inputs) -> Ready:
        found = getattr(importlib.import_module(f"benchmarks.{module}"), name)
        return (found(*arguments) if arguments else found)(x)

    return peer


PEERS: dict[str, Peer] = {
    "cpu": ours("cpu"),
    "triton": ours("triton"),
    "composed": ours("composed"),
    "eager": ours("eager"),
    "sdpa": sdpa(),
    "sdpa flash": sdpa("FLASH_ATTENTION"),
    "sdpa cudnn": sdpa("CUDNN_ATTENTION"),
    "sdpa efficient": sdpa("EFFICIENT_ATTENTION"),
    "sdpa math": sdpa("MATH"),
    "cat + sdpa": concatenating,
    "cat into + sdpa": concatenating_into,
    "flex packed": elsewhere("flex", "packed"),
    "flex merged": elsewhere("flex", "merged"),
    "fa3": elsewhere("libraries", "fa3"),
    "fa2 merged": elsewhere("libraries", "flash_merged", "flash_attn"),
    "fa3 merged": elsewhere("libraries", "flash_merged", "flash_attn_interface"),
    "fa4 merged": elsewhere("libraries", "flash_merged", "flash_attn.cute"),
    "xformers merged": elsewhere("libraries", "xformers_merged"),
    "flashinfer": elsewhere("libraries", "flashinfer", False),
    "flashinfer cascade": elsewhere("libraries", "flashinfer", True),
}
OURS = ("cpu", "triton", "composed", "eager")
SLOW_TO_PREPARE = ("flex packed", "flex merged")  # compiled and tuned for every shape
STORES_SCORES = ("eager", "sdpa math")
SCORES = 1 << 26  # bytes of them at which, on a CPU, those two are left out unless they are asked for


def chosen(device: str, asked: Sequence[str] | None = None) -> dict[str, Peer]:
    """The peers of a run: those asked for, or all that are worth their time on this device.

    Raises:
        ValueError: a name is not that of a peer.
    """
    if unknown := sorted({*(asked or ())} - PEERS.keys()):
        raise ValueError(f"no peer is named {unknown[0]!r}; there are {', '.join(PEERS)}")
    slow = {*SLOW_TO_PREPARE, *(STORES_SCORES if device == "cuda" else ("sdpa flash",))}  # on a CPU it is sdpa's choice
    return {name: PEERS[name] for name in asked or PEERS if asked or name not in slow}


class Prepared(NamedTuple):
    """The peers that ran a call once, with its gradients; the reasons of the others; seconds that each took for it."""

    ready: dict[str, Ready]
    reasons: dict[str, str]
    seconds: dict[str, float]


def prepare(peers: Mapping[str, Peer], x: Inputs, *, gradients: bool) -> Prepared:
    """Every peer, once. Its seconds hold compilation and tuning."""
    done = Prepared({}, {}, {})
    _buffer.cache_clear()
    if x.query.is_cuda:
        torch.compiler.reset()  # every shape is compiled anew; torch would stop after a few
    for name, peer in peers.items():
        begin = time.perf_counter()
        try:
            done.ready[name] = _prepared(peer(x), x, gradients)
        # Whatever a peer raises is its result. A device that no longer answers fails the synchronisation below.
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), "no message")[:300]
            done.reasons[name] = line if isinstance(error, Unable) else f"{type(error).__name__}: {line}"
        if x.query.is_cuda:
            torch.cuda.synchronize()
        done.seconds[name] = time.perf_counter() - begin
    _buffer.cache_clear()
    return done


def _prepared(peer: Ready, x: Inputs, gradients: bool) -> Ready:
    gradients = gradients and bool(peer.leaves)
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
