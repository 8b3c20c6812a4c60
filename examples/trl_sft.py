"""TRL's SFTTrainer trains a prefix on chats: packed rows, and a loss on the assistant's answers alone.

Run it with ``python examples/trl_sft.py``. It needs transformers and trl (Python 3.11), and downloads nothing: a tiny
Llama with random weights learns to answer in capital letters. SFTTrainer takes the model as it takes any other.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig, SFTTrainer

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model

CHAT = """{% for message in messages %}{% if message.role == 'user' %}?{{ message.content }}>{% else %}\
{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
WORDS = ("red", "green", "blue", "black", "white", "grey", "pink", "brown")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a chat template that marks what the assistant says."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")
    made.chat_template = CHAT
    return made


def base_model() -> LlamaForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def chats() -> Dataset:
    """A question of two words, and an answer of the same in capital letters."""
    pairs = [f"{one} {two}" for one in WORDS for two in WORDS]
    turns = [(("user", text), ("assistant", text.upper())) for text in pairs]
    return Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns])


def main() -> None:
    """Train a prefix; save it, and load it."""
    torch.set_num_threads(1)  # the tensors are too small for more
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        model = get_prefix_model(base_model(), PrefixConfig(num_virtual_tokens=8))
        arguments = SFTConfig(
            folder, packing=True, max_length=128, assistant_only_loss=True, learning_rate=0.1, max_steps=16,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, bf16=False,
        )  # fmt: skip
        trainer = SFTTrainer(model, arguments, train_dataset=chats(), processing_class=tokenizer())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        model.save_pretrained(f"{folder}/prefix")
        again = PrefixModel.from_pretrained(base_model(), f"{folder}/prefix")
        ids = torch.tensor([tokenizer()("?red pink>")["input_ids"]])
        difference = (again.eval()(ids).logits - model.eval()(ids).logits).abs().max()
        print(f"saved and loaded: logits differ by {difference:.1e}")


if __name__ == "__main__":
    main()
