"""The runs of each experiment."""

from __future__ import annotations

from typing import Any

import pytest

from prefix_attn.experiments import plan
from prefix_attn.experiments.plan import Run
from prefix_attn.training.settings import LEARNING_RATES

COMMON: dict[str, Any] = {
    "task": "e2e",
    "train": "dev.csv",
    "steps": 300,
    "batch_size": 8,
    "validate_every": 10,
    "virtual_tokens": 10,
    "mlp_width": 512,
    "rank": 2,
    "init": "random",
    "init_text": "Describe it.",
}


def test_settings_that_a_method_has_no_use_for_are_dropped() -> None:
    frozen = Run(**COMMON, method="frozen", seed=3, num_beams=5)
    assert frozen.to_dict() == {"task": "e2e", "method": "frozen", "train": "dev.csv", "model": "smollm2"} | {
        "seed": 0,
        "max_length": 96,
    }
    discrete = Run(**COMMON, method="discrete")
    assert (discrete.init_text, discrete.init, discrete.steps) == ("Describe it.", None, None)
    prefix = Run(**COMMON, method="prefix", seed=3, subset=1)
    assert (prefix.seed, prefix.virtual_tokens, prefix.learning_rate) == (3, 10, LEARNING_RATES["prefix"])
    assert (prefix.init_text, prefix.mlp_width, prefix.rank, prefix.subset) == (None, None, None, None)
    assert Run(**COMMON | {"init": "text"}, method="prefix").init_text == "Describe it."


def test_every_trained_method_has_a_learning_rate() -> None:
    trained = {method for method in plan.METHODS if Run(**COMMON, method=method).is_trained}
    assert trained == LEARNING_RATES.keys()


def test_a_run_is_its_json() -> None:
    run = Run(**COMMON, method="lora", seed=1, test="test.csv", unseen=("a", "b"), num_beams=5)
    assert Run.from_dict(run.to_dict()) == run
    with pytest.raises(ValueError, match=r"unknown settings \['learningrate'\]"):
        Run.from_dict(run.to_dict() | {"learningrate": 1})
    with pytest.raises(ValueError, match="method must be one of"):
        Run(**COMMON, method="adapter")


def test_summaries_are_decoded_as_in_the_paper() -> None:
    beams = {"method": "prefix", "test": "b.csv", "num_beams": 6}
    assert Run(**COMMON | {"task": "summary"} | beams).length_penalty == 0.8
    assert Run(**COMMON | {"task": "summary"} | beams | {"num_beams": 1}).length_penalty is None
    assert Run(**COMMON | beams).length_penalty is None
    assert (plan.NUM_BEAMS["e2e"], plan.NUM_BEAMS["summary"]) == (5, 6)
    assert plan.NUM_BEAMS.keys() == plan.MAX_LENGTH.keys() == plan.INSTRUCTIONS.keys()


def test_reproduce_has_every_method_seed_and_rate() -> None:
    runs = plan.reproduce(COMMON, plan.METHODS, [0, 1], [None])
    assert len(set(runs)) == len(runs)
    counts = {method: sum(run.method == method for run in runs) for method in plan.METHODS}
    assert counts == dict.fromkeys(plan.METHODS, 2) | {"frozen": 1, "discrete": 1, "embedding": 3 * 2, "infix": 3 * 2}
    assert {run.steps for run in runs if run.is_trained} == {300}
    rates = plan.reproduce(COMMON, ["frozen", "prefix"], [0, 1], [1e-2, 3e-3])
    assert [(run.seed, run.learning_rate) for run in rates[1:]] == [(0, 1e-2), (1, 1e-2), (0, 3e-3), (1, 3e-3)]


def test_ablations_vary_one_thing() -> None:
    length = plan.ablate("length", COMMON, [0, 1], [0])
    assert [run.virtual_tokens for run in length[1::2]] == [1, 2, 5, 10, 20, 40, 100]
    init = plan.ablate("init", COMMON, [0, 1], [0, 1, 2])
    assert len(init) == 1 + 8 * 3 * 2
    assert {run.init for run in init[1:]} == {"random", "uniform", "text"}
    assert {(run.examples, run.steps) for run in init[1:]} == {(100, 200)}
    assert {run.init_text for run in init[1:]} == {None, plan.INSTRUCTIONS["e2e"], *plan.WORDS}
    sites = plan.ablate("sites", COMMON, [0, 1], [0])
    assert [run.sites and "+".join(run.sites) for run in sites[2::2]] == [
        *("encoder", "cross", "decoder", "encoder+cross", "encoder+decoder", "cross+decoder", "encoder+cross+decoder"),
    ]
    assert Run.from_dict(sites[7].to_dict()) == sites[7]
    mode = plan.ablate("mode", COMMON, [0], [0])
    assert [(run.method, run.virtual_tokens) for run in mode] == [
        ("frozen", None),
        ("prefix", 10),
        ("prefix-mlp", 10),
        ("embedding", 1),
        ("embedding", 10),
        ("embedding", 20),
        ("infix", 1),
        ("infix", 10),
        ("infix", 20),
    ]
    low = plan.ablate("lowdata", COMMON | {"learning_rate": 0.1}, [0], [0, 1])
    assert {run.learning_rate for run in low} == {None, 0.1, LEARNING_RATES["full"]}
    assert [run.examples for run in low if run.method == "full"] == [50, 50, 100, 100, 200, 200, 500, 500]
    assert {run.steps for run in low if run.examples == 500} == {400}
    assert all(runs[0].method == "frozen" for runs in (length, init, mode, low))
    with pytest.raises(ValueError, match="kind must be"):
        plan.ablate("depth", COMMON, [0], [0])
