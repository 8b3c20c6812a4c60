"""The runner on a small model that has learnt eight answers. The data ask for one of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefix_attn.experiments import loop, plan, pretrain, runner
from prefix_attn.experiments.methods import wrap
from prefix_attn.experiments.plan import Run
from prefix_attn.hf.load import load_base
from prefix_attn.training import train as trainings
from prefix_attn.training.data import Example
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.tokens import Collator, collate
from tests.hf.models import tiny
from tests.test_cli import run as prefix_attn
from tests.tokens import END, byte_tokenizer

pytest.importorskip("peft")

SMALL = (
    "--steps",
    40,
    "--validate-every",
    20,
    "--batch-size",
    8,
    "--virtual-tokens",
    3,
    "--max-new-tokens",
    24,
    "--threads",
    1,
)


@pytest.fixture(autouse=True)
def no_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nltk.data.path", [])


def settings(files: Path, method: str, **changes: Any) -> Run:
    small = {"steps": 4, "batch_size": 4, "validate_every": 2, "virtual_tokens": 3, "rank": 2, "mlp_width": 8}
    given: dict[str, Any] = {"task": "e2e", "train": "train.csv", "model": str(files / "model"), **small, **changes}
    return Run(method=method, **given)


def folders(files: Path) -> dict[str, Path]:
    return {path.name: path for path in files.iterdir()}


def test_all_methods_share_one_protocol(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained methods beat the frozen model. An instruction makes it worse, because it has not learnt to follow one."""
    paths = ("--train", files / "train.csv", "--test", files / "test.csv", "--model", files / "model")
    command = ("reproduce", "e2e", *paths, "--out", tmp_path, *SMALL, "--num-beams", 2)
    assert prefix_attn(monkeypatch, *command, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["run"]["method"] for r in results if r["run"].get("virtual_tokens", 3) in (3, 10)] == list(plan.METHODS)
    found = {r["run"]["method"]: r for r in results}
    flat = 3 * 3 * 2 * 16  # virtual tokens, layers, key and value, width
    assert found["prefix"]["trained_parameters"] == found["peft"]["trained_parameters"] == flat
    assert found["prefix-mlp"]["stored_parameters"] == flat < found["prefix-mlp"]["trained_parameters"]
    assert found["embedding"]["trained_parameters"] == 20 * 32
    assert found["full"]["trained_share"] == 1
    # Of 3 equal layers two, without embedding and head of 257 x 32 each and the last norm of 32.
    total = found["full"]["trained_parameters"]
    assert found["top2"]["trained_parameters"] == (total - 2 * 257 * 32 - 32) * 2 // 3
    # Query (32 to 32) and value (32 to 16), rank 2.
    assert found["lora"]["trained_parameters"] == 3 * 2 * (64 + 48)
    for method, result in found.items():
        assert set(result["metrics"]) == {"bleu", "nist", "rougeL", "cider", "chrf", "ter"}
        curve = result["validation"]
        assert [step for step, _ in curve] == ([0] if method in ("frozen", "discrete") else [0, 20, 40])
        assert len(result.get("train_loss", [])) == (0 if len(curve) == 1 else 40)
    last = {method: result["validation"][-1][1] for method, result in found.items()}
    assert last["frozen"] < last["discrete"]
    assert max(last[method] for method in ("prefix", "peft", "embedding", "infix", "full")) < last["frozen"] - 1e-3
    table = (tmp_path / "table.md").read_text()
    assert len(table.splitlines()) == 2 + len(results)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    # What is in the file is not repeated, but what is half written there is.
    file = tmp_path / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:100])
    assert prefix_attn(monkeypatch, *command) == 0
    assert f"{len(results)} runs, {len(results) - 1} of them" in capsys.readouterr().err
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert again[:-1] == results[:-1]
    assert again[-1]["train_loss"] == results[-1]["train_loss"]
    assert again[-1]["metrics"] == results[-1]["metrics"]
    assert prefix_attn(monkeypatch, "report", file, "--plot", tmp_path / "x.png", "--axis", "method") == 0
    assert capsys.readouterr().out.splitlines()[:2] == table.splitlines()[:2]


@pytest.mark.parametrize(
    ("method", "rate"),
    [("lora", 1e-2), ("peft", 1e-1), ("prefix-mlp", 1e-2), ("embedding", 3e-2), ("full", 1e-3), ("top2", 1e-3)],
)
def test_bfloat16_products_are_of_the_weights_of_their_step(
    files: Path, monkeypatch: pytest.MonkeyPatch, method: str, rate: float
) -> None:
    ends = []
    for casts in (False, True):
        for module in (runner, trainings):
            monkeypatch.setattr(module, "has_bfloat16", lambda device, casts=casts: casts)
        run = settings(files, method, steps=20, batch_size=8, learning_rate=rate, validate_every=20)
        (_, first), (_, last) = runner.execute(run, folders(files), "cpu")["validation"]
        ends.append(last)
    assert abs(ends[1] - ends[0]) < 0.2 * abs(first - ends[0])


def test_longer_prefixes_learn_more(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "LENGTHS", (1, 3, 10))
    command = ("ablate", "length", "--train", files / "train.csv", "--model", files / "model", "--out", tmp_path)
    assert prefix_attn(monkeypatch, *command, *SMALL, "--seeds", "0,1", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    losses = {
        P: [r["validation"][-1][1] for r in results if r["run"].get("virtual_tokens") == P] for P in (None, 1, 3, 10)
    }
    assert [len(found) for found in losses.values()] == [1, 2, 2, 2]
    mean = {P: sum(found) / len(found) for P, found in losses.items()}
    assert mean[10] < mean[3] < mean[1] < mean[None]
    assert "metrics" not in results[0]


def test_few_examples_stop_at_the_best(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With far too large steps the loss rises. The start or an early step is kept."""
    run = settings(files, "prefix", examples=10, subset=1, steps=12, learning_rate=100.0, test="test.csv", num_beams=1)
    result = runner.execute(run, folders(files))
    curve = dict(result["validation"])
    assert result["train_rows"] == 10
    assert curve[result["best_step"]] == min(curve.values()) < result["validation"][-1][1]
    monkeypatch.setattr(loop, "PATIENCE", 4)
    impatient = runner.execute(run, folders(files))
    last = result["best_step"] + 4
    assert last < 12
    assert impatient["validation"] == [found for found in result["validation"] if found[0] <= last]
    assert impatient["train_loss"] == result["train_loss"][:last]
    assert impatient["held_out_loss"] == result["held_out_loss"]
    assert result["held_out_loss"] < result["validation"][-1][1]  # of what is kept, not of the last step
    base, tokenizer = load_base(run.model)
    torch.manual_seed(run.seed)
    model = runner.wrap(base, tokenizer, run)
    data = runner.load(run, folders(files), tokenizer)
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    watch = loop.Watch([p for p in model.parameters() if p.requires_grad], patience=4)
    watch.on_evaluate(None, SimpleNamespace(global_step=0), None, {"eval_loss": 1.0})
    for p in model.parameters():
        p.data.add_(1)
    watch.on_evaluate(None, SimpleNamespace(global_step=2), None, {"eval_loss": 2.0})
    watch.restore()
    assert all(torch.equal(p, old) for p, old in zip((p for p in model.parameters() if p.requires_grad), start))
    assert len(data.train) == 10


def test_what_is_drawn_depends_on_the_subset_alone(files: Path) -> None:
    tokenizer = byte_tokenizer()

    def drawn(**changes: Any) -> tuple[list[Any], list[Any]]:
        data = runner.load(settings(files, "prefix", **changes), folders(files), tokenizer)
        assert data.validation == everything.validation
        return data.train, data.stop_by

    def text(row: dict[str, list[int]]) -> str:  # of the input
        return tokenizer.decode(row["input_ids"]).split("=>")[0]

    everything = runner.load(settings(files, "prefix"), folders(files), tokenizer)
    assert everything.stop_by == []

    few, more = drawn(examples=5, subset=0), drawn(examples=10, subset=0, seed=3)
    assert more[0][:5] == few[0]
    assert drawn(examples=5, subset=0, seed=3) == few
    assert drawn(examples=5, subset=1)[0] != few[0]
    assert (len(more[0]), len(more[1])) == (10, 3)
    trained, stopped_by = ({text(row) for row in rows} for rows in more)
    assert not trained & stopped_by
    with pytest.raises(ValueError, match="100 rows are to be drawn"):
        drawn(examples=100, subset=0)


def test_unseen_categories_are_scored_apart(files: Path) -> None:
    dart = {"task": "dart", "train": "dart.json", "test": "dart.json", "num_beams": 1, "max_new_tokens": 8}
    result = runner.execute(settings(files, "frozen", unseen=("inn",), **dart), folders(files))
    assert {"metrics", "metrics_seen", "metrics_unseen"} <= result.keys()
    data = runner.load(settings(files, "frozen", unseen=("inn",), **dart), folders(files), byte_tokenizer())
    assert data.categories == {"pub"}
    assert {example.category for example in data.test} == {"pub", "inn"}
    everything = runner.load(settings(files, "frozen", **dart), folders(files), byte_tokenizer())
    assert everything.categories == {"pub", "inn"}
    assert everything.test == data.test
    with pytest.raises(ValueError, match=r"no example of the categories \['x'\]"):
        runner.load(settings(files, "frozen", unseen=("x",), **dart), folders(files), byte_tokenizer())


@pytest.mark.parametrize(("share", "wanted"), [("TENTH", "validate on"), ("FIFTH", "test on")])
def test_nothing_left_to_do_is_said(files: Path, monkeypatch: pytest.MonkeyPatch, share: str, wanted: str) -> None:
    """With few inputs the hash may hold out none. That gave a loss over nothing, or a run without texts."""
    monkeypatch.setattr(runner, share, 0)
    with pytest.raises(ValueError, match=f"train.csv: no example is left to {wanted}"):
        runner.load(settings(files, "prefix", test="train.csv"), folders(files), byte_tokenizer())


def test_a_run_that_fails_leaves_the_tables_of_the_others(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "LOW_DATA", (10, 1000))
    monkeypatch.setattr(plan, "LOW_DATA_STEPS", {10: 2, 1000: 2})
    command = ("ablate", "lowdata", "--train", files / "train.csv", "--model", files / "model", "--out", tmp_path)
    assert prefix_attn(monkeypatch, *command, *SMALL) == 1
    assert "1000 rows are to be drawn" in capsys.readouterr().err
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + 3
    assert (tmp_path / "plot.png").exists()


def test_frequencies_are_no_weights() -> None:
    """In bfloat16 they rotated keys by up to half a radian too far, and decoding used others than full fine-tuning."""
    model = tiny("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    runner.weights_to_bfloat16(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_an_instruction_is_a_line_of_its_own(files: Path) -> None:
    base, tokenizer = load_base(str(files / "model"))
    model = wrap(base, tokenizer, settings(files, "discrete", init_text="Say it."))
    assert model.prefix_configs["default"].num_virtual_tokens == len("Say it.\n")


def test_data_order_depends_on_the_seed_alone(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All methods see the same rows in the same order, and each row once in an epoch."""
    seen: list[list[str]] = []

    def collated(self: Collator, rows: list[dict[str, list[int]]]) -> Any:
        seen[-1] += [byte_tokenizer().decode(row["input_ids"]) for row in rows]
        return collate(rows, self.pad_id)

    monkeypatch.setattr(Collator, "__call__", collated)

    def order(method: str, seed: int) -> list[str]:
        seen.append([])
        result = runner.execute(settings(files, method, seed=seed, steps=10), folders(files))
        assert result["loop"] == "Trainer"
        return seen[-1][:40]

    first = order("prefix", 0)
    assert first == order("embedding", 0) != order("prefix", 1)
    epoch = first[: runner.execute(settings(files, "frozen"), folders(files))["train_rows"]]
    assert len(set(epoch)) == len(epoch)


def test_held_out_is_a_share_and_a_property_of_the_input() -> None:
    examples = [Example(f"name : N{i}", ("text",)) for i in range(1000)]
    kept, held_out = runner.hold_out(examples, 0, 26)
    assert 70 < len(held_out) < 130
    assert len(kept) + len(held_out) == 1000
    assert runner.hold_out(examples[::-1], 0, 26)[1] == held_out[::-1]


def test_learning_rate_warms_up_and_decays(tmp_path: Path) -> None:
    """It is that of ``prefix-attn train``: the trainer is the same."""
    model = tiny("llama")
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    settings = TrainingSettings(tmp_path, steps=100, learning_rate=2.0)
    trainer = trainings.make_trainer(model, rows, END, None, settings)
    trainer.create_optimizer_and_scheduler(100)
    rates = []
    for _ in range(101):
        rates.append(trainer.lr_scheduler.get_last_lr()[0] / 2)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[0] == 0
    assert rates[10] == pytest.approx(1 / 2)
    assert rates[20] == max(rates) == 1
    assert rates[60] == pytest.approx(0.5)
    assert rates[100] == 0


ERRORS = {
    "no file": (("reproduce", "e2e", "--out", "x"), "the task 'e2e' needs --train"),
    "a file too many": (
        ("reproduce", "aws", "--out", "x", "--train", "a.csv"),
        "the task 'aws' needs no files",
    ),
    "one name": (
        ("ablate", "mode", "--out", "x", "--train", "a/x.csv", "--test", "b/x.csv"),
        "must have different names",
    ),
    "seeds": (
        ("ablate", "mode", "--out", "x", "--train", "a.csv", "--seeds", "one"),
        "--seeds must be numbers with",
    ),
    "rates": (
        ("reproduce", "e2e", "--out", "x", "--train", "a.csv", "--learning-rate", "1e-2;1e-3"),
        "--learning-rate must be numbers with commas between them, got '1e-2;1e-3'",
    ),
    "no MLP": (
        ("train", "--output", "x", "--mlp-depth", "2"),
        "--mlp-depth and --mlp-activation need --mlp",
    ),
    "no text": (
        ("train", "--output", "x", "--top-k", "5"),
        "--top-k needs --distill-from",
    ),
    "method": (
        ("reproduce", "e2e", "--out", "x", "--train", "a.csv", "--methods", "b"),
        "method must be one of",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", "a.csv") if arguments[0] == "train" else ()
    assert prefix_attn(monkeypatch, *arguments, "--model", "m", *data) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_peft_is_missed_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    command = ("reproduce", "aws", "--model", "smollm2", "--methods", "frozen,lora", "--out", tmp_path / "x")
    monkeypatch.setattr("prefix_attn.hf.load.smollm2_file", lambda: None)
    assert prefix_attn(monkeypatch, *command) == 1
    assert "the methods ['lora'] need PEFT: pip install peft" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# Encoder-decoders -----------------------------------------------------------------------------------------------------


def test_sites_of_an_encoder_decoder(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small T5 learns a task and is frozen. Each of its attentions can hold a prefix for another task."""
    monkeypatch.setattr(pretrain, "SIZES", dict.fromkeys(pretrain.SIZES, 2) | {"d_model": 16, "d_kv": 8})
    command = ("pretrain", files / "train.csv", "--out", tmp_path / "t5", "--steps", 60, "--learning-rate", 1e-2)
    assert prefix_attn(monkeypatch, *command, "--threads", 1, "--json") == 0
    (_, before), (_, after) = json.loads(capsys.readouterr().out)["validation"]
    assert after < before - 0.5
    assert prefix_attn(monkeypatch, *command) == 1
    assert "holds something already" in capsys.readouterr().err
    dart = tmp_path / "dart.json"  # with other answers than those that it has learnt
    dart.write_text((files / "dart.json").read_text().replace('"By ', '"We are at '))
    paths = ("--train", dart, "--test", dart, "--model", tmp_path / "t5", "--out", tmp_path)
    assert prefix_attn(monkeypatch, "ablate", "sites", "--task", "dart", *paths, *SMALL, "--limit", 2, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    found = {"+".join(r["run"].get("sites", [r["run"]["method"]])): r for r in results}
    some = ["encoder", "cross", "decoder", "encoder+cross", "encoder+decoder", "cross+decoder", "encoder+cross+decoder"]
    assert list(found) == ["frozen", *some]
    site = 3 * 2 * 2 * 16  # virtual tokens, layers, key and value, width
    assert [found[name]["trained_parameters"] for name in some] == [site * n for n in (1, 1, 1, 2, 2, 2, 3)]
    curves = {name: [loss for _, loss in found[name]["validation"]] for name in some}
    assert all(curve[-1] < curve[0] for curve in curves.values())
    refused = {
        "the method infix for causal models": ("reproduce", "dart", "--methods", "frozen,infix", *paths),
        "has no attention at the sites": ("ablate", "sites", "--task", "dart", *paths, "--model", files / "model"),
        "x: no model found; give": ("ablate", "sites", "--task", "dart", *paths, "--model", tmp_path / "x"),
    }
    for message, again in refused.items():
        assert prefix_attn(monkeypatch, *again) == 1
        assert message in " ".join(capsys.readouterr().err.split())
    assert all("bleu" in result["metrics"] for result in results)
    assert "| prefix | sites encoder+cross |" in (tmp_path / "table.md").read_text()
