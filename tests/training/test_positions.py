"""Lengths beyond the model's positions: refused by name, before anything is trained or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefix_attn import PrefixConfig, get_prefix_model
from prefix_attn.experiments.plan import Run
from prefix_attn.experiments.runner import execute
from prefix_attn.training.distill import distill
from prefix_attn.training.examples import Example
from prefix_attn.training.generate import Generator, default_new_tokens
from prefix_attn.training.positions import room_for_rows
from prefix_attn.training.preview import preview
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.tokens import DEFAULT
from prefix_attn.training.train import train
from tests.hf.models import tiny
from tests.tokens import END, byte_tokenizer

P, POSITIONS = 4, 64
TOO_LONG = r"max_length=61 is too long: the model has 64 positions, of which the prefix takes 4; take at most 60"


def prefixed(name: str, **fields: Any) -> Any:
    base = tiny(name, vocab_size=257, eos_token_id=END, pad_token_id=END)
    return get_prefix_model(base, PrefixConfig(num_virtual_tokens=P, **fields))


def settings(folder: Path, **changes: Any) -> TrainingSettings:
    return TrainingSettings(folder / "out", steps=1, batch_size=1, validate_every=1, **changes)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rows_that_are_too_long_are_refused_before_a_row_is_read(name: str, tmp_path: Path) -> None:
    """A table of positions ends in an error of torch, in the step that meets such a row, and angles in nonsense."""
    model, tokenizer, examples = prefixed(name), byte_tokenizer(), iter([Example("a", ("b",))])
    chosen = settings(tmp_path, max_length=61)
    with pytest.raises(ValueError, match=TOO_LONG):
        train(model, tokenizer, examples, [], chosen)
    with pytest.raises(ValueError, match=TOO_LONG):
        preview(model, tokenizer, examples, chosen, prompt=DEFAULT)
    assert next(examples)
    with pytest.raises(ValueError, match=TOO_LONG):
        distill(model, tokenizer, "a document", chosen)
    assert not (tmp_path / "out").exists()


def test_the_longest_rows_that_fit_are_trained(tmp_path: Path) -> None:
    """Also where the prefix takes no positions, and those of a decoder that an encoder reads for."""
    rows = [Example("a" * 100, ("b",))]
    for number, (name, fields, most) in enumerate(
        (("gpt2", {}, 60), ("gpt2", {"position_mode": "none"}, 64), ("bart", {}, 64))
    ):
        model = prefixed(name, **fields)
        found = train(model, byte_tokenizer(), rows, [], settings(tmp_path / str(number), max_length=most))
        assert (found["steps"], found["cut"]) == (1, 1)
        with pytest.raises(ValueError, match=f"take at most {most}"):
            train(model, byte_tokenizer(), rows, [], settings(tmp_path, max_length=most + 1))
    # Of RoBERTa's table of 64, two are no positions.
    assert room_for_rows(get_prefix_model(tiny("roberta"), PrefixConfig(num_virtual_tokens=P))) == 58


def test_a_distillation_takes_pieces_that_fit(tmp_path: Path) -> None:
    """96 tokens are the default, and the model has 60 positions for them."""
    distill(prefixed("llama"), byte_tokenizer(), "abc", settings(tmp_path))
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["max_length"] == 60


def test_outputs_that_are_too_long_are_refused() -> None:
    """A decoder's own positions end too, whatever its encoder reads."""
    for name, most in (("gpt2", 57), ("llama", 57), ("bart", 64)):  # behind "\n=>" where the input is in front
        model, tokenizer = prefixed(name), byte_tokenizer()
        Generator(model, tokenizer, max_new_tokens=most)
        with pytest.raises(ValueError, match=rf"max_new_tokens={most + 1}: .* take at most {most}"):
            Generator(model, tokenizer, max_new_tokens=most + 1)
        assert default_new_tokens(model) == {"bart": 64}.get(name, 30)


def test_a_start_that_the_model_cannot_read_is_refused() -> None:
    """Random numbers need no positions: such a prefix may be longer than the model's rows."""
    config = PrefixConfig(num_virtual_tokens=70, position_mode="none")
    with pytest.raises(ValueError, match="num_virtual_tokens must be at most 64, the positions of GPT2LMHeadModel"):
        get_prefix_model(tiny("gpt2"), config)
    config.init = "uniform"
    assert get_prefix_model(tiny("gpt2"), config).prefix_configs["default"].num_virtual_tokens == 70


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 61}, TOO_LONG),
        ({"max_length": 60, "max_new_tokens": 60}, "max_new_tokens=60: the model has 64 positions"),
    ],
)
def test_experiments_refuse_before_they_train(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny("gpt2", vocab_size=257, eos_token_id=END, pad_token_id=END)
    base.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    lines = [f'{{"source": "{n}", "target": "b"}}\n' for n in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    monkeypatch.setattr("prefix_attn.experiments.runner.train", None)
    fixed = {"steps": 1, "batch_size": 1, "validate_every": 1, "virtual_tokens": P, "init": "random", "num_beams": 1}
    run = Run("e2e", "prefix", "data.jsonl", "data.jsonl", model=str(tmp_path / "model"), **fixed | changes)
    with pytest.raises(ValueError, match=message):
        execute(run, {"data.jsonl": tmp_path / "data.jsonl"}, "cpu")
