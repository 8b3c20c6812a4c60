"""Prefixes that are longer in some layers than in others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.edit import concatenate, truncate
from prefix_attn.hf.model import PrefixModel, get_prefix_model
from tests.hf.models import tiny, tokens

P = 4


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_length_for_each_layer(backend: str, tmp_path: Path) -> None:
    """The layer sees the first tokens alone: none of the others moves an output, or has a gradient."""
    lengths = {2: 1, 0: P}
    config = PrefixConfig(num_virtual_tokens=P, layers=lengths, backend=backend)
    model = get_prefix_model(tiny("llama"), config).eval()
    encoder = model.prefixes["default"]
    out = model(tokens()).logits
    (grad,) = torch.autograd.grad(out.square().sum(), encoder.embedding)
    used = grad.view(P, 2, 2, -1).abs().amax((2, 3)) > 0  # slots are in the order of the layers
    assert used.tolist() == [[True, i < 1] for i in range(P)]
    kv = encoder().detach().clone()
    kv[2:, :, 1:] = 100.0
    encoder.set_kv(kv)
    torch.testing.assert_close(model(tokens()).logits, out)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PREFIX_ATTN"
    again = PrefixModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert again.prefix_configs["default"].layers == lengths
    torch.testing.assert_close(again(tokens()).logits, out)
    # In a bank.
    model.add_prefix("same", PrefixConfig(num_virtual_tokens=P, layers=lengths, backend=backend))
    expected = torch.stack([out[0], model(tokens()).logits[1]])
    torch.testing.assert_close(model(tokens(), prefix_names=["default", "same"]).logits, expected)
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=P, layers={2: P, 0: P}, backend=backend))
    with pytest.raises(ValueError, match="must have one layers"):
        model(tokens(), prefix_names=["default", "other"])
    with pytest.raises(ValueError, match="too few tokens in layers decoder 2"):
        model.add_prefix("x", PrefixConfig(num_virtual_tokens=P, init="prefix", init_prefix="default", layers=[2]))
    for edit in (lambda: concatenate(model, ["default", "same"], "x"), lambda: truncate(model, "same", "x", stop=1)):
        with pytest.raises(NotImplementedError, match="can be moved, but not cut or joined"):
            edit()


@pytest.mark.parametrize(("name", "gate"), [("llama", None), ("llama", "zero"), ("bart", None), ("t5", None)])
def test_full_lengths_are_no_lengths(name: str, gate: str | None) -> None:
    outs = []
    for layers in ([0, 1], {0: P, 1: P}):
        config = PrefixConfig(num_virtual_tokens=P, layers=layers, gate=gate)
        torch.manual_seed(0)
        model = get_prefix_model(tiny(name), config).eval()
        if gate is not None:
            model.prefixes["default"].gate.data.fill_(0.5)
        given = {"decoder_input_ids": tokens(2, 5)} if name in ("bart", "t5") else {}
        outs.append(model(input_ids=tokens(), **given).logits)
    assert torch.equal(*outs)
