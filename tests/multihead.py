"""torch.nn.MultiheadAttention: the forms in which it is called, and a prefix put into it by concatenation."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefix_attn import PrefixAttention
from tests.numerics import as_accurate

B, S, T, E, H, P = 3, 9, 11, 16, 2, 5
D = E // H

# Key 0 is never masked: without a prefix a query that sees nothing is NaN in the original, and equals nothing.
PADDING = torch.arange(T) >= torch.tensor([T, 6, 1])[:, None]
HOLES = torch.rand(B * H, S, T, generator=torch.Generator().manual_seed(1)) > 0.6
HOLES[:, :, 0] = False
SQUARE, CAUSAL = (torch.ones(n, T, dtype=torch.bool).triu(1) for n in (T, S))


def additive(mask: Tensor, finite: float = 0.0) -> Tensor:
    """As a float: -inf where it hides, else 0, or numbers of about ``finite``."""
    numbers = finite * torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
    return numbers.masked_fill(mask, -torch.inf)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": additive(PADDING)},
    "finite padding": {"key_padding_mask": additive(PADDING, 1.0)},
    "bool 2-D": {"attn_mask": HOLES[0]},
    "float 2-D": {"attn_mask": additive(HOLES[0], 1.0)},
    "bool 3-D": {"attn_mask": HOLES},
    "float 3-D": {"attn_mask": additive(HOLES, 1.0)},
    "causal": {"attn_mask": SQUARE, "is_causal": True},
    "float causal": {"attn_mask": additive(SQUARE), "is_causal": True},
    "causal S<T": {"attn_mask": CAUSAL, "is_causal": True},
    "causal without hint": {"attn_mask": SQUARE},
    "bool both": {"key_padding_mask": PADDING, "attn_mask": HOLES},
    "float both": {"key_padding_mask": additive(PADDING), "attn_mask": additive(HOLES[0], 1.0)},
    "finite both": {"key_padding_mask": additive(PADDING, 1.0), "attn_mask": additive(HOLES, 1.0)},
    "causal and padding": {"key_padding_mask": PADDING, "attn_mask": SQUARE, "is_causal": True},
    "causal and float padding": {
        "key_padding_mask": additive(PADDING),
        "attn_mask": additive(SQUARE),
        "is_causal": True,
    },
    "bool and float": {"key_padding_mask": PADDING, "attn_mask": additive(HOLES[0], 1.0)},
}
MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "sizes": {"kdim": 6, "vdim": 10},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
}
LAYOUTS = ("batch first", "sequence first", "one sample")


def module(layout: str = "batch first", *, dtype: torch.dtype = torch.float32, **options: Any) -> nn.MultiheadAttention:
    """The original, with biases that are not 0."""
    made = nn.MultiheadAttention(E, H, batch_first=layout == "batch first", dtype=dtype, **options)
    for bias in (made.in_proj_bias, made.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias, std=0.3)
    return made


def tensors(layout: str, masks: dict[str, Any], mha: nn.MultiheadAttention, *, together: bool) -> dict[str, Any]:
    """Arguments for ``mha``: three inputs or, ``together``, one for self-attention; masks in its dtype."""
    dtype = mha.out_proj.weight.dtype
    queries = S
    if together or masks.get("attn_mask", HOLES).shape[-2] == T:
        queries = T
    sizes = ((queries, mha.embed_dim), (T, mha.kdim), (T, mha.vdim))
    query, key, value = (torch.randn(B, *size, dtype=torch.float64).to(dtype) for size in sizes)
    masks = {n: m.to(dtype) if isinstance(m, Tensor) and m.is_floating_point() else m for n, m in masks.items()}
    if layout == "one sample":
        query, key, value = query[1], key[1], value[1]
        if "key_padding_mask" in masks:
            masks["key_padding_mask"] = masks["key_padding_mask"][1]
        if "attn_mask" in masks and masks["attn_mask"].dim() == 3:
            masks["attn_mask"] = masks["attn_mask"][H : 2 * H]
    elif layout == "sequence first":
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    if together:
        key = value = query
    return {"query": query, "key": key, "value": value} | masks


def fits(masks: dict[str, Any], mha: nn.MultiheadAttention) -> list[bool]:
    """The values of ``together`` that the masks and the module allow."""
    square = "attn_mask" not in masks or masks["attn_mask"].shape[-2] == T
    return [True, False] if square and mha.in_proj_weight is not None else [False]


class Concatenated(nn.Module):
    """torch's own attention over [prefix ; sequence], with the parameters of a PrefixAttention.

    Position p of the prefix is an input that is 1 in a feature of its own, which the key projection maps to the
    prefix's key and the value projection to its value. All else is torch's, the weights and the extra keys too.
    """

    def __init__(self, attn: PrefixAttention) -> None:
        super().__init__()
        self.attn, self.batch_first = attn, attn.batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        attn = self.attn
        separate = (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
        w_q, w_k, w_v = separate if attn.in_proj_weight is None else attn.in_proj_weight.chunk(3)
        _, b_k, b_v = (0.0,) * 3 if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)
        flip = self.batch_first and query.dim() == 3
        query, key, value = (t.transpose(0, 1) if flip else t for t in (query, key, value))
        out, weights = F.multi_head_attention_forward(
            query,
            self.extended(key),
            self.extended(value),
            attn.embed_dim,
            attn.num_heads,
            None,
            attn.in_proj_bias,
            attn.bias_k,
            attn.bias_v,
            attn.add_zero_attn,
            attn.dropout,
            attn.out_proj.weight,
            attn.out_proj.bias,
            training=attn.training,
            key_padding_mask=self.visible(key_padding_mask, query.dtype),
            need_weights=need_weights,
            attn_mask=self.visible(attn_mask, query.dtype),
            use_separate_proj_weight=True,
            q_proj_weight=w_q,
            k_proj_weight=self.columns(w_k, attn.prefix_key, b_k),
            v_proj_weight=self.columns(w_v, attn.prefix_value, b_v),
            average_attn_weights=average_attn_weights,
        )
        return out.transpose(0, 1) if flip else out, weights

    def extended(self, tokens: Tensor) -> Tensor:
        n = self.attn.prefix_length
        own = torch.eye(n, dtype=tokens.dtype).view(n, *[1] * (tokens.dim() - 2), n).expand(n, *tokens.shape[1:-1], n)
        return torch.cat([F.pad(own, (tokens.shape[-1], 0)), F.pad(tokens, (0, n))])

    def columns(self, weight: Tensor, prefix: Tensor, bias: Tensor | float) -> Tensor:
        return torch.cat([weight, (prefix.transpose(0, 1).flatten(1) - bias).T.to(weight.dtype)], dim=1)

    def visible(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)
        return None if mask is None else F.pad(mask, (self.attn.prefix_length, 0))


def results(attn: nn.Module, call: dict[str, Any], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Output, weights, and the gradients of inputs, prefix and all other parameters, each as one vector."""
    leaves = {id(call[n]): call[n].detach().requires_grad_() for n in ("query", "key", "value")}
    found = dict(zip(("out", "weights"), attn(**call | {n: leaves[id(call[n])] for n in ("query", "key", "value")})))
    found = {n: t.flatten() for n, t in found.items() if t is not None}
    objective = sum((t * torch.linspace(-0.5, 1, t.numel(), dtype=t.dtype)).sum() for t in found.values())
    grads = torch.autograd.grad(objective, [*leaves.values(), *parameters.values()])
    groups: dict[str, list[Tensor]] = {}
    for name, grad in zip([*["inputs"] * len(leaves), *parameters], grads):
        group = name if name in ("inputs", "prefix_key", "prefix_value") else "projections"
        groups.setdefault(f"grad {group}", []).append(grad.flatten())
    return found | {n: torch.cat(group) for n, group in groups.items()}


def check_concatenation(calls: list[tuple[PrefixAttention, dict[str, Any]]]) -> None:
    """All that comes out of the calls is as near to float64 as torch's own module over the concatenation."""
    columns: dict[str, list[tuple[Tensor, ...]]] = {}
    for attn, call in calls:
        double = copy.deepcopy(attn).double()
        # By identity: self-attention stays that.
        wide = {id(t): t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in call.values()}
        exact = results(
            Concatenated(double), {n: wide[id(t)] for n, t in call.items()}, dict(double.named_parameters())
        )
        rough = results(Concatenated(attn), call, dict(attn.named_parameters()))
        for name, got in results(attn, call, dict(attn.named_parameters())).items():
            columns.setdefault(name, []).append((got.detach(), exact[name].detach(), rough[name].detach()))
    for name, column in columns.items():
        got, exact, rough = map(torch.cat, zip(*column))
        as_accurate(name, got, exact, [rough], few=got.dtype == torch.bfloat16)
