"""Metrics against numbers computed elsewhere."""

from __future__ import annotations

import logging
import math

import pytest

from prefix_attn.training import metrics
from prefix_attn.training.metrics import METRICS, SCORED, choose, score
from tests.numerics import DOUBLE, close


@pytest.fixture(autouse=True)
def no_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results do not depend on whether the machine has nltk's data."""
    monkeypatch.setattr("nltk.data.path", [])


def test_a_perfect_text_scores_full_marks() -> None:
    text = "the cat sat on the mat ."
    found = score([text], [["something else entirely .", text]])
    assert set(found) == set(SCORED)
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


def test_exact_f1_and_rouge_by_hand() -> None:
    asked = ("exact", "f1", "rouge1", "rouge2")
    found = score(["The cat, sat", "a dog\n", ""], [["birds", "the cat sat down"], ["a dog"], [" "]], asked)
    assert tuple(found) == asked
    assert found["exact"] == pytest.approx(100 * (0 + 1 + 1) / 3)
    assert found["f1"] == pytest.approx(100 * (2 * 3 / (4 + 4) + 1 + 1) / 3)  # the comma is in none
    assert found["rouge1"] == pytest.approx(100 * (2 * 3 / (3 + 4) + 1 + 0) / 3)
    assert found["rouge2"] == pytest.approx(100 * (2 * 2 / (2 + 3) + 1 + 0) / 3)


def test_the_metrics_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By any case, and those alone. What is missing is named before anything is scored."""
    assert choose(["rougel", "BLEU", "bleu", "Loss"], besides=("loss",)) == ["rougeL", "bleu", "loss"]
    everything = score(["the cat"], [["a cat"]])
    assert score(["the cat"], [["a cat"]], ["rougel", "nist"]) == {
        name: everything[name] for name in ("rougeL", "nist")
    }
    with pytest.raises(ValueError, match=r"no metric 'bleurt'; there are bleu, nist, .*, exact, f1, loss"):
        choose(["bleu", "bleurt"], besides=("loss",))
    with pytest.raises(ValueError, match="no METEOR: nltk's WordNet is missing"):
        choose(["meteor"])
    monkeypatch.setattr(metrics, "find_spec", lambda package: None if package == "rouge_score" else package)
    with pytest.raises(ModuleNotFoundError, match="the metric rougeL needs the package rouge_score"):
        choose()
    assert choose(["bleu"]) == ["bleu"]


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


# What pycocoevalcap 1.2's CiderScorer(n=4, sigma=6.0) gives for these words, each text in turn.
CIDER = [
    (
        "The Vaults is a cheap pub near the river.",
        ["The Vaults is a cheap pub by the river.", "Near the river there is a cheap pub, The Vaults."],
        5.979134251174745,
    ),
    (
        "Aromi serves Italian food, in the city centre.",
        ["Aromi is an Italian restaurant in the city centre."],
        2.547741039018852,
    ),
    (
        "A coffee shop.",
        ["A coffee shop.", "Blue Spice is a coffee shop in the city centre.", "There is a coffee shop."],
        5.093569793586049,
    ),
    ("Zizzi is a pub rated 3 out of 5", ["Zizzi is a pub with a rating of 3 out of 5."], 4.724757482064062),
    ("", ["Nothing here"], 0.0),
    ("the the the the the cat cat", ["the cat sat on the mat", "a cat"], 0.8200813612362854),
]


def test_cider_is_pycocoevalcaps() -> None:
    hypotheses, references, wanted = zip(*CIDER)
    close(score(hypotheses, references)["cider"], sum(wanted) / len(wanted), DOUBLE)


def test_cider_of_equal_texts_is_ten() -> None:
    texts = ["a cat sat on the mat", "some dogs run in parks"]
    assert score(texts, [[text] for text in texts])["cider"] == pytest.approx(10)
    assert score(texts[:1], [texts[:1]])["cider"] == 0  # every word is in every document


class Synonyms:
    """A WordNet without synonyms."""

    def synsets(self, word: str) -> list[object]:
        return []


def test_meteor_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_wordnet", Synonyms)
    found = score(["the cats sat", "a dog"], [["birds", "the cat sat down"], ["a dog"]])
    assert set(found) == set(METRICS)
    # Three of three words, one by its stem, of the four of the reference, in one chunk: 10PR / (R + 9P), and a penalty
    # of 0.5 (chunks / matches)^3.
    first = 10 * 0.75 / (0.75 + 9) * (1 - 0.5 / 27)
    assert found["meteor"] == pytest.approx(100 * (first + (1 - 0.5 / 8)) / 2)


def test_without_wordnet_meteor_is_missing_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing(archive: str) -> None:
        raise LookupError(archive)

    monkeypatch.setattr("nltk.data.find", nothing)
    metrics._wordnet.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert all("meteor" not in score(["a"], [["a"]]) for _ in range(2))
    assert [record.message.split(":")[0] for record in caplog.records] == ["METEOR is left out"]
    metrics._wordnet.cache_clear()
