"""A peer's error against float64, as a multiple of the error of torch's own attention in the same dtype."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.peers import FIVE, PREFIX, Inputs, Ready
from prefix_attn import prefix_attention

Errors = dict[str, tuple[float, float]]


def exact(x: Inputs, *, gradients: bool) -> dict[str, Tensor]:
    """The float64 eager result and its gradients. Holds the scores of one key head at a time."""
    Hkv = x.key.shape[1]
    G = x.query.shape[1] // Hkv
    parts: dict[str, list[Tensor]] = {}
    for h in range(Hkv):
        rows = slice(h * G, (h + 1) * G)
        one = slice(h, h + 1)
        five = (x.query[:, rows], x.key[:, one], x.value[:, one], x.prefix_key[one], x.prefix_value[one])
        leaves = [t.detach().double().requires_grad_() for t in five]
        with torch.set_grad_enabled(gradients):
            out = prefix_attention(*leaves, is_causal=x.is_causal, backend="eager")
        parts.setdefault("out", []).append(out.detach())
        if gradients:
            grads = torch.autograd.grad(out, leaves, x.grad[:, rows].double())
            for name, grad in zip(FIVE, grads):
                parts.setdefault(name, []).append(grad)
    return {name: torch.cat(part, dim=0 if name in PREFIX else 1) for name, part in parts.items()}


def errors(peer: Ready, truth: Mapping[str, Tensor]) -> Errors:
    """The largest and the rms error of each result. Gradients are compared if ``truth`` has them."""
    gradients = len(truth) > 1 and bool(peer.leaves)
    with peer.context(), torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = peer.forward()
        results = {"out": peer.output(out.detach())}
        if gradients:
            results |= peer.gradients(dict(zip(peer.leaves, peer.backward(out))))
    found = {}
    for name, got in results.items():
        if got.numel():
            error = got.double() - truth[name]
            found[name] = (float(error.abs().max()), float(error.square().mean().sqrt()))
    return found


def multiple(of: Errors, baseline: Errors) -> float:
    """The worst error as a multiple of the baseline's, over all results, largest and rms errors. NaN stays NaN."""
    pairs = [pair for name in of for pair in zip(of[name], baseline[name])]
    ratios = [a / b if b else (math.inf if a else 0.0) for a, b in pairs]
    return math.nan if any(map(math.isnan, ratios)) else max(ratios, default=0.0)
