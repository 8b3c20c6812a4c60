"""Rows that a model has no positions for: an error that says so, before torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefix_attn import PrefixConfig, PrefixTuning, get_prefix_model
from tests.hf.models import tiny, tokens
from tests.numerics import MODEL, close

P = 10
NAMES = ["gpt2", "opt", "bert", "roberta", "electra", "distilbert"]  # of 64 positions, OPT and RoBERTa from 2 on
MESSAGE = (
    "rows of 55 tokens after num_virtual_tokens=10 need 65 positions, and the model has 64; shorten the rows to 54"
)


def prefixed(base: PreTrainedModel, **fields: Any) -> Any:
    return get_prefix_model(base, PrefixConfig(num_virtual_tokens=P, **fields)).eval()


def tuned(base: PreTrainedModel) -> Any:
    return PrefixTuning(base, P, base.get_input_embeddings().weight.shape[1]).eval()


def longest(name: str) -> PreTrainedModel:
    return tiny(name, max_position_embeddings=66) if name == "roberta" else tiny(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrap", [prefixed, tuned])
def test_the_last_row_that_fits_and_the_first_that_does_not(name: str, wrap: Callable[[PreTrainedModel], Any]) -> None:
    model = wrap(longest(name))
    assert model(tokens(1, 54)).logits.isfinite().all()
    with pytest.raises(ValueError, match=MESSAGE):
        model(tokens(1, 55))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@pytest.mark.parametrize("wrap", [prefixed, tuned])
def test_padding_takes_no_position(name: str, wrap: Callable[[PreTrainedModel], Any]) -> None:
    model, ids = wrap(tiny(name)), tokens(1, 54)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
    got = model(padded, attention_mask=(padded != 0).long()).logits[:, 3:]
    close(got, model(ids).logits, MODEL)
    with pytest.raises(ValueError, match=MESSAGE):
        model(padded, attention_mask=(torch.arange(57) > 1).long()[None])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_text_grows_until_the_positions_end(cache: str) -> None:
    model = prefixed(tiny("gpt2"))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "disable_compile": True}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    assert model.generate(tokens(1, 50), max_new_tokens=5, **options).shape == (1, 55)  # the last is not read
    with pytest.raises(ValueError, match=MESSAGE):
        model.generate(tokens(1, 50), max_new_tokens=6, **options)


def test_a_batch_of_prefixes_counts_the_longest_of_its_rows() -> None:
    model = prefixed(tiny("gpt2"))
    model.add_prefix("short", PrefixConfig(num_virtual_tokens=2))
    assert model(tokens(2, 54), prefix_names=["default", "short"]).logits.isfinite().all()
    with pytest.raises(ValueError, match="need 65 positions"):
        model(tokens(2, 55), prefix_names=["short", "default"])
    assert model(tokens(2, 60), prefix_names=["short", None]).logits.isfinite().all()


def test_decoders_of_encoder_decoders_count_their_own() -> None:
    model = prefixed(tiny("bart"), position_mode="shift")
    fits: dict[str, Tensor] = {"input_ids": tokens(1, 54), "decoder_input_ids": tokens(1, 54)}
    assert model(**fits).logits.isfinite().all()
    for name in fits:
        with pytest.raises(ValueError, match=MESSAGE):
            model(**fits | {name: tokens(1, 55)})


def test_models_without_a_table_have_no_limit() -> None:
    assert prefixed(tiny("llama"))(tokens(1, 80)).logits.isfinite().all()
    none = prefixed(tiny("gpt2"), position_mode="none")
    assert none(tokens(1, 64)).logits.isfinite().all()
    with pytest.raises(ValueError, match="rows of 65 tokens need 65 positions, and the model has 64; shorten"):
        none(tokens(1, 65))
    with pytest.raises(ValueError, match="num_virtual_tokens must be at most 64, the positions of GPT2LMHeadModel"):
        get_prefix_model(tiny("gpt2"), PrefixConfig(num_virtual_tokens=70))
