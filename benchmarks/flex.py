"""FlexAttention over [prefix ; sequence], in its own two shapes; compiled and tuned for every call's shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention, noop_mask

from benchmarks.peers import FIVE, Inputs, Ready, Unable, leaf


def best(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Compiled at its best."""
    mode = None if device.type == "cpu" else "max-autotune-no-cudagraphs"
    return torch.compile(function, dynamic=False, mode=mode)


def leaves_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves; none on a CPU, where FlexAttention has no backward."""
    return {name: leaf(tensor) for name, tensor in tensors.items() if tensor.device.type != "cpu"}


def packed(x: Inputs) -> Ready:
    """All sequences in one row and one prefix behind them: FlexAttention's own shape for a shared prefix.

    The prefix comes last, so that sequences of whole tiles stay whole tiles for every P.
    """
    B, Hq, S, _ = x.query.shape
    Hkv, P, _ = x.prefix_key.shape
    T = x.key.shape[2]
    if S == 1:
        raise Unable("decoding: a tile of 128 packed queries would visit the keys of 128 sequences")

    def one_row(tensor: Tensor, prefix: Tensor | None = None) -> Tensor:
        row = tensor.transpose(0, 1).flatten(1, 2)
        return (row if prefix is None else torch.cat([row, prefix], dim=1))[None].contiguous()

    row = one_row(x.query)
    whole = {"whole_key": one_row(x.key, x.prefix_key), "whole_value": one_row(x.value, x.prefix_value)}
    query = {"query": row} if "query" in x.wanted else {}
    leaves = leaves_of(query | whole)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = (j < B * T) & (i // S == j // T)
        if x.is_causal:
            own = own & (i % S + T - S >= j % T)
        return (j >= B * T) | own

    compiled = x.query.is_cuda
    mask = create_block_mask(visible, None, None, B * S, B * T + P, device=x.query.device, _compile=compiled)
    run = best(lambda q, k, v: flex_attention(q, k, v, block_mask=mask, enable_gqa=Hq != Hkv), x.query.device)

    def unpacked(row: Tensor) -> Tensor:
        return row[0].unflatten(1, (B, -1)).transpose(0, 1)

    def back(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        k, v = grads["whole_key"], grads["whole_value"]
        found = {
            "key": unpacked(k[:, :, : B * T]),
            "value": unpacked(v[:, :, : B * T]),
            "prefix_key": k[0, :, B * T :],
            "prefix_value": v[0, :, B * T :],
        }
        found |= {name: unpacked(grads[name]) for name in query}
        return {name: found[name] for name in x.wanted}

    call = [leaves.get(name, tensor) for name, tensor in {"query": row, **whole}.items()]
    return Ready(lambda: run(*call), leaves, unpacked, back)


def merged(x: Inputs) -> Ready:
    """The prefix with a batch of one, broadcast (decoding: all rows folded into its queries), and the sequence."""
    S, T = x.query.shape[2], x.key.shape[2]
    if not x.prefix_key.shape[1]:
        raise Unable("without a prefix there is nothing to merge")
    if x.query.device.type == "cpu":
        raise Unable("on a CPU torch compiles FlexAttention without a log-sum-exp")
    device, fold = x.query.device, S == 1
    how: dict[str, Any] = {"device": device, "_compile": device.type == "cuda"}
    own_mask = prefix_mask = None
    if x.is_causal and not fold:
        own_mask = create_block_mask(lambda b, h, i, j: i + T - S >= j, None, None, S, T, **how)
    if not fold:  # a batch of one key for many queries is allowed only under a mask that has the queries' batch
        prefix_mask = create_block_mask(noop_mask, x.query.shape[0], None, S, x.prefix_key.shape[1], **how)
    options: dict[str, Any] = {"enable_gqa": x.query.shape[1] != x.key.shape[1], "return_aux": AuxRequest(lse=True)}

    def attend(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
        own, own_aux = flex_attention(q, k, v, block_mask=own_mask, **options)
        rows = q.transpose(0, 2) if fold else q
        prefix, aux = flex_attention(rows, pk[None], pv[None], block_mask=prefix_mask, **options)
        lse = aux.lse
        if fold:
            prefix, lse = prefix.transpose(0, 2), lse.transpose(0, 2)
        weight = torch.sigmoid(lse - own_aux.lse)[..., None]
        return (own + weight * (prefix.float() - own.float())).to(q.dtype)

    run = best(attend, device)
    leaves = leaves_of({name: getattr(x, name) for name in x.wanted})
    five = [leaves.get(name, getattr(x, name)) for name in FIVE]
    return Ready(lambda: run(*five), leaves, lambda out: out, dict)
