"""A folder with a small trained model and data files in E2E's format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefix_attn.training.data import Example
from prefix_attn.training.tokens import collate, encode
from tests.hf.models import tiny
from tests.tokens import END, byte_tokenizer

SIZES = {"vocab_size": 257, "max_position_embeddings": 256, "eos_token_id": END, "pad_token_id": END}
NAMES = [a + b for a in "ABCDEFGH" for b in "aeiou"]


def targets(name: str) -> tuple[str, ...]:
    """What the model has learnt to write, each with equal probability. The files ask for the second one only."""
    return tuple(f"{word} {name}." for word in ("At", "By", "Do", "Go", "In", "My", "On", "To"))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, train.csv with 40 inputs, test.csv with 2, and dart.json with 40 inputs of two categories."""
    import json

    folder = tmp_path_factory.mktemp("experiments")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = tiny("llama", **SIZES).train()
    rows, _ = encode(tokenizer, [Example(f"name : {name}", targets(name)) for name in NAMES])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        batch = collate([rows[i] for i in torch.randint(len(rows), (16,)).tolist()], END)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [f'"name[{name}]",{targets(name)[1]}' for name in NAMES]
    (folder / "train.csv").write_text("mr,ref\n" + "\n".join(lines))
    (folder / "test.csv").write_text("MR,ref\n" + "\n".join(lines[:2]))
    entries = [
        {
            "tripleset": [[name, "is", "a"]],
            "annotations": [{"source": "pub" if i % 4 else "inn", "text": targets(name)[1]}],
        }
        for i, name in enumerate(NAMES)
    ]
    (folder / "dart.json").write_text(json.dumps(entries))
    return folder
