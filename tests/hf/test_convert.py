"""From every format that can be read to ours and to PEFT's: the same outputs, and a report that hides nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf.io import checkpoint
from prefix_attn.hf.io.convert import convert
from tests.hf import foreign
from tests.hf.foreign import GPT2, HEADS, P, mlp, table
from tests.hf.models import tiny, tokens


@torch.no_grad()
def logits(model: Any) -> Tensor:
    given = {"input_ids": tokens(2, 9)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens(2, 6)
    return model.eval()(**given).logits


def ours(base: PreTrainedModel, path: Path) -> PrefixModel:
    return PrefixModel.from_pretrained(base, path)


def saved_by_peft(base: PreTrainedModel, folder: Path, config: Any) -> Tensor:
    """Its logits."""
    peft = get_peft_model(base, config)
    peft.save_pretrained(folder)
    return logits(peft)


@pytest.mark.peft
@pytest.mark.parametrize(("name", "layers"), [("bart", 4), ("bart", 3), ("t5", 2)])
def test_peft_s_encoder_decoder_models_there_and_back(name: str, layers: int, tmp_path: Path) -> None:
    """To ours, with a prefix for each decoder layer; and from ours to PEFT, where one dead slot keeps layers apart."""
    sizes = ("num_layers", "num_decoder_layers") if name == "t5" else ("encoder_layers", "decoder_layers")
    changes = dict.fromkeys(sizes, layers) | ({"d_kv": 8} if name == "t5" else {})
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    expected = saved_by_peft(tiny(name, **changes), tmp_path / "peft", config)
    report = convert(tmp_path / "peft", tmp_path / "ours", base=tiny(name, **changes).config)
    assert report["format"] == "PEFT (encoder-decoder)"
    assert report["dead_slots"] == ([] if layers % 2 else list(range(1, layers, 2)))
    assert len(report["notes"]) == (0 if layers % 2 else 2)
    assert report["parameters"] == P * 2 * layers * 32
    model = ours(tiny(name, **changes), tmp_path / "ours")
    torch.testing.assert_close(logits(model), expected)
    model.prefixes["default"].embedding.data += torch.randn(P, 2 * layers * 32)  # no two layers are alike any more
    model.save_pretrained(tmp_path / "edited")
    back = convert(tmp_path / "edited", tmp_path / "back", to="peft")
    assert back["peft_type"] == "PREFIX_TUNING"
    again = PeftModel.from_pretrained(tiny(name, **changes), tmp_path / "back")
    torch.testing.assert_close(logits(again), logits(model))
    assert (logits(again) - expected).abs().max() > 0.1


@pytest.mark.peft
def test_cartridges_to_peft_and_back(tmp_path: Path) -> None:
    foreign.cartridge(tmp_path / "cache.pt", table(3, width=16), 2, frozen=1)
    convert(tmp_path / "cache.pt", tmp_path / "peft", to="peft")
    peft = PeftModel.from_pretrained(tiny("llama"), tmp_path / "peft")
    assert peft.peft_config["default"].num_frozen_tokens == 1
    torch.testing.assert_close(logits(peft), logits(ours(tiny("llama"), tmp_path / "cache.pt")))
    expected = saved_by_peft(
        tiny("llama"), tmp_path / "theirs", CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    )
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert (report["peft_type"], report["num_frozen_tokens"]) == ("CARTRIDGE", 1)
    torch.testing.assert_close(logits(ours(tiny("llama"), tmp_path / "ours")), expected)


@pytest.mark.peft
def test_the_original_to_peft(tmp_path: Path) -> None:
    """GPT-2's positions are shifted by both."""
    part, rows = mlp(3)
    foreign.original(tmp_path / "theirs", part, GPT2)
    convert(tmp_path / "theirs", tmp_path / "peft", to="peft")
    assert torch.equal(load_file(tmp_path / "peft" / checkpoint.ADAPTER)[checkpoint.KEY], rows)
    peft = PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "peft")
    torch.testing.assert_close(logits(peft), logits(ours(tiny("gpt2"), tmp_path / "theirs")))


def test_adapters_to_ours(tmp_path: Path) -> None:
    """With its head; how many heads of attention there are is known from the base model alone."""
    part, rows = mlp(3)
    foreign.adapters(tmp_path / "theirs", "bert", "BertForSequenceClassification", {"self_prefix": part})
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    torch.save(head, tmp_path / "theirs" / "pytorch_model_head.bin")
    for base, heads in ((None, None), (tiny("bert").config, HEADS)):
        report = convert(tmp_path / "theirs", tmp_path / "ours", base=base)
        assert report["heads"] == ["classifier"]
        written = json.loads((tmp_path / "ours" / checkpoint.ADAPTER_CONFIG).read_text())
        assert written["num_attention_heads"] == heads
        model = ours(tiny("bert"), tmp_path / "ours")
        assert torch.equal(model.prefixes["default"].embedding, rows)
        with pytest.raises(ValueError, match="trained for a base model"):
            ours(tiny("roberta"), tmp_path / "ours")
        assert torch.equal(logits(model), logits(ours(tiny("bert"), tmp_path / "theirs")))
    with pytest.raises(ValueError, match="trained for a base model"):
        convert(tmp_path / "theirs", tmp_path / "x", base=tiny("roberta").config)


def test_ours_to_ours_is_folded(tmp_path: Path) -> None:
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P, prefix_projection=True))
    model.save_pretrained(tmp_path / "a", training_state=True)
    report = convert(tmp_path / "a", tmp_path / "b")
    assert "left behind" in report["notes"][0]
    assert torch.equal(logits(ours(tiny("llama"), tmp_path / "b")), logits(model))


NOT_PEFT_S: dict[str, tuple[str, dict[str, Any], str]] = {
    "positions": ("llama", {"position_mode": "none"}, "its tokens start at position 0"),
    "layers": ("llama", {"layers": [1]}, r"it has layers \[1\] only"),
    "gate": ("llama", {"gate": "zero"}, "it has a gate"),
    "sites": ("bart", {}, r"position 0.*; it has sites \['encoder', 'cross', 'decoder'\]"),
}


@pytest.mark.parametrize(("name", "config", "why"), NOT_PEFT_S.values(), ids=NOT_PEFT_S)
def test_what_peft_does_not_have(name: str, config: dict[str, Any], why: str, tmp_path: Path) -> None:
    get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, **config)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=why):
        convert(tmp_path / "ours", tmp_path / "peft", to="peft")
    assert not (tmp_path / "peft").exists()


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    foreign.adapters(tmp_path / "a", "gpt2", "GPT2LMHeadModel", {"self_prefix": mlp(3)[0]})
    with pytest.raises(ValueError, match="does not say how many heads"):
        convert(tmp_path / "a", tmp_path / "b", to="peft")
    with pytest.raises(ValueError, match="other than that of the source"):
        convert(tmp_path / "a", tmp_path / "a")
    with pytest.raises(ValueError, match="to must be one of"):
        convert(tmp_path / "a", tmp_path / "b", to="adapters")
    foreign.original(tmp_path / "c", {"control_trans": torch.full((P * 192,), torch.inf)}, GPT2)
    with pytest.raises(ValueError, match="finite"):
        convert(tmp_path / "c", tmp_path / "b")
    foreign.original(tmp_path / "d", mlp(3)[0], GPT2 | {"n_layer": 4})
    with pytest.raises(ValueError, match=r"need .*\(4, 256\).* has .*\(4, 192\)"):
        convert(tmp_path / "d", tmp_path / "b")
    with pytest.raises(ValueError, match="num_attention_heads is 4, the base model needs 2"):
        convert(tmp_path / "d", tmp_path / "b", base=tiny("llama").config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]
