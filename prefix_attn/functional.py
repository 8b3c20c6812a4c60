"""The operator: attention over [prefix ; sequence], where the batch shares a learned prefix."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from prefix_attn import _ops, dispatch
from prefix_attn.backends import eager, visibility
from prefix_attn.call import NUMBERS, Call, as_int, as_number, check, check_gate
from prefix_attn.packing import Packed, padded

HUGE = 1e30  # nothing that was trained

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from prefix_attn.call import Options, PackedOptions


@overload
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *,
    prefix_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    prefix_start: Tensor | None = None,
    prefix_gate: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention over [prefix ; sequence], where the whole batch shares one learned prefix.

        out[b, h, i] = sum_j softmax_j(scale * query[b, h, i] . k_j) v_j

    j runs over all P prefix positions and over the sequence positions that query i may see. The prefix has no batch
    dimension: no backend except ``eager`` makes anything of size B * P.

    Args:
        query: (B, Hq, S, D) float16, bfloat16, float32 or float64. Any strides, last dimension contiguous.
        key: (B, Hkv, T, D) in query's dtype. Hq is a multiple of Hkv. Query head h reads key head h // (Hq // Hkv).
        value: (B, Hkv, T, Dv) in query's dtype.
        prefix_key: (Hkv, P, D), or a bank (N, Hkv, P, D) of which each row reads one entry. None means no prefix. In
            query's dtype or float32. Its gradient has its own dtype, and is summed over the batch in float32.
        prefix_value: (Hkv, P, Dv) or (N, Hkv, P, Dv), like ``prefix_key``.
        prefix_ids: (B,) int. Row b reads entry ``prefix_ids[b]`` of the bank; -1 means no prefix. Default: entry b if
            N = B, the one entry if N = 1.
        prefix_lengths: (N,) int: the length of each entry of a bank that is padded to P. Default: P.
        prefix_start: (B,) int: query i sees the prefix if its position is at least ``prefix_start[b]`` (infix).
        prefix_gate: (Hq,) or (B, Hq) in query's dtype or float32; may need a gradient. The result is then
            attention(sequence) + gate * attention(prefix), two softmaxes; a gate of 0 is exactly no prefix. ``sinks``
            and the log-sum-exp belong to the sequence.
        key_lengths: (B,) int: row b sees its first ``key_lengths[b]`` keys (static caches). Default: T.
        key_mask: (B, T) bool, True = visible, in any pattern. It does not move positions.
        is_causal: query i sees keys up to its own position, T - S + i (or ``key_lengths[b]`` - S + i). All queries see
            the prefix. If S > T, the first queries see nothing else.
        window: a query at position p sees keys j with p - j < window, causal or not. The prefix stays visible.
        scale: factor on the scores. Default: D ** -0.5. torch.compile makes one graph per value of ``scale``,
            ``softcap`` and ``dropout_p``. One graph serves all sizes and windows.
        softcap: scores become softcap * tanh(score / softcap), for prefix and sequence.
        sinks: (Hq,) in query's dtype or float32; may need a gradient. Logits that are added once to the softmax's
            denominator, neither scaled nor capped (gpt-oss).
        bias: (1 or B, Hq, S, T) in query's dtype or float32; may need a gradient. It is added to the sequence's scores
            after the softcap, and may hold -inf. The prefix gets 0.
        dropout_p: probability of dropping a probability, also of the prefix. The log-sum-exp is without dropout.
        return_lse: also return the log-sum-exp of the scores.
        backend: "auto", "eager", "composed", "cpu", "triton" or "cuda". A named backend runs, or the call raises. On a
            GPU "auto" takes "triton" or "eager". ``explain`` says what "auto" takes, and why.

    Returns:
        (B, Hq, S, Dv) in query's dtype. With ``return_lse`` also (B, Hq, S) float32 (float64 for float64): natural
        logarithm, differentiable. A query that sees no key and no sink gives 0 and -inf. One that sees only a sink
        gives 0 and the sink. Neither adds to any gradient. P = 0, T = 0 and S = 0 are legal.

    Raises:
        ValueError: a shape, a range or a device.
        TypeError: a type or a dtype.
        NotImplementedError: the named backend cannot run the call. The message says why.

    Examples:
        >>> query, key, value = torch.randn(3, 2, 4, 8, 64)  # each is (batch, heads, tokens, head size)
        >>> prefix_key = torch.randn(4, 10, 64, requires_grad=True)
        >>> out = prefix_attention(query, key, value, prefix_key, torch.randn(4, 10, 64))
        >>> out.sum().backward()
        >>> prefix_key.grad.shape  # the sum over the batch
        torch.Size([4, 10, 64])

    Source: Li and Liang 2021, section 4.2 (prefix activations of every layer); Dao et al. 2022 (log-sum-exp).
    """
    call = Call(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        sinks,
        bias,
        prefix_ids,
        prefix_lengths,
        prefix_start,
        key_lengths,
        key_mask,
        is_causal=is_causal,
        window=window,
        scale=scale,  # pyrefly: ignore[bad-argument-type]  # None until it is checked
        softcap=softcap,
        dropout_p=dropout_p,
    )
    done = None if prefix_gate is not None else _ops.at_once(call, backend)
    out, lse = done or _attend(_checked(call), prefix_gate, backend)
    return (out, lse) if return_lse else out


@overload
def prefix_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    return_lse: Literal[False] = False,
    **options: Unpack[PackedOptions],
) -> Tensor: ...


@overload
def prefix_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    return_lse: Literal[True],
    **options: Unpack[PackedOptions],
) -> tuple[Tensor, Tensor]: ...


def prefix_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    prefix_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    prefix_start: Tensor | None = None,
    prefix_gate: Tensor | None = None,
    is_causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``prefix_attention`` over packed sequences: B sequences of different lengths, one after the other.

    The options that are not listed here are those of ``prefix_attention``. ``prefix_ids``, ``prefix_start`` and the
    rows of ``prefix_gate`` are one per sequence. ``prefix_start`` counts from the sequence's own first key.

    Args:
        query: (Nq, Hq, D), the tokens of all sequences.
        key: (Nk, Hkv, D).
        value: (Nk, Hkv, Dv).
        prefix_key: (Hkv, P, D) or a bank (N, Hkv, P, D).
        prefix_value: (Hkv, P, Dv) or a bank (N, Hkv, P, Dv).
        cu_seqlens_q: (B + 1,) int: sequence b has the queries ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]``.
        cu_seqlens_k: (B + 1,) int, the same for keys. A sequence may have more or fewer keys than queries.
        max_seqlen_q: the largest number of queries of a sequence. A larger number only costs speed.
        max_seqlen_k: the same for keys.
        is_causal: each sequence is aligned at its own last query and key.
        window: counts within each sequence.
        backend: "cpu" and "triton" read the sequences where they lie, except with a gate. The others get them padded.

    Returns:
        (Nq, Hq, Dv) in query's dtype. With ``return_lse`` also (Hq, Nq) float32, natural logarithm.

    Raises:
        ValueError: a shape, a range or a device.
        TypeError: a type or a dtype.
        NotImplementedError: the named backend cannot run the call. The message says why.

    Examples:
        >>> x = torch.randn(7, 4, 64)  # a sequence of 3 tokens and one of 4
        >>> cu, prefix = torch.tensor([0, 3, 7]), torch.randn(4, 10, 64)
        >>> lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 4, "max_seqlen_k": 4}
        >>> prefix_attention_varlen(x, x, x, prefix, prefix, **lengths).shape
        torch.Size([7, 4, 64])
    """
    packed_q = Packed(cu_seqlens_q, max_seqlen_q, query, "q")
    packed_k = Packed(cu_seqlens_k, max_seqlen_k, key, "k")
    if packed_q.batch != packed_k.batch:
        raise ValueError(f"cu_seqlens_k must be (B + 1,) = ({packed_q.batch + 1},), got ({packed_k.batch + 1},)")
    call = _call(
        *(t.transpose(0, 1)[None] if isinstance(t, Tensor) and t.dim() == 3 else t for t in (query, key, value)),
        prefix_key,
        prefix_value,
        sinks,
        prefix_ids=prefix_ids,
        prefix_lengths=prefix_lengths,
        prefix_start=prefix_start,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=packed_q.max_seqlen,
        max_seqlen_k=packed_k.max_seqlen,
        is_causal=is_causal,
        window=window,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
    )
    if prefix_gate is None and (module := dispatch.select_packed(call, backend)) is not None:
        out, lse = _run(call, module)
        out, lse = out[0].transpose(0, 1), lse[0]
    else:
        queries = packed_q.padding()
        out, lse = _attend(padded(call, queries, packed_k.padding()), prefix_gate, backend)
        out, lse = queries.unpad((out, 0.0), (lse[..., None], -torch.inf))
        lse = lse[..., 0].transpose(0, 1)
    return (out, lse) if return_lse else out


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> dispatch.Explanation:
    """What ``backend="auto"`` does with a call of ``prefix_attention``, and why the other backends cannot run it.

    Arguments and errors are those of ``prefix_attention``.

    Returns:
        ``backend``, the name of the one that runs, and ``refused``, the reasons of each that does not. As a string, one
        line per backend.

    Examples:
        >>> x, prefix = torch.randn(2, 4, 8, 64), torch.randn(4, 10, 64)
        >>> explain(x, x, x, prefix, prefix, dropout_p=0.1).refused["cpu"]
        ('the kernels have no dropout',)
    """
    given = inspect.signature(prefix_attention).bind(
        query, key, value, prefix_key, prefix_value, return_lse=return_lse, **options
    )
    given.apply_defaults()
    return dispatch.explain(_call(**{n: given.arguments[n] for n in Call._fields if n in given.arguments}))


# help(explain) then shows the options by name.
_signature = inspect.signature(prefix_attention).replace(return_annotation=dispatch.Explanation)
explain.__signature__ = _signature  # pyrefly: ignore[missing-attribute]


def _call(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Call:
    return _checked(Call(query, key, value, *rest, **named))


def _checked(call: Call) -> Call:
    """The call, found to be right: query, key and value in autocast's dtype where it is on, a scale filled in."""
    query, key, value = call[:3]
    if isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor):
        kind = query.device.type
        on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if on and query.dtype != torch.float64:
            query, key, value = (t.to(torch.get_autocast_dtype(kind)) for t in (query, key, value))
            call = call._replace(query=query, key=key, value=value)
    if call.scale is None and isinstance(query, Tensor) and query.dim():
        size = query.shape[-1]
        call = call._replace(scale=max(size.item() if isinstance(size, Tensor) else size, 1) ** -0.5)  # torch.jit.trace
    if call.window is not None:
        call = call._replace(window=as_int("window", call.window, 1, "an int or None"))
    for name, number in (("scale", call.scale), ("softcap", call.softcap), ("dropout_p", call.dropout_p)):
        if number is not None and not isinstance(number, NUMBERS):
            call = call._replace(**{name: as_number(number)})
    check(call)
    return call


def _attend(call: Call, gate: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of a batch."""
    if gate is None:
        return _run(call, dispatch.select(call, backend))
    return _gated(call, gate, backend)


def _run(call: Call, module: ModuleType) -> tuple[Tensor, Tensor]:
    if module is eager:
        return eager.forward(call)
    if call.dropout_p:  # on the device, from its default generator: no synchronisation, and CUDA graphs replay it
        call = call._replace(seed=torch.randint(2**31, (1,), device=call.query.device))
    return _ops.attend(call, module.NAME)


def _gated(call: Call, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """attention(sequence) + gate * attention(prefix), and the sequence's lse: two calls that no backend tells apart.

    What a gate of 0 shuts out may be NaN or huge. It reaches neither the output nor a gradient. From what is neither,
    such a gate learns what it would let through.
    """
    check_gate(gate, call)
    sequence, prefix = _split(call)
    out, lse = _run(sequence, dispatch.select(sequence, backend))
    if call.prefix_key is None:
        return out, lse
    factor = gate[..., None, None]
    shut = factor == 0
    if torch.is_grad_enabled():
        prefix = _without_bad_gradients(prefix, shut)
    other, _ = _run(prefix, dispatch.select(prefix, backend))
    other = torch.where(shut & ~(other.abs() < HUGE), 0.0, other)
    return (out + factor * other).to(call.query.dtype), lse


def _without_bad_gradients(call: Call, shut: Tensor) -> Call:
    """The same values, and no gradient to prefixes that are NaN or huge, nor to queries that are shut out from them.

    Their outputs have a gradient of 0, which a backend's backward multiplies by NaN. ``shut`` is ([B,] Hq, 1, 1).
    """
    assert call.prefix_key is not None and call.prefix_value is not None
    # [Hkv], or of a bank [N, Hkv]
    bad = ~((call.prefix_key.abs() < HUGE).all(-1).all(-1) & (call.prefix_value.abs() < HUGE).all(-1).all(-1))
    of_rows = bad
    if call.has_bank() and bad.shape[0]:
        entries = visibility.prefix_entries(call)
        of_rows = bad[entries.clamp(min=0)] & (entries >= 0)[:, None]
    of_rows = of_rows.repeat_interleave(call.query.shape[1] // bad.shape[-1], dim=-1)[..., None, None]
    bad = bad[..., None, None]
    return call._replace(
        query=torch.where(shut & of_rows, call.query.detach(), call.query) if bad.numel() else call.query,
        prefix_key=torch.where(bad, call.prefix_key.detach(), call.prefix_key),
        prefix_value=torch.where(bad, call.prefix_value.detach(), call.prefix_value),
    )


def _split(call: Call) -> tuple[Call, Call]:
    """The call without its prefix, and without its sequence."""
    start = call.prefix_start
    if start is not None:  # without the sequence, positions count from 0 - S
        T = call.key.shape[2]
        start = start - (T if call.key_lengths is None else call.key_lengths.clamp(0, T))
    no_prefix: dict[str, Any] = dict.fromkeys(
        ("prefix_key", "prefix_value", "prefix_ids", "prefix_lengths", "prefix_start")
    )
    no_sequence: dict[str, Any] = dict.fromkeys(("bias", "sinks", "key_lengths", "key_mask", "window"))
    nothing: dict[str, Any] = {
        "key": call.key[:, :, :0],
        "value": call.value[:, :, :0],
        "prefix_start": start,
        "is_causal": False,
    }
    return call._replace(**no_prefix), call._replace(**no_sequence, **nothing)
