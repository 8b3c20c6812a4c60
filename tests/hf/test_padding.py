"""Padding behind a row: a head for question answering reads it, so it has the positions that transformers gives it."""

from __future__ import annotations

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from prefix_attn import PrefixConfig, accelerate, get_prefix_model
from tests.hf.by_hand import SIZES, other
from tests.hf.models import VOCABULARY, tiny
from tests.numerics import MODEL, close, close_in_norm

P = 4
# How the position of a padding token comes about: counted on; counted, in a table of positions; always the same one.
NAMES = ["llama", "gpt2", "bert", "opt", "roberta"]


def answering(name: str) -> PreTrainedModel:
    multi_head = {"num_key_value_heads": 4}  # PEFT takes these for the prefix's heads
    changes = {"word_embed_proj_dim": 32} if name == "opt" else {"pad_token_id": 1} if name == "roberta" else {}
    return other(name, AutoModelForQuestionAnswering, **multi_head | changes)


def questions(padding: int, length: int = 9) -> dict[str, Tensor]:
    """Two rows, of which the first has padding behind it."""
    ids = torch.randint(5, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    answers = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    return {"input_ids": ids.where(mask.bool(), padding), "attention_mask": mask, **answers}


@pytest.mark.peft
@pytest.mark.parametrize("name", NAMES)
def test_question_answering_is_pefts(name: str) -> None:
    """Its loss is a softmax over all columns."""
    base = answering(name)
    given = questions(base.config.pad_token_id or 0)
    model = get_peft_model(base, PrefixTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=P)).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    expected = model(**given)
    (wanted,) = torch.autograd.grad(expected.loss, weight)
    ours = get_prefix_model(answering(name), PrefixConfig(num_virtual_tokens=P, position_mode="shift")).eval()
    leaf = ours.prefixes["default"].embedding
    leaf.data = weight.detach().clone()
    for path, values in ((model, weight), (ours, leaf)):
        if path is model:
            accelerate(model)
        got = path(**given)
        for key in ("start_logits", "end_logits"):
            close(got[key], expected[key], MODEL)
        torch.testing.assert_close(got.loss, expected.loss)
        close_in_norm(torch.autograd.grad(got.loss, values)[0], wanted, MODEL)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_prefix_to_see_it_is_the_models_own(name: str) -> None:
    """A gate of zero, and tokens that start at 0: the bare model, in every column."""
    config = PrefixConfig(num_virtual_tokens=P, gate="zero", position_mode="none")
    given = questions(answering(name).config.pad_token_id or 0)
    got, expected = get_prefix_model(answering(name), config).eval()(**given), answering(name)(**given)
    close(got.start_logits, expected.start_logits, MODEL)
    torch.testing.assert_close(got.loss, expected.loss)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_padding_takes_no_room_among_the_positions(name: str) -> None:
    """Rows padded to all the positions that a model has: their tokens fit behind the prefix."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, position_mode="shift")).eval()
    ids = torch.randint(5, VOCABULARY, (1, 64))
    mask = (torch.arange(64) < 60).long()[None]
    assert SIZES["max_position_embeddings"] == 64
    close(model(ids, attention_mask=mask).logits[:, :60], model(ids[:, :60]).logits, MODEL)
