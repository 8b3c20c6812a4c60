"""A training goes on with the prefix and the model that it had; or it says what differs, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, get_prefix_model
from tests.hf.models import tiny, tokens

P = 4


def trainer(model: Any, folder: Path, steps: int = 4) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 7)]
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(str(folder), max_steps=steps, save_steps=2, learning_rate=1e-2, **quiet)
    return Trainer(model, arguments, train_dataset=rows)


def prefixed(base: PreTrainedModel, **fields: Any) -> PrefixModel:
    return get_prefix_model(base, PrefixConfig(**{"num_virtual_tokens": P} | fields))


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of a plain prefix."""
    folder = tmp_path_factory.mktemp("left")
    base = tiny("llama")
    base.config._name_or_path = "somebody/tiny"
    trainer(prefixed(base), folder, 2).train()
    return folder


def named(name: str, architecture: str = "llama", **changes: Any) -> PreTrainedModel:
    base = tiny(architecture, **changes)
    base.config._name_or_path = name
    return base


def with_names(*names: str) -> PrefixModel:
    model = PrefixModel(named(SAME))
    for name in names:
        model.add_prefix(name, PrefixConfig(num_virtual_tokens=P))
    return model


SAME, OTHER = "somebody/tiny", "somebody/other"
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "length": (lambda: prefixed(named(SAME), num_virtual_tokens=6), "num_virtual_tokens is 4 there and 6 here"),
    "frozen": (lambda: prefixed(named(SAME), num_frozen_tokens=1), "num_frozen_tokens is 0 there and 1 here"),
    "embedding": (lambda: prefixed(named(SAME), mode="embedding"), "mode is default there and embedding here"),
    "infix": (lambda: prefixed(named(SAME), mode="infix"), "mode is default there and infix here"),
    "positions": (
        lambda: prefixed(named(SAME), position_mode="none"),
        "position_mode is default there and none",
    ),
    "gate": (lambda: prefixed(named(SAME), gate="zero"), "gate is None there and zero here"),
    "mlp": (lambda: prefixed(named(SAME), prefix_projection=True), "prefix_projection is False there and True here"),
    "layers": (lambda: prefixed(named(SAME), layers=[0]), r"layers is default there and \[0\] here"),
    "name of the prefix": (lambda: with_names("style"), r"has prefixes \['default'\], and the model \['style'\]"),
    "one more": (lambda: with_names("default", "style"), r"\['default'\], and the model \['default', 'style'\]"),
    "base of another width": (
        lambda: prefixed(named(SAME, num_key_value_heads=4)),
        r"embedding is \(4, 96\) there and \(4, 192\) here",
    ),
    "base of another kind": (lambda: prefixed(named(SAME, "qwen2")), 'trained for a base model.*"llama".*"qwen2"'),
    "base of another name": (lambda: prefixed(named(OTHER)), f"training to resume is of {SAME}, and this.*{OTHER}"),
}


@pytest.mark.parametrize("case", CASES)
def test_another_training_is_refused_before_it_starts(case: str, left: Path) -> None:
    make, message = CASES[case]
    model, files = make(), {path: path.read_bytes() for path in left.rglob("*") if path.is_file()}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer(model, left).train(resume_from_checkpoint=True)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {path: path.read_bytes() for path in left.rglob("*") if path.is_file()} == files


def test_the_same_training_goes_on(left: Path) -> None:
    model = prefixed(named("elsewhere/tiny"))  # a folder that was moved
    made = trainer(model, left, 3)
    made.train(resume_from_checkpoint=str(left / "checkpoint-2"))
    assert made.state.global_step == 3


def test_a_table_of_another_length_is_refused(tmp_path: Path) -> None:
    trainer(PrefixTuning(tiny("llama"), P, 32), tmp_path, 2).train()
    model = PrefixTuning(tiny("llama"), P + 1, 32)
    with pytest.raises(ValueError, match=r"has \(prefix_length, hidden_size\) = \(5, 32\), .* had .* = \(4, 32\)"):
        trainer(model, tmp_path).train(resume_from_checkpoint=True)
    trainer(PrefixTuning(named("a"), P, 32), tmp_path / "a", 2).train()
    other = trainer(PrefixTuning(named("b"), P, 32), tmp_path / "a")
    with pytest.raises(ValueError, match="the training to resume is of a, and this base model is b"):
        other.train(resume_from_checkpoint=True)


def test_an_adapter_alone_is_no_checkpoint(tmp_path: Path) -> None:
    model = prefixed(tiny("llama"))
    model.save_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"has an adapter, and none of \('model.safetensors'"):
        trainer(model, tmp_path).train(resume_from_checkpoint=True)
