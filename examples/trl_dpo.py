"""TRL's DPOTrainer trains a prefix on preferences. The reference is the same model without its prefix.

Run it with ``python examples/trl_dpo.py``. It needs transformers and trl (Python 3.11), and downloads nothing: a tiny
Llama with random weights learns to prefer one answer to another. ``ref_model=model.base_model`` is the frozen model
that the prefix is for. So there is no second copy of the weights.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer

from prefix_attn import PrefixConfig, get_prefix_model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")


def base_model() -> LlamaForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def preferences() -> Dataset:
    """A polite answer is preferred to a rude one."""
    names = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")
    rows = [{"prompt": f"{n}: pass the salt.", "chosen": f" Of course, {n}.", "rejected": " No!"} for n in names]
    return Dataset.from_list(rows)


def main() -> None:
    """Train a prefix, and look at the reference afterwards."""
    torch.set_num_threads(1)  # the tensors are too small for more
    disable_progress_bars()
    model, ids = get_prefix_model(base_model(), PrefixConfig(num_virtual_tokens=8)), torch.arange(64, 96)[None]
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder, learning_rate=0.1, max_steps=12, per_device_train_batch_size=8, logging_steps=1, bf16=False,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = DPOTrainer(
            model, model.base_model, arguments, train_dataset=preferences(), processing_class=tokenizer()
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {logged[0]['loss']:.3f} -> {logged[-1]['loss']:.3f}")
    first, last = (entry["rewards/margins"] for entry in (logged[0], logged[-1]))
    print(f"margin of the preferred answer: {first:.2f} -> {last:.2f}")
    with torch.no_grad():
        reference, expected = trainer.ref_model(ids).logits, base_model()(ids).logits
        moved = (model(ids).logits - reference).abs().max()
    print(f"the reference is the frozen model: logits differ by {(reference - expected).abs().max():.1e}")
    print(f"the prefix moves them by {moved:.2f}")


if __name__ == "__main__":
    main()
