"""Three prefixes on one frozen language model, mixed in one batch.

Run it with ``python examples/many_prefixes.py``. It needs transformers, and downloads nothing. A tiny Llama learns to
continue a count in steps of 1, 2 or 3. From a single number it cannot know the step. Each of three prefixes learns one
step, all in the same batches. Then each row of a batch counts in the steps of its own prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from prefix_attn import PrefixConfig, get_prefix_model

NUMBERS, LENGTH = 16, 8  # count modulo 16, in rows of eight numbers
STEPS = {"ones": 1, "twos": 2, "threes": 3}


def counting(steps: Tensor) -> Tensor:
    """A row of numbers for each step, from a random start."""
    start = torch.randint(NUMBERS, steps.shape)
    return (start[:, None] + steps[:, None] * torch.arange(LENGTH)) % NUMBERS


def base_model() -> LlamaForCausalLM:
    """A tiny Llama that counts, once it has seen two numbers."""
    config = LlamaConfig(
        vocab_size=NUMBERS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        ids = counting(torch.randint(1, 4, (48,)))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main() -> None:
    """Train the base, then the prefixes; count with all of them at once, and with each alone."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are too small for more
    model = get_prefix_model(base_model(), PrefixConfig(num_virtual_tokens=4))  # this prefix is named "default"
    for name in STEPS:
        model.add_prefix(name, PrefixConfig(num_virtual_tokens=4))
    model.delete_prefix("default")

    names = [name for name in STEPS for _ in range(16)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(100):
        ids = counting(torch.tensor([STEPS[name] for name in names]))
        loss = model(input_ids=ids, labels=ids, prefix_names=names).loss  # each prefix learns from its own rows
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss of the three prefixes {losses[0]:.3f} -> {losses[-1]:.3f}")

    rows = ["threes", "ones", None, "twos", "threes"]  # None: the frozen model without a prefix
    prompt = torch.full((len(rows), 1), 5)
    counted = model.generate(input_ids=prompt, prefix_names=rows, max_new_tokens=5, do_sample=False)
    same = 0
    for name, row in zip(rows, counted):
        alone = model.generate(input_ids=prompt[:1], prefix_names=[name], max_new_tokens=5, do_sample=False)
        same += int(torch.equal(alone[0], row))
        print(f"{name or 'no prefix':10} {' '.join(str(number) for number in row.tolist())}")
    print(f"{same} of {len(rows)} rows are the same alone")


if __name__ == "__main__":
    main()
