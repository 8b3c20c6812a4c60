"""Frozen tokens of a prefix: no gradient, no optimizer state, no dropout; PEFT's CARTRIDGE both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PeftModel, get_peft_model
from torch import Tensor

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from tests.hf.models import tiny, tokens
from tests.numerics import GRADIENT, MODEL, close

P, F, WIDTH = 5, 2, 2 * 3 * 2 * 8
FORMS: dict[str, dict[str, Any]] = {"flat": {}, "mlp": {"prefix_projection": True, "encoder_hidden_size": 8}}


def prefixed(name: str = "llama", **options: Any) -> PrefixModel:
    return get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, num_frozen_tokens=F, **options))


def frozen_rows(model: PrefixModel) -> Tensor:
    return model.prefixes["default"].prompt_embeddings().detach()[:F].clone()


@pytest.mark.parametrize("form", FORMS)
def test_frozen_tokens_stay_as_they_are(form: str) -> None:
    """Steps of AdamW, with weight decay, move the other tokens alone, and keep no state for them."""
    model = prefixed(**FORMS[form]).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    before, rest = frozen_rows(model), model.prefixes["default"].prompt_embeddings().detach()[F:].clone()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(frozen_rows(model), before)
    assert (model.prefixes["default"].prompt_embeddings()[F:] - rest).abs().amax(1).min() > 1e-3
    state = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim())
    assert state == 2 * model.get_nb_trainable_parameters()[0]
    if form == "flat":
        assert model.get_nb_trainable_parameters()[0] == (P - F) * WIDTH


@pytest.mark.parametrize("form", FORMS)
def test_start_and_gradient_are_those_of_a_prefix_without_frozen_tokens(form: str) -> None:
    ids = tokens()
    torch.manual_seed(0)
    model = prefixed(init="text", init_token_ids=tokens(1, P)[0].tolist(), **FORMS[form]).eval()
    plain = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P)).eval()
    plain.prefixes["default"].embedding.data = model.prefixes["default"].prompt_embeddings().detach()
    grads = [
        torch.autograd.grad(m(ids).logits.square().sum(), m.prefixes["default"].embedding)[0] for m in (model, plain)
    ]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    if form == "flat":
        assert torch.equal(grads[0], grads[1][F:])


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_distributed_data_parallel_has_no_buffer_to_send(name: str) -> None:
    """It sends those that it does not ignore in every forward. What is frozen is no buffer, and is never trained."""
    model = prefixed(name)
    assert [name for name, _ in model.named_buffers() if name not in model._ddp_params_and_buffers_to_ignore] == []
    encoder = model.prefixes["default"].requires_grad_(True)
    assert {name: p.requires_grad for name, p in encoder.named_parameters()} == {"embedding": True, "frozen": False}
    encoder.frozen.requires_grad_(True)  # as a loop over all parameters would
    model(tokens(), labels=tokens()).loss.backward()
    assert encoder.frozen.grad is None
    assert encoder.embedding.grad is not None


def test_a_state_of_a_buffer_loads() -> None:
    """As frozen tokens were, under the same name."""
    model, other = prefixed(), prefixed(**FORMS["mlp"])
    for one in (model, other):
        state = {name: tensor + 1 for name, tensor in one.state_dict().items()}
        one.load_state_dict(state)
        assert torch.equal(one.prefixes["default"].frozen, state["prefixes.default.frozen"])


def test_dropout_is_for_trained_tokens() -> None:
    encoder = prefixed(dropout=0.5).train().prefixes["default"]
    kv = encoder()
    assert torch.equal(kv[:, :, :F], encoder.eval()()[:, :, :F])
    assert (kv[:, :, F:] == 0).float().mean() > 0.2


def test_all_frozen_is_a_hard_prompt() -> None:
    prompt, ids = tokens(1, P)[0], tokens()
    config = PrefixConfig(
        num_virtual_tokens=P, num_frozen_tokens=P, init="text", init_token_ids=prompt.tolist(), task_type="CAUSAL_LM"
    )
    base = tiny("llama")
    expected = base(torch.cat([prompt.expand(2, -1), ids], dim=1)).logits[:, P:]
    model = get_prefix_model(base, config)
    assert model.get_nb_trainable_parameters()[0] == 0
    loss = model(ids, labels=ids)
    loss.loss.backward()
    close(loss.logits, expected, MODEL)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_trainable", [False, True])
def test_files(form: str, is_trainable: bool, tmp_path: Path) -> None:
    """What is frozen is frozen again, in the folded prefix and in the training state."""
    model = prefixed(**FORMS[form]).eval()
    model.save_pretrained(tmp_path, training_state=True)
    again = PrefixModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=is_trainable).eval()
    encoder = again.prefixes["default"]
    assert (encoder.num_virtual_tokens, encoder.num_frozen_tokens) == (P, F)
    assert encoder.state_dict().keys() == (
        model.prefixes["default"].state_dict().keys() if is_trainable else {"embedding", "frozen"}
    )
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    again.fold()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert again.prefixes["default"].embedding.shape == (P - F, WIDTH)


@pytest.mark.peft
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_loads_a_cartridge_of_ours(name: str, tmp_path: Path) -> None:
    ours = prefixed(name, prefix_projection=True, encoder_hidden_size=8).eval()
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["num_frozen_tokens"]) == ("CARTRIDGE", F)
    peft = PeftModel.from_pretrained(tiny(name), tmp_path).eval()
    assert torch.equal(peft.prompt_encoder["default"].frozen_embedding, frozen_rows(ours))
    close(peft(input_ids=tokens()).logits, ours(tokens()).logits, MODEL)


@pytest.mark.peft
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cartridge_of_peft_loads(name: str, tmp_path: Path) -> None:
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_frozen_tokens=F)
    peft = get_peft_model(tiny(name), config).eval()
    peft.save_pretrained(tmp_path)
    ours = PrefixModel.from_pretrained(tiny(name), tmp_path, is_trainable=True).eval()
    assert torch.equal(frozen_rows(ours), peft.prompt_encoder["default"].frozen_embedding)
    close(ours(tokens()).logits, peft(input_ids=tokens()).logits, MODEL)
    ours(tokens(), labels=tokens()).loss.backward()
    peft(input_ids=tokens(), labels=tokens()).loss.backward()
    theirs = peft.prompt_encoder["default"].trainable_embedding.grad
    close(ours.prefixes["default"].embedding.grad, theirs, GRADIENT)


def test_frozen_and_other_prefixes_share_a_batch() -> None:
    model = prefixed().eval()
    model.add_prefix("plain", PrefixConfig(num_virtual_tokens=3))
    ids, names = tokens(2, 9), ["default", "plain"]
    together = model(ids, prefix_names=names).logits
    for row, name in enumerate(names):
        model.set_prefix(name)
        close(together[row], model(ids[row : row + 1]).logits[0], MODEL)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative": ({"num_frozen_tokens": -1}, ValueError, r"num_frozen_tokens must lie in 0..5 of 5, got -1"),
    "too many": ({"num_frozen_tokens": 6}, ValueError, "must lie in 0..5 of 5, got 6"),
    "no number": ({"num_frozen_tokens": True}, ValueError, "got True"),
    "nothing for the MLP": (
        {"num_frozen_tokens": 5, "prefix_projection": True},
        ValueError,
        "must lie in 0..4 of 5, of which an MLP must make one, got 5",
    ),
    "embeddings": ({"num_frozen_tokens": 1, "mode": "embedding"}, NotImplementedError, "trains all its tokens"),
}


@pytest.mark.parametrize(("fields", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrefixConfig(num_virtual_tokens=P, **fields)
