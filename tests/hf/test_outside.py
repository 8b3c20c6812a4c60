"""Ways round a wrapper's own forward: each runs with the prefix, or raises. Only ``base_model`` is the frozen model."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin
from transformers.models.llama.modeling_llama import LlamaAttention

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, get_prefix_model
from tests.hf.models import CACHE, tiny, tokens
from tests.numerics import HALF, MODEL, close

P, WIDTH = 4, 32
CONTINUOUS = [name for name in vars(ContinuousMixin) if not name.startswith(("_", "destroy", "generation_config"))]


def prefixed(name: str = "llama", **options: Any) -> PrefixModel:
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, **options)).eval()
    for parameter in model.prefixes.parameters():
        parameter.data.normal_(std=2)
    return model


def tuned(name: str) -> PrefixTuning:
    model = PrefixTuning(tiny(name), P, WIDTH).eval()
    model.prefix.data.normal_(std=2)
    return model


MODELS = {
    "llama": prefixed,
    "gpt2": lambda: prefixed("gpt2"),
    "mlp": lambda: prefixed("qwen2", prefix_projection=True, encoder_hidden_size=8),
    "infix": lambda: prefixed(mode="infix"),
    "table shared": lambda: tuned("llama"),
    "table in rows": lambda: tuned("mistral"),
}


def loss_of(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    return cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def without_head(self: Any, fused: bool = False, labels: Any = None, **kwargs: Any) -> Any:
    """Calls ``base_model``, as TRL's fused head does; without ``fused`` the forward that was there before."""
    if not fused:
        return self.before(labels=labels, **kwargs)
    return loss_of(self.base_model(**kwargs).last_hidden_state, self.get_output_embeddings(), labels)


def through_the_stack(self: Any, labels: Any = None, **kwargs: Any) -> Any:
    """Calls the stack by its name, as Liger's does."""
    stack = getattr(self, self.base_model_prefix)
    return loss_of(stack(**kwargs)[0], self.get_output_embeddings(), labels)


def through_the_decoder(self: Any, labels: Any = None, **kwargs: Any) -> Any:
    return loss_of(self.get_decoder()(**kwargs)[0], self.get_output_embeddings(), labels)


FUSED = (without_head, through_the_stack, through_the_decoder)


@pytest.mark.parametrize("fused", FUSED, ids=lambda function: function.__name__)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_forward_in_place_of_ours_has_the_prefix(make: Callable[[], Any], fused: Callable[..., Any]) -> None:
    """Its loss and gradient are those of our own."""
    model, ids = make(), tokens()
    labels = ids.clone()
    labels[:, :4] = -100
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = model.base_model(ids, labels=labels).loss
    expected = model(ids, labels=labels).loss
    gradients = torch.autograd.grad(expected, trained)
    model.before = model.forward
    model.forward = types.MethodType(fused, model)
    options = {"fused": True} if fused is without_head else {}
    got = model(input_ids=ids, labels=labels, **options)
    close(got, expected, MODEL)
    assert (got - frozen).abs() > 1e-3
    close(torch.autograd.grad(got, trained), gradients, MODEL)
    if fused is without_head:
        close(model(input_ids=ids, labels=labels).loss, expected, MODEL)
        close(model.base_model(ids, labels=labels).loss, frozen, MODEL)
        assert model.generate(ids, max_new_tokens=3, pad_token_id=0, eos_token_id=None).shape[1] == ids.shape[1] + 3


def test_a_forward_in_place_of_ours_has_the_prefixes_that_are_asked_for() -> None:
    model, ids = prefixed(), tokens()
    expected = model(ids, prefix_names=["default", None]).logits
    frozen = model.base_model(ids).logits

    def forward(self: Any, **kwargs: Any) -> Tensor:
        return self.get_output_embeddings()(self.base_model(**kwargs)[0])

    model.forward = types.MethodType(forward, model)
    close(model(input_ids=ids, prefix_names=["default", None]), expected, MODEL)
    with model.disable_prefix():
        close(model(input_ids=ids), frozen, MODEL)
    copied = copy.deepcopy(model)
    for parameter in copied.prefixes.parameters():
        parameter.data.zero_()
    close(model(input_ids=ids, prefix_names=["default", None]), expected, MODEL)
    assert (copied(input_ids=ids) - model(input_ids=ids)).abs().max() > 1e-3
    model.forward = types.MethodType(type(model).forward, model)
    assert "forward" not in vars(model)
    close(model(ids, prefix_names=["default", None]).logits, expected, MODEL)


def test_accelerate_wraps_our_forward_and_takes_it_out_again() -> None:
    """It replaces ``forward`` by one in autocast, over another that a library had put there."""
    model, ids = prefixed("qwen2", prefix_projection=True, encoder_hidden_size=8), tokens()
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, labels=ids).loss
    model.before = model.forward
    model.forward = types.MethodType(without_head, model)
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's, of this process
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    close(prepared(input_ids=ids, labels=ids).loss, rounded, MODEL)
    close(prepared(input_ids=ids, labels=ids, fused=True), expected, HALF)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    close(model(input_ids=ids, labels=ids).loss, expected, MODEL)
    close(model(input_ids=ids, labels=ids, fused=True), expected, MODEL)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_is_reached_through_the_wrapper_has_the_prefix(make: Callable[[], Any]) -> None:
    """Stacks and methods; what is reached through ``base_model`` is the frozen model, and so are weights."""
    model, ids = make(), tokens()
    base, stack = model.base_model, model.base_model_prefix
    if make is MODELS["infix"]:
        with pytest.raises(ValueError, match="infix_start"):
            getattr(model, stack)(ids)
        return
    expected, frozen = model(ids, output_hidden_states=True).hidden_states[-1], base.base_model(ids)[0]
    assert (expected - frozen).abs().max() > 1e-3
    for reached in (getattr(model, stack), model.get_decoder(), getattr(model, stack).forward):
        close(reached(ids)[0], expected, MODEL)
        close(base.base_model(ids)[0], frozen, MODEL)
    reached = getattr(model, stack)
    assert reached == base.base_model == getattr(model, stack)
    assert getattr(model, stack) == reached
    copied = copy.deepcopy(reached)
    assert copied != reached
    close(copied(ids)[0], expected, MODEL)
    assert isinstance(reached, type(base.base_model))
    assert [p for _, p in reached.named_parameters()] == [p for _, p in base.base_model.named_parameters()]
    assert model.get_input_embeddings() is base.get_input_embeddings()


def test_packed_positions_and_padding_are_those_of_our_forward() -> None:
    """Also where the stack is called without the model around it."""
    model, ids = prefixed(), tokens(1, 9)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), "use_cache": False}
    padded = {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])}
    for given in (packed, padded):
        expected = model(ids, output_hidden_states=True, **given).hidden_states[-1]
        close(model.model(ids, **given)[0], expected, MODEL)
        assert (model.model(ids)[0] - expected).abs().max() > 1e-3


def test_a_stack_without_a_slot_of_the_prefix_runs() -> None:
    ids = tokens()
    model = prefixed("t5", sites=("encoder",))
    hidden = model(ids, decoder_input_ids=ids).encoder_last_hidden_state
    close(model.get_encoder()(ids)[0], hidden, MODEL)
    assert (model.base_model.encoder(ids)[0] - hidden).abs().max() > 1e-3
    model = prefixed("t5", sites=("decoder",))
    close(model.encoder(ids)[0], model.base_model.encoder(ids)[0], MODEL)


# Refused --------------------------------------------------------------------------------------------------------------


def forward_by_layers(self: Any, input_ids: Tensor) -> Tensor:
    """Runs the layers itself, so that nothing tells them of the prefix."""
    stack = self.base_model
    hidden = stack.embed_tokens(input_ids)
    rotations = stack.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
    for layer in stack.layers:
        hidden = layer(hidden, position_embeddings=rotations)
    return hidden


def forward_of_the_stack(self: Any, input_ids: Tensor) -> Any:
    """Calls no module, so no hook."""
    return type(self.base_model).forward(self.base_model, input_ids)


@pytest.mark.parametrize("forward", [forward_by_layers, forward_of_the_stack], ids=lambda function: function.__name__)
def test_a_forward_that_passes_the_prefix_by_raises(forward: Callable[..., Any]) -> None:
    model = prefixed()
    model.forward = types.MethodType(forward, model)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM ran its layers without the modules that hand them the"):
        model(input_ids=tokens())
    with model.disable_prefix():
        model(input_ids=tokens())
    table = tuned("mistral")
    table.forward = types.MethodType(forward, table)
    with pytest.raises(RuntimeError, match="no virtual token entered it"):
        table(input_ids=tokens())
    model.forward = lambda **_: "nothing ran"
    assert model(input_ids=tokens()) == "nothing ran"


def own_attention(self: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    return self.o_proj(self.q_proj(hidden_states)), None


def test_attention_replaced_after_attaching_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its class, as Unsloth does; in one module; in the steps of generate alone, where others were served before."""
    model, table, ids = prefixed(), tuned("llama"), tokens()
    with monkeypatch.context() as patch:
        patch.setattr(LlamaAttention, "forward", own_attention)
        for run in (lambda: model(ids), lambda: model.model(ids), lambda: table(ids)):
            with pytest.raises(RuntimeError, match="took the prefix: its attention was replaced"):
                run()
    with monkeypatch.context() as patch:
        last = model.base_model.model.layers[2].self_attn
        patch.setattr(last, "forward", types.MethodType(own_attention, last))
        with pytest.raises(RuntimeError, match="did not hand the prefix to layers decoder 2"):
            model(ids)
    theirs = LlamaAttention.forward

    def in_steps(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        return (own_attention if hidden_states.shape[1] == 1 else theirs)(self, hidden_states=hidden_states, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaAttention, "forward", in_steps)
        with pytest.raises(RuntimeError, match="no decoder layer of LlamaModel of LlamaForCausalLM took the prefix"):
            model.generate(ids, max_new_tokens=3, pad_token_id=0, eos_token_id=None)
    assert model(ids, **{CACHE: DynamicCache(config=model.config)}).logits.isfinite().all()


def test_another_attention_function_selected_after_attaching_raises() -> None:
    model, table, ids = prefixed(), tuned("llama"), tokens()
    for wrapper in (model, table):
        wrapper.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="took the prefix: its attention was replaced"):
            wrapper(ids)
        with pytest.raises(RuntimeError, match="took the prefix: its attention was replaced"):
            wrapper.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize(
    "make", [prefixed, lambda: tuned("llama"), lambda: tuned("mistral")], ids=["kv", "table", "rows"]
)
def test_continuous_batching_is_refused(make: Callable[[], Any], name: str) -> None:
    """It runs the base model in another thread. Even where it could: after another attention function was selected.

    PrefixModel.generate_batch takes the prefix there, unless its attention was replaced.
    """
    model = make()
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"no prefix reaches it there|the attention function is 'sdpa'"):
        getattr(model, name)([[5, 6, 7]])


@pytest.mark.peft
def test_continuous_batching_of_an_accelerated_peft_model_is_refused() -> None:
    from peft import PrefixTuningConfig, get_peft_model

    from prefix_attn import accelerate

    model = get_peft_model(tiny("llama"), PrefixTuningConfig(num_virtual_tokens=P, task_type="CAUSAL_LM"))
    theirs = model.generate_batch
    undo = accelerate(model)
    for name in CONTINUOUS:
        with pytest.raises(NotImplementedError, match="no prefix reaches it there"):
            getattr(model, name)([[5, 6, 7]])
    undo()
    assert model.generate_batch == theirs
