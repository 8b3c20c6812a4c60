"""examples/tour.ipynb runs from its first cell to its last, and each part of it does what its text says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.models import tiny
from tests.tokens import END, byte_tokenizer

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples/tour.ipynb"


def test_tour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a tiny random Llama in place of SmolLM2."""
    sizes = {"vocab_size": 257, "max_position_embeddings": 256, "eos_token_id": END, "pad_token_id": END}
    base = tiny("llama", seed=1, **sizes)
    monkeypatch.setattr("prefix_attn.hf.load.load_base", lambda name: (base, byte_tokenizer()))
    names: dict[str, Any] = {}
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["losses"][-1] < names["losses"][0]
    assert names["mass"].shape == (3, 4)
    assert ((names["mass"] > 0) & (names["mass"] < 1)).all()
    model, prompt, tokenizer = names["model"], names["inputs"], names["tokenizer"]
    for prefix, text in zip(names["names"], names["texts"], strict=True):
        with torch.no_grad():
            out = model.generate(**prompt, prefix_names=[prefix], max_new_tokens=12, do_sample=False)
        alone = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == alone
    assert all(names["texts"])
    assert names["served"] == names["texts"][1]
    assert capsys.readouterr().out.splitlines()[-1] == repr(names["served"])
