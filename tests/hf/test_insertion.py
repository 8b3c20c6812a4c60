"""Virtual tokens in every row: encoders, encoder-decoders, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from prefix_attn import PrefixTuning
from tests.hf.by_hand import WIDTH, P, concatenated, other
from tests.hf.models import CACHE, tiny, tokens
from tests.numerics import MODEL, close, close_in_norm


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoder(name: str) -> None:
    """In front of the encoder's input; the decoder attends to them, in generation too."""
    base = other(name, AutoModelForSeq2SeqLM)
    model = PrefixTuning(base, P, WIDTH).eval()
    ids, target = tokens(2, 9), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    got = model(ids, attention_mask=mask, labels=target)
    given = concatenated(base, model.prefix, ids, mask)
    expected = base(**given, labels=target)
    close(got.logits, expected.logits, MODEL)
    torch.testing.assert_close(got.loss, expected.loss)
    grads = [torch.autograd.grad(out.loss, model.prefix)[0] for out in (got, expected)]
    close_in_norm(*grads, MODEL)
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), base.generate(**given, **options))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # what DeBERTa is written in
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "deberta-v2"])
def test_encoder(name: str) -> None:
    base = other(name, AutoModelForMaskedLM)
    model = PrefixTuning(base, P, WIDTH).eval()
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    got = model(ids, attention_mask=mask, labels=ids, output_hidden_states=True)
    expected = base(**concatenated(base, model.prefix, ids, mask), output_hidden_states=True)
    close(got.logits, expected.logits[:, P:], MODEL)
    assert got.hidden_states
    for ours, theirs in zip(got.hidden_states, expected.hidden_states):
        close(ours, theirs[:, P:], MODEL)
    weight = torch.randn_like(got.logits)
    grads = [torch.autograd.grad((t * weight).sum(), model.prefix)[0] for t in (got.logits, expected.logits[:, P:])]
    close_in_norm(*grads, MODEL)


def test_a_pooler_sees_the_first_real_token() -> None:
    """Not the first virtual one, which is where the sequence would begin."""
    base = other("bert", AutoModelForSequenceClassification)
    model = PrefixTuning(base, P, WIDTH).eval()
    ids, types = tokens(2, 9), torch.arange(9).ge(5).long().expand(2, -1)
    given = concatenated(base, model.prefix, ids, torch.ones_like(ids))
    given["token_type_ids"] = torch.cat([types.new_zeros(2, P), types], dim=1)
    hidden = base.bert(**given).last_hidden_state[:, P:]
    expected = base.classifier(base.bert.pooler(hidden))
    for return_dict in (True, False):
        out = model(ids, token_type_ids=types, labels=torch.tensor([0, 1]), return_dict=return_dict)
        close_in_norm(out[1], expected, MODEL)
        torch.testing.assert_close(out[0], nn.functional.cross_entropy(expected, torch.tensor([0, 1])))


INIT_ERRORS: dict[str, tuple[str, Any, dict[str, Any], type[Exception], str]] = {
    "size": ("llama", AutoModelForCausalLM, {"hidden_size": 768}, ValueError, "hidden_size must be 32, .* got 768"),
    "length": (
        "llama",
        AutoModelForCausalLM,
        {"prefix_length": 0},
        ValueError,
        "prefix_length must be a positive int, got 0",
    ),
    "no cache": ("mamba", AutoModelForCausalLM, {}, NotImplementedError, "MambaForCausalLM has no past_key_values"),
    "layers": ("albert", AutoModelForMaskedLM, {}, NotImplementedError, "AlbertForMaskedLM has no list of 2 layers"),
}


@pytest.mark.parametrize(("name", "auto", "arguments", "error", "message"), INIT_ERRORS.values(), ids=INIT_ERRORS)
def test_refused_models(name: str, auto: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    base = other(name, auto)
    before = base.config._attn_implementation
    with pytest.raises(error, match=message):
        PrefixTuning(base, **{"prefix_length": P, "hidden_size": WIDTH} | arguments)
    assert base.config._attn_implementation == before
    assert all(p.requires_grad for p in base.parameters())


def test_a_model_that_scales_the_embeddings_of_ids_alone() -> None:
    base = other("pegasus", AutoModelForSeq2SeqLM, scale_embedding=True)
    with pytest.raises(NotImplementedError, match="does not treat inputs_embeds as the embeddings of input_ids"):
        PrefixTuning(base, P, WIDTH)


def test_refused_calls() -> None:
    """Wherever virtual tokens would silently be lost, or seen by some alone."""
    model = PrefixTuning(tiny("mistral"), P, WIDTH).eval()
    ids = tokens()
    cache = model(ids, use_cache=True)[CACHE]
    frozen = tiny("mistral")(ids, use_cache=True)[CACHE]
    packed = torch.cat([torch.arange(5), torch.arange(4)])[None]
    calls = {
        "need an attention_mask": ({"input_ids": ids, CACHE: cache}, ValueError),
        r"attention_mask must be \(B, 14\)": (
            {"input_ids": ids, CACHE: frozen, "attention_mask": torch.ones(2, 18)},
            ValueError,
        ),
        r"attention_mask must be \(B, 9\), .* got \(2, 1, 9, 9\)": (
            {"input_ids": ids, "attention_mask": torch.ones(2, 1, 9, 9)},
            ValueError,
        ),
        "packed": ({"input_ids": ids, "position_ids": packed}, NotImplementedError),
    }
    with pytest.raises(NotImplementedError, match="static cache"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static", disable_compile=True)
    for message, (arguments, error) in calls.items():
        with pytest.raises(error, match=message):
            model(**arguments)
    encoder_decoder = PrefixTuning(other("t5", AutoModelForSeq2SeqLM), P, WIDTH)
    encoded = encoder_decoder.base_model.encoder(ids)
    with pytest.raises(RuntimeError, match="did not run T5Stack: no virtual token entered it"):
        encoder_decoder(encoder_outputs=encoded, labels=ids)
