"""Generation in batches, and the loss on targets."""

from __future__ import annotations

import pytest
import torch

from prefix_attn.data import IGNORED, collate, prompt_ids
from prefix_attn.evaluate import generate_text, validation_loss
from tests.hf.models import tiny
from tests.tokens import END, byte_tokenizer

SIZES = {"vocab_size": 257, "max_position_embeddings": 128, "eos_token_id": END, "pad_token_id": END}


# Generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batches_and_order_do_not_change_the_texts(num_beams: int) -> None:
    model, tokenizer = tiny("llama", **SIZES), byte_tokenizer()
    sources = ["a", "a much longer source", "medium one", "b", "a much longer one too"]
    done: list[int] = []
    options = {"num_beams": num_beams, "max_new_tokens": 6}
    together = generate_text(model, tokenizer, sources, batch_size=3, progress=done.append, **options)
    alone = [generate_text(model, tokenizer, [source], **options)[0] for source in sources]
    assert together == alone
    assert done == [3, 2]
    assert len(set(together)) > 1


def test_the_first_line_is_kept_and_the_mode_restored() -> None:
    class Parrot(torch.nn.Module):
        """Continues every prompt by the same text."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generate(self, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
            assert not self.training
            assert options["do_sample"] is False
            text = tokenizer("\n  The first. \nThe second.")["input_ids"] + [END]
            return torch.cat([input_ids, torch.tensor([text] * len(input_ids))], 1)

    tokenizer, model = byte_tokenizer(), Parrot().train()
    assert generate_text(model, tokenizer, ["a", "bcd"]) == ["The first."] * 2
    assert model.training
    assert generate_text(model, tokenizer, []) == []


def test_prompt_ids_are_those_of_the_frame() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(prompt_ids(tokenizer, "a b")) == "a b\n=>"


# Validation loss ------------------------------------------------------------------------------------------------------


def test_validation_loss_weighs_tokens() -> None:
    model = tiny("llama", **SIZES).train()
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, 6, 7, 8, 9]},
        {"input_ids": [1, 2, 3], "labels": [IGNORED, IGNORED, 3]},
        {"input_ids": [4, 9], "labels": [IGNORED, 9]},
    ]
    apart = validation_loss(model, [collate(rows[:1], END), collate(rows[1:], END)])
    together = validation_loss(model, [collate(rows, END)])
    assert model.training
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for i, label in enumerate(row["labels"][1:]):
            if label != IGNORED:
                total, count = total - float(logits[i, label].detach()), count + 1
    assert count == 6
    assert apart == pytest.approx(total / count, rel=1e-5)
    assert together == pytest.approx(total / count, rel=1e-5)
    without = {"input_ids": [1, 2], "labels": [IGNORED, IGNORED]}
    assert validation_loss(model, [collate([without], END), collate(rows, END)]) == together


def test_validation_loss_needs_targets() -> None:
    with pytest.raises(ValueError, match="no target tokens"):
        validation_loss(tiny("llama", **SIZES), [])
