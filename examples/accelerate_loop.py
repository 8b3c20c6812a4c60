"""A training loop of one's own with accelerate: a prefix and the model's norms, checkpoints, and files at the end.

Run it with ``python examples/accelerate_loop.py``, or on several processes with ``accelerate launch``. It needs
transformers, and downloads nothing: a tiny Llama with random weights learns lines of random tokens. After half of the
epochs the loop starts again from a checkpoint, in a new model, and ends where a loop without a break ends.
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model

EPOCHS = 30
LINES = torch.randint(64, (16, 12), generator=torch.Generator().manual_seed(1))


def base_model() -> LlamaForCausalLM:
    """The same weights each time. The user chooses to train the norms too: attaching a prefix leaves them trainable."""
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("norm" in name)
    return base


def train(epochs: range, checkpoint: str, *, resume: bool = False) -> tuple[Accelerator, PrefixModel, float, float]:
    """A loop as for any model: one line of it knows of prefixes."""
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=2)  # the same in each run
    accelerator = Accelerator(gradient_accumulation_steps=2, dataloader_config=order)
    model = get_prefix_model(base_model(), PrefixConfig(num_virtual_tokens=8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 2 * EPOCHS)
    data = DataLoader(list(LINES), batch_size=4, shuffle=True)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
    if resume:
        accelerator.load_state(checkpoint)
    losses = []
    for epoch in epochs:
        data.set_epoch(epoch)
        for ids in data:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    if not resume:
        accelerator.save_state(checkpoint)
    return accelerator, model, losses[0], losses[-1]


def main() -> None:
    """Train in two halves and at once, save, and read the files back."""
    torch.set_num_threads(1)  # the tensors are too small for more
    with tempfile.TemporaryDirectory() as folder:
        _, _, first, middle = train(range(EPOCHS // 2), f"{folder}/half")
        accelerator, model, _, last = train(range(EPOCHS // 2, EPOCHS), f"{folder}/half", resume=True)
        accelerator.print(f"loss {first:.3f} -> {middle:.3f}, and from the checkpoint {middle:.3f} -> {last:.3f}")
        _, straight, _, _ = train(range(EPOCHS), f"{folder}/all")
        same = all(map(torch.equal, model.state_dict().values(), straight.state_dict().values()))
        accelerator.print(f"without a break: {'the same' if same else 'other'} bits")
        trained = accelerator.unwrap_model(model)
        trained.save_pretrained(f"{folder}/adapter", is_main_process=accelerator.is_main_process)
        again = PrefixModel.from_pretrained(base_model(), f"{folder}/adapter")
        with torch.no_grad():
            difference = again(input_ids=LINES).logits - trained(input_ids=LINES).logits
        accelerator.print(f"read back: logits differ by {difference.abs().max():.1e}")


if __name__ == "__main__":
    main()
