"""Train a small T5 from scratch. No package ships an encoder-decoder, and a random one would show little."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefix_attn.experiments.loop import train
from prefix_attn.experiments.runner import TENTH, hold_out
from prefix_attn.training.examples import Example
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.tokens import batches, encode, source_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOCABULARY = 4096
# T5, which normalises before each layer, learns to read its encoder. A BART of this size learns to ignore it.
SIZES = {"d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 3, "num_heads": 8}
PAD, END, MASK = "<pad>", "</s>", "<mask>"
MASKED, SPAN = 0.25, 3  # share of words to mask, and the mean length of a masked span


def pretrain(
    examples: Sequence[Example],
    output: Path,
    *,
    steps: int = 1500,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    max_length: int = 96,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Train a tokenizer and a T5 on ``examples``, and save both.

    Half of the rows are the task, from source to reference. The other half restore a text, a source or a reference, in
    which spans of words are masked (Lewis et al. 2020).

    Args:
        examples: a tenth of them, chosen by hash, is held out.
        output: folder for the model.
        steps: steps of AdamW, with warm-up and linear decay.
        batch_size: rows per step.
        learning_rate: peak learning rate.
        max_length: tokens per source and per target. Longer texts are not used for denoising.
        seed: seed of weights, masks and order.
        device: default: the GPU if there is one.

    Returns:
        ``parameters``, and what ``loop.train`` returns: ``train_loss`` of each step, ``validation`` before and after.

    Raises:
        ValueError: there are too few examples to hold some out, or ``output`` is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output}: holds something already; take another folder")
    kept, held_out = hold_out(examples, 0, TENTH)
    if not kept or not held_out:
        raise ValueError(f"{len(examples)} examples are too few to train on some and hold out others")
    tokenizer = _tokenizer(text for example in kept for text in (example.source, *example.references))
    model = _model(tokenizer, seed).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pad_id = tokenizer.pad_token_id
    rows, _ = encode(tokenizer, kept, max_length, encoder_decoder=True)
    texts = [text for example in kept for text in (example.source, *example.references)]
    texts = [text for text in texts if len(source_ids(tokenizer, text)) <= max_length]
    masked, with_masks = _denoising(texts, len(rows), seed), Prompt(special_tokens=True)
    denoised, _ = encode(tokenizer, masked, max_length, encoder_decoder=True, prompt=with_masks)
    held_rows, _ = encode(tokenizer, held_out, max_length, encoder_decoder=True)
    validation = batches(held_rows, batch_size, pad_id)
    found = train(
        model,
        rows + denoised,
        pad_id,
        validation,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        validate_every=steps,
        seed=seed,
    )
    model.eval()
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)
    return {"parameters": model.num_parameters(), **found}


def _tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Train byte-level BPE on ``texts``. It can encode any text and ends each with END."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, VOCABULARY, special_tokens=[PAD, END, MASK], show_progress=False)
    trained.post_processor = TemplateProcessing(f"$A {END}", special_tokens=[(END, trained.token_to_id(END))])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token=PAD, eos_token=END, mask_token=MASK, padding_side="right"
    )


def _model(tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
            **SIZES,
        )
    )


def _denoising(texts: Sequence[str], count: int, seed: int) -> list[Example]:
    """Draw ``count`` texts, mask spans in them, and take the whole text as reference."""
    generator = random.Random(seed)
    chosen = (generator.choice(texts) for _ in range(count))
    return [Example(_masked(text, generator), (text,)) for text in chosen]


def _masked(text: str, generator: random.Random) -> str:
    """Replace spans of ``text`` by masks, so that a share of about MASKED of the words is gone."""
    words, kept, i = text.split(" "), [], 0
    while i < len(words):
        if generator.random() < MASKED / (SPAN - MASKED * (SPAN - 1)):
            kept.append(MASK)
            i += generator.randint(1, 2 * SPAN - 1)
        else:
            kept.append(words[i])
            i += 1
    return " ".join(kept)
