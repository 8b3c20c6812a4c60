"""Generation in batches, and metrics against numbers worked out elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from prefix_attn.data import IGNORED, collate, prompt_ids
from prefix_attn.evaluate import METRICS, generate_text, score, validation_loss
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


# Metrics --------------------------------------------------------------------------------------------------------------


def test_a_perfect_text_scores_full_marks() -> None:
    text = "the cat sat on the mat ."
    found = score([text], [["something else entirely .", text]])
    assert set(found) == set(METRICS)
    assert found["bleu"] == pytest.approx(100)
    assert found["chrf"] == pytest.approx(100)
    assert found["rougeL"] == pytest.approx(100)
    assert found["ter"] == 0


def test_nist_by_hand() -> None:
    # One reference of four different words: information log2(4) of each word, 0 of each longer n-gram, and no penalty.
    assert score(["a b c d"], [["a b c d"]])["nist"] == pytest.approx(math.log2(4))
    # Two of three words are right: 2 log2(3) / 3.
    assert score(["A b x"], [["a b c"]])["nist"] == pytest.approx(2 * math.log2(3) / 3)


def test_rouge_and_ter_by_hand() -> None:
    found = score(["the cat sat", "a dog"], [["the cat ran", "birds"], ["a dog"]])
    assert found["rougeL"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert found["ter"] == pytest.approx(100 / (2 + 2))  # one edit; references have 3 and 1 words, 2 on average, and 2


def test_numbers_of_references_may_differ() -> None:
    found = score(
        ["the cat sat on the mat", "a dog runs in the park"],
        [["the cat sat on the mat"] * 3, ["a dog runs in the park"]],
    )
    assert found["bleu"] == pytest.approx(100)


def test_bleu_by_hand() -> None:
    # 5, 3, 2, 1 of 6, 5, 4, 3 n-grams are right, lengths agree.
    found = score(["the cat sat on a mat"], [["the cat sat on the mat"]])
    assert found["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


@pytest.mark.parametrize("text", ["", "hi", "."])
def test_short_texts_have_scores(text: str) -> None:
    found = score([text], [["hello there"]])
    assert all(math.isfinite(value) for value in found.values())
    assert found["nist"] == 0


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "no hypotheses"),
        (["a"], [], "1 hypotheses but references for 0"),
        (["a", "b"], [["a"], []], "hypothesis 1 has no references"),
    ],
)
def test_score_refuses(hypotheses: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(hypotheses, references)


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
