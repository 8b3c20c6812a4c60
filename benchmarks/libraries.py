"""Peers from libraries that may not be there; each says so."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Inputs, Peer, Ready, Unable, apart, concatenated, leaf


def library(name: str, package: str) -> Any:
    """The module, or ``Unable`` with the package that has it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Unable(f"{package} is not installed") from None


def fa3(x: Inputs) -> Ready:
    """FlashAttention 3 on the concatenation; its causal mask is aligned bottom right."""
    fa = library("flash_attn_interface", "flash_attn_interface")
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
        found = {"query": query, **apart(P, *wholes)}
        return {name: found[name] for name in x.wanted}

    return Ready(forward, leaves, lambda out: out.transpose(1, 2), back)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Of two attentions (B, S, H, D), with lse (B, H, S), the one over the keys of both."""
    weight = torch.sigmoid(other_lse - lse).transpose(1, 2)[..., None]
    return (out + weight * (other.float() - out.float())).to(out.dtype)


def flash_merged(module: str) -> Peer:
    """FlashAttention 2, 3 or 4 twice: over the sequence, and over one prefix that all rows share by a stride of 0."""

    def peer(x: Inputs) -> Ready:
        fa = library(module, module)
        B, P = x.query.shape[0], x.prefix_key.shape[1]
        if not P:
            raise Unable("without a prefix there is nothing to merge")
        query, key, value = (t.transpose(1, 2).contiguous() for t in (x.query, x.key, x.value))
        prefix_key, prefix_value = (
            t.transpose(0, 1)[None].expand(B, -1, -1, -1) for t in (x.prefix_key, x.prefix_value)
        )

        def attend(key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
            options = {"return_lse": True} if module == "flash_attn.cute" else {"return_attn_probs": True}
            out, lse, *_ = fa.flash_attn_func(query, key, value, causal=causal, **options)
            return out, lse

        def forward() -> Tensor:
            return merge(*attend(key, value, x.is_causal), *attend(prefix_key, prefix_value, False))

        return Ready(forward, {}, lambda out: out.transpose(1, 2), dict)  # no gradient passes through their lse

    return peer


def xformers_merged(x: Inputs) -> Ready:
    """xformers' partial attention over sequence and prefix, and its merge."""
    fmha = library("xformers.ops.fmha", "xformers")
    B, Hq, S, D = x.query.shape
    (Hkv, P, _), T = x.prefix_key.shape, x.key.shape[2]
    if not P:
        raise Unable("without a prefix there is nothing to merge")
    grouped = lambda t: t.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, Hq // Hkv, -1)  # (B, T, Hkv, G, D)
    query = x.query.unflatten(1, (Hkv, Hq // Hkv)).permute(0, 3, 1, 2, 4).contiguous()
    own = grouped(x.key), grouped(x.value)
    prefix = [grouped(t[None].expand(B, -1, -1, -1)) for t in (x.prefix_key, x.prefix_value)]
    bias = fmha.attn_bias.LowerTriangularFromBottomRightMask() if x.is_causal and S > 1 and T else None

    def forward() -> Tensor:
        parts = [fmha.memory_efficient_attention_partial(query, *own, attn_bias=bias)]
        parts.append(fmha.memory_efficient_attention_partial(query, *prefix))
        return fmha.merge_attentions(*zip(*parts))[0]

    return Ready(forward, {}, lambda out: out.reshape(B, S, Hq, D).transpose(1, 2), dict)


def flashinfer(cascade: bool) -> Peer:
    """Paged decoding. Both forms keep the prefix's pages once; the cascade also reads them once per batch."""

    def peer(x: Inputs) -> Ready:
        fi = library("flashinfer", "flashinfer")
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
