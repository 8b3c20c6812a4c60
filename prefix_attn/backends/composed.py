"""torch's own attention kernel twice, merged by log-sum-exp.

    sequence   out_s, lse_s = attention(query, key, value, masks)
    prefix     out_p, lse_p = attention(queries of all rows folded into one, prefix_key, prefix_value)
    merge      lse = log(e^lse_s + e^lse_p + e^sink),   out = e^(lse_s - lse) out_s + e^(lse_p - lse) out_p

Folding the batch into the query axis is what keeps the prefix single: its keys are read where they lie, and its
gradient comes out already summed over the batch. Backward does not differentiate the merge. A part's probabilities are
e^(score - lse) with the *global* lse, and the softmax term is grad_out . out with the *global* out, so the kernel's own
backward, handed those two, is exact for each part (xformers' merge_training and NATTEN do the same).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.backends import gpu_attention, visibility
from prefix_attn.backends.outputs import rescaled
from prefix_attn.call import Call

NAME = "composed"
PACKED = False
FINE = 1024.0  # up to here float32 keeps an lse so exactly that e^(score - lse) is right to 1e-4
ROWS = 256  # of scores at a time, where they are made outside torch's kernel

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def refuse(call: Call) -> Iterator[str]:
    """Reasons why torch's kernel cannot run this call."""
    device = call.query.device.type
    if device == "cuda":
        yield from gpu_attention.refuse(call)
    elif device != "cpu":
        yield f"tensors are on {device}; torch's flash attention with a log-sum-exp is wired for cpu and cuda"
    if call.softcap is not None:
        yield "torch's flash attention has no softcap"
    if call.dropout_p:
        yield "torch's flash attention on cpu has no dropout"
    grad = torch.is_grad_enabled()
    if call.sinks is not None and call.sinks.requires_grad and grad and call.query.dtype.itemsize < 4:
        yield f"the gradient of sinks needs an output more precise than {call.query.dtype}"
    if call.bias is not None:
        if call.bias.dtype != call.query.dtype:
            yield f"bias must have query's dtype {call.query.dtype}, got {call.bias.dtype}"
        if call.bias.requires_grad and grad:
            yield "torch's flash attention gives no gradient of bias"


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call."""
    call = _without_tail(call)
    parts = [part for part in (_sequence(call), _prefix(call)) if part is not None]
    if not parts:
        rows = call.query.shape[:3]
        exact = torch.promote_types(call.query.dtype, torch.float32)
        parts = [
            (call.query.new_zeros(*rows, call.value.shape[-1]), call.query.new_full(rows, -torch.inf, dtype=exact))
        ]
    out, lse = parts[0] if len(parts) == 1 else _merge(*parts[0], *parts[1])
    if call.sinks is not None:
        total = torch.logaddexp(lse, call.sinks.to(lse.dtype)[:, None])
        out, lse = out * torch.exp(lse - _finite(total))[..., None].to(out.dtype), total
    return out.to(call.query.dtype), lse


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of query, key, value, prefix_key, prefix_value, sinks and bias, where needed."""
    grad_query = grad_key = grad_value = grad_prefix_key = grad_prefix_value = grad_sinks = None
    if call.bias is not None and (coarse := (lse.abs() > FINE) & lse.isfinite()).any():
        factor = torch.where(coarse, 1 / _totals(call, lse, coarse), 1.0)
        grad_out, grad_lse = rescaled(grad_out, grad_lse, factor)
    # A query that sees nothing has lse = -inf; +inf makes each of its probabilities e^(score - lse) an exact 0.
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    if not all(grad_out.stride()) or grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()  # the kernel reads rows; an expanded gradient, as of sum(), has none
    if any(needs[:3]):
        if call.query.numel() and call.key.shape[2]:
            mask, causal = _mask(call)
            grad_query, grad_key, grad_value = _attend_backward(
                call.query, *visibility.without_hidden(call), out, lse, grad_out, grad_lse, call.scale, mask, causal
            )
        else:
            grad_query, grad_key, grad_value = (torch.zeros_like(t) for t in (call.query, call.key, call.value))
    if call.prefix_key is not None and (needs[0] or needs[3] or needs[4]):
        part, grad_prefix_key, grad_prefix_value = _prefix_backward(call, out, lse, grad_out, grad_lse)
        grad_query = part if grad_query is None else grad_query.add_(part)
    if call.sinks is not None and needs[5]:
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        delta = delta if grad_lse is None else delta - grad_lse
        share = torch.exp(call.sinks.to(lse.dtype)[:, None] - lse)
        grad_sinks = -(share * delta).sum((0, 2)).to(call.sinks.dtype)
    grads = (grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, grad_sinks, None)
    return [grad if needed else None for grad, needed in zip(grads, needs)]


def _without_tail(call: Call) -> Call:
    """The call without the keys that no row has, which is most of a static cache: else all of it would be copied."""
    if call.key_lengths is None or not call.key_lengths.numel():
        return call
    shortest, longest = (int(n.clamp(0, call.key.shape[2])) for n in call.key_lengths.aminmax())
    return call._replace(
        key=call.key[:, :, :longest],
        value=call.value[:, :, :longest],
        key_mask=None if call.key_mask is None else call.key_mask[:, :longest],
        bias=None if call.bias is None else call.bias[..., :longest],
        key_lengths=None if shortest == longest else call.key_lengths,
    )


def _totals(call: Call, lse: Tensor, wanted: Tensor) -> Tensor:
    """(B, Hq, S) sum over all keys and the sink of e^(score - lse), where ``wanted``; see ``rescaled``."""
    total = torch.zeros_like(lse)
    if (prefix := _prefix(call)) is not None:
        total += torch.exp(prefix[1] - lse)
    if call.sinks is not None:
        total += torch.exp(call.sinks.to(lse.dtype)[:, None] - lse)
    mask, _ = _mask(call)
    key, _ = visibility.without_hidden(call)
    assert mask is not None
    Hq, (Hkv, T, D) = lse.shape[1], key.shape[1:]
    for b, masked in enumerate(mask.expand(len(lse), -1, -1, -1)):
        for some in wanted[b].any(0).nonzero().flatten().split(ROWS):
            grouped = call.query[b, :, some].to(lse.dtype).view(Hkv, Hq // Hkv * len(some), D)
            scores = (grouped @ key[b].to(lse.dtype).mT).view(Hq, len(some), T) * call.scale + masked[:, some]
            total[b, :, some] += torch.exp(scores - lse[b, :, some, None]).sum(-1)
    return total


def _sequence(call: Call) -> tuple[Tensor, Tensor] | None:
    """The sequence's part; None when it is empty."""
    if not call.query.numel() or not call.key.shape[2]:
        return None
    mask, causal = _mask(call)
    out, lse = _attend(call.query, *visibility.without_hidden(call), call.scale, mask, causal)
    # The kernel gives a fully masked row out = 0, lse = 0.
    if call.bias is not None and mask is not None:
        lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
    elif (seen := visibility.sequence_rows(call)) is not None:
        lse = lse.masked_fill(~seen, -torch.inf)
    if _on_gpu(out) and mask is not None:  # where a row without keys need not be 0
        out = out.masked_fill((lse == -torch.inf)[..., None], 0.0)
    return out, lse


def _mask(call: Call) -> tuple[Tensor | None, bool]:
    """The additive mask that the kernel needs, broadcastable to (B, Hq, S, T), and its own causal flag.

    The flag (aligned to the top left) serves when S = T; it skips work, and the mask then has no S axis.
    """
    S, T = call.query.shape[2], call.key.shape[2]
    flag = call.is_causal and S == T and call.key_lengths is None and call.bias is None
    alone = S == 1 and call.key_lengths is None  # the last query sees every key: causality says nothing
    visible = visibility.sequence(call, causal=call.is_causal and not flag and not alone)
    if call.bias is not None:
        return (call.bias if visible is None else call.bias.masked_fill(~visible, -torch.inf)), flag
    if visible is None:
        return None, flag
    mask = call.query.new_zeros(visible.shape)
    return mask.masked_fill_(~visible, -torch.inf), flag


def _groups(call: Call) -> list[tuple[Tensor | None, int | None, int]]:
    """(rows, bank entry, valid length) of every prefix in use; rows None = the whole batch, entry None = no bank."""
    P = call.prefix_length()
    if not call.has_bank():
        return [(None, None, P)]
    assert call.prefix_key is not None
    lengths = visibility.prefix_lengths(call)
    valid = [P] * call.prefix_key.shape[0] if lengths is None else lengths.tolist()
    # Sorted once: to look for the rows of each entry in the whole batch would take B * N steps.
    entries, order = torch.sort(visibility.prefix_entries(call), stable=True)
    present, counts = torch.unique_consecutive(entries, return_counts=True)
    rows = zip(present.tolist(), order.split(counts.tolist()))
    return [(some, n, valid[n]) for n, some in rows if n >= 0 and valid[n]]


def _entry(bank: Tensor, entry: int | None, length: int, dtype: torch.dtype) -> Tensor:
    """(1, Hkv, length, D): one prefix, in the dtype that the kernel computes in."""
    return (bank if entry is None else bank[entry])[None, :, :length].to(dtype)


def _prefix(call: Call) -> tuple[Tensor, Tensor] | None:
    """The prefix's part, over all rows; None when no row has a prefix."""
    if call.prefix_key is None or call.prefix_value is None or not call.prefix_length() or not call.query.numel():
        return None
    query, parts = call.query, []
    for rows, entry, length in _groups(call):
        key, value = (_entry(bank, entry, length, query.dtype) for bank in (call.prefix_key, call.prefix_value))
        chosen = query if rows is None else query[rows]
        out, lse = _attend(_fold(chosen), key, value, call.scale)
        parts.append((rows, _unfold(out, chosen.shape), lse.view(lse.shape[1], -1, query.shape[2]).transpose(0, 1)))
    if not parts:
        return None
    if parts[0][0] is None:
        _, out, lse = parts[0]
    else:
        out = query.new_zeros(*query.shape[:3], call.value.shape[-1])
        lse = parts[0][2].new_full(query.shape[:3], -torch.inf)
        for rows, part, part_lse in parts:
            out[rows], lse[rows] = part, part_lse
    if (seen := visibility.prefix_rows(call)) is not None:
        out, lse = out.masked_fill(~seen[..., None], 0.0), lse.masked_fill(~seen, -torch.inf)
    return out, lse


def _prefix_backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad of query through the prefix, of prefix_key, of prefix_value).

    Half precision is widened: the prefix's gradient sums over every query of the batch, in float32 to the end.
    """
    assert call.prefix_key is not None and call.prefix_value is not None
    exact = torch.promote_types(call.query.dtype, torch.float32)
    groups = _groups(call) if call.prefix_length() and call.query.numel() else []
    grad_query = grad_key = grad_value = torch.empty(0)
    if call.has_bank() or not groups:  # else the one group below gives all of each
        grad_query = torch.zeros_like(call.query)
        grad_key = torch.zeros_like(call.prefix_key, dtype=exact)
        grad_value = torch.zeros_like(call.prefix_value, dtype=exact)
    seen = visibility.prefix_rows(call)
    lse = lse if seen is None else lse.masked_fill(~seen, torch.inf)
    for rows, entry, length in groups:
        # As rounded as forward saw them: with other keys the probabilities would not fit the saved lse.
        key, value = (
            _entry(bank, entry, length, call.query.dtype).to(exact) for bank in (call.prefix_key, call.prefix_value)
        )
        chosen = [t if rows is None else t[rows] for t in (call.query, out, grad_out)]
        query, part_out, part_grad = (_fold(t).to(exact) for t in chosen)
        part_lse = _fold_rows(lse if rows is None else lse[rows])
        part_grad_lse = None if grad_lse is None else _fold_rows(grad_lse if rows is None else grad_lse[rows])
        part, dk, dv = _attend_backward(query, key, value, part_out, part_lse, part_grad, part_grad_lse, call.scale)
        part = _unfold(part, chosen[0].shape).to(call.query.dtype)
        if rows is None or entry is None:
            grad_query, grad_key, grad_value = part, dk[0], dv[0]
        else:
            grad_query[rows] = part
            grad_key[entry, :, :length], grad_value[entry, :, :length] = dk[0], dv[0]
    return grad_query, grad_key.to(call.prefix_key.dtype), grad_value.to(call.prefix_value.dtype)


def _fold_rows(rows: Tensor) -> Tensor:
    """(b, H, S) -> (1, H, b * S)."""
    return rows.transpose(0, 1).flatten(1)[None]


def _fold(tensor: Tensor) -> Tensor:
    """(b, H, S, D) -> (1, H, b * S, D). A view of the (b, S, H, D) layout that models use; otherwise one copy."""
    b, H, S, D = tensor.shape
    return tensor.transpose(1, 2).reshape(1, b * S, H, D).transpose(1, 2)


def _unfold(tensor: Tensor, shape: torch.Size) -> Tensor:
    """(1, H, b * S, D) -> (b, H, S, D), with b and S of ``shape``."""
    return tensor.transpose(1, 2).reshape(shape[0], shape[2], tensor.shape[1], -1).transpose(1, 2)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions over disjoint keys -> the attention over both. Weights are never rounded to half precision."""
    total = torch.logaddexp(lse, other_lse)
    share = torch.exp(other_lse - _finite(total))[..., None]
    return torch.lerp(out.to(share.dtype), other.to(share.dtype), share), total


def _finite(lse: Tensor) -> Tensor:
    """``lse`` with -inf replaced, so that -inf - lse is -inf and not NaN."""
    return torch.where(lse == -torch.inf, 0.0, lse)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """torch's kernel, which wants equal head sizes: the smaller are padded with zeros."""
    D, Dv = query.shape[-1], value.shape[-1]
    query, key, value = _pad((query, key, value), max(D, Dv))
    if _on_gpu(query):
        out, lse = gpu_attention.attend(query, key, value, scale, mask, causal)
    else:
        out, lse = _forward(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return out[..., :Dv], lse


def _attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's backward kernel, with a gradient of the lse if there is one.

    grad_score = p * (grad_out . v - grad_out . out + grad_lse): the kernel knows the first two terms. One more column,
    1 in value, 0 in out and grad_lse in grad_out, makes the third a piece of the first.
    """
    D, Dv = query.shape[-1], value.shape[-1]
    if grad_lse is not None:
        value = torch.cat([value, value.new_ones(*value.shape[:-1], 1)], dim=-1)
        grad_out = torch.cat([grad_out, grad_lse[..., None].to(grad_out.dtype)], dim=-1)
    padded = _pad((query, key, value, out, grad_out), max(D, value.shape[-1]))
    query, key, value, out, grad_out = padded
    if _on_gpu(query):
        grads = gpu_attention.attend_backward(query, key, value, out, lse, grad_out, scale, mask, causal)
    else:
        grads = _backward(grad_out, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return grads[0][..., :D], grads[1][..., :D], grads[2][..., :Dv]


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _pad(tensors: tuple[Tensor, ...], size: int) -> list[Tensor]:
    """Each tensor with its last dimension filled up with zeros to ``size``; no copy where it has that size.

    torch.cat and F.pad take a last dimension of one for channels-last, and may give it a stride; the kernel reads rows.
    """
    if _on_gpu(tensors[0]):
        size = gpu_attention.head_size(size)
    padded = [t if t.shape[-1] == size else F.pad(t, (0, size - t.shape[-1])) for t in tensors]
    return [t if t.stride(-1) == 1 else t.contiguous(memory_format=torch.contiguous_format) for t in padded]
