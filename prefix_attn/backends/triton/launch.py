"""The launches of a call: buffers, grids and kernels. ``plan`` says with which tiles, ``arguments`` what they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefix_attn.backends.outputs import empty_like, grad_sinks, rescaled
from prefix_attn.backends.triton import arguments, direct, interpreter, plan
from prefix_attn.backends.triton.arguments import Given, array, contiguous, given, tiled
from prefix_attn.backends.triton.attend import _forward
from prefix_attn.backends.triton.decode import _fold_prefix, _split_keys
from prefix_attn.backends.triton.plan import cdiv
from prefix_attn.backends.triton.prefix_grad import _grad_prefix, _sum_splits
from prefix_attn.backends.triton.query_grad import _delta, _grad_query
from prefix_attn.backends.triton.sequence_grad import _grad_sequence
from prefix_attn.call import Call

if interpreter.ACTIVE:
    interpreter.repair()


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) by ``_forward``, or by the decode kernels where each row has few queries."""
    out = empty_like(call, call.query, call.value.shape[-1])
    lse = call.query.new_empty(call.query.shape[:3], dtype=torch.float32)
    if call.cu_seqlens_q is not None:
        lse.fill_(-torch.inf)  # of the tokens that belong to no sequence
    if not lse.numel():
        return out, lse
    if plan.decodes(call):
        _decode(call, out, lse)
    else:
        _launch_forward(call, given(call), (array(out), lse, None))
    return out, lse


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """The gradients that ``needs`` asks for, each by the kernels that make it and no other."""
    if not lse.numel():
        return [torch.zeros_like(t) if isinstance(t, Tensor) and needed else None for t, needed in zip(call, needs)]
    grads: list[Tensor | None] = [None] * 7
    known = given(call)
    if call.bias is not None:
        factor = torch.exp(-_lost(call, known, lse))
        grad_out, grad_lse = rescaled(grad_out, grad_lse, factor)
    saved = _saved(call, out, lse, grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous(), grad_lse)
    if needs[0] or needs[5]:
        grads[0] = empty_like(call, call.query, call.query.shape[-1]) if needs[0] else None
        share = torch.zeros_like(lse) if needs[5] else None
        _launch_grad_query(call, known, saved, (array(grads[0]), share))
        if share is not None and call.sinks is not None:
            grads[5] = grad_sinks(call.sinks, lse, share, grad_lse)
    if needs[1] or needs[2]:
        grads[1], grads[2] = (empty_like(call, t, t.shape[-1]) for t in (call.key, call.value))
        _launch_grad_sequence(call, known, saved, (array(grads[1]), array(grads[2])))
    if needs[3] or needs[4]:
        grads[3], grads[4] = _grad_of_prefix(call, known, saved)
    return [grad if needed else None for grad, needed in zip(grads, needs)]


def _launch_forward(call: Call, known: Given, results: tuple[Any, ...]) -> None:
    """``results``: where out and lse go, and an lse that is subtracted from the new one."""
    options = plan.options(call, "forward")
    B, Hkv, G, S, *_ = known.sizes
    args = *known.arrays, contiguous(call.sinks), tiled(known.rows, options["BLOCK_N"]), known.scores, *results
    programs = B * Hkv * G * cdiv(S, options["BLOCK_M"])
    direct.launch(_forward, programs, args, known.sizes, {"CAUSAL": call.is_causal, **options})


def _lost(call: Call, known: Given, lse: Tensor) -> Tensor:
    """(B, Hq, S) log sum_j exp(logit_j - lse): what ``lse`` lost when it was rounded, see ``rescaled``."""
    lost = torch.empty_like(lse)
    query, key, _, prefix_key, _ = known.arrays
    undropped = known.scores._replace(dropout=None, seed=None)
    known = known._replace(arrays=(query, key, None, prefix_key, None), scores=undropped)
    _launch_forward(call, known, (None, lost, lse))
    return lost


def _saved(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """(grad_out, lse in the units of logits, delta): what every backward kernel reads."""
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    B, Hq, S = lse.shape
    upstream = array(grad_out)
    args = array(out), upstream, lse, None if grad_lse is None else grad_lse.float().contiguous(), lse2, delta
    Dv = call.value.shape[-1]
    constants = {"NATURAL": call.bias is not None, "DV": Dv, "BLOCK_M": 64, "BLOCK_DV": max(16, plan.power_of_2(Dv))}
    direct.launch(_delta, B * Hq * cdiv(S, 64), args, (Hq, S), constants | {"enable_fp_fusion": True})
    return upstream, lse2, delta


def _launch_grad_query(call: Call, known: Given, saved: tuple[Any, ...], results: tuple[Any, ...]) -> None:
    options = plan.options(call, "grad_query")
    B, Hkv, G, S, *_ = known.sizes
    args = *known.arrays, tiled(known.rows, options["BLOCK_N"]), known.scores, *saved, *results, float(call.scale)
    programs = B * Hkv * G * cdiv(S, options["BLOCK_M"])
    direct.launch(_grad_query, programs, args, known.sizes, {"CAUSAL": call.is_causal, **options})


def _launch_grad_sequence(call: Call, known: Given, saved: tuple[Any, ...], results: tuple[Any, ...]) -> None:
    options = plan.options(call, "grad_sequence")
    B, Hkv, _, _, T, *_ = known.sizes
    if T:
        args = *known.arrays[:3], known.rows, known.scores, *saved, *results, float(call.scale)
        programs = cdiv(T, options["BLOCK_N"]) * Hkv * B
        direct.launch(_grad_sequence, programs, args, known.sizes, {"CAUSAL": call.is_causal, **options})


def _decode(call: Call, out: Tensor, lse: Tensor) -> None:
    B, Hq, S, _ = call.query.shape
    Hkv, Dv = call.key.shape[1], call.value.shape[-1]
    block_m, chunks, splits, runs, tiles, early = plan.decode(call)
    (query, key, value, *prefix), rows, scores, sizes = given(call)
    slots_out = slots_lse = arrived = None
    if runs or splits > 1:
        slots = (runs + (splits if splits > 1 else 0), B, Hq, S)
        slots_out, slots_lse = lse.new_empty((*slots, Dv)), lse.new_empty(slots)
    if splits > 1:
        arrived = lse.new_zeros((B, Hkv, chunks), dtype=torch.int32)
    if runs:
        order = None if rows.ids is None else arguments.order(call)[1]
        args = query, *prefix, rows, scores, order, slots_out, slots_lse
        constants = {"EARLY": early, **plan.options(call, "fold_prefix")}
        direct.launch(_fold_prefix, tiles * Hkv * runs, args, (runs, *sizes), constants)
        prefix = None, None
    constants = {"CAUSAL": call.is_causal, "EARLY": early, **plan.options(call, "split_keys"), "BLOCK_M": block_m}
    if early:  # starts before the launch above has ended: what both read and write was there before that began
        constants["launch_pdl"] = True
    args = query, key, value, *prefix, contiguous(call.sinks), rows, scores, array(out), lse
    args = *args, slots_out, slots_lse, arrived
    direct.launch(_split_keys, B * Hkv * chunks * splits, args, (chunks, splits, runs, *sizes), constants)


def _grad_of_prefix(call: Call, known: Given, saved: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    assert call.prefix_key is not None and call.prefix_value is not None
    prefix = call.prefix_key, call.prefix_value
    if not call.prefix_key.shape[-2] or not call.prefix_key.numel():
        return torch.zeros_like(prefix[0]), torch.zeros_like(prefix[1])
    options = plan.options(call, "grad_prefix")
    (query, _, _, prefix_key, prefix_value), rows, scores, sizes = known
    B, Hkv, G, S, _, P, N, *_ = sizes
    programs = cdiv(P, options["BLOCK_N"]) * Hkv * N
    splits = plan.prefix_splits(call, cdiv(B * cdiv(S, options["BLOCK_M"]) * G, N), programs)
    order, bounds = (None, None) if N == 1 and call.prefix_ids is None else arguments.grouped(call)
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in prefix)
    parts = grads
    if splits > 1:
        parts = tuple(saved[1].new_empty((splits, N, Hkv, P, t.shape[-1])) for t in grads)
    args = query, prefix_key, prefix_value, rows, scores, order, bounds, *saved, *parts
    direct.launch(_grad_prefix, programs * splits, (*args, float(call.scale)), (splits, *sizes), options)
    if splits > 1:
        for part, grad in zip(parts, grads):
            size = grad.numel()
            constants = {"BLOCK": 1024, "enable_fp_fusion": True}
            direct.launch(_sum_splits, cdiv(size, 1024), (part, grad), (splits, size), constants)
    return grads[0], grads[1]
