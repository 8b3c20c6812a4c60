"""The launches of a call: buffers, grids and kernels. ``plan`` says with which tiles, ``arguments`` what they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefix_attn.backends.outputs import empty_like, grad_sinks, rescaled
from prefix_attn.backends.triton import arguments, interpreter, plan
from prefix_attn.backends.triton.attend import _forward
from prefix_attn.backends.triton.decode import _fold_prefix, _split_keys
from prefix_attn.backends.triton.plan import cdiv
from prefix_attn.backends.triton.prefix_grad import _grad_prefix, _sum_splits
from prefix_attn.backends.triton.primitives import Array, Scores
from prefix_attn.backends.triton.query_grad import _delta, _grad_query
from prefix_attn.backends.triton.sequence_grad import _grad_sequence
from prefix_attn.call import Call

if interpreter.ACTIVE:
    interpreter.repair()


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) by ``_forward``, or by the decode kernels where each row has few queries."""
    out = empty_like(call, call.query, call.value.shape[-1])
    lse = torch.empty(call.query.shape[:3], dtype=torch.float32, device=out.device)
    if call.cu_seqlens_q is not None:
        lse.fill_(-torch.inf)  # of the tokens that belong to no sequence
    if not lse.numel():
        return out, lse
    B, Hkv, G, S, *_ = sizes = arguments.sizes(call)
    if plan.decodes(call):
        _decode(call, out, lse)
    else:
        options = plan.options(call, "forward")
        num = cdiv(S, options["BLOCK_M"])
        _forward[(B * Hkv * G * num,)](
            *arguments.arrays(call),
            arguments.sinks(call),
            arguments.rows(call, options["BLOCK_N"]),
            arguments.scores(call),
            arguments.array(out),
            lse,
            None,
            *sizes,
            CAUSAL=call.is_causal,
            **options,
        )
    return out, lse


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """The gradients that ``needs`` asks for, each by the kernels that make it and no other."""
    if not lse.numel():
        return [torch.zeros_like(t) if isinstance(t, Tensor) and needed else None for t, needed in zip(call, needs)]
    grads: list[Tensor | None] = [None] * 7
    if call.bias is not None:
        grad_out, grad_lse = rescaled(grad_out, grad_lse, torch.exp(-_lost(call, lse)))
    arrays, scores = arguments.arrays(call), arguments.scores(call)
    saved = _saved(call, out, lse, grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous(), grad_lse)
    if needs[0] or needs[5]:
        grads[0] = empty_like(call, call.query, call.query.shape[-1]) if needs[0] else None
        share = torch.zeros_like(lse) if needs[5] else None
        _launch_grad_query(call, arrays, scores, saved, grads[0], share)
        if share is not None and call.sinks is not None:
            grads[5] = grad_sinks(call.sinks, lse, share, grad_lse)
    if needs[1] or needs[2]:
        grads[1], grads[2] = (empty_like(call, t, t.shape[-1]) for t in (call.key, call.value))
        _launch_grad_sequence(call, arrays, scores, saved, grads[1], grads[2])
    if needs[3] or needs[4]:
        grads[3], grads[4] = _grad_of_prefix(call, arrays, saved)
    return [grad if needed else None for grad, needed in zip(grads, needs)]


def _lost(call: Call, lse: Tensor) -> Tensor:
    """(B, Hq, S) log sum_j exp(logit_j - lse): what ``lse`` lost when it was rounded, see ``rescaled``."""
    lost = torch.empty_like(lse)
    B, Hkv, G, S, *_ = sizes = arguments.sizes(call)
    options = plan.options(call, "forward")
    query, key, _, prefix_key, _ = arguments.arrays(call)
    _forward[(B * Hkv * G * cdiv(S, options["BLOCK_M"]),)](
        query, key, None, prefix_key, None, arguments.sinks(call), arguments.rows(call, options["BLOCK_N"]),
        arguments.scores(call)._replace(dropout=None, seed=None), None, lost, lse, *sizes, CAUSAL=call.is_causal,
        **options,
    )  # fmt: skip
    return lost


def _saved(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """(grad_out, lse in the units of logits, delta): what every backward kernel reads."""
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    B, Hq, S = lse.shape
    _delta[(B * Hq * cdiv(S, 64),)](
        arguments.array(out),
        arguments.array(grad_out),
        lse,
        None if grad_lse is None else grad_lse.float().contiguous(),
        lse2,
        delta,
        Hq,
        S,
        NATURAL=call.bias is not None,
        DV=call.value.shape[-1],
        BLOCK_M=64,
        BLOCK_DV=max(16, plan.power_of_2(call.value.shape[-1])),
        enable_fp_fusion=True,
    )
    return arguments.array(grad_out), lse2, delta


def _launch_grad_query(
    call: Call,
    arrays: tuple[Array | None, ...],
    scores: Scores,
    saved: tuple[Any, ...],
    grad: Tensor | None,
    share: Tensor | None,
) -> None:
    B, Hkv, G, S, *_ = sizes = arguments.sizes(call)
    options = plan.options(call, "grad_query")
    _grad_query[(B * Hkv * G * cdiv(S, options["BLOCK_M"]),)](
        *arrays,
        arguments.rows(call, options["BLOCK_N"]),
        scores,
        *saved,
        arguments.array(grad),
        share,
        call.scale,
        *sizes,
        CAUSAL=call.is_causal,
        **options,
    )


def _launch_grad_sequence(
    call: Call,
    arrays: tuple[Array | None, ...],
    scores: Scores,
    saved: tuple[Any, ...],
    grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> None:
    B, Hkv, _, _, T, *_ = sizes = arguments.sizes(call)
    if not T:
        return
    options = plan.options(call, "grad_sequence")
    _grad_sequence[(cdiv(T, options["BLOCK_N"]) * Hkv * B,)](
        *arrays[:3],
        arguments.rows(call),
        scores,
        *saved,
        arguments.array(grad_key),
        arguments.array(grad_value),
        call.scale,
        *sizes,
        CAUSAL=call.is_causal,
        **options,
    )


def _decode(call: Call, out: Tensor, lse: Tensor) -> None:
    B, Hq, S, _ = call.query.shape
    Hkv, Dv = call.key.shape[1], call.value.shape[-1]
    block_m, chunks, splits, runs, tiles, early = plan.decode(call)
    options = plan.options(call, "split_keys") | {"BLOCK_M": block_m}
    query, key, value, prefix_key, prefix_value = arguments.arrays(call)
    slots_out = slots_lse = arrived = None
    if runs or splits > 1:
        slots = (runs + (splits if splits > 1 else 0), B, Hq, S)
        slots_out = torch.empty(*slots, Dv, dtype=torch.float32, device=out.device)
        slots_lse = torch.empty(slots, dtype=torch.float32, device=out.device)
    if splits > 1:
        arrived = torch.zeros(B, Hkv, chunks, dtype=torch.int32, device=out.device)
    rows, scores, sizes = arguments.rows(call), arguments.scores(call), arguments.sizes(call)
    if runs:
        order = None if rows.ids is None else arguments.order(call)[1]
        _fold_prefix[(tiles * Hkv * runs,)](
            query, prefix_key, prefix_value, rows, scores, order, slots_out, slots_lse, runs, *sizes,
            EARLY=early, **plan.options(call, "fold_prefix"),
        )  # fmt: skip
        prefix_key = prefix_value = None
    if early:  # starts before the launch above has ended: what both read and write was there before that began
        options["launch_pdl"] = True
    _split_keys[(B * Hkv * chunks * splits,)](
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        arguments.sinks(call),
        rows,
        scores,
        arguments.array(out),
        lse,
        slots_out,
        slots_lse,
        arrived,
        chunks,
        splits,
        runs,
        *sizes,
        CAUSAL=call.is_causal,
        EARLY=early,
        **options,
    )


def _grad_of_prefix(call: Call, arrays: tuple[Array | None, ...], saved: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    assert call.prefix_key is not None and call.prefix_value is not None
    prefix = call.prefix_key, call.prefix_value
    if not call.prefix_key.shape[-2] or not call.prefix_key.numel():
        return torch.zeros_like(prefix[0]), torch.zeros_like(prefix[1])
    B, Hkv, G, S, _, P, N, *_ = sizes = arguments.sizes(call)
    options = plan.options(call, "grad_prefix")
    programs = cdiv(P, options["BLOCK_N"]) * Hkv * N
    splits = plan.prefix_splits(call, cdiv(B * cdiv(S, options["BLOCK_M"]) * G, N), programs)
    order, bounds = (None, None) if N == 1 and call.prefix_ids is None else arguments.grouped(call)
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in prefix)
    parts = grads
    if splits > 1:
        parts = tuple(torch.empty(splits, N, Hkv, P, t.shape[-1], dtype=torch.float32, device=t.device) for t in grads)
    query, _, _, prefix_key, prefix_value = arrays
    _grad_prefix[(programs * splits,)](
        query,
        prefix_key,
        prefix_value,
        arguments.rows(call),
        arguments.scores(call),
        order,
        bounds,
        *saved,
        *parts,
        call.scale,
        splits,
        *sizes,
        **options,
    )
    if splits > 1:
        for part, grad in zip(parts, grads):
            size = grad.numel()
            _sum_splits[(cdiv(size, 1024),)](part, grad, splits, size, BLOCK=1024, enable_fp_fusion=True)
    return grads[0], grads[1]
