"""Score generated texts. Metrics come from other libraries if a lightweight one exists."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any

METRICS = ("bleu", "nist", "meteor", "rougeL", "cider", "chrf", "ter")
SCORED = tuple(name for name in METRICS if name != "meteor")  # those that need no extra data
MORE = ("rouge1", "rouge2", "exact", "f1")  # those that are to be asked for
PACKAGES = {
    **dict.fromkeys(("bleu", "chrf", "ter"), "sacrebleu"),
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), "rouge_score"),
    **dict.fromkeys(("nist", "meteor"), "nltk"),
}
NO_WORDNET = "nltk's WordNet is missing (python -m nltk.downloader wordnet)"
CIDER_N, CIDER_SIGMA = 4, 6.0

_log = logging.getLogger(__name__)


def choose(names: Sequence[str] | None = None, *, besides: Sequence[str] = ()) -> list[str]:
    """The metrics of these names, whatever their case, once what they need was looked for. Default: ``METRICS``.

    Args:
        names: those that are asked for. METEOR without WordNet is left out of the default, and a warning says so.
        besides: names that the caller knows.

    Raises:
        ValueError: there is no such metric, or no WordNet for METEOR.
        ModuleNotFoundError: a package is missing.
    """
    known = {name.lower(): name for name in (*METRICS, *MORE, *besides)}
    wanted = [*METRICS, *besides] if names is None else list(names)
    if wrong := [name for name in wanted if name.lower() not in known]:
        raise ValueError(f"there is no metric {wrong[0]!r}; there are {', '.join(known.values())}")
    found = list(dict.fromkeys(known[name.lower()] for name in wanted))
    for name in found:
        package = PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise ModuleNotFoundError(f"the metric {name} needs the package {package}", name=package)
    if "meteor" in found and names is not None and _find_wordnet() is None:
        raise ValueError(f"no METEOR: {NO_WORDNET}")
    if "meteor" in found and _wordnet() is None:
        found.remove("meteor")
    return found


def score(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str] | None = None
) -> dict[str, float]:
    """Scores of a corpus, each hypothesis against all of its references.

    BLEU, NIST, METEOR, ROUGE-L, CIDEr, chrF++ and TER, or the ``metrics`` that are asked for, of these and ROUGE-1,
    ROUGE-2, exact (texts that are one of their references, white space at the ends aside) and f1 (of words and
    punctuation marks, whatever their case, as bags; with the best reference).

    CIDEr ranges from 0 to 10, NIST has no upper limit, the others are out of 100. TER is an error rate: lower is
    better, and it can exceed 100. METEOR is nltk's and needs nltk's WordNet (``python -m nltk.downloader wordnet``).
    Without it the default has no "meteor", and a warning says so.

    Raises:
        ValueError: nothing to score, a hypothesis has no references, the two lists differ in length, or as ``choose``.
        ModuleNotFoundError: as ``choose``.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but references for {len(references)}")
    if not hypotheses:
        raise ValueError("no hypotheses to score")
    missing = next((i for i, texts in enumerate(references) if not texts), None)
    if missing is not None:
        raise ValueError(f"hypothesis {missing} has no references")
    ways = {
        **dict.fromkeys(("bleu", "chrf", "ter"), _sacrebleu),
        **dict.fromkeys(("rouge1", "rouge2", "rougeL"), _rouge),
        "nist": _nist,
        "meteor": _meteor,
        "cider": _cider,
        "exact": _exact,
        "f1": _f1,
    }
    return {name: ways[name](name, list(hypotheses), references) for name in choose(metrics)}


Texts = Sequence[str]


def _sacrebleu(name: str, hypotheses: Texts, references: Sequence[Texts]) -> float:
    from sacrebleu.metrics import BLEU, CHRF, TER

    # sacrebleu wants the first references of all hypotheses, then the second ones, and so on, with None in the gaps.
    streams = [list(stream) for stream in zip_longest(*references)]
    metric = {"bleu": BLEU, "chrf": partial(CHRF, word_order=2), "ter": TER}[name]()
    return metric.corpus_score(hypotheses, streams).score


def _exact(name: str, hypotheses: Texts, references: Sequence[Texts]) -> float:
    right = [
        text.strip() in {wanted.strip() for wanted in texts} for text, texts in zip(hypotheses, references, strict=True)
    ]
    return 100 * sum(right) / len(right)


def _f1(name: str, hypotheses: Texts, references: Sequence[Texts]) -> float:
    """Mean F-measure of the words in common, as in SQuAD (Rajpurkar et al. 2016), but without its rules of English."""

    def of(found: Counter[str], wanted: Counter[str]) -> float:
        both = found.total() + wanted.total()
        return 2 * (found & wanted).total() / both if both else 1.0

    best = [
        max(of(Counter(_words(text)), Counter(_words(wanted))) for wanted in texts)
        for text, texts in zip(hypotheses, references, strict=True)
    ]
    return 100 * sum(best) / len(best)


def _rouge(name: str, hypotheses: Texts, references: Sequence[Texts]) -> float:
    """Mean F-measure against the best reference of each hypothesis."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=True)
    best = [
        max(scorer.score(text, hypothesis)[name].fmeasure for text in texts)
        for hypothesis, texts in zip(hypotheses, references, strict=True)
    ]
    return 100 * sum(best) / len(best)


def _nist(name: str, hypotheses: Texts, references: Sequence[Texts]) -> float:
    """NIST (Doddington 2002) with n-grams up to 5, or up to the longest hypothesis if that is shorter. 0 without words.

    This is nltk's version. For each n it uses the best of several references. The paper's mteval pools the references
    and gives higher values.
    """
    from nltk.translate.nist_score import corpus_nist

    found = [_words(hypothesis) for hypothesis in hypotheses]
    wanted = [[_words(text) for text in texts] for texts in references]
    order = min(5, max(len(words) for words in found))
    if order == 0 or not any(words for texts in wanted for words in texts):
        return 0.0
    return float(corpus_nist(wanted, found, n=order))


def _words(text: str) -> list[str]:
    """Lower-case words and punctuation marks. Numbers such as 3.5 stay whole."""
    return re.findall(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]", text.lower())


@functools.cache
def _wordnet() -> Any:
    """nltk's WordNet. If it is not installed, None and one warning."""
    found = _find_wordnet()
    if found is None:
        _log.warning("METEOR is left out: %s", NO_WORDNET)
    return found


def _find_wordnet() -> Any:
    import nltk

    for archive in ("corpora/wordnet.zip", "corpora/wordnet"):
        try:
            nltk.data.find(archive)
        except LookupError:
            continue
        from nltk.corpus import wordnet

        return wordnet
    return None


def _meteor(name: str, hypotheses: Texts, references: Sequence[Texts]) -> float:
    """Mean METEOR (Banerjee and Lavie 2005) against the best reference of each hypothesis.

    Stems and synonyms are nltk's, so values differ from those of the paper's Java program.
    """
    from nltk.translate.meteor_score import meteor_score

    found = [
        meteor_score([_words(text) for text in texts], _words(hypothesis), wordnet=_wordnet())
        for hypothesis, texts in zip(hypotheses, references, strict=True)
    ]
    return 100 * sum(found) / len(found)


def _cider(name: str, hypotheses: Texts, references: Sequence[Texts]) -> float:
    """CIDEr-D (Vedantam et al. 2015, section 5.1) of words without punctuation, averaged over the corpus.

    The formula is that of pycocoevalcap's CiderScorer, and a test compares the two. It is not a dependency because it
    takes 100 MB; aac-metrics brings sentence-transformers. It splits words in Java, we use ``_words``. A corpus of one
    input has no rare words and gives 0.
    """
    found = [_ngrams(hypothesis) for hypothesis in hypotheses]
    wanted = [[_ngrams(text) for text in texts] for texts in references]
    documents = Counter(ngram for texts in wanted for ngram in set().union(*texts))
    rarest = math.log(len(wanted))

    def weigh(counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {ngram: n * (rarest - math.log(max(1, documents[ngram]))) for ngram, n in counts.items()}

    total = 0.0
    for counts, texts in zip(found, wanted, strict=True):
        weights = weigh(counts)
        total += sum(_similarity(weights, weigh(text), _bigrams(counts) - _bigrams(text)) for text in texts) / len(
            texts
        )
    return 10 * total / len(wanted)


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = [word for word in _words(text) if word[0].isalnum() or word[0] == "_"]
    return Counter(tuple(words[i : i + n]) for n in range(1, CIDER_N + 1) for i in range(len(words) - n + 1))


def _bigrams(counts: Counter[tuple[str, ...]]) -> int:
    """Number of bigrams. CIDEr uses it as the length of a text."""
    return sum(n for ngram, n in counts.items() if len(ngram) == 2)


def _similarity(found: dict[tuple[str, ...], float], wanted: dict[tuple[str, ...], float], difference: int) -> float:
    """Mean over n of the clipped cosine, reduced for texts that differ in length."""
    total = 0.0
    for n in range(1, CIDER_N + 1):
        ours = {ngram: weight for ngram, weight in found.items() if len(ngram) == n}
        theirs = {ngram: weight for ngram, weight in wanted.items() if len(ngram) == n}
        product = sum(min(weight, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0) for ngram, weight in ours.items())
        if norm := math.hypot(*ours.values()) * math.hypot(*theirs.values()):
            total += product / norm
    return total / CIDER_N * math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
