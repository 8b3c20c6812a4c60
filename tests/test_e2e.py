"""The E2E benchmark, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import e2e, e2e_report
from prefix_attn.data import Example
from tests.hf.models import tiny
from tests.tokens import END, byte_tokenizer

pytest.importorskip("peft")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a model, and E2E files of 40 and 2 inputs."""
    tiny("llama", vocab_size=257, max_position_embeddings=128).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    lines = [f'"name[N{i}], food[F{i}]",N{i} serves {kind} F{i}.' for i in range(40) for kind in ("good", "bad")]
    (tmp_path / "train.csv").write_text("mr,ref\n" + "\n".join(lines))
    (tmp_path / "test.csv").write_text("MR,ref\n" + "\n".join(lines[:4]))
    return tmp_path


def run(files: Path, *arguments: str) -> list[e2e_report.Run]:
    paths = ["--model", str(files / "model"), "--train", str(files / "train.csv"), "--test", str(files / "test.csv")]
    small = ["--steps", "12", "--virtual-tokens", "3", "--batch-size", "4", "--max-length", "64", "--threads", "1"]
    generation = ["--generate", "--num-beams", "2", "--max-new-tokens", "4", "--device", "cpu"]
    e2e.main([*paths, *small, *generation, "--out", str(files / "out.jsonl"), *arguments])
    return e2e_report.read(files / "out.jsonl")


def test_all_methods_share_one_protocol(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in e2e.METHODS:
        runs = run(files, "--method", method, "--seeds", "0,1", "--save", str(files / "saved"))
    assert [(r["method"], r["seed"]) for r in runs] == [
        ("prefix", 0),
        ("prefix", 1),
        ("peft", 0),
        ("peft", 1),
        ("frozen", 0),
    ]
    prefix, peft, frozen = runs[0], runs[2], runs[4]
    assert prefix["trainable_parameters"] == peft["trainable_parameters"] == 3 * 3 * 2 * 16  # layers, P, k and v, width
    assert frozen["trainable_parameters"] == 0
    assert [step for step, _ in prefix["validation"]] == [step for step, _ in peft["validation"]] == [0, 10, 12]
    assert len(prefix["train_loss"]) == 12
    assert [step for step, _ in frozen["validation"]] == [0]
    assert [i for i, result in enumerate(runs) if "metrics" in result] == [0, 2, 4]  # the first seed of each
    for result in runs[::2]:
        assert result["test_inputs"] == 2
        assert set(result["metrics"]) >= {"bleu", "nist", "rougeL", "cider", "chrf", "ter"}
    for result in runs[:4]:
        losses = [loss for _, loss in result["validation"]]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 0.005
    assert sorted(path.name for path in (files / "saved").iterdir()) == [
        f"{m}-seed{s}" for m in ("peft", "prefix") for s in (0, 1)
    ]
    # Runs that are in the file are not repeated.
    assert len(run(files, "--method", "peft", "--seeds", "0,1")) == 5
    capsys.readouterr()
    e2e.main(["--table", str(files / "out.jsonl")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("| prefix | ")
    assert " ± " in lines[2]
    e2e.main(["--plot", str(files / "out.jsonl"), "--out", str(files / "curve.png")])
    assert (files / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_data_order_depends_on_the_seed_alone() -> None:
    rows = [{"input_ids": [i], "labels": [i]} for i in range(10)]

    def first(seed: int) -> list[list[int]]:
        batches = e2e.batches(rows, 4, seed, END)
        return [next(batches)["input_ids"][:, 0].tolist() for _ in range(4)]

    assert first(0) == first(0) != first(1)
    assert len(set(first(0)[0] + first(0)[1])) == 8  # an epoch has no repetitions


def test_held_out_is_a_tenth_and_a_property_of_the_input() -> None:
    examples = [Example(f"name : N{i}", ("text",)) for i in range(1000)]
    kept, held_out = e2e.hold_out(examples)
    assert 70 < len(held_out) < 130
    assert len(kept) + len(held_out) == 1000
    assert e2e.hold_out(examples[::-1])[1] == held_out[::-1]


def test_learning_rate_warms_up_and_decays() -> None:
    factors = [e2e._learning_rate_factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 20)
    assert factors[19] == factors[20] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[100] == 0


def test_missing_arguments_and_bad_results_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        e2e.main(["--method", "prefix"])
    assert "a run needs --method, --train and --out" in capsys.readouterr().err
    (tmp_path / "x.jsonl").write_text(json.dumps({"a": 1}) + "\n{")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: not JSON"):
        e2e_report.read(tmp_path / "x.jsonl")
