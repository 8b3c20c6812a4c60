"""Task heads are found by structure: trained with the prefix is what a model for a task adds to a pretrained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    GPT2DoubleHeadsModel,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, get_prefix_model
from prefix_attn.hf.attach.task_heads import default_task_heads
from tests.hf.models import CONFIGS, ENCODER_DECODERS, ENCODERS, tiny, tokens
from tests.numerics import MODEL, close

P = 3
SIZES: dict[str, dict[str, Any]] = CONFIGS | ENCODERS | ENCODER_DECODERS
TASKS = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "question": AutoModelForQuestionAnswering,
    "choice": AutoModelForMultipleChoice,
    "next sentence": AutoModelForNextSentencePrediction,
    "audio": AutoModelForAudioClassification,
}


def built(task: Any, name: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(name, **SIZES[name] | changes)
    return task.from_config(config).eval()


@pytest.mark.parametrize("task", TASKS)
def test_what_a_task_adds_is_trained(task: str) -> None:
    """Every architecture that has the task: what the pretrained model lacks, and nothing that it has."""
    count = 0
    for name in SIZES:
        config = AutoConfig.for_model(name, **SIZES[name])
        if type(config) not in TASKS[task]._model_mapping:
            continue
        with torch.device("meta"):
            model, pretrained = built(TASKS[task], name, num_labels=2), built(AutoModel, name)
        known = {n for n, _ in pretrained.named_parameters()}
        added = {n for n, _ in model.named_parameters() if n.removeprefix(f"{model.base_model_prefix}.") not in known}
        assert {n.split(".")[0] for n in added} == set(default_task_heads(model)) != set(), type(model).__name__
        count += 1
    assert count >= {"sequence": 20, "token": 15, "question": 15, "choice": 6, "next sentence": 1, "audio": 1}[task]


@pytest.mark.parametrize("task", [AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining])
def test_models_without_a_task_have_nothing_to_add(task: Any) -> None:
    with torch.device("meta"):
        models: list[PreTrainedModel] = [built(task, "bert"), tiny("llama"), tiny("t5"), tiny("whisper")]
        models.append(CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=32, num_hidden_layers=1)))
    assert [default_task_heads(model) for model in models] == [()] * 5


def test_a_class_that_hands_its_labels_on_unnamed() -> None:
    class Own(LlamaForSequenceClassification):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            return super().forward(input_ids, **kwargs)

    assert default_task_heads(Own(tiny("llama").config)) == ("score",)


def sequences(model: PreTrainedModel) -> dict[str, Tensor]:
    """What ``model`` reads, for two rows."""
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))}
    ids = tokens(2, 9)
    return {"input_ids": torch.stack([ids, ids.flip(1)], 1) if "Choice" in type(model).__name__ else ids}


SERVED: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "multiple choice": (AutoModelForMultipleChoice, "bert", {}),
    "multiple choice, summed": (AutoModelForMultipleChoice, "electra", {}),
    "next sentence": (AutoModelForNextSentencePrediction, "bert", {}),
    "encoder-decoder": (AutoModelForTokenClassification, "t5", {}),
    "audio": (AutoModelForAudioClassification, "whisper", {"classifier_proj_size": 16}),
}


@pytest.mark.parametrize("case", SERVED)
def test_the_head_is_trained_saved_and_restored(case: str, tmp_path: Path) -> None:
    """Into a model whose own head starts elsewhere, as each from_pretrained of a backbone draws another one."""
    task, name, changes = SERVED[case]
    base = built(task, name, **changes)
    heads = default_task_heads(base)
    fresh = built(task, name, **changes)
    fresh.load_state_dict({n: t for n, t in base.state_dict().items() if n.split(".")[0] not in heads}, strict=False)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P)).eval()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[2] for n in trained} == {"embedding", *heads}
    model(**sequences(base)).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(parameter.grad)
    model.save_pretrained(tmp_path)
    again = PrefixModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(again(**sequences(base)).logits, model(**sequences(base)).logits)


@pytest.mark.parametrize("is_table", [False, True])
def test_choices_that_reach_the_layers_as_one_batch(is_table: bool) -> None:
    """GPT-2 takes ids (B, choices, S) itself; a choice that is padded on the left is the choice alone."""
    base = GPT2DoubleHeadsModel(tiny("gpt2").config).eval()
    base.config.num_labels = 1
    model: Any = PrefixTuning(base, P, 32) if is_table else get_prefix_model(base, PrefixConfig(num_virtual_tokens=P))
    ids, last = tokens(6, 9).view(2, 3, 9), torch.full((2, 3), 8)
    mask = torch.ones_like(ids)
    mask[1, 2, :4] = 0
    out = model.eval()(ids, attention_mask=mask, mc_token_ids=last)
    alone = model(ids[1:, 2:, 4:], mc_token_ids=last[1:, 2:] - 4)
    close(out.logits[1, 2, 4:], alone.logits[0, 0], MODEL)
    close(out.mc_logits[1, 2], alone.mc_logits[0, 0], MODEL)


def test_parameters_outside_of_all_children_are_trained_with_the_head() -> None:
    changes = {"use_weighted_layer_sum": True, "classifier_proj_size": 16}
    bases = [built(AutoModelForAudioClassification, "whisper", **changes) for _ in range(2)]
    model = get_prefix_model(bases[0], PrefixConfig()).eval()
    model(**sequences(model.base_model)).logits.square().sum().backward()
    assert model.base_model.layer_weights.grad.abs().max() > 0
    assert "base_model.layer_weights" in model.state_dict()
    model = get_prefix_model(bases[1], PrefixConfig(modules_to_save=()))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prefixes.default.embedding"]


def test_the_configuration_decides() -> None:
    base = BertForSequenceClassification(tiny("bert").config)
    assert get_prefix_model(base, PrefixConfig(modules_to_save=())).prefix_configs["default"].modules_to_save == ()
