"""Measure the loss of a model on targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from prefix_attn.hf.attach.infix import start_of_targets
from prefix_attn.hf.attach.wrapper import evaluating
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.head import base_of, can_leave_out_logits, sum_over
from prefix_attn.training.ranks import share, sums
from prefix_attn.training.tokens import IGNORED


def target_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a batch in float32, with the logits of its targets alone and some of these at a time.

    A model computes its usual loss, with all logits, if it adds a loss of its own (``output_router_logits``), or if
    nothing shows that its loss is that of the next tokens: a causal model without ``logits_to_keep``, an
    encoder-decoder without ``prepare_decoder_input_ids_from_labels``.

    Args:
        model: ours, PEFT's, one of transformers, or DistributedDataParallel around one; causal or an encoder-decoder.
        batch: what ``tokens.collate`` makes, with at least one target token.

    Returns:
        Mean negative log-likelihood of the targets in nats, a scalar that can be differentiated once.
    """
    base, labels = base_of(model), batch["labels"]
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
    at = labels != IGNORED
    if not base.config.is_encoder_decoder:
        # The model predicts each token from those before it.
        at, labels = torch.nn.functional.pad(at[:, 1:], (0, 1)), labels.roll(-1, 1)
    targets = labels[at]
    if _has_a_loss_of_its_own(base):
        return model(**batch).loss
    if base.config.is_encoder_decoder:
        # What these models do themselves where they get labels.
        inputs |= {"decoder_input_ids": base.prepare_decoder_input_ids_from_labels(labels=labels), "use_cache": False}
    prefixed = getattr(model, "module", model)
    if isinstance(prefixed, PrefixModel) and any(c.mode == "infix" for c in prefixed.prefix_configs.values()):
        inputs["infix_start"] = start_of_targets(None, batch)  # the model would have found it in the labels

    def score(logits: Tensor, piece: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.float(), targets[piece].to(logits.device), reduction="sum")

    return sum_over(model, inputs, at, score) / len(targets)


def _has_a_loss_of_its_own(base: Any) -> bool:
    if getattr(base.config, "output_router_logits", False):
        return True
    if base.config.is_encoder_decoder:
        return not hasattr(base, "prepare_decoder_input_ids_from_labels")
    return not can_leave_out_logits(base)


@torch.no_grad()
def validation_loss(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean negative log-likelihood of all target tokens in nats.

    Args:
        model: a causal model or an encoder-decoder, with or without a prefix.
        batches: what ``tokens.collate`` makes. Processes of ``torch.distributed`` share them, so all have to call.

    Raises:
        ValueError: no batch has a target token.
    """
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch, counts in share(batches):
            # A causal model predicts each token from those before it, so the first one has no loss.
            first = 0 if model.config.is_encoder_decoder else 1
            count = int((batch["labels"][:, first:] != IGNORED).sum())
            if not count:
                continue  # the mean over no tokens would be nan
            loss = target_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
            if counts:
                total, tokens = total + float(loss) * count, tokens + count
    total, tokens = sums(total, tokens, device=device)
    if not tokens:
        raise ValueError("no target tokens to evaluate on")
    return total / tokens
