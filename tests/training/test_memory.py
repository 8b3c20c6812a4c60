"""The estimate of what a training takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import get_prefix_model
from prefix_attn.training import memory
from prefix_attn.training.evaluate import target_loss
from prefix_attn.training.examples import Example
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.train import has_bfloat16
from prefix_attn.training.train import train as run_training
from tests.hf.models import tiny
from tests.tokens import END, byte_tokenizer


def kept(rows: int, length: int, name: str, prefix: int) -> int:
    """Bytes that autograd keeps for the backward of such a batch, without weights and what has no column."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=prefix)).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(rows, length, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        target_loss(model, batch)
    return sum(sizes.values())


@pytest.mark.parametrize(("name", "most"), [("llama", 1.1), ("gpt2", 1.1), ("gemma2", 1.4), ("t5", 1.4)])
def test_activations_of_a_short_row_tell_those_of_a_batch(name: str, most: float) -> None:
    """The last two keep a mask or a bias for pairs of tokens, once for all rows. In models this narrow it shows."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=3))
    found = memory.training_memory(model)
    grown = kept(4, 40, name, 3) - kept(2, 40, name, 3)
    layers = 2 * 3 if name == "t5" else 3
    # Without the working memory of one layer, and the holes of a heap.
    estimated = found.token * 2 * 40 * layers / (layers + 1) / memory.HOLES[False]
    assert 0.9 < estimated / grown < most
    assert not model.base_model.training


def test_what_is_trained_and_checkpointed_counts() -> None:
    flat, mlp = (
        memory.training_memory(
            get_prefix_model(tiny("llama"), PrefixConfig(4, prefix_projection=projected, encoder_hidden_size=64))
        )
        for projected in (False, True)
    )
    assert mlp.fixed - flat.fixed > 12 * 64 * 3 * 2 * 16  # the last layer of the MLP
    model = get_prefix_model(tiny("llama", num_hidden_layers=8), PrefixConfig(4))
    whole, some = (memory.training_memory(model, gradient_checkpointing=on) for on in (False, True))
    assert some.token / memory.HOLES[True] < whole.token / memory.HOLES[False] / 2
    assert some.loaded == whole.loaded > sum(p.nbytes for p in model.parameters())


def test_the_longest_row_is_the_inverse_of_the_total() -> None:
    found = memory.Memory(loaded=1000, fixed=500, token=2.0)
    assert found.total(8, 10) == 1660
    assert found.longest(8, free=660) == 10
    assert found.longest(8, free=100) == 0
    assert memory.free_bytes(torch.device("cpu")) > 2**20


def train(folder: Path, texts: Sequence[str], **changes: Any) -> dict[str, Any]:
    """Train a step on rows of these sources."""
    sizes = {"vocab_size": 257, "max_position_embeddings": 64, "eos_token_id": END, "pad_token_id": END}
    model = get_prefix_model(tiny("llama", **sizes), PrefixConfig(num_virtual_tokens=4))
    chosen = TrainingSettings(folder, steps=1, batch_size=2, validate_every=1, **changes)
    run_training(model, byte_tokenizer(), [Example(text, ("b",)) for text in texts], [], chosen)
    return json.loads((folder / "settings.json").read_text())


def test_rows_are_as_long_as_the_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each has its source, a line break, '=>', a space, a target and an end: 6 tokens more than the source."""
    assert train(tmp_path / "short", ["a" * 10, "a" * 20])["max_length"] == 26
    assert "cut" not in caplog.text
    # The prefix takes 4 of 64 positions.
    assert train(tmp_path / "long", ["a" * 10, "a" * 70, "a" * 80])["max_length"] == 60
    assert "2 of 3 rows have a source that is too long for max_length=60, by up to 26 tokens" in caplog.text
    assert "cut (the model's positions)" in caplog.text


def test_memory_ends_rows_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_prefix_model(tiny("llama", vocab_size=257), PrefixConfig(num_virtual_tokens=4))
    found = memory.training_memory(model, bf16=has_bfloat16(model.device))
    free = int((found.fixed + found.token * 2 * 30.5) / memory.SHARE)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert train(tmp_path / "x", ["a" * 40])["max_length"] in (29, 30, 31)
    assert "cut (memory)" in caplog.text
    # What goes on takes the length of before, whatever memory has room for by now.
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * free)
    assert train(tmp_path / "x", ["a" * 40], resume=True)["max_length"] in (29, 30, 31)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    with pytest.raises(ValueError, match=r"there is no room \(memory\) for 2 rows"):
        train(tmp_path / "y", ["a"])
    assert train(tmp_path / "z", ["a" * 40], max_length=20)["max_length"] == 20
