"""Generating from a model, and its loss on what it should write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefix_attn.data import IGNORED, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    num_beams: int = 1,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """What the model writes for each source, in their order: its first line, without sampling.

    Args:
        model: a causal model, with a prefix or not.
        tokenizer: its tokenizer, with end-of-text and padding tokens.
        sources: inputs, without the prompt's frame.
        num_beams: 1 decodes greedily.
        max_new_tokens: limit of each output.
        batch_size: sources generated at once; sources of similar length share a batch.
        progress: called with the number of sources of each finished batch.
    """
    prompts = [prompt_ids(tokenizer, source) for source in sources]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            outputs = _generate(model, tokenizer, [prompts[i] for i in batch], num_beams, max_new_tokens)
            for i, output in zip(batch, outputs, strict=True):
                texts[i] = _first_line(tokenizer.decode(output, skip_special_tokens=True))
            if progress is not None:
                progress(len(batch))
    finally:
        model.train(was_training)
    return texts


@torch.no_grad()
def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], num_beams: int, max_new_tokens: int
) -> Tensor:
    """New tokens of each prompt; padded on the left, so that all of them start at the same column."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = next(model.parameters()).device
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        num_beams=num_beams,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return output[:, width:]


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


@torch.no_grad()
def validation_loss(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean negative log-likelihood of the target tokens, in nats; every token counts the same.

    Args:
        model: a causal model, with a prefix or not.
        batches: what ``data.collate`` makes.

    Raises:
        ValueError: no batch has a target token.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for batch in batches:
            # The model predicts each token from those before it, so the first one has no loss.
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            if not count:
                continue  # its mean over no tokens would be nan
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            total += float(loss) * count
            tokens += count
    finally:
        model.train(was_training)
    if not tokens:
        raise ValueError("no target tokens to evaluate on")
    return total / tokens
