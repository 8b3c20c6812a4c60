"""Against PEFT where PEFT is right, and padding-invariant where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf.load import load_base
from tests.hf.models import tiny, tokens
from tests.numerics import GRADIENT, MODEL, close, close_in_norm

pytestmark = pytest.mark.peft
NAMES = ("llama", "gpt2", "qwen2", "mistral", "opt", "gpt_neox")
P = 5


def base(name: str) -> PreTrainedModel:
    """PEFT's cache loses the prefix past a sliding window: none here."""
    return tiny(name, **({"sliding_window": None} if name == "mistral" else {}))


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, PrefixModel]:
    """A PEFT model with a random prefix, saved by PEFT, and the same loaded here."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    peft = get_peft_model(base(request.param), config).eval()
    peft.save_pretrained(tmp_path)
    return peft, PrefixModel.from_pretrained(base(request.param), tmp_path).eval()


def greedy(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(input_ids=ids, attention_mask=mask, **options)


def left_padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The first row without its first four tokens, padded on the left; its mask."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    return ids, mask


def test_logits_of_a_peft_checkpoint(pair: tuple[Any, PrefixModel]) -> None:
    peft, ours = pair
    ids = tokens(3, 12)
    with torch.no_grad():
        expected, got = peft(input_ids=ids).logits, ours(input_ids=ids).logits
        with ours.disable_prefix():
            bare = ours(input_ids=ids).logits
    torch.testing.assert_close(got, expected)
    assert (bare - expected).abs().max() > 0.1


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_token_for_token(pair: tuple[Any, PrefixModel], num_beams: int) -> None:
    peft, ours = pair
    for ids, mask in ((tokens(3, 7), None), left_padded(tokens(3, 9))):
        expected = greedy(peft, ids, mask, num_beams=num_beams)
        assert torch.equal(greedy(ours, ids, mask, num_beams=num_beams), expected)


def test_left_padding_changes_nothing(pair: tuple[Any, PrefixModel]) -> None:
    """PEFT's forward places a left-padded row's tokens elsewhere than its generate does."""
    _, ours = pair
    ids, mask = left_padded(tokens(2, 9))
    with torch.no_grad():
        padded = ours(input_ids=ids, attention_mask=mask).logits[0, 4:]
        alone = ours(input_ids=ids[:1, 4:]).logits[0]
    close(padded, alone, MODEL)


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "mlp"])
@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_what_we_save(name: str, projection: bool, tmp_path: Path) -> None:
    config = PrefixConfig(num_virtual_tokens=P, prefix_projection=projection, encoder_hidden_size=16)
    ours = get_prefix_model(base(name), config).eval()
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"
    peft = PeftModel.from_pretrained(base(name), tmp_path).eval()
    ids = tokens(3, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, peft(input_ids=ids).logits)
    assert torch.equal(greedy(ours, ids), greedy(peft, ids))


def test_gradient_is_peft_s() -> None:
    """One training step's gradient of a flat prefix: PEFT sums B copies, we have one."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    peft = get_peft_model(base("llama"), config).eval()
    ours = get_prefix_model(base("llama"), PrefixConfig(num_virtual_tokens=P)).eval()
    theirs = peft.prompt_encoder["default"].embedding.weight
    ours.prefixes["default"].embedding.data.copy_(theirs.data)
    ids = tokens(3, 12)
    for model in (peft, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    close(ours.prefixes["default"].embedding.grad, theirs.grad, GRADIENT)


def test_smollm2_logits_of_a_peft_checkpoint(tmp_path: Path) -> None:
    """A real model of 30 layers, against PEFT in float64, whose own attention functions differ by up to 7e-4 there."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    peft = get_peft_model(load_base("smollm2", dtype=torch.float32)[0], config).eval()
    peft.prompt_encoder["default"].embedding.weight.data.mul_(0.5)
    peft.save_pretrained(tmp_path)
    model, tokenizer = load_base("smollm2", dtype=torch.float32)
    ours = PrefixModel.from_pretrained(model, tmp_path).eval()
    ids = tokenizer("name : Aromi | eatType : coffee shop\n=> Aromi is a coffee shop", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(greedy(ours, ids), greedy(peft, ids))
        close_in_norm(ours(input_ids=ids).logits.double(), peft.double()(input_ids=ids).logits, MODEL)
