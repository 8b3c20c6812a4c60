"""Zero gates: training starts from the frozen model, exactly; then as two softmaxes, in every way of running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from tests.hf import test_gradients
from tests.hf.models import CONFIGS, ENCODERS, VOCABULARY, tiny, tokens
from tests.hf.test_banks import QUIET, left_padded, only
from tests.hf.test_gradients import checkpointing_changes_no_gradient
from tests.numerics import LONG, MODEL, close, close_in_norm

P = 4


def gated(name: str = "llama", opened: bool = True, **options: Any) -> PrefixModel:
    """A model with gates, which are random if ``opened``."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, gate="zero", **options)).eval()
    if opened:
        open_gates(model)
    return model


def open_gates(model: PrefixModel) -> None:
    for encoder in model.prefixes.values():
        assert isinstance(encoder.gate, nn.Parameter)
        encoder.gate.data.normal_()


def two_softmaxes(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Any:
    """Independent of the project: attention to the sequence, plus gate times attention to the prefix."""
    kwargs["concatenated_prefix"], gates = kwargs["concatenated_prefix"]
    prefix_key, prefix_value = kwargs["concatenated_prefix"][module.layer_idx]
    nothing = {module.layer_idx: (prefix_key[:, :0], prefix_value[:, :0])}
    out, _ = test_gradients.concatenating_attention(
        module, query, key, value, mask, **kwargs | {"concatenated_prefix": nothing}
    )
    alone, _ = test_gradients.concatenating_attention(
        module, query, key[:, :, :0], value[:, :, :0], mask[..., :0], **kwargs | {"s_aux": None}
    )
    return out + gates[module.layer_idx][:, None] * alone, None


AttentionInterface.register("two_softmaxes", two_softmaxes)
AttentionMaskInterface.register("two_softmaxes", test_gradients.full_mask)


@pytest.mark.parametrize("name", [*CONFIGS, "bart", "t5", *ENCODERS])
def test_starts_from_the_frozen_model_exactly(name: str) -> None:
    """To the bit, whatever the prefix is, with gates of either sign of zero."""
    model = gated(name, opened=False)
    model.prefixes["default"].embedding.data.normal_().mul_(3)
    given = {"input_ids": tokens(2, 9)}
    if name in ("bart", "t5"):
        given["decoder_input_ids"] = tokens(2, 5)
    for sign in (1, -1):
        model.prefixes["default"].gate.data.mul_(sign)
        with torch.no_grad(), model.disable_prefix():
            frozen = model(**given).logits
        assert torch.equal(model(**given).logits, frozen)
    open_gates(model)
    assert (model(**given).logits - frozen).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_starts_from_the_frozen_model_in_half_precision_and_with_padding(name: str) -> None:
    """On the right. On the left transformers counts padding as positions in a bare forward, and we do not."""
    model = get_prefix_model(tiny(name).bfloat16(), PrefixConfig(num_virtual_tokens=P, gate="zero")).eval()
    mask = (torch.arange(9) < torch.tensor([[9], [6]])).long()
    with model.disable_prefix():
        frozen = model(tokens(2, 9), attention_mask=mask).logits
    assert model.prefixes["default"].gate.dtype == torch.float32
    assert torch.equal(model(tokens(2, 9), attention_mask=mask).logits[mask.bool()], frozen[mask.bool()])


def test_gradient_flows_to_the_gate_and_then_to_the_prefix() -> None:
    model = gated(opened=False).train()
    encoder = model.prefixes["default"]
    optimizer = torch.optim.AdamW(model.prefixes.parameters(), lr=1e-2, weight_decay=0.0)
    start, losses = encoder.embedding.detach().clone(), []
    for step in range(10):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        per_slot = encoder.embedding.grad.view(P, 6, -1).abs().amax((0, 2))
        assert (per_slot.max() == 0) if step == 0 else (per_slot.min() > 0)
        assert encoder.gate.grad.abs().min() > 0
        optimizer.step()
        if step == 0:
            assert torch.equal(encoder.embedding, start)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "gpt_oss"])
def test_every_layer_against_two_softmaxes(name: str) -> None:
    """Logits, and gradients of prefix and gates; grouped heads, a window, a softcap, sinks."""
    model, ids = gated(name), tokens(3, 11)
    base, encoder = model.base_model, model.prefixes["default"]
    weight, leaves = torch.randn(3, 11, VOCABULARY), [encoder.embedding, encoder.gate]
    logits = model(ids).logits
    grads = torch.autograd.grad((logits * weight).sum(), leaves)
    base.set_attn_implementation("two_softmaxes")
    kv = encoder()
    given = list(zip(kv[::2], kv[1::2])), encoder.gate
    handle = base.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"concatenated_prefix": given}), with_kwargs=True
    )
    with model.disable_prefix():
        expected = base(ids, use_cache=False).logits
    handle.remove()
    close(logits, expected, MODEL)
    for got, wanted in zip(grads, torch.autograd.grad((expected * weight).sum(), leaves)):
        close_in_norm(got, wanted, MODEL)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("projection", [False, True], ids=["flat", "mlp"])
def test_checkpointing_changes_no_gradient(projection: bool, use_reentrant: bool) -> None:
    model = gated(prefix_projection=projection)
    checkpointing_changes_no_gradient(model, tokens(), tokens(), use_reentrant=use_reentrant)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_in_every_way_of_caching(name: str) -> None:
    model = gated(name)
    ids, mask = left_padded(3, 9)
    out = model.generate(ids, attention_mask=mask, **QUIET)
    for options in ({"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **QUIET), out)
    with torch.no_grad():
        logits = model(out, attention_mask=(torch.cat([mask, mask.new_ones(3, 6)], dim=1))).logits
    assert torch.equal(logits[:, 8:-1].argmax(-1), out[:, 9:])
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **QUIET)
    for row in range(3):
        assert torch.equal(model.generate(ids[row : row + 1, row:], num_beams=3, **QUIET)[0], beams[row, row:])


@pytest.mark.parametrize("form", ["flat", "mlp", "embedding"])
def test_files_and_folding(form: str, tmp_path: Path) -> None:
    """Gates are saved and folding leaves them; with the training state all goes on. PEFT refuses the files."""
    options: dict[str, dict[str, Any]] = {
        "flat": {"num_frozen_tokens": 1},
        "mlp": {"prefix_projection": True, "num_frozen_tokens": 1, "encoder_hidden_size": 8},
        "embedding": {"mode": "embedding"},
    }
    model = gated(**options[form])
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path, training_state=True)
    for is_trainable in (False, True):
        again = PrefixModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=is_trainable).eval()
        assert again.prefix_configs["default"].gate == "zero"
        assert again.prefixes["default"].gate.requires_grad == is_trainable
        assert torch.equal(again(tokens()).logits, expected)
    assert again.prefixes["default"].state_dict().keys() == model.prefixes["default"].state_dict().keys()
    model.fold()
    assert torch.equal(model(tokens()).logits, expected)
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)


def test_files_of_a_model_in_half_precision(tmp_path: Path) -> None:
    """Files are float32, whatever the prefix was cast to."""
    model = gated(prefix_projection=True).bfloat16()
    model.save_pretrained(tmp_path, training_state=True)
    for is_trainable in (False, True):
        again = PrefixModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=is_trainable)
        assert torch.equal(again.prefixes["default"].gate, model.prefixes["default"].gate.float())
        assert again.prefix_configs["default"].prefix_projection == is_trainable


def test_a_training_state_with_other_gates_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After the first step, the prefix is still the one before it: gates tell the two apart."""
    model = gated(prefix_projection=True)
    model.save_pretrained(tmp_path, training_state=True)
    state = (tmp_path / "training_state.safetensors").read_bytes()
    open_gates(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "training_state.safetensors").write_bytes(state)
    again = PrefixModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True).eval()
    assert "another prefix" in caplog.text
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_gated_prefixes_share_a_batch() -> None:
    """Each row has the gates of its own prefix, or no prefix; beams too. Others would need another softmax."""
    model = gated()
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=P + 3, gate="zero"))
    open_gates(model)
    ids, mask = left_padded(4, 9)
    names = ["other", "default", None, "other"]
    weight = torch.randn(4, 9, VOCABULARY) * mask[..., None]
    logits = model(ids, attention_mask=mask, prefix_names=names).logits
    grads = torch.autograd.grad((logits * weight).sum(), list(model.prefixes.parameters()))
    out = model.generate(ids, attention_mask=mask, prefix_names=names, num_beams=2, **QUIET)
    alone = []
    for row, name in enumerate(names):
        with only(model, name):
            alone.append((model(ids[row : row + 1, row:]).logits[0] * weight[row, row:]).sum())
            close(logits[row, row:], model(ids[row : row + 1, row:]).logits[0], MODEL)
            assert torch.equal(model.generate(ids[row : row + 1, row:], num_beams=2, **QUIET)[0], out[row, row:])
    for got, wanted in zip(grads, torch.autograd.grad(sum(alone), list(model.prefixes.parameters()))):
        close(got, wanted, LONG)
    model.add_prefix("plain", PrefixConfig(num_virtual_tokens=P))
    with pytest.raises(ValueError, match=r"one gate, got {'other': 'zero', 'plain': None}"):
        model(ids, prefix_names=["other", "plain", None, None])


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"gate": "tanh"}, r"gate must be one of \(None, 'zero'\), got 'tanh'"),
    "moved": ({"gate": "zero", "position_mode": "shift"}, "position_mode='none'"),
}


@pytest.mark.parametrize(("fields", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixConfig(**fields)
