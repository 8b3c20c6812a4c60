"""Context distillation: train a short prefix to replace a long text (Eyuboglu et al. 2025, Cartridges).

The teacher is the frozen model with the whole text in front. The student is the same model with a short trained prefix,
so one copy of the model is enough. The text is not read again in every step: its keys and values are a prefix too. They
are computed once, shared by the batch and never trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefix_attn.hf.attach.wrapper import evaluating
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import PrefixModel, get_prefix_model
from prefix_attn.training.head import sum_over
from prefix_attn.training.positions import check_rows, positions_of, room_for_rows
from prefix_attn.training.ranks import share, sums
from prefix_attn.training.row_file import digest
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.tokens import Batch, Row, batches
from prefix_attn.training.train import VALIDATION_BATCH, fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOP_K = 20
LENGTH = 96  # tokens of a piece
VALIDATION_ROWS = 64


def distill(
    model: PrefixModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    settings: TrainingSettings,
    *,
    validation: str | None = None,
    top_k: int = TOP_K,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the active prefix of ``model`` to act like ``document`` in front of a text, and save it.

    The training texts are consecutive pieces of the document, ``settings.max_length`` tokens each, by default 96. The
    loss is ``divergence``. Everything else is as in ``train.train``.

    Args:
        model: its active prefix is trained. One with ``init="document"`` starts close to the document.
        tokenizer: the model's tokenizer.
        document: the text to distil. It must fit into the model's context window together with one piece.
        settings: how to train.
        validation: a text; the validation loss is measured on its pieces. Default: pieces of the document that start
            half a piece later than those of the training.
        top_k: how many tokens of each teacher distribution are compared one by one.
        options: as in ``train.fit``.

    Returns:
        What ``train.train`` returns, with ``document_tokens`` and ``rows``. Losses are in nats per token.

    Raises:
        ValueError: the document is too short or too long, the prefix is an infix, or as in ``train.train``.
        NotImplementedError: the model is an encoder-decoder, or its prefixes take no positions, as a text would.
    """
    if model.config.is_encoder_decoder:
        raise NotImplementedError("distillation puts one text in front of another, which takes a causal model")
    config = model.prefix_configs.get(model.active_prefix or "")
    if config is not None and config.mode == "infix":
        raise ValueError("an infix stands within a row, and cannot stand for a text in front: take mode='kv'")
    ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    length = settings.max_length or min(LENGTH, room_for_rows(model) or LENGTH)
    check_rows(model, length)
    teacher = Teacher(model.base_model, ids, length, top_k)
    rows = pieces(ids, length)
    if validation is None:
        held_out = pieces(ids[length // 2 :], length)
    else:
        other = tokenizer(validation, add_special_tokens=False, verbose=False)["input_ids"]
        held_out = pieces(other, length)
    pad_id = tokenizer.pad_token_id
    held_out_batches = batches(held_out[:VALIDATION_ROWS], VALIDATION_BATCH, pad_id)
    return fit(
        model,
        rows,
        pad_id,
        (lambda: mean_divergence(model, teacher, held_out_batches)) if held_out_batches else None,
        dataclasses.replace(settings, max_length=length),
        held_out=held_out[:VALIDATION_ROWS],
        task={"document": digest([{"input_ids": ids}]), "top_k": top_k},
        objective=lambda student, batch: divergence(student, teacher(batch), batch),
        options=options,
        extra={"document_tokens": len(ids), "rows": len(rows)},
    )


def pieces(ids: Sequence[int], length: int) -> list[Row]:
    """Rows of ``length`` tokens, one after the other. A last piece of a single token is left out.

    They have no labels: with them the model would compute a loss of its own.
    """
    found = [list(ids[i : i + length]) for i in range(0, len(ids), length)]
    return [{"input_ids": piece} for piece in found if len(piece) > 1]


class Target:
    """What the teacher predicts at N tokens: the k likeliest next tokens and their log-probabilities, (N, k) each."""

    def __init__(self, logits: Tensor, top_k: int) -> None:
        """Take them from logits (N, V), which are not kept."""
        values, self.ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        self.log_probs = values.float() - logits.float().logsumexp(-1, keepdim=True)

    def extend(self, other: Target) -> None:
        """Put those of other tokens behind these."""
        self.ids = torch.cat([self.ids, other.ids])
        self.log_probs = torch.cat([self.log_probs, other.log_probs])


class Teacher:
    """The frozen model with a text in front of every row."""

    def __init__(self, base: PreTrainedModel, ids: Sequence[int], row_length: int, top_k: int) -> None:
        """``ids`` are the text. Rows after it have up to ``row_length`` tokens."""
        if top_k < 1:
            raise ValueError(f"top_k must be positive, got {top_k}")
        if len(ids) < 2:
            raise ValueError(f"the document must have at least 2 tokens, got {len(ids)}")
        window = positions_of(base)
        if window is not None and len(ids) + row_length > window:
            raise ValueError(
                f"the document has {len(ids)} tokens, which with {row_length} behind them do not fit into the model's"
                f" {window}: distill it in parts, or take a model with a longer window"
            )
        config = PrefixConfig(
            num_virtual_tokens=len(ids), init="text", init_token_ids=list(ids), num_frozen_tokens=len(ids)
        )
        self.top_k, self.model = top_k, get_prefix_model(base, config)
        if self.model.prefix_configs["default"].position_mode != "shift":
            raise NotImplementedError(f"{type(base).__name__}: its prefixes take no positions, as a text would")

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Target:
        """Distributions at the tokens of ``batch`` that are not padding."""
        vocabulary = self.model.config.get_text_config().vocab_size
        found = Target(torch.empty(0, vocabulary, device=self.model.device), self.top_k)

        def read(logits: Tensor, _: slice) -> Tensor:
            found.extend(Target(logits, self.top_k))
            return logits.new_zeros(())

        with evaluating(self.model):
            sum_over(self.model, batch, batch["attention_mask"].bool(), read)
        return found


def divergence(student: Any, target: Target, batch: Batch) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher in nats, averaged over tokens.

    The teacher's top k tokens are compared one by one and the rest of the vocabulary as a whole. This is a lower bound.
    It needs k numbers per token from the teacher instead of V, and is 0 if both agree on the k tokens.
    """
    at = batch["attention_mask"].bool()

    def score(logits: Tensor, some: slice) -> Tensor:
        return _divergence(logits, target.ids[some], target.log_probs[some])

    return sum_over(student, batch, at, score) / at.sum()


def _divergence(logits: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
    """The sum of it over the tokens whose logits (N, V) these are."""
    log_q = logits.gather(-1, ids).float() - logits.float().logsumexp(-1, keepdim=True)
    smallest = torch.finfo(torch.float32).eps  # both remainders are 1 minus a rounded sum
    rest_p = (1 - log_p.exp().sum(-1)).clamp(min=smallest)
    rest_q = (1 - log_q.exp().sum(-1)).clamp(min=smallest)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())).sum()


@torch.no_grad()
def mean_divergence(model: PrefixModel, teacher: Teacher, batches: Sequence[Batch]) -> float:
    """Average ``divergence`` over the tokens of all batches, of which there is at least one."""
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch, counts in share(batches):
            given = {name: tensor.to(device) for name, tensor in batch.items()}
            count = int(given["attention_mask"].sum())
            loss = float(divergence(model, teacher(given), given))
            if counts:
                total, tokens = total + loss * count, tokens + count
    total, tokens = sums(total, tokens, device=device)
    return total / tokens
