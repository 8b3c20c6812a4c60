"""The plans of the experiments. A run is a set of settings, and an experiment is a list of runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from prefix_attn.hf.config import SITES
from prefix_attn.quoting import quoted
from prefix_attn.training.settings import LEARNING_RATES

# The hard prompt of the method "discrete", and a text that a prefix can start from.
INSTRUCTIONS = {
    "e2e": "Describe the restaurant in one or two English sentences that say all of the following data.",
    "dart": "Say all of the following facts in fluent English sentences.",
    "webnlg": "Say all of the following facts in fluent English sentences.",
    "aws": "Say in one sentence what the following operation of a web service does.",
    "aws-summary": "Say in one sentence what the operation does that the following documentation describes.",
    "summary": "Say in one sentence what the following text says.",
}
MAX_LENGTH = {"e2e": 96, "dart": 160, "webnlg": 256, "aws": 96, "aws-summary": 512, "summary": 512}  # source and target
# The paper decodes with 5 beams and no length penalty, summaries with 6 beams and 0.8.
LENGTH_PENALTY = {"aws-summary": 0.8, "summary": 0.8}
NUM_BEAMS = {task: 6 if task in LENGTH_PENALTY else 5 for task in INSTRUCTIONS}

# Settings that only some methods use. A run sets the others to None, so that equal runs compare equal.
_PREFIX = ("virtual_tokens", "init", "init_text", "sites")
_TRAINED = ("steps", "batch_size", "learning_rate", "validate_every", "examples", "subset")
FIELDS: dict[str, tuple[str, ...]] = {
    "frozen": (),
    "discrete": ("init_text",),
    "embedding": (*_PREFIX, *_TRAINED),
    "infix": (*_PREFIX, *_TRAINED),
    "prefix": (*_PREFIX, *_TRAINED),
    "prefix-mlp": (*_PREFIX, "mlp_width", *_TRAINED),
    "peft": ("virtual_tokens", *_TRAINED),
    "lora": ("rank", *_TRAINED),
    "top2": _TRAINED,
    "full": _TRAINED,
}
METHODS = tuple(FIELDS)

LENGTHS = (1, 2, 5, 10, 20, 40, 100)
WORDS = ("table-to-text:", "summarize", "active", "banana", "elephant")  # of the paper's figure 5
LOW_DATA = (50, 100, 200, 500)
INIT_EXAMPLES = 100
# Optimizer steps for each number of examples: the paper's for GPT-2, section A.1.
LOW_DATA_STEPS = {50: 200, 100: 200, 200: 200, 500: 400}


@dataclass(frozen=True)
class Run:
    """One training with its evaluation. Fields that the method does not use are None.

    ``train`` and ``test`` are file names without folders, so that results do not depend on the machine. ``examples``
    is how many pairs are drawn for training, with the random seed ``subset``. Such a run stops early. None takes all.
    """

    task: str
    method: str
    train: str
    test: str | None = None
    model: str = "smollm2"
    seed: int = 0
    max_length: int = 96
    unseen: tuple[str, ...] = ()
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    validate_every: int | None = None
    virtual_tokens: int | None = None
    sites: tuple[str, ...] | None = None
    mlp_width: int | None = None
    init: str | None = None
    init_text: str | None = None
    rank: int | None = None
    examples: int | None = None
    subset: int | None = None
    limit: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        """Validate the method, drop settings that it does not use, and fill in its defaults."""
        if self.method not in FIELDS:
            raise ValueError(f"method must be one of {METHODS}, got {quoted(self.method)}")
        object.__setattr__(self, "unseen", tuple(self.unseen))
        object.__setattr__(self, "sites", self.sites and tuple(self.sites))
        optional = {name for names in FIELDS.values() for name in names}
        for name in optional - set(FIELDS[self.method]):
            object.__setattr__(self, name, None)
        if self.is_trained and self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.method])
        if not self.is_trained:
            object.__setattr__(self, "seed", 0)  # nothing is random
        if self.method != "discrete" and self.init != "text":
            object.__setattr__(self, "init_text", None)
        if (self.num_beams or 1) > 1:
            object.__setattr__(self, "length_penalty", LENGTH_PENALTY.get(self.task))
        if self.examples is None:
            object.__setattr__(self, "subset", None)
        for name in ("limit", "num_beams", "length_penalty", "max_new_tokens"):
            if self.test is None:
                object.__setattr__(self, name, None)

    @property
    def is_trained(self) -> bool:
        """Whether the method trains anything."""
        return "steps" in FIELDS[self.method]

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as JSON values."""
        found = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return {name: value for name, value in found.items() if value not in (None, [])}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """The inverse of ``to_dict``. An unknown field, and one of another type, is an error."""
        if not isinstance(values, dict):
            raise ValueError(f"a run must be an object of settings, got {quoted(values)}")
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings {quoted(unknown)}")
        try:
            run = cls(**values)
            hash(run)
        except TypeError as error:
            raise ValueError(f"no run has the settings {quoted(values)} ({error})") from None
        return run


def reproduce(
    common: dict[str, Any], methods: Sequence[str], seeds: Sequence[int], rates: Sequence[float | None]
) -> list[Run]:
    """Table 1 of the paper for one task: all ``methods`` with the settings in ``common``."""
    changes = (
        {"method": method, "seed": seed, "learning_rate": rate, **length}
        for method in methods
        for length in _lengths(method)
        for rate, seed in product(rates, seeds)
    )
    return _changed(common, changes)


def ablate(kind: str, common: dict[str, Any], seeds: Sequence[int], subsets: Sequence[int]) -> list[Run]:
    """One of the paper's ablations: "length" (figure 4), "init" (figure 5), "mode" (table 4) or "lowdata" (figure 3).

    "sites" is ours, for encoder-decoders: a prefix in each attention, in each pair of them, and in all three.
    """
    frozen: dict[str, Any] = {"method": "frozen"}
    changes: list[dict[str, Any]]
    if kind == "length":
        changes = [{"method": "prefix", "virtual_tokens": P, "seed": s} for P, s in product(LENGTHS, seeds)]
    elif kind == "mode":
        modes = ("prefix", "prefix-mlp", "embedding", "infix")
        changes = [{"method": mode, "seed": s, **length} for mode in modes for length in _lengths(mode) for s in seeds]
    elif kind == "init":
        texts = [
            ("random", None),
            ("uniform", None),
            ("text", INSTRUCTIONS[common["task"]]),
        ]  # uniform: the paper's random
        texts += [("text", word) for word in WORDS]
        n = INIT_EXAMPLES
        changes = [
            {"method": "prefix", "init": init, "init_text": text, **_few(n), "subset": subset, "seed": s}
            for (init, text), subset, s in product(texts, subsets, seeds)
        ]
    elif kind == "lowdata":
        full: dict[str, Any] = {"method": "full", "learning_rate": None}  # a given rate is meant for prefixes
        changes = [
            {**method, **_few(n), "subset": subset, "seed": s}
            for n, method, subset, s in product(LOW_DATA, ({"method": "prefix"}, full), subsets, seeds)
        ]
    elif kind == "sites":
        some = [sites for count in (1, 2, 3) for sites in combinations(SITES, count)]
        changes = [{"method": "prefix", "sites": sites, "seed": s} for sites, s in product(some, seeds)]
    else:
        raise ValueError(f"kind must be length, init, mode, lowdata or sites, got {kind!r}")
    return _changed(common, [frozen, *changes])


def _few(examples: int) -> dict[str, int]:
    return {"examples": examples, "steps": LOW_DATA_STEPS[examples]}


def _lengths(method: str) -> list[dict[str, int]]:
    """The virtual tokens to try. The paper has three lengths for embeddings and the infix."""
    return [{"virtual_tokens": P} for P in (1, 10, 20)] if method in ("embedding", "infix") else [{}]


def _changed(common: dict[str, Any], changes: Iterable[dict[str, Any]]) -> list[Run]:
    """Build the runs: ``common`` with each of ``changes``, without duplicates."""
    return list(dict.fromkeys(Run(**common | change) for change in changes))
