"""The search for a better recipe: its cells, and rates of keys and values apart."""

from __future__ import annotations

import torch

from benchmarks.recipe import cells, scale
from prefix_attn import PrefixConfig, get_prefix_model
from tests.hf.models import tiny
from tests.numerics import FLOAT, close


def test_cells_have_names_of_their_own() -> None:
    names = [cell["name"] for cell in cells()]
    assert len(set(names)) == len(names) > 20


def test_keys_learn_faster() -> None:
    """The prefix starts as it was. One step of Adam at a small rate moves keys 4 times as far as values."""
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=3))
    encoder, _ = model.find_prefix("default")
    before = encoder().detach().clone()
    scale(model, 4.0)
    close(encoder().detach(), before, FLOAT)
    optimizer = torch.optim.Adam([encoder.embedding], lr=1e-3)
    encoder().sum().backward()
    optimizer.step()
    moved = (encoder().detach() - before).abs()
    torch.testing.assert_close(moved[0::2].mean(), 4 * moved[1::2].mean())
