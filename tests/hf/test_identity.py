"""What trainers, pipelines and collators ask a model: a wrapped one answers as its base, and trains with its loss."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    BatchEncoding,
    CLIPVisionConfig,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.trainer_utils import validate_quantization_for_training
from transformers.utils.generic import can_return_loss, find_labels

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, accelerate, get_prefix_model
from tests.hf.models import CONFIGS, ENCODERS, spread, tiny, tokens
from tests.numerics import MODEL, close
from tests.tokens import byte_tokenizer

P = 4
IDS = tokens(8, 9)
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
Rows = list[dict[str, Any]]


def encoder(auto: Any, name: str, num_labels: int, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **ENCODERS["bert"] | {"num_labels": num_labels} | changes)
    return spread(auto.from_config(config).eval())


def llava() -> PreTrainedModel:
    """One image is four tokens, with id 90."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=32)
    text = LlamaConfig(**CONFIGS["llama"])
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=90, vision_feature_layer=-1)
    return spread(LlavaForConditionalGeneration(config).eval())


def texts() -> Rows:
    """Rows with unlike numbers of targets, so that a mean over rows is not one over tokens."""
    labels = [torch.where(torch.arange(9) > i, row, -100) for i, row in enumerate(IDS)]
    return [{"input_ids": row, "labels": label} for row, label in zip(IDS, labels)]


def pairs() -> Rows:
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[:5].tolist()} for row in IDS]


def boxes() -> Rows:
    places = torch.randint(0, 500, (8, 9, 4), generator=torch.Generator().manual_seed(0)).sort(-1).values
    return [{"input_ids": row, "bbox": place, "labels": row % 3} for row, place in zip(IDS, places)]


def images() -> Rows:
    ids = torch.cat([torch.full((8, 4), 90), IDS.clamp(max=89)], dim=1)
    pixels = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "pixel_values": image, "labels": row} for row, image in zip(ids, pixels)]


CASES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], Rows]]] = {
    "causal": (lambda: tiny("llama"), texts),
    "sequence to sequence": (lambda: tiny("t5"), pairs),
    "sequence classification": (
        lambda: tiny("bert"),
        lambda: [{"input_ids": row, "labels": i % 3} for i, row in enumerate(IDS)],
    ),
    "token classification": (lambda: encoder(AutoModelForTokenClassification, "layoutlm", 3), boxes),
    "question answering": (
        lambda: encoder(AutoModelForQuestionAnswering, "bert", 2),
        lambda: [{"input_ids": row, "start_positions": 2, "end_positions": 4} for row in IDS],
    ),
    "images": (llava, images),
}


def collator(model: Any) -> Any:
    """The Trainer's, or for sequence to sequence the one that asks the model for the decoder's input."""
    if not model.config.is_encoder_decoder:
        return None
    made = SimpleNamespace(pad=lambda rows, **_: BatchEncoding({k: torch.stack([r[k] for r in rows]) for k in rows[0]}))
    made.padding_side = "right"
    return DataCollatorForSeq2Seq(made, model=model)


def losses(model: Any, rows: Rows, folder: Path, **options: Any) -> tuple[float, float]:
    """Of a Trainer's evaluation and of its first step, four rows in two batches."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4}
    arguments = TrainingArguments(
        str(folder), max_steps=1, logging_steps=1, save_strategy="no", **sizes, **QUIET, **options
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator(model))
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train()
    return evaluated, next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_a_trainer_finds_the_loss_of_the_bare_model(case: str, smoothing: float, tmp_path: Path) -> None:
    """With gates of 0 they are the same model: columns, label shift and number of items decide the rest."""
    make, rows = CASES[case]
    model = get_prefix_model(make(), PrefixConfig(num_virtual_tokens=P, gate="zero"))
    got = losses(model, rows(), tmp_path, label_smoothing_factor=smoothing)
    expected = losses(make(), rows(), tmp_path, label_smoothing_factor=smoothing)
    close(torch.tensor(got), torch.tensor(expected), MODEL)
    assert model.prefixes["default"].gate.detach().abs().max() > 0  # it was the prefix that was trained


def prefixed(base: PreTrainedModel, **fields: Any) -> PrefixModel:
    return get_prefix_model(base, PrefixConfig(num_virtual_tokens=P, **fields)).eval()


def tuned(base: PreTrainedModel) -> PrefixTuning:
    return PrefixTuning(base, P, 32).eval()


@pytest.mark.parametrize(
    ("case", "wrap"), [*((case, prefixed) for case in CASES), ("causal", tuned), ("sequence classification", tuned)]
)
def test_name_and_arguments_are_the_base_s(case: str, wrap: Callable[[PreTrainedModel], Any]) -> None:
    base = CASES[case][0]()
    model = wrap(base)
    assert model._get_name() == type(model).__name__ == type(base).__name__
    assert find_labels(model.__class__) == find_labels(type(base))
    assert can_return_loss(model.__class__) == can_return_loss(type(base))
    theirs, ours = (inspect.signature(m.forward).parameters for m in (base, model))
    added = ["prefix_names", "adapter_names", "infix_start"] if isinstance(model, PrefixModel) else []
    assert [name for name in ours if name not in added] == list(theirs)
    assert set(added) <= set(ours)
    assert isinstance(model, PrefixModel if wrap is prefixed else PrefixTuning)


def test_positional_arguments_are_the_base_s() -> None:
    """BERT's third is token_type_ids and LayoutLM's second the boxes."""
    row = boxes()[0]
    model = prefixed(encoder(AutoModelForTokenClassification, "layoutlm", 3))
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=P, modules_to_save=[]))
    ids, box = row["input_ids"][None], row["bbox"][None]
    got = model(ids, box, prefix_names=["other"]).logits
    assert torch.equal(got, model(input_ids=ids, bbox=box).logits)
    with pytest.raises(ValueError, match="for each of 1 rows, got 2"):
        model(ids, box, prefix_names=["other", None])
    bert = tiny("bert")
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    model = prefixed(bert, gate="zero")
    close(model(ids, None, types).logits, tiny("bert")(ids, None, types).logits, MODEL)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(ids, input_ids=ids)


def test_seq2seq_trainer_generates_as_its_arguments_say(tmp_path: Path) -> None:
    base = tiny("t5")
    chosen = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0, decoder_start_token_id=2)
    options = {"predict_with_generate": True, "generation_config": chosen, "label_smoothing_factor": 0.1}
    arguments = Seq2SeqTrainingArguments(str(tmp_path), **options, **QUIET)
    model = prefixed(base)
    trainer = Seq2SeqTrainer(model, arguments, eval_dataset=pairs(), data_collator=collator(model))
    assert base.generation_config.max_new_tokens == 3
    made = torch.from_numpy(trainer.predict(pairs()).predictions)
    assert torch.equal(made[:, :4], model.generate(IDS))
    assert (made[:, 4:] == 0).all()  # the Trainer's padding


@pytest.mark.parametrize("wrap", [prefixed, tuned])
def test_attributes_are_the_base_s(wrap: Callable[[PreTrainedModel], Any]) -> None:
    """Those that it has are read, set and deleted there; new ones and our own stay on the wrapper."""
    base = tiny("llama")
    model = wrap(base)

    def loss(logits: torch.Tensor, **_: Any) -> torch.Tensor:
        return logits.sum()

    model.loss_function = loss
    assert model(IDS, labels=IDS).loss == model(IDS).logits.sum()
    model.prepare_inputs_for_generation = lambda ids, **_: {"input_ids": ids, "use_cache": False}
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (8, 11)
    del model.prepare_inputs_for_generation
    assert "prepare_inputs_for_generation" not in vars(base)
    new = {"config": copy.deepcopy(base.config), "main_input_name": "x", "_no_split_modules": ["y"]}
    for name, value in new.items():
        setattr(model, name, value)
        assert getattr(base, name) is getattr(model, name) is value
        assert name not in vars(model)
    head = nn.Linear(32, 97, bias=False)
    model.lm_head = head
    assert base.lm_head is head
    assert "lm_head" not in model._modules
    with pytest.raises(AttributeError, match="'LlamaForCausalLM' object has no attribute 'nothing'"):
        getattr(model, "nothing")  # noqa: B009
    with pytest.raises(AttributeError, match="nothing"):
        del model.nothing


def test_new_and_own_attributes_stay_on_the_wrapper() -> None:
    base = tiny("llama")
    model, other = prefixed(base), prefixed(base)
    model.value_head, model.scale, model.note = nn.Linear(32, 1), nn.Parameter(torch.ones(1)), "mine"
    assert {"value_head.weight", "scale"} <= {name for name, _ in model.named_parameters()}
    assert not any(hasattr(place, name) for place in (base, other) for name in ("value_head", "scale", "note"))
    model.add_prefix("more", PrefixConfig(num_virtual_tokens=P))
    model.active_prefix = "default"
    model.forward = lambda *_, **__: "mine"
    assert model(IDS) == "mine"
    assert not isinstance(base(IDS), str)
    del model.value_head, model.scale, model.note, model.forward
    assert not hasattr(model, "note")
    assert not hasattr(base, "active_prefix")
    model.eval(), model.train()
    assert base.training


class Mine(PrefixModel):
    """A user's own."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base)
        self.scale = 2.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs).logits * self.scale


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file])
@pytest.mark.parametrize("kind", [PrefixModel, PrefixTuning, Mine])
def test_a_copy_answers_as_the_model(kind: type[Any], copied: Callable[[Any], Any]) -> None:
    model = tuned(tiny("llama")) if kind is PrefixTuning else kind(tiny("llama"))
    if kind is not PrefixTuning:
        model.add_prefix("default", PrefixConfig(num_virtual_tokens=P))
    again = copied(model)
    assert type(again) is type(model)
    outs = [m(IDS) if kind is Mine else m(IDS).logits for m in (model, again)]
    assert torch.equal(*outs)
    again.generation_config = GenerationConfig(max_new_tokens=1)
    assert model.generation_config.max_new_tokens is None


def test_what_accelerate_notes_on_the_base_is_not_about_the_wrapper() -> None:
    """A hook's old forward, and that the base was prepared: read from the wrapper they would lose the prefix."""
    base = tiny("llama")
    base._is_accelerate_prepared = True  # as a Trainer leaves it
    add_hook_to_module(base, ModelHook())
    model = prefixed(base)
    expected = model(IDS).logits
    add_hook_to_module(model, ModelHook())
    assert torch.equal(model(IDS).logits, expected)
    remove_hook_from_module(model)
    assert torch.equal(model(IDS).logits, expected)
    assert not hasattr(model, "_is_accelerate_prepared")
    AcceleratorState._reset_state(True)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert prepared(IDS).logits.dtype == torch.float32
    assert not torch.equal(prepared(IDS).logits, expected)
    plain = Accelerator().unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(plain(IDS).logits, expected)
    AcceleratorState._reset_state(True)


def test_a_quantised_base_is_trained_where_its_method_allows() -> None:
    base = tiny("llama")
    base.is_quantized, base.hf_quantizer = True, SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(base)
    model = prefixed(base)
    assert model.is_quantized
    validate_quantization_for_training(model)
    validate_quantization_for_training(tuned(base))
    base.hf_quantizer.is_trainable = False
    with pytest.raises(ValueError, match="quantized"):
        validate_quantization_for_training(model)


@pytest.mark.parametrize("task", ["text-generation", "text-classification", "token-classification"])
def test_pipelines_know_the_model(task: str, caplog: pytest.LogCaptureFixture) -> None:
    bases = {
        "text-generation": lambda: tiny("llama", vocab_size=257),
        "text-classification": lambda: tiny("bert", vocab_size=257),
        "token-classification": lambda: encoder(AutoModelForTokenClassification, "bert", 3, vocab_size=257),
    }
    model = prefixed(bases[task]())
    log = logging.getLogger("transformers.pipelines.base")
    log.addHandler(caplog.handler)
    try:
        run = pipeline(task, model=model, tokenizer=byte_tokenizer(), device="cpu")
    finally:
        log.removeHandler(caplog.handler)
    assert caplog.messages == []
    options = {"max_new_tokens": 2} if task == "text-generation" else {}
    assert len(run("some text", **options)) == (9 if task == "token-classification" else 1)


def bad_bases() -> dict[str, tuple[Callable[[], Any], str]]:
    return {
        "PrefixModel": (lambda: prefixed(tiny("llama")), r"got PrefixModel\[LlamaForCausalLM\]: give its base_model"),
        "PrefixTuning": (lambda: tuned(tiny("llama")), r"got PrefixTuning\[LlamaForCausalLM\]: give its base_model"),
        "wrapped": (lambda: nn.DataParallel(tiny("llama")), "got DataParallel: give the model inside"),
        "a name": (lambda: "gpt2", "got 'gpt2': give the model that from_pretrained"),
    }


@pytest.mark.parametrize("case", bad_bases())
def test_what_is_no_base(case: str) -> None:
    make, message = bad_bases()[case]
    base = make()
    for wrap in (prefixed, tuned, PrefixModel, lambda b: PrefixModel.from_pretrained(b, "nowhere")):
        with pytest.raises(TypeError, match=message):
            wrap(base)


@pytest.mark.peft
def test_a_peft_model_is_no_base() -> None:
    from peft import PrefixTuningConfig, get_peft_model

    theirs = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    with pytest.raises(TypeError, match=r"got PeftModelForCausalLM: give what get_base_model\(\)"):
        prefixed(theirs)
    with pytest.raises(TypeError, match=r"needs a peft.PeftModel, got PrefixModel\[LlamaForCausalLM\]"):
        accelerate(prefixed(tiny("llama")))


def replicas(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What nn.DataParallel runs on two devices; here both are the CPU."""
    torchs = importlib.import_module("torch.nn.parallel.replicate")
    everywhere = lambda tensors, devices, detach=False: [list(tensors) for _ in devices]
    monkeypatch.setattr(torchs, "_broadcast_coalesced_reshape", everywhere)
    return torchs.replicate(module, [0, 1])


def test_data_parallel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (prefixed(tiny("llama")), tuned(tiny("llama")), nn.Sequential(tuned(tiny("bert")))):
        with pytest.raises(NotImplementedError, match=r"does not run under nn\.DataParallel.*one process per GPU"):
            replicas(model, monkeypatch)


@pytest.mark.peft
def test_data_parallel_is_refused_of_an_accelerated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    theirs = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    undo = accelerate(theirs)
    with pytest.raises(NotImplementedError, match=r"PeftModelForCausalLM, accelerated, does not run under nn\.DataPar"):
        replicas(nn.Sequential(theirs), monkeypatch)
    undo()
    assert len(replicas(theirs, monkeypatch)) == 2


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_input_embeddings_that_are_set(name: str) -> None:
    """Every forward reads those that the base model has now, wherever virtual tokens run."""
    model = PrefixTuning(tiny(name), 4, 32).eval()
    larger = torch.nn.Embedding(2 * model.config.vocab_size, 32)
    expected = model(inputs_embeds=larger(tokens() + model.config.vocab_size)).logits
    model.set_input_embeddings(larger)
    assert torch.equal(model(tokens() + model.config.vocab_size).logits, expected)
