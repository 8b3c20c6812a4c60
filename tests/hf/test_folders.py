"""Whatever folder a trainer leaves: it loads, and the prefixes are those that were trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, get_prefix_model
from prefix_attn.hf.io import checkpoint, state
from prefix_attn.hf.io.convert import convert
from tests.hf.models import tiny, tokens
from tests.numerics import MODEL, close

P = 4
KINDS: dict[str, dict[str, Any]] = {
    "flat": {},
    "mlp": {"prefix_projection": True, "encoder_hidden_size": 16, "encoder_depth": 2, "encoder_activation": "gelu"},
    "gate": {"gate": "zero"},
    "embedding": {"mode": "embedding"},
    "infix": {"mode": "infix"},
    "frozen": {"num_frozen_tokens": 1},
    "lengths": {"layers": {0: 4, 2: 2}},
    "none": {"position_mode": "none"},
}
IN_PEFT = ("flat", "mlp", "embedding", "frozen")


def trained(kind: str, name: str = "llama", **config: Any) -> PrefixModel:
    """A model whose parameters are not those that a new one has."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, **KINDS.get(kind, {}), **config)).eval()
    shake(model)
    return model


@torch.no_grad()
def shake(model: PrefixModel) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.3)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    given = {"input_ids": tokens(), "labels": tokens()}  # an infix stands where the labels begin
    return model.eval()(**given).logits


def trainer(model: Any, folder: Path, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    arguments = Seq2SeqTrainingArguments if kind is Seq2SeqTrainer else TrainingArguments
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "seed": 1} | options
    ids = tokens(6, 8)
    rows = [{"input_ids": i, "labels": i} for i in ids]
    args = arguments(str(folder), report_to="none", disable_tqdm=True, per_device_train_batch_size=2, **settings)
    return kind(model, args, train_dataset=rows, eval_dataset=rows)


def state_dict_of_a_larger_model(model: PrefixModel) -> Any:
    return nn.ModuleDict({"outer": nn.ModuleDict({"inner": model}), "other": nn.Linear(2, 2)}).state_dict()


def save_state(model: PrefixModel, folder: Path, **options: Any) -> Path:
    """accelerate's own checkpoint of the prepared model and its optimizer."""
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    accelerator.prepare(model, optimizer)
    accelerator.save_state(str(folder), **options)
    return folder


def save_shards(model: PrefixModel, folder: Path) -> Path:
    Accelerator(cpu=True).save_model(model, str(folder), max_shard_size="1KB")
    assert (folder / "model.safetensors.index.json").exists() == (len(model.state_dict()) > 1)
    return folder


def save(content: Any, path: Path) -> Path:
    path.parent.mkdir()
    torch.save(content, path)
    return path.parent


WAYS: dict[str, Callable[[PrefixModel, Path], Path]] = {
    "save_state": save_state,
    "save_state, pickled": lambda m, f: save_state(m, f, safe_serialization=False),
    "save_model, sharded": save_shards,
    "torch.save": lambda m, f: save(m.state_dict(), f / "any name.pth"),
    "torch.save, nested": lambda m, f: save(state_dict_of_a_larger_model(m), f / "larger.pt"),
    "Lightning": lambda m, f: save({"epoch": 1, "state_dict": m.state_dict(), "hparams": {"lr": 1.0}}, f / "last.ckpt"),
}


@pytest.mark.parametrize(
    ("kind", "way"), [*product(("mlp", "infix"), WAYS), ("embedding", "save_state"), ("lengths", "save_state")]
)
def test_a_state_dict_is_enough(kind: str, way: str, tmp_path: Path) -> None:
    """All bits come back, of several prefixes too, and trainable ones are what they were: MLPs and embeddings."""
    model = trained(kind)
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=3))
    shake(model)
    folder = WAYS[way](model, tmp_path / "saved")
    for is_trainable in (False, True):
        again = PrefixModel.from_pretrained(tiny("llama"), folder, is_trainable=is_trainable)
        assert sorted(again.prefix_names) == ["default", "other"]
        assert again.active_prefix == "default"
        for name in model.prefix_names:
            model.set_prefix(name)
            again.set_prefix(name)
            assert torch.equal(logits(again), logits(model))
        if is_trainable:
            assert {n: t.shape for n, t in again.named_parameters() if t.requires_grad} == {
                n: t.shape for n, t in model.named_parameters() if t.requires_grad
            }
    model.delete_prefix("other")
    model.load_prefix(folder, "other")  # of several the one of this name
    again.set_prefix("other")
    assert torch.equal(logits(model), logits(again))


def test_a_state_dict_holds_what_is_trained_and_what_its_shapes_do_not_show() -> None:
    for kind in KINDS:
        model = trained(kind)
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        more = {"prefixes.default.frozen"} if kind == "frozen" else set()
        if kind in ("mlp", "embedding", "infix", "lengths", "none"):  # of the MLP its activation
            more |= {"prefixes.default._extra_state"}
        assert model.state_dict().keys() == names | more


def test_a_state_dict_of_another_kind_is_refused() -> None:
    """It has the same shapes, and another meaning."""
    with pytest.raises(RuntimeError, match=r"prefixes.default is a prefix with {}, the state is of one with .*infix"):
        trained("flat").load_state_dict(trained("infix").state_dict())
    model, other = trained("infix"), trained("infix")
    shake(other)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))
    shake(other)
    bare = {n: t for n, t in other.state_dict().items() if not n.endswith("_extra_state")}  # as of earlier versions
    model.load_state_dict(bare)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_trainer_saves(kind: str, tmp_path: Path) -> None:
    """PEFT's files where PEFT has such prefixes, with the MLP that training goes on with."""
    model = trained(kind)
    trainer(model, tmp_path).save_model(str(tmp_path / "final"))
    for is_trainable in (False, True):
        again = PrefixModel.from_pretrained(tiny("llama"), tmp_path / "final", is_trainable=is_trainable)
        close(logits(again), logits(model), MODEL)
    (config,), (wanted,) = again.prefix_configs.values(), model.prefix_configs.values()
    assert (config.mode, config.layers, config.gate) == (wanted.mode, wanted.layers, wanted.gate)
    assert (again.prefixes["default"].mlp is None) == (model.prefixes["default"].mlp is None)
    expected = "PREFIX_ATTN" if kind not in IN_PEFT else "CARTRIDGE" if kind == "frozen" else "PREFIX_TUNING"
    peft = json.loads((tmp_path / "final" / checkpoint.ADAPTER_CONFIG).read_text())
    assert peft["peft_type"] == expected


@pytest.mark.peft
def test_peft_loads_what_a_trainer_saves(tmp_path: Path) -> None:
    from peft import PeftModel

    for kind in IN_PEFT:
        model = trained(kind)
        trainer(model, tmp_path).save_model(str(tmp_path / kind))
        close(logits(PeftModel.from_pretrained(tiny("llama"), str(tmp_path / kind))), logits(model), MODEL)


def test_a_trainer_with_several_prefixes(tmp_path: Path) -> None:
    """The active one is what other programs load; all of them come back, and it is the active one again."""
    model = trained("mlp")
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=3, mode="infix"))
    shake(model)
    trainer(model, tmp_path).save_model(str(tmp_path / "final"))
    again = PrefixModel.from_pretrained(tiny("llama"), tmp_path / "final", is_trainable=True)
    assert again.active_prefix == "other"
    assert sorted(again.prefix_names) == ["default", "other"]
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    described = checkpoint.describe(tmp_path / "final")
    assert (described["mode"], described["prefixes"]) == ("infix", ["default", "other"])
    alone = PrefixModel.from_pretrained(tiny("llama"), tmp_path / "final", name="default")
    assert alone.prefix_names == ["default"]
    model.set_prefix("default")
    close(logits(alone), logits(model), MODEL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_trainer_saves_of_a_model_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """The MLP is found again although it rounds more than one in float32, and other prefixes with it."""
    model = trained("mlp")
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=3))
    model.set_prefix("default")
    trainer(model.to(dtype), tmp_path).save_model(str(tmp_path / "final"))
    again = PrefixModel.from_pretrained(tiny("llama"), tmp_path / "final", is_trainable=True)
    assert sorted(again.prefix_names) == ["default", "other"]
    assert all(torch.equal(t.to(dtype), model.state_dict()[n]) for n, t in again.prefixes.named_parameters("prefixes"))


def test_a_newer_adapter_beside_an_older_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What save_pretrained wrote last counts, with a warning; the base model's own weights there are nothing to us."""
    older, newer = trained("mlp"), trained("mlp")
    shake(newer)
    trainer(older, tmp_path).save_model(str(tmp_path / "final"))
    newer.save_pretrained(tmp_path / "final")
    again = PrefixModel.from_pretrained(tiny("llama"), tmp_path / "final", is_trainable=True)
    assert "beside it has other prefixes" in caplog.text
    assert torch.equal(logits(again), logits(newer))
    caplog.clear()
    tiny("llama").save_pretrained(tmp_path / "final")
    assert torch.equal(logits(PrefixModel.from_pretrained(tiny("llama"), tmp_path / "final")), logits(newer))
    assert "beside" not in caplog.text


def test_an_encoder_decoder_and_a_classifier(tmp_path: Path) -> None:
    """Seq2SeqTrainer; and the head, which PEFT's files have too."""
    model = get_prefix_model(tiny("t5"), PrefixConfig(num_virtual_tokens=P, prefix_projection=True))
    run = trainer(model, tmp_path, Seq2SeqTrainer, max_steps=1, save_steps=1)
    run.train()
    save_state(model, tmp_path / "state")
    for folder in (tmp_path / "checkpoint-1", tmp_path / "state"):
        again = PrefixModel.from_pretrained(tiny("t5"), folder, is_trainable=True)
        assert again.state_dict().keys() == model.state_dict().keys()
        close(logits(again), logits(model), MODEL)
    classifier = trained("flat", "bert")
    trainer(classifier, tmp_path).save_model(str(tmp_path / "bert"))
    torch.save(classifier.state_dict(), tmp_path / "bert.pt")
    for path in (tmp_path / "bert", tmp_path / "bert.pt", tmp_path / "bert" / "model.safetensors"):
        again = PrefixModel.from_pretrained(tiny("bert"), path)
        assert torch.equal(again(tokens()).logits, classifier(tokens()).logits)


def test_training_resumes_bit_for_bit_and_the_best_comes_back(tmp_path: Path) -> None:
    """The files beside the Trainer's own change neither."""
    kind = KINDS["mlp"] | {"dropout": 0.1}

    def new() -> PrefixModel:
        torch.manual_seed(0)
        return get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P, **kind))

    straight, second = new(), new()
    trainer(straight, tmp_path).train()
    trainer(second, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(t, second.state_dict()[n]) for n, t in straight.state_dict().items())
    best = new()
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 30.0}
    run = trainer(best, tmp_path / "best", **options)  # such steps end worse than they began
    run.train()
    folder = Path(str(run.state.best_model_checkpoint))
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(t, saved[n]) for n, t in best.state_dict().items())
    close(logits(PrefixModel.from_pretrained(tiny("llama"), folder)), logits(best), MODEL)


def test_save_pretrained_takes_accelerate_s_arguments(tmp_path: Path) -> None:
    """The values are those of state_dict, whatever the modules hold at the moment; others write nothing."""
    for kind in ("mlp", "embedding", "gate"):
        model, wanted = trained(kind), trained(kind)
        shake(wanted)
        given = {f"module.{n}": t for n, t in wanted.state_dict().items()}
        model.save_pretrained(tmp_path / kind, is_main_process=False, save_function=torch.save, state_dict=given)
        assert not (tmp_path / kind).exists()
        model.save_pretrained(tmp_path / kind, is_main_process=True, save_function=torch.save, state_dict=given)
        assert torch.equal(logits(PrefixModel.from_pretrained(tiny("llama"), tmp_path / kind)), logits(wanted))
    with pytest.raises(ValueError, match=r"state_dict lacks \['prefixes.default.embedding'"):
        model.save_pretrained(tmp_path / "none", state_dict={"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        model.save_pretrained(tmp_path / "none", safe_serialization=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="must be a folder, and is a file"):
        model.save_pretrained(tmp_path / "mlp" / "README.md")


def test_selected_adapters_lie_as_peft_s(tmp_path: Path) -> None:
    model = trained("flat")
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=3))
    with pytest.raises(ValueError, match="no prefix named 'x'"):
        model.save_pretrained(tmp_path, selected_adapters=["default", "x"])
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    with pytest.raises(ValueError, match=r"no such file; the folder has \[\]; its folders \['other'\] may be read"):
        PrefixModel.from_pretrained(tiny("llama"), tmp_path)
    model.save_pretrained(tmp_path, selected_adapters=["default", "other"])
    again = PrefixModel.from_pretrained(tiny("llama"), tmp_path)
    again.load_adapter(tmp_path, "b", subfolder="other")
    assert again.prefix_configs["b"].num_virtual_tokens == 3
    with pytest.raises(ValueError, match="has no subfolder 'nowhere'"):
        again.load_adapter(tmp_path, "c", subfolder="nowhere")


def test_other_weights_that_were_trained(tmp_path: Path) -> None:
    """They go into the base model that has them, and a base model without is refused. Nothing is dropped."""
    model = trained("flat")
    weight = torch.full_like(model.base_model.model.norm.weight, 3)
    torch.save(model.state_dict() | {"base_model.model.norm.weight": weight}, tmp_path / "more.pt")
    base = tiny("llama")
    again = PrefixModel.from_pretrained(base, tmp_path / "more.pt")
    assert torch.equal(base.model.norm.weight, weight)
    again.save_pretrained(tmp_path / "saved", state_dict=torch.load(tmp_path / "more.pt"))
    base = tiny("llama")
    PrefixModel.from_pretrained(base, tmp_path / "saved")
    assert torch.equal(base.model.norm.weight, weight)
    torch.save(model.state_dict() | {"base_model.lora.weight": weight}, tmp_path / "more.pt")
    before = {n: t.clone() for n, t in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"lora.weight \(32,\) of the base model was trained .* no such weight"):
        again.load_prefix(tmp_path / "more.pt", "bad")
    assert again.prefix_names == ["default"]
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


def test_convert_reads_them(tmp_path: Path) -> None:
    """A state_dict with its base model's configuration becomes what save_pretrained would have written."""
    for kind in ("flat", "mlp", "gate", "infix"):
        model = trained(kind)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        report = convert(tmp_path / "state.pt", tmp_path / kind, base=model.config)
        model.save_pretrained(tmp_path / f"{kind}-wanted")
        wanted = json.loads((tmp_path / f"{kind}-wanted" / checkpoint.ADAPTER_CONFIG).read_text())
        assert report["peft_type"] == wanted["peft_type"]
        assert any("MLP is left behind" in note for note in report["notes"]) == (kind == "mlp")
        close(logits(PrefixModel.from_pretrained(tiny("llama"), tmp_path / kind)), logits(model), MODEL)
    torch.save(trained("embedding").state_dict(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match="only their model makes keys and values"):
        convert(tmp_path / "state.pt", tmp_path / "embedding")


def test_embedding_only_prefixes_in_a_trainer(tmp_path: Path) -> None:
    model = PrefixTuning(tiny("llama"), prefix_length=P, hidden_size=32)
    trainer(model, tmp_path).save_model(str(tmp_path / "final"))
    Accelerator(cpu=True).save_model(model, str(tmp_path / "state"))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for place in ("final", "final/model.safetensors", "state", "state.pt"):
        again = PrefixTuning.from_pretrained(tiny("llama"), tmp_path / place)
        assert torch.equal(again.prefix, model.prefix)
    bad = {"finite": torch.full((P, 32), torch.nan), r"need .*\(4, 32\)": torch.ones(P, 33), "need": torch.ones(())}
    for message, table in bad.items():
        torch.save({"prefix": table}, tmp_path / "state.pt")
        with pytest.raises(ValueError, match=message):
            PrefixTuning.from_pretrained(tiny("llama"), tmp_path / "state.pt")
    torch.save(trained("flat").state_dict(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"a PrefixTuning has 'prefix', this file has \['prefixes.default.embedding'"):
        PrefixTuning.from_pretrained(tiny("llama"), tmp_path / "state.pt")


def test_of_several_saved_models_the_one_with_prefixes_is_read(tmp_path: Path) -> None:
    """As accelerate saves them: model.safetensors and model_1.safetensors."""
    model = trained("flat")
    save_file({"weight": torch.ones(2, 2)}, tmp_path / state.STATES[0])
    save_file(model.state_dict(), tmp_path / "model_1.safetensors")
    assert torch.equal(logits(PrefixModel.from_pretrained(tiny("llama"), tmp_path)), logits(model))


def test_what_a_state_dict_does_not_say_may_be_given(tmp_path: Path) -> None:
    """Dropout, say."""
    torch.save(trained("flat").state_dict(), tmp_path / "state.pt")
    config = PrefixConfig(num_virtual_tokens=P, dropout=0.25)
    model = PrefixModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True, config=config)
    assert model.prefixes["default"].dropout.p == 0.25
    with pytest.raises(ValueError, match=r"need .*\(5, 96\)"):
        PrefixModel.from_pretrained(tiny("llama"), tmp_path, config=PrefixConfig(num_virtual_tokens=5))
