"""Where a prefix meets a transformers model: one attention function, one mask function, one state.

The state of a forward (its prefix) travels as a keyword argument from the model's backbone through every layer to the
attention function. Nothing global, nothing on the modules: recomputation under gradient checkpointing, two forwards
before one backward and a change of prefix in between see the state that they started with. The KV cache holds the
sequence alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from prefix_attn.functional import prefix_attention
from prefix_attn.hf.banks import Rows, grow

NAME = "prefix_attn"  # of both functions: without a mask function of its name, padding would be ignored
STATE = "prefix_state"  # the keyword argument


class Prefix(NamedTuple):
    """What an attention module hands to ``prefix_attention``."""

    key: Tensor | None = None  # (H, P, D) or (N, H, P, D)
    value: Tensor | None = None
    ids: Tensor | None = None  # (B,)
    lengths: Tensor | None = None  # (N,)


class PrefixState:
    """The prefixes of one forward: what each layer attends to before its sequence."""

    def __init__(self, kv: Tensor, *, shift: int | Tensor, backend: str, rows: Rows | None = None) -> None:
        """One prefix for all rows, or a bank.

        Args:
            kv: (2 * L, H, P, D), or a bank (N, 2 * L, H, P, D).
            shift: what is added to positions; (B, 1) for a bank.
            backend: of ``prefix_attention``.
            rows: of a bank.
        """
        parts = kv.unbind(-4)
        self.layers = list(zip(parts[::2], parts[1::2]))
        self.shift = shift
        self.backend = backend
        self.rows = rows
        self.served: set[int] = set()

    def take(self, module: nn.Module, key: Tensor, value: Tensor) -> Prefix:
        """The prefix of the layer that ``module`` is in, for the rows of ``key``."""
        layer = _layer(module)
        self.served.add(layer)
        if self.rows is None:
            return Prefix(*self.layers[layer])
        return Prefix(*self.layers[layer], grow(self.rows.ids, key.shape[0]), self.rows.lengths)


class Capture:
    """A state without a prefix that keeps each layer's keys (rotated) and values, (B, H, T, D)."""

    shift = 0
    backend = "auto"

    def __init__(self) -> None:
        """Empty."""
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, module: nn.Module, key: Tensor, value: Tensor) -> Prefix:
        """Keep them; there is no prefix."""
        self.layers[_layer(module)] = (key, value)
        return Prefix()


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    prefix_state: PrefixState | Capture | None = None,
    **_: Any,  # transformers hands every attention function what any of them might want
) -> tuple[Tensor, None]:
    """transformers' attention interface: (B, H, S, D) in, (B, S, H, D) out."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    key_mask = bias = None
    if attention_mask is not None and attention_mask.dim() == 2:
        key_mask = attention_mask
    elif attention_mask is not None:
        causal = False  # the mask says it all
        if attention_mask.dtype == torch.bool and attention_mask.shape[1:3] == (1, 1):
            key_mask = attention_mask[:, 0, 0].expand(query.shape[0], -1)
        else:
            bias = _bias(attention_mask, query)
    prefix, backend = Prefix(), "auto"
    if prefix_state is not None:
        prefix, backend = prefix_state.take(module, key, value), prefix_state.backend
    out = prefix_attention(
        query,
        key,
        value,
        prefix.key,
        prefix.value,
        prefix_ids=prefix.ids,
        prefix_lengths=prefix.lengths,
        key_mask=key_mask,
        bias=bias,
        is_causal=causal,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout,
        backend=backend,
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def prefix_attention_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **rest: Any,
) -> Tensor | None:
    """The sequence's mask, in the smallest form that says it: the prefix is not in it, and so is always visible.

    None: plain causal. (B, T) bool: causal with padding. (B, 1, S, T) bool: anything else (windows, packing, static
    caches).
    """
    causal = mask_function is causal_mask_function and isinstance(q_offset, int) and kv_offset == 0
    if causal and q_offset + q_length == kv_length:
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] == kv_length:
            padding = attention_mask.bool()
            return None if not torch.compiler.is_compiling() and bool(padding.all()) else padding
    rest |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **rest,
    )


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """A 4-D mask, boolean or additive, as a bias for every query head; a view where it has one for all."""
    if mask.dtype == torch.bool:
        mask = query.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return mask.to(query.dtype).expand(-1, query.shape[1], -1, -1)


def _layer(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise NotImplementedError(f"{type(module).__name__} does not say which layer it is in (layer_idx)")
    return layer


AttentionInterface.register(NAME, prefix_attention_forward)
AttentionMaskInterface.register(NAME, prefix_attention_mask)
