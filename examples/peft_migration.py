"""From PEFT's prefix tuning to prefix_attn: change two lines, keep the files. Or keep PEFT's model and accelerate it.

Run it with ``python examples/peft_migration.py``. It needs transformers and peft, and downloads nothing: a tiny Llama
with random weights learns four lines of random tokens.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from prefix_attn import PrefixConfig, PrefixModel, accelerate, get_prefix_model

IDS = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))


def base_model() -> LlamaForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def with_peft() -> Any:
    """Before."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    return get_peft_model(base_model(), config)


def with_prefix_attn() -> Any:
    """After: another class and another function. The arguments stay."""
    config = PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    return get_prefix_model(base_model(), config)


def train(model: Any) -> str:
    """The rest of the script stays as it is."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(60):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"


@torch.no_grad()
def difference(one: Any, other: Any) -> float:
    """The largest difference of two models' logits."""
    return (one.eval()(input_ids=IDS).logits - other.eval()(input_ids=IDS).logits).abs().max().item()


def main() -> None:
    """Train both, exchange their files, then let PEFT's model run through our operator."""
    torch.set_num_threads(1)  # the tensors are too small for more
    theirs, ours = with_peft(), with_prefix_attn()
    print(f"PEFT: {train(theirs)}")
    print(f"ours: {train(ours)}")
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(f"{folder}/theirs")
        ours.save_pretrained(f"{folder}/ours")
        read = PrefixModel.from_pretrained(base_model(), f"{folder}/theirs")
        print(f"we read PEFT's file: logits differ by {difference(theirs, read):.1e}")
        read = PeftModel.from_pretrained(base_model(), f"{folder}/ours")
        print(f"PEFT reads our file: logits differ by {difference(ours, read):.1e}")
    before = theirs.eval()(input_ids=IDS).logits
    undo = accelerate(theirs)  # the same model, attending through our operator; undo() takes that back
    after = theirs(input_ids=IDS).logits
    print(f"PEFT's model, accelerated: logits differ by {(after - before).abs().max():.1e}")
    undo()


if __name__ == "__main__":
    main()
