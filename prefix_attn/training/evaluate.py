"""Measure the loss of a model on targets."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from prefix_attn.hf.attach.infix import start_of_targets
from prefix_attn.hf.attach.wrapper import Wrapper, evaluating
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.tokens import IGNORED


def target_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a batch in float32, without the logits that it does not need.

    No loss reads the logits before the first target of a batch, and each is as wide as the vocabulary. Models that
    cannot leave them out (no ``logits_to_keep``), or that add a loss of their own, compute their usual loss.

    Args:
        model: ours, PEFT's or one of transformers; causal or an encoder-decoder.
        batch: what ``tokens.collate`` makes, with at least one target token.

    Returns:
        Mean negative log-likelihood of the targets in nats, a scalar that can be differentiated.
    """
    labels = batch["labels"]
    if getattr(model.config, "output_router_logits", False):
        return model(**batch).loss
    if model.config.is_encoder_decoder:
        logits = model(**batch).logits
    elif _can_leave_out_logits(model):
        inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if isinstance(model, PrefixModel) and any(c.mode == "infix" for c in model.prefix_configs.values()):
            inputs["infix_start"] = start_of_targets(None, batch)  # the model would have found it in the labels
        if len(labels) == 1:  # rows that are packed have targets in several places
            keep = (labels[0, 1:] != IGNORED).nonzero().flatten()
            logits = model(**inputs, logits_to_keep=keep).logits[0]
            return torch.nn.functional.cross_entropy(logits.float(), labels[0, 1:][keep].to(logits.device))
        # The model predicts each token from those before it.
        first = max(int((labels != IGNORED).any(0).int().argmax()), 1)
        labels = labels[:, first:]
        logits = model(**inputs, logits_to_keep=_last(labels.shape[1] + 1, labels.device)[:-1]).logits
    else:
        return model(**batch).loss
    labels = labels.to(logits.device)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def _last(count: int, device: torch.device) -> Tensor:
    """The last ``count`` positions, for ``logits_to_keep``.

    Indices, not a number: with a number transformers slices the hidden states. The slice is not contiguous, and for
    such an input ``linear`` copies the weights of the whole vocabulary once per row (7 GB for 64 rows of SmolLM2).
    """
    return torch.arange(-count, 0, device=device)


def _can_leave_out_logits(model: Any) -> bool:
    base = model.base_model if isinstance(model, Wrapper) else model
    if hasattr(base, "get_base_model"):  # PEFT's
        base = base.get_base_model()
    return "logits_to_keep" in inspect.signature(base.forward).parameters


@torch.no_grad()
def validation_loss(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean negative log-likelihood of all target tokens in nats.

    Args:
        model: a causal model or an encoder-decoder, with or without a prefix.
        batches: what ``tokens.collate`` makes.

    Raises:
        ValueError: no batch has a target token.
    """
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in batches:
            # A causal model predicts each token from those before it, so the first one has no loss.
            first = 0 if model.config.is_encoder_decoder else 1
            count = int((batch["labels"][:, first:] != IGNORED).sum())
            if not count:
                continue  # the mean over no tokens would be nan
            loss = target_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
            total += float(loss) * count
            tokens += count
    if not tokens:
        raise ValueError("no target tokens to evaluate on")
    return total / tokens
