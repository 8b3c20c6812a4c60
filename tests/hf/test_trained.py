"""What of the base model its user made trainable goes on being trained, and is in every state; the rest is frozen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, WhisperConfig, WhisperForAudioClassification

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, get_prefix_model
from tests.hf.models import ENCODER_DECODERS, tiny, tokens
from tests.numerics import MODEL, close

P, WIDTH = 4, 32


def lora(base: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(5)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), base)


def new_tokens(base: Any) -> None:
    base.requires_grad_(False)
    base.get_input_embeddings().weight.requires_grad_()


def norms(base: Any) -> None:
    for module in base.modules():
        is_norm = "Norm" in type(module).__name__
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(is_norm)


def head(base: Any) -> None:
    base.requires_grad_(False)
    base.lm_head.requires_grad_()


def last_layers(base: Any) -> None:
    base.model.embed_tokens.requires_grad_(False)
    base.model.layers[0].requires_grad_(False)


CHOICES: dict[str, Callable[[Any], None]] = {f.__name__: f for f in (lora, new_tokens, norms, head, last_layers)}
ALL = [pytest.param(name, marks=pytest.mark.peft) if name == "lora" else name for name in CHOICES]


def chosen(choice: str) -> PreTrainedModel:
    base = tiny("llama")
    CHOICES[choice](base)
    return base


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def attached(base: Any, kind: str) -> Any:
    torch.manual_seed(7)
    return get_prefix_model(base, PrefixConfig(num_virtual_tokens=P)) if kind == "kv" else PrefixTuning(base, P, WIDTH)


def step(model: nn.Module) -> None:
    """One step of what is trainable, in which all of it moves."""
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert not [name for name, p in trainable(model).items() if torch.equal(p, before[name])]


@pytest.mark.parametrize("kind", ["kv", "table"])
@pytest.mark.parametrize("choice", ALL)
def test_what_was_chosen_is_trained_and_in_the_state(choice: str, kind: str, caplog: Any) -> None:
    """All else keeps its bits. Another model with the same choice takes the state, by itself and in a module."""
    base = chosen(choice)
    names = {f"base_model.{name}" for name in trainable(base)}
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    with caplog.at_level(logging.WARNING):
        model = attached(base, kind)
    assert f"of LlamaForCausalLM{f' and {len(names) - 1} more' if len(names) > 1 else ''} stay trainable" in caplog.text
    own = trainable(model).keys() - names
    assert own == ({"prefixes.default.embedding"} if kind == "kv" else {"prefix"})
    assert names < trainable(model).keys()
    assert model.state_dict().keys() == trainable(model).keys()
    step(model)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters() if f"base_model.{n}" not in names)
    for outer in (lambda module: module, nn.Sequential):
        again = attached(chosen(choice), kind)
        outer(again).load_state_dict({n: t.clone() for n, t in outer(model).state_dict().items()})
        assert torch.equal(again.eval()(tokens()).logits, model.eval()(tokens()).logits)
        missing = outer(model).state_dict()
        missing.popitem()
        with pytest.raises(RuntimeError, match="Missing key"):
            outer(again).load_state_dict(missing)


@pytest.mark.parametrize("name", ["llama", "marian", "pegasus", "whisper"])
def test_where_nothing_was_chosen_all_is_frozen(name: str) -> None:
    """The last three have tables of positions that their classes freeze: nobody chose the rest."""
    base = tiny(name)
    frozen = [n for n, p in base.named_parameters() if not p.requires_grad]
    assert len(frozen) == {"llama": 0, "whisper": 1}.get(name, 2)
    model = attached(base, "kv")
    assert list(trainable(model)) == ["prefixes.default.embedding"]
    model.attachment.remove()
    assert [n for n, p in base.named_parameters() if not p.requires_grad] == frozen


def test_weights_of_eight_bits_were_not_chosen_to_be_frozen() -> None:
    base = tiny("llama")
    linear = base.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    linear.forward = lambda x: nn.functional.linear(x, linear.weight.to(x.dtype))
    assert list(trainable(attached(base, "kv"))) == ["prefixes.default.embedding"]


def test_a_class_that_wants_more_than_a_configuration() -> None:
    class Own(type(tiny("llama"))):  # type: ignore[misc]
        def __init__(self, config: Any, more: int) -> None:
            super().__init__(config)
            self.more = more

    base = Own(tiny("llama").config, 3)
    head(base)
    assert trainable(attached(base, "kv")).keys() == {"base_model.lm_head.weight", "prefixes.default.embedding"}


def test_what_is_unfrozen_later_is_in_the_state() -> None:
    """Tied weights are there once, as safetensors wants it. A model whose head is frozen takes them too."""
    for tied, name in ((False, "base_model.lm_head.weight"), (True, "base_model.model.embed_tokens.weight")):
        model = attached(tiny("llama", tie_word_embeddings=tied), "kv").eval()
        model.base_model.lm_head.requires_grad_(True)
        step(model)
        assert model.state_dict().keys() == {name, "prefixes.default.embedding"}
        again = attached(tiny("llama", tie_word_embeddings=tied), "kv").eval()
        again.load_state_dict({n: t.clone() for n, t in model.state_dict().items()})
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
        with pytest.raises(RuntimeError, match="size mismatch"):
            again.load_state_dict({**model.state_dict(), name: torch.zeros(3, WIDTH)})
        with pytest.raises(RuntimeError, match="Unexpected key"):
            again.load_state_dict({**model.state_dict(), "base_model.score.weight": torch.zeros(3, WIDTH)})


def test_running_statistics_of_what_is_trained_are_in_the_state() -> None:
    base = tiny("llama").requires_grad_(False)
    base.lm_head = nn.Sequential(base.lm_head, nn.Flatten(0, 1), nn.BatchNorm1d(97), nn.Unflatten(0, (2, 9)))
    model = attached(base, "kv")
    trained = {f"base_model.lm_head.2.{name}" for name in ("weight", "bias")} | {"prefixes.default.embedding"}
    assert trainable(model).keys() == trained
    buffers = {f"base_model.lm_head.2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert model.state_dict().keys() == trained | buffers


def test_a_second_model_on_the_base_keeps_the_choice() -> None:
    base = chosen("norms")
    names = {f"base_model.{name}" for name in trainable(base)}
    for kind in ("kv", "table", "kv"):
        assert names < trainable(attached(base, kind)).keys()


def test_a_head_whose_copy_is_trained_is_frozen_itself() -> None:
    """It does not run with the prefix: it would have no gradient, and no optimizer should hold it."""
    base = tiny("bert").requires_grad_(False)
    base.classifier.requires_grad_()
    base.bert.pooler.requires_grad_()
    model = attached(base, "kv")
    pooler = {f"base_model.bert.pooler.dense.{name}" for name in ("weight", "bias")}
    heads = {f"heads.default.classifier.{name}" for name in ("weight", "bias")}
    assert trainable(model).keys() == pooler | heads | {"prefixes.default.embedding"}
    model(tokens(), labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())


def test_a_tied_head_whose_copy_is_trained_leaves_the_embeddings() -> None:
    base = tiny("llama", tie_word_embeddings=True)
    new_tokens(base)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P, modules_to_save=["lm_head"]))
    assert "base_model.model.embed_tokens.weight" in trainable(model)
    assert "heads.default.lm_head.weight" in trainable(model)


@pytest.mark.peft
def test_a_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Two steps, a restart from the checkpoint and two more are four steps."""

    def train(steps: int, resume: Path | None = None) -> PrefixModel:
        model = attached(chosen("lora"), "kv")
        options: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
        args = TrainingArguments(str(tmp_path), max_steps=steps, save_steps=2, learning_rate=1e-2, **options)
        data = [{"input_ids": row, "labels": row} for row in tokens(8)]
        Trainer(model, args, train_dataset=data).train(resume_from_checkpoint=resume and str(resume))  # type: ignore[arg-type]
        return model

    straight = train(4)
    resumed = train(4, tmp_path / "checkpoint-2")
    start: dict[str, Tensor] = attached(chosen("lora"), "kv").state_dict()
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)
        assert not torch.equal(start[name], tensor)


@pytest.mark.parametrize("kind", ["kv", "table"])
@pytest.mark.parametrize("choice", ["norms", "head", pytest.param("lora", marks=pytest.mark.peft)])
def test_files_have_what_was_trained(choice: str, kind: str, tmp_path: Path, caplog: Any) -> None:
    """Into a base prepared as before training. To go on with the training, the same is trainable; else nothing is."""
    model = attached(chosen(choice), kind)
    step(model)
    model.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        again = type(model).from_pretrained(chosen(choice), tmp_path, is_trainable=is_trainable)
        assert trainable(again).keys() == (trainable(model).keys() if is_trainable else set())
        assert torch.equal(again.eval()(tokens()).logits, model.eval()(tokens()).logits)
    assert "of its weights were trained with the prefix, and are set" in caplog.text
    if choice == "lora":
        with pytest.raises(ValueError, match=r"lora_A.*was trained with the prefix, and LlamaForCausalLM has no such"):
            type(model).from_pretrained(tiny("llama"), tmp_path)


def test_a_prefix_with_weights_of_its_own_joins_no_other(tmp_path: Path) -> None:
    """They would change the outputs of the prefixes that are there. To the model that it came from it comes back."""
    model = attached(chosen("norms"), "kv")
    step(model)
    model.save_pretrained(tmp_path)
    model.load_prefix(tmp_path, "again")
    other = attached(tiny("llama"), "kv").eval()
    before = other(tokens()).logits
    with pytest.raises(ValueError, match="again was trained with weights of the base model that are not"):
        other.load_prefix(tmp_path, "again")
    assert other.prefix_names == ["default"]
    assert torch.equal(other(tokens()).logits, before)


@pytest.mark.parametrize("changes", [{}, {"use_weighted_layer_sum": True}])
def test_unload_restores_what_was_trained(changes: dict[str, Any]) -> None:
    """Also of a head, in whose place a copy was trained, and of weights that were trained beside it."""
    config = WhisperConfig(**ENCODER_DECODERS["whisper"], **changes)
    base = WhisperForAudioClassification(config)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    before = {name: p.requires_grad for name, p in base.named_parameters()}
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
    assert not base.classifier.weight.requires_grad
    model.unload()
    assert {name: p.requires_grad for name, p in base.named_parameters()} == before


@pytest.mark.peft
def test_peft_reads_what_was_trained(tmp_path: Path) -> None:
    from peft import PeftModel

    model = attached(chosen("norms"), "kv").eval()
    step(model)
    model.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    close(peft(input_ids=tokens()).logits, model(tokens()).logits, MODEL)
