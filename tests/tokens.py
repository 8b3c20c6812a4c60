"""A tokenizer that needs no file: one token a byte, and end-of-text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

END = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the i-th byte of the alphabet; 256 is end-of-text, and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
