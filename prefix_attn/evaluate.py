"""Generating from a model, and scoring what it writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefix_attn.data import IGNORED, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRICS = ("bleu", "nist", "rougeL", "chrf", "ter")


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


def score(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU, NIST, ROUGE-L, chrF++ and TER of a corpus, each hypothesis against all of its references.

    All but NIST are out of 100; TER is an error rate (lower is better) and can exceed 100.

    Raises:
        ValueError: nothing to score, a hypothesis has no references, or the two differ in length.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but references for {len(references)}")
    if not hypotheses:
        raise ValueError("no hypotheses to score")
    missing = next((i for i, texts in enumerate(references) if not texts), None)
    if missing is not None:
        raise ValueError(f"hypothesis {missing} has no references")
    from sacrebleu.metrics import BLEU, CHRF, TER

    # sacrebleu takes the first references of all hypotheses, then the second ones, ...; None where there are fewer.
    streams = [list(stream) for stream in zip_longest(*references)]
    hypotheses = list(hypotheses)
    return {
        "bleu": BLEU().corpus_score(hypotheses, streams).score,
        "nist": _nist(hypotheses, references),
        "rougeL": _rouge_l(hypotheses, references),
        "chrf": CHRF(word_order=2).corpus_score(hypotheses, streams).score,
        "ter": TER().corpus_score(hypotheses, streams).score,
    }


def _rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F-measure, with the best reference of each hypothesis."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(text, hypothesis)["rougeL"].fmeasure for text in texts)
        for hypothesis, texts in zip(hypotheses, references, strict=True)
    ]
    return 100 * sum(best) / len(best)


def _nist(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """NIST (Doddington 2002) with n-grams up to 5, or up to the longest text if that is shorter; 0 without words."""
    from nltk.translate.nist_score import corpus_nist

    found = [_words(hypothesis) for hypothesis in hypotheses]
    wanted = [[_words(text) for text in texts] for texts in references]
    order = min(5, max(len(words) for words in found))
    if order == 0 or not any(words for texts in wanted for words in texts):
        return 0.0
    return float(corpus_nist(wanted, found, n=order))


def _words(text: str) -> list[str]:
    """Lower-case words and punctuation, apart; numbers such as 3.5 stay whole."""
    return re.findall(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]", text.lower())


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
