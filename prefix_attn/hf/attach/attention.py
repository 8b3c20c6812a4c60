"""The attention function and the mask function that transformers calls, and the state that brings them the prefix.

The state travels as a keyword argument from each stack of layers to the attention function. It is neither global nor an
attribute of modules. So recomputation under gradient checkpointing sees the state of its forward, even if another
forward or a change of prefix came in between. The KV cache holds the sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from prefix_attn.call import MAX_HEAD_SIZE
from prefix_attn.functional import prefix_attention
from prefix_attn.hf.attach.banks import BatchRows, grow
from prefix_attn.hf.attach.packed import Sequences

# Names of attention function and mask function: without a mask function of its name, padding would be ignored.
NAME = "prefix_attn"
MASKED = "prefix_attn_masked"  # for modules whose is_causal does not say what their mask does
STATE = "prefix_state"  # the keyword argument
DISTANCES = "prefix_distances"  # another, for stacks whose tokens are moved by their distance from the prefix
PACKED = "prefix_packed"  # another, for rows of several sequences
FIRST = "prefix_first"  # another, for an infix: the column of the first query, which caches of a fixed size do not tell


Watch = Callable[[nn.Module, Tensor], None]  # of a module: shares (B, Hq, S)


class Prefix(NamedTuple):
    """The prefix of one attention module, as arguments of ``prefix_attention``."""

    key: Tensor | None = None  # (H, P, D) or (N, H, P, D)
    value: Tensor | None = None
    ids: Tensor | None = None  # (B,)
    lengths: Tensor | None = None  # (N,)
    gate: Tensor | None = None  # (Hq,) or (B, Hq)
    start: Tensor | None = None  # (B,)


class PrefixState:
    """The prefixes of one forward, by attention module.

    ``weights`` says whether each module returns its attention weights. ``entered`` are the stacks that ran, ``served``
    the modules that took their prefix, ``recent`` those that took it in the last call of their stack. ``sites`` are the
    modules of which one has to in each call: by stack and site. ``longest`` is the largest P.
    """

    weights = False

    def __init__(
        self,
        kv: Tensor,
        slots: Mapping[nn.Module, int],
        *,
        shifts: Mapping[nn.Module, int | Tensor],
        backend: str,
        lengths: Sequence[int] | None = None,
        rows: BatchRows | None = None,
        gates: Tensor | None = None,
        starts: Tensor | None = None,
        watch: Watch | None = None,
    ) -> None:
        """One prefix for all rows, or a bank.

        Args:
            kv: (2 * slots, H, P, D), or a bank (N, 2 * slots, H, P, D).
            slots: of the modules that have a prefix.
            shifts: where the tokens of each stack start; (B, 1) for a bank.
            backend: of ``prefix_attention``.
            lengths: how many of the P tokens each slot sees; None = all.
            rows: of a bank.
            gates: (slots, Hq), or of a bank (N, slots, Hq).
            starts: (B,) int64: the first column of each row that sees an infix; None = all see their prefix.
            watch: is told the share of the softmax that each query gives to the prefix.
        """
        self.longest = kv.shape[-2]
        parts = kv.unbind(-4)
        self.layers = list(zip(parts[::2], parts[1::2]))
        self.has_lengths = lengths is not None
        if lengths is not None:
            self.layers = [(key[..., :n, :], value[..., :n, :]) for (key, value), n in zip(self.layers, lengths)]
        self.gates = None if gates is None else gates.unbind(-2)
        self.slots = slots
        self.shifts = shifts
        self.backend = backend
        self.rows = rows
        self.starts = starts
        self.watch = watch
        self.entered: set[nn.Module] = set()
        self.served: set[nn.Module] = set()
        self.recent: set[nn.Module] = set()
        self.sites: dict[nn.Module, dict[str, set[nn.Module]]] = {}

    def take(self, call: AttentionCall) -> Prefix:
        """The prefix of the module, for the rows of the call."""
        slot = self.slots.get(call.module)
        if slot is None:
            return Prefix()
        self.served.add(call.module)
        self.recent.add(call.module)
        gate = None if self.gates is None else self.gates[slot]
        start = None if self.starts is None else self._start(self.starts, call)
        ids = lengths = None
        if self.rows is not None:
            ids, lengths = grow(self.rows.ids, call.query.shape[0]), self.rows.lengths
            if self.has_lengths:
                lengths = lengths.clamp(max=self.layers[slot][0].shape[-2])
            gate = None if gate is None else gate[ids.clamp(min=0)]  # whatever it is in rows without a prefix
        prefix = Prefix(*self.layers[slot], ids, lengths, gate, start)
        # A device_map may have this layer elsewhere, and starts are where the caller's labels or prompt are.
        return Prefix(*(None if t is None else t.to(call.query.device) for t in prefix))

    def _start(self, starts: Tensor, call: AttentionCall) -> Tensor:
        """``starts`` where the operator has the last query at the last key: caches are larger, or hold a window."""
        B, _, S, _ = call.query.shape
        first = call.first.to(starts.device) if isinstance(call.first, Tensor) else call.first
        return grow(starts, B) + (call.key.shape[2] - S - first)


class AttentionCall(NamedTuple):
    """The tensors that an attention module was called with."""

    module: nn.Module
    query: Tensor  # (B, Hq, S, D)
    key: Tensor  # (B, H, T, D), rotated
    value: Tensor  # (B, H, T, Dv)
    mask: Tensor | None
    first: int | Tensor = 0  # column of the first query, where that is asked for


class Distances(NamedTuple):
    """How to bias the prefix by distance: the position of the first query, and the bias function of each module."""

    first: int | Tensor
    functions: Mapping[nn.Module, Callable[..., Tensor]]


class Capture:
    """A state without a prefix that records the calls of all attention modules.

    ``masks_outside`` says whether a stack was given a mask.
    """

    backend = "auto"
    longest = 0
    shifts: Mapping[nn.Module, int | Tensor] = {}
    starts = None
    watch = None
    weights = False
    sites: Mapping[nn.Module, Mapping[str, set[nn.Module]]] = {}
    masks_outside = False

    def __init__(self) -> None:
        """Empty."""
        self.recent: set[nn.Module] = set()
        self.entered: set[nn.Module] = set()
        self.calls: list[AttentionCall] = []

    def take(self, call: AttentionCall) -> Prefix:
        """Record the call. There is no prefix."""
        self.calls.append(call)
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
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    prefix_state: PrefixState | Capture | None = None,
    prefix_distances: Distances | None = None,
    prefix_first: int | Tensor = 0,
    prefix_packed: Sequences | None = None,
    **_: Any,  # transformers hands every attention function what any of them might want
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: (B, H, S, D) in, (B, S, H, D) out.

    If the state asks for weights, they are returned too: (B, Hq, S, P + T), first the prefix and then the sequence, as
    in PEFT but without dropout. P is the layer's own if layers differ. In a bank, rows with a shorter prefix have 0 in
    the columns that only the longest one fills.
    """
    if indices is not None or block_indices is not None:
        raise NotImplementedError(f"{type(module).__name__} chooses the keys of each query (sparse attention)")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    sequence = _visible(query, attention_mask, position_bias, causal) | {"sinks": s_aux}
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "dropout_p": dropout}
    prefix = Prefix()
    if prefix_state is not None:
        prefix = prefix_state.take(AttentionCall(module, query, key, value, attention_mask, prefix_first))
        options["backend"] = prefix_state.backend
    function = None if prefix_distances is None else prefix_distances.functions.get(module)
    if prefix_distances is not None and function is not None and prefix.key is not None and prefix.value is not None:
        if prefix.ids is not None:
            raise NotImplementedError(
                f"{type(module).__name__} moves the tokens of all rows alike, and prefixes of one batch need other "
                "distances; position_mode='none' works"
            )
        bias = function(query.shape[2], prefix.key.shape[1], query.device, prefix_distances.first)
        merged = partial(_at_a_distance, prefix_bias=bias, sequence=sequence)
        attend: Callable[..., Any] = lambda *tensors, **others: merged(*tensors, **others)[0]
        out, share = merged(query, key, value, prefix.key, prefix.value, **options)
    else:
        share = None
        options |= {"prefix_ids": prefix.ids, "prefix_lengths": prefix.lengths}
        options |= {"prefix_gate": prefix.gate, "prefix_start": prefix.start}
        attend = partial(prefix_attention, **sequence)
        # One bank entry or one start for each row would have to become one for each sequence.
        plain = prefix.ids is None and prefix.start is None and position_bias is None
        if prefix_packed is not None and plain and prefix_packed.are_all_of(attention_mask, query, key):
            attend = partial(prefix_packed.attend, sinks=s_aux)
        out = attend(query, key, value, prefix.key, prefix.value, **options)
    if prefix_state is not None and prefix_state.watch is not None and prefix.key is not None:
        prefix_state.watch(module, _share(query, key, value, prefix, sequence, options) if share is None else share)
    weights = None
    if prefix_state is not None and prefix_state.weights:
        options |= {"backend": "eager", "dropout_p": 0.0}
        weights = _weights(partial(attend, **options), query, key, prefix.key)
    return out.transpose(1, 2).contiguous(), weights


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
    """The sequence's mask in its smallest form. The prefix is not part of it, and is therefore always visible.

    None: no padding. (B, T) bool: padding. In both cases the module knows whether it is causal. (B, 1, S, T) bool:
    anything else (windows, packing, static caches).
    """
    causal = mask_function is causal_mask_function and isinstance(q_offset, int) and q_offset + q_length == kv_length
    if (causal or mask_function is bidirectional_mask_function) and kv_offset == 0:
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] == kv_length:
            padding = attention_mask.bool()
            return None if not torch.compiler.is_compiling() and bool(padding.all()) else padding
    return full_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **rest,
    )


def full_mask(**arguments: Any) -> Tensor | None:
    """The sequence's mask, always (B, 1, S, T) bool."""
    return sdpa_mask(**arguments | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _visible(query: Tensor, mask: Tensor | None, position_bias: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """The arguments of ``prefix_attention`` that say which keys of the sequence a query sees, and how well."""
    key_mask = bias = None
    if mask is not None and mask.dim() == 2:
        key_mask = mask
    elif mask is not None:
        is_causal = False  # the mask says it all
        if mask.dtype == torch.bool and mask.shape[1:3] == (1, 1):
            key_mask = mask[:, 0, 0].expand(query.shape[0], -1)
        else:
            bias = _bias(mask, query)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    return {"key_mask": key_mask, "bias": bias, "is_causal": is_causal}


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """A 4-D mask, boolean or additive, as a bias for every query head. It is a view if all heads share the mask."""
    if mask.dtype == torch.bool:
        mask = query.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return mask.to(query.dtype).expand(-1, query.shape[1], query.shape[2], -1)


def _weights(attend: Callable[..., Any], query: Tensor, key: Tensor, prefix_key: Tensor | None) -> Tensor:
    """The weights (B, Hq, S, P + T) of ``attend``: its output for values that form an identity matrix."""
    P, T = 0 if prefix_key is None else prefix_key.shape[-2], key.shape[2]
    parts = []
    for columns in torch.eye(P + T, dtype=query.dtype, device=query.device).split(MAX_HEAD_SIZE, dim=1):
        value = columns[P:].expand(*key.shape[:2], -1, -1)
        prefix_value = None if prefix_key is None else columns[:P].expand(*prefix_key.shape[:-2], -1, -1)
        parts.append(attend(query, key, value, prefix_key, prefix_value))
    return torch.cat(parts, dim=-1)


def _at_a_distance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    prefix_bias: Tensor,
    sequence: dict[str, Any],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with a bias on the prefix: over sequence and prefix separately, merged by their log-sum-exps.

    Also returns the prefix's share (B, Hq, S).
    """
    out, lse = prefix_attention(query, key, value, None, None, return_lse=True, **sequence, **options)
    # Expanded before the cast: the gradient's sum over the batch is taken in the prefix's dtype.
    key, value = (t.expand(query.shape[0], -1, -1, -1).to(query.dtype) for t in (prefix_key, prefix_value))
    options |= {"bias": prefix_bias, "is_causal": False, "return_lse": True}
    prefix, prefix_lse = prefix_attention(query, key, value, None, None, **options)
    share = torch.sigmoid(prefix_lse - lse)
    return (out + share[..., None] * (prefix - out)).to(query.dtype), share


def _share(
    query: Tensor, key: Tensor, value: Tensor, prefix: Prefix, sequence: dict[str, Any], options: dict[str, Any]
) -> Tensor:
    """(B, Hq, S): the prefix's share of the softmax's mass, from the log-sum-exps with and without it."""
    options = options | sequence | {"return_lse": True}
    _, both = prefix_attention(query, key, value, prefix.key, prefix.value, **options)
    options |= dict.fromkeys(("prefix_ids", "prefix_lengths", "prefix_start"))
    _, without = prefix_attention(query, key, value, None, None, **options)
    return -torch.expm1(without - torch.where(both == -torch.inf, 0.0, both)).where(both > -torch.inf, 0.0)


for name, mask in ((NAME, prefix_attention_mask), (MASKED, full_mask)):
    AttentionInterface.register(name, prefix_attention_forward)
    AttentionMaskInterface.register(name, mask)
