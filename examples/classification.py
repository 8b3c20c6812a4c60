"""A classifier: a prefix and a new head on a frozen BERT, trained by transformers' Trainer, saved and loaded together.

Run it with ``python examples/classification.py``. It needs transformers and accelerate, and downloads nothing: a tiny
BERT with random weights learns to tell rows of small numbers from rows of large ones.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model


def base_model() -> BertForSequenceClassification:
    """The same weights each time; the head starts at random."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=16, initializer_range=0.2, **sizes)).eval()


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Half of them from 1 to 9, half from 6 to 14."""
    draw = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(1, 10, (count, 12), generator=draw), torch.arange(count) % 2
    return [{"input_ids": row, "labels": label} for row, label in zip(ids + 5 * labels[:, None], labels)]


@torch.no_grad()
def logits(model: Any, data: list[dict[str, Any]]) -> torch.Tensor:
    """(rows, 2)."""
    return model.eval()(input_ids=torch.stack([row["input_ids"] for row in data])).logits


def accuracy(model: Any, data: list[dict[str, Any]]) -> float:
    """In percent."""
    labels = torch.stack([row["labels"] for row in data])
    return 100 * (logits(model, data).argmax(-1) == labels).float().mean().item()


def main() -> None:
    """Train, and load what the Trainer saved."""
    torch.set_num_threads(1)
    model = get_prefix_model(base_model(), PrefixConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    print(f"trained beside the prefix: {', '.join(model.heads['default'])}")
    test, before = rows(64, seed=2), accuracy(model, rows(64, seed=2))
    with tempfile.TemporaryDirectory() as folder:
        options = {"learning_rate": 3e-2, "per_device_train_batch_size": 32, "save_strategy": "no", "report_to": "none"}
        args = TrainingArguments(folder, max_steps=80, use_cpu=True, disable_tqdm=True, seed=0, **options)
        trainer = Trainer(model, args, train_dataset=rows(256, seed=1))
        trainer.train()
        trainer.save_model(f"{folder}/final")
        again = PrefixModel.from_pretrained(base_model(), f"{folder}/final")
    print(f"accuracy {before:.0f}% -> {accuracy(model, test):.0f}%")
    print(
        f"loaded from the Trainer's folder: logits differ by {(logits(again, test) - logits(model, test)).abs().max()}"
    )


if __name__ == "__main__":
    main()
