"""``accelerate``: a PEFT model gives what it gave, through the operator, and can be had back as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from prefix_attn import accelerate
from prefix_attn.hf.attach import attention
from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from tests.hf.models import tiny, tokens
from tests.numerics import GRADIENT, LONG, MODEL, close

pytestmark = pytest.mark.peft
P = 5
ADAPTERS: dict[str, Callable[[], Any]] = {
    "flat": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    "mlp": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=16
    ),
    "saved": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, inference_mode=True),
    "cartridge": lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_frozen_tokens=2),
}


def peft_model(name: str = "llama", adapter: str = "flat") -> Any:
    torch.manual_seed(1)
    return get_peft_model(tiny(name), ADAPTERS[adapter]()).eval()


def results(model: Any) -> dict[str, Tensor]:
    """Loss, logits of a right-padded batch, every gradient, and tokens of greedy and beam search with left padding."""
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    out = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out.loss, list(trained.values()), allow_unused=True) if trained else ()
    found = {"loss": out.loss.detach(), "logits": out.logits.detach()[mask.bool()]}
    found |= {n: grad for n, grad in zip(trained, grads) if grad is not None}  # other adapters have none
    given = {"input_ids": ids, "attention_mask": mask.flip(1), "max_new_tokens": 6, "do_sample": False}
    given |= {"pad_token_id": 0, "eos_token_id": None}
    return found | {f"{n} beams": model.generate(**given, num_beams=n) for n in (1, 2)}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    close(got, expected, MODEL)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_results_are_those_of_peft(name: str, adapter: str) -> None:
    model = peft_model(name, adapter)
    expected = results(model)
    assert adapter == "saved" or len(expected) > 4
    undo = accelerate(model)
    assert model.get_base_model().config._attn_implementation == attention.NAME
    assert_same(results(model), expected)
    undo()
    assert model.get_base_model().config._attn_implementation != attention.NAME
    again = results(model)
    assert all(torch.equal(again[n], expected[n]) for n in expected)


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "mlp"])
@pytest.mark.parametrize("name", ["bart", "t5", "mt5", "pegasus"])
def test_results_of_encoder_decoders_are_those_of_peft(name: str, projection: bool) -> None:
    """Half of its slots dead and layers that share one, as PEFT has it."""
    torch.manual_seed(1)
    config = PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, prefix_projection=projection, encoder_hidden_size=16
    )
    sizes = {"d_kv": 8} if name in ("t5", "mt5") else {}  # PEFT takes the head size from d_model
    model = get_peft_model(tiny(name, **sizes), config).eval()
    assert model.active_peft_config.num_transformer_submodules == 2
    expected = results(model)
    undo = accelerate(model)
    assert_same(results(model), expected)
    undo()
    again = results(model)
    assert all(torch.equal(again[n], expected[n]) for n in expected)


def test_the_adapter_stays_pefts() -> None:
    """Another adapter, none, and PEFT's own state dict, while accelerated."""
    model = peft_model()
    model.add_adapter("other", ADAPTERS["mlp"]())
    expected = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        expected[name] = results(model)
    with model.disable_adapter():
        bare = model(input_ids=tokens()).logits
    state = {n: t.clone() for n, t in model.state_dict().items()}
    accelerate(model)
    for name, wanted in expected.items():
        model.set_adapter(name)
        assert_same(results(model), wanted)
    with model.disable_adapter():
        close(model(input_ids=tokens()).logits, bare, MODEL)
    assert_same(results(model), expected["default"])
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_trainer_ends_where_it_ended(tmp_path: Path) -> None:
    """The Trainer asks a PEFT model for its base, its signature and its adapter: the same after as before."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(6, 9)]
    trained = []
    for change in (lambda _: None, accelerate):
        model = peft_model()
        change(model)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, learning_rate=0.1, report_to=[], save_strategy="no", use_cpu=True, seed=3
        )
        start = model.prompt_encoder["default"].embedding.weight.detach().clone()
        Trainer(model, arguments, train_dataset=rows).train()
        trained.append(model.prompt_encoder["default"].embedding.weight.detach())
        assert (trained[-1] - start).abs().max() > 0.1
    close(trained[1], trained[0], LONG)


def test_the_mlp_runs_once_per_batch() -> None:
    """PEFT runs it for every sample."""
    model, rows = peft_model(adapter="mlp"), []
    encoder = model.prompt_encoder["default"]
    encoder.register_forward_hook(lambda _module, _args, out: rows.append(out.shape[0]))
    model(input_ids=tokens(3, 9))
    accelerate(model)
    model(input_ids=tokens(3, 9))
    assert rows == [3, 1]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = peft_model(adapter="mlp").train()
    accelerate(model)
    ids, parameters = tokens(), [p for p in model.parameters() if p.requires_grad]

    def grads() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in parameters if p.grad is not None]

    expected = grads()
    set_checkpointing(model.get_base_model(), use_reentrant=use_reentrant)
    for got, wanted in zip(grads(), expected, strict=True):
        close(got, wanted, GRADIENT)


def test_what_cannot_be_accelerated() -> None:
    with pytest.raises(TypeError, match=r"needs a peft.PeftModel, got Linear"):
        accelerate(nn.Linear(2, 2))
    lora = get_peft_model(tiny("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM))
    with pytest.raises(ValueError, match="'default' is LORA; only"):
        accelerate(lora)
    model = peft_model()
    undo = accelerate(model)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)
    undo()
    with pytest.raises(ValueError, match="not accelerated any more"):
        undo()


def test_a_model_whose_tokens_cannot_move_is_refused_and_left_alone() -> None:
    model = get_peft_model(tiny("m2m_100"), PrefixTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=3))
    given = {"input_ids": tokens(), "labels": tokens(2, 5)}
    before, own = model(**given).logits, model.get_base_model().config._attn_implementation
    with pytest.raises(NotImplementedError, match="M2M100ForConditionalGeneration: its tokens cannot start behind"):
        accelerate(model)
    assert model.get_base_model().config._attn_implementation == own
    assert torch.equal(model(**given).logits, before)


CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "classifier": ("bert", {"task_type": "SEQ_CLS"}),
    "two layers": ("roberta", {"task_type": "SEQ_CLS"}),
    "lm_head": ("llama", {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}),
    "norms": ("llama", {"task_type": "CAUSAL_LM"}),
}


@pytest.mark.parametrize(("name", "options"), CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_what_else_is_trained_goes_on_being_trained(name: str, options: dict[str, Any]) -> None:
    """PEFT's heads, and what its user unfroze: flags and gradients are the same. Neither way touches the flags."""
    torch.manual_seed(1)
    model = get_peft_model(tiny(name), PrefixTuningConfig(num_virtual_tokens=P, **options)).eval()
    if name == "llama" and "modules_to_save" not in options:
        model.get_base_model().model.norm.requires_grad_()
    labels = tokens() if name == "llama" else torch.tensor([0, 2])

    def gradients() -> dict[str, Tensor]:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        loss = model(input_ids=tokens(), attention_mask=torch.ones(2, 9), labels=labels).loss
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))

    expected = gradients()
    assert len(expected) > 1
    undo = accelerate(model)
    close(gradients(), expected, GRADIENT)
    model.prompt_encoder.requires_grad_(False)
    undo()
    assert gradients().keys() == expected.keys() - {"prompt_encoder.default.embedding.weight"}
