"""Train a prefix with the Trainer: what trains the bare model trains the prefix, after one line more.

Run it with ``python examples/trainer.py``. It needs transformers and accelerate, and downloads nothing. A tiny Llama
learns to count in steps of 1, 2 or 3. Then a prefix learns to count in steps of 3 from a single number, with the same
function and the same arguments. It is interrupted, resumed, and loaded from the folder that the Trainer leaves.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model

NUMBERS, LENGTH = 16, 8  # count modulo 16, in rows of eight numbers


def rows(*steps: int) -> list[dict[str, Any]]:
    """Each start with each step. The last column is one that the model does not read."""
    counts = [(start + step * torch.arange(LENGTH)) % NUMBERS for start in range(NUMBERS) for step in steps]
    return [{"input_ids": count, "labels": count, "source": "made up"} for count in counts]


def base_model() -> LlamaForCausalLM:
    """The same weights each time."""
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return LlamaForCausalLM(LlamaConfig(vocab_size=NUMBERS, **sizes, **ids))


def trainer(model: Any, data: list[dict[str, Any]], folder: str, steps: int) -> Trainer:
    """A Trainer of any model, bare or with a prefix."""
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=40,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        label_smoothing_factor=0.1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    made = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    made.remove_callback(PrinterCallback)
    return made


def main() -> None:
    """Train the model, then a prefix in one go and in two, then load it."""
    torch.set_num_threads(1)  # the tensors are too small for more
    config = PrefixConfig(num_virtual_tokens=8)
    with tempfile.TemporaryDirectory() as folder:
        base = base_model()
        trainer(base, rows(1, 2, 3), f"{folder}/base", 80).train()
        model = get_prefix_model(base, config)  # the line
        whole = trainer(model, rows(3), f"{folder}/whole", 80)
        before = whole.evaluate()["eval_loss"]
        whole.train()
        print(f"1. eval_loss {before:.3f} -> {whole.evaluate()['eval_loss']:.3f}")
        set_seed(0)
        trainer(get_prefix_model(base, config), rows(3), f"{folder}/parts", 40).train()  # and is killed here, say
        parts = trainer(get_prefix_model(base, config), rows(3), f"{folder}/parts", 80)
        parts.train(resume_from_checkpoint=True)
        loaded = PrefixModel.from_pretrained(base, f"{folder}/parts/checkpoint-80").eval()
    ids = torch.tensor([[5]])
    off = (loaded(ids).logits - parts.model.eval()(ids).logits).abs().max()
    print(f"2. resumed, saved and loaded: eval_loss {parts.evaluate()['eval_loss']:.3f}, logits differ by {off:.1e}")
    made = loaded.generate(ids, max_new_tokens=5, do_sample=False)
    print("3. it counts:", *made[0].tolist())


if __name__ == "__main__":
    main()
