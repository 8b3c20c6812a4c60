"""Generating from a model, and its loss on what it should write."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefix_attn.hf.attach.infix import start_of_targets
from prefix_attn.hf.attach.wrapper import Wrapper, evaluating
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.tokens import IGNORED, prompt_ids, shortened, source_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def generate_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """What the model writes for each source, in their order: its first line, without sampling.

    Args:
        model: a causal model or an encoder-decoder, with a prefix or not.
        tokenizer: its tokenizer, with end-of-text and padding tokens.
        sources: inputs, without the prompt's frame.
        num_beams: 1 decodes greedily.
        length_penalty: beams are ranked by log-likelihood over length to this power.
        max_new_tokens: limit of each output.
        batch_size: sources generated at once; sources of similar length share a batch.
        progress: called with the number of sources of each finished batch.
    """
    if model.config.is_encoder_decoder:
        prompts = _within(model, [source_ids(tokenizer, source) for source in sources], "encoder", 0, 1)
    else:
        taken = max_new_tokens
        if isinstance(model, PrefixModel):
            taken += max((config.num_virtual_tokens for config in model.prefix_configs.values()), default=0)
        tail = len(prompt_ids(tokenizer, ""))
        prompts = _within(model, [prompt_ids(tokenizer, source) for source in sources], "model", taken, tail)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts = [""] * len(prompts)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            outputs = _generate(
                model,
                tokenizer,
                [prompts[i] for i in batch],
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                **({"length_penalty": length_penalty} if num_beams > 1 else {}),
            )
            for i, output in zip(batch, outputs, strict=True):
                texts[i] = _first_line(tokenizer.decode(output, skip_special_tokens=True))
            if progress is not None:
                progress(len(batch))
    return texts


@torch.no_grad()
def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], **options: Any) -> Tensor:
    """New tokens of each prompt. Prompts are padded on the left, so that all outputs start at the same column.

    An encoder's are padded on the right, as in training, and its outputs hold no prompt.
    """
    width, on_the_right = max(len(prompt) for prompt in prompts), model.config.is_encoder_decoder

    def padded(row: list[int], fill: int) -> list[int]:
        padding = [fill] * (width - len(row))
        return row + padding if on_the_right else padding + row

    ids = torch.tensor([padded(prompt, tokenizer.pad_token_id) for prompt in prompts])
    mask = torch.tensor([padded([1] * len(prompt), 0) for prompt in prompts])
    device = next(model.parameters()).device
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        # Indices, as in _last; but a tensor would be taken for one with a row a text, and repeated for each beam.
        **({"logits_to_keep": [-1]} if _can_leave_out_logits(model) else {}),
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return output[:, 1:] if on_the_right else output[:, width:]  # a decoder's begins with its start token


def _within(model: Any, sources: list[list[int]], part: str, taken: int, tail: int) -> list[list[int]]:
    """``sources`` cut to the positions that are there, but for those ``taken``; the last ``tail`` tokens stay."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return sources
    room = positions - taken
    if room < tail:
        raise ValueError(f"the {part} has {positions} positions, of which outputs and prefix take {taken}: too many")
    if long := sum(len(ids) > room for ids in sources):
        _log.warning("%d of %d sources are longer than %d of the %s's positions: cut", long, len(sources), room, part)
    return [shortened(ids, room, tail) for ids in sources]


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def target_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a batch, in float32, without the logits that it does not need.

    Before the first target of a batch there are logits of a whole vocabulary that no loss reads. Models that cannot
    leave them out (no ``logits_to_keep``), or that add a loss of their own, compute it as they always do.

    Args:
        model: of ours, of PEFT or of transformers; causal, an encoder-decoder, or one whose own loss is to be taken.
        batch: what ``tokens.collate`` makes, with at least one target token.

    Returns:
        Mean negative log-likelihood of the targets in nats, a scalar with its graph.
    """
    labels = batch["labels"]
    if getattr(model.config, "output_router_logits", False):
        return model(**batch).loss
    if model.config.is_encoder_decoder:
        logits = model(**batch).logits
    elif _can_leave_out_logits(model):
        inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if isinstance(model, PrefixModel) and any(c.mode == "infix" for c in model.prefix_configs.values()):
            inputs["infix_start"] = start_of_targets(None, batch)  # which it would have found in the labels
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

    As indices, not as their number: a slice of the hidden states is not contiguous, and for such a one ``linear``
    copies the weights of the whole vocabulary once per row (7 GB for 64 rows of SmolLM2).
    """
    return torch.arange(-count, 0, device=device)


def _can_leave_out_logits(model: Any) -> bool:
    base = model.base_model if isinstance(model, Wrapper) else model
    if hasattr(base, "get_base_model"):  # PEFT's
        base = base.get_base_model()
    return "logits_to_keep" in inspect.signature(base.forward).parameters


@torch.no_grad()
def validation_loss(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean negative log-likelihood of the target tokens, in nats; every token counts the same.

    Args:
        model: a causal model or an encoder-decoder, with a prefix or not.
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
                continue  # its mean over no tokens would be nan
            loss = target_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
            total += float(loss) * count
            tokens += count
    if not tokens:
        raise ValueError("no target tokens to evaluate on")
    return total / tokens
