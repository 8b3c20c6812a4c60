"""Gradients of every layer's prefix through a whole model, against plain concatenation; checkpointing; frozen bases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from tests.hf.models import CONFIGS, tiny, tokens
from tests.numerics import GRADIENT, MODEL, close, close_in_norm

P = 4


def concatenating_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    concatenated_prefix: list[tuple[Tensor, Tensor]],
    **_: Any,
) -> tuple[Tensor, None]:
    """Independent of the project: repeat heads, concatenate the expanded prefix, mask, softmax."""
    B, Hq, S, _ = query.shape
    pk, pv = concatenated_prefix[module.layer_idx]
    key = torch.cat([pk.expand(B, -1, -1, -1), key], dim=2).repeat_interleave(Hq // key.shape[1], dim=1)
    value = torch.cat([pv.expand(B, -1, -1, -1), value], dim=2).repeat_interleave(Hq // value.shape[1], dim=1)
    logits = query @ key.mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    visible = torch.cat(
        [torch.ones(B, 1, S, pk.shape[1], dtype=torch.bool), attention_mask.expand(B, 1, S, -1)], dim=-1
    )
    logits = logits.masked_fill(~visible, -torch.inf)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux[:, None, None].expand(B, -1, S, 1)], dim=-1)
    weights = logits.softmax(-1)
    weights = weights if s_aux is None else weights[..., :-1]
    return (weights @ value).transpose(1, 2).contiguous(), None


def full_mask(**arguments: Any) -> Tensor:
    mask = sdpa_mask(**arguments | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    assert mask is not None
    return mask


AttentionInterface.register("concatenating", concatenating_attention)
AttentionMaskInterface.register("concatenating", full_mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_against_concatenation(name: str) -> None:
    """Detaching q, k or v anywhere would leave the last layer right and all others wrong."""
    base, ids = tiny(name), tokens(3, 11)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    weight = torch.randn(3, 11, base.config.vocab_size) * mask[..., None]
    leaf = model.prefixes["default"].embedding
    logits = model(ids, attention_mask=mask).logits
    (grad,) = torch.autograd.grad((logits * weight).sum(), leaf)

    base.set_attn_implementation("concatenating")
    kv = model.prefixes["default"]()
    layers = list(zip(kv[::2], kv[1::2]))
    positions = torch.arange(11)[None] + P
    handle = base.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"concatenated_prefix": layers}), with_kwargs=True
    )
    with model.disable_prefix():
        expected = base(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    handle.remove()
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), leaf)

    real = mask.bool()
    close(logits[real], expected[real], MODEL)
    per_layer = (P, 2 * base.config.num_hidden_layers, -1)
    for layer, (got, wanted) in enumerate(zip(grad.view(per_layer).unbind(1), expected_grad.view(per_layer).unbind(1))):
        close_in_norm(got, wanted, MODEL, name=f"layer {layer // 2}, {'value' if layer % 2 else 'key'}")


def checkpointing_changes_no_gradient(model: PrefixModel, ids: Tensor, labels: Tensor, *, use_reentrant: bool) -> None:
    """The same gradients with checkpointing as without, twice in a row, and every parameter has one."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def grads() -> list[Tensor]:
        model.train().zero_grad()
        model(ids, labels=labels, use_cache=False).loss.backward()
        return [p.grad.clone() for p in parameters]

    expected = grads()
    set_checkpointing(model, use_reentrant=use_reentrant)
    for _ in range(2):
        for got, wanted in zip(grads(), expected):
            assert wanted.abs().max() > 0
            close(got, wanted, GRADIENT)


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "mlp"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma2"])
def test_gradient_checkpointing_changes_no_gradient(name: str, use_reentrant: bool, projection: bool) -> None:
    """Layer 0 included, and twice: reentrant checkpointing once went through the MLP's graph more than once."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, prefix_projection=projection))
    checkpointing_changes_no_gradient(model, tokens(), tokens(), use_reentrant=use_reentrant)


def test_two_forwards_before_one_backward_under_checkpointing() -> None:
    """Each forward's recomputation must see the prefix that it started with, although another is active by then."""
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P))
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=P + 3))
    first, second = (model.prefixes[n].embedding for n in ("default", "other"))
    ids = tokens()

    def grads() -> tuple[Tensor, ...]:
        losses = []
        for name in ("default", "other"):
            model.set_prefix(name)
            losses.append(model(ids, labels=ids, use_cache=False).loss)
        return torch.autograd.grad(sum(losses), [first, second])

    model.train()
    expected = grads()
    set_checkpointing(model, use_reentrant=False)
    torch.testing.assert_close(grads(), expected)


def test_training_moves_the_prefix_alone() -> None:
    base = tiny("llama")
    before = {n: p.clone() for n, p in base.state_dict().items()}
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P)).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert [p.shape for p in trainable] == [(P, 2 * 3 * 2 * 8)]
    start = trainable[0].detach().clone()
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert (trainable[0] - start).abs().max() > 1e-3
    assert all(torch.equal(p, before[n]) for n, p in base.state_dict().items())
    assert all(p.grad is None for p in base.parameters())


def test_prefix_is_visible_past_a_sliding_window() -> None:
    """In the KV cache a prefix scrolls out of the window, and its gradient becomes an exact 0."""
    model = get_prefix_model(tiny("mistral"), PrefixConfig(num_virtual_tokens=P))
    logits = model(tokens(1, 40)).logits
    (grad,) = torch.autograd.grad(logits[0, -1].square().sum(), model.prefixes["default"].embedding)
    assert grad.view(P, 6, -1).abs().amax(-1).min() > 1e-6


def test_packed_sequences_do_not_leak() -> None:
    """Two sequences in one row, told apart by positions that start again, equal two rows."""
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P)).eval()
    a, b = tokens(1, 5), tokens(1, 7)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(torch.cat([a, b], dim=1), position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(a).logits, model(b).logits], dim=1)
    close(packed, apart, MODEL)


def test_compile_fullgraph_forward_and_backward() -> None:
    """A prefixed tiny Llama, dynamic shapes, one graph; gradients equal those of eager execution."""
    torch._dynamo.reset()
    config = PrefixConfig(num_virtual_tokens=P, prefix_projection=True)
    model = get_prefix_model(tiny("llama", num_hidden_layers=2), config).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch, length in ((3, 9), (5, 13)):
        ids = tokens(batch, length)
        losses = [m(ids, labels=ids, use_cache=False).loss for m in (compiled, model)]
        torch.testing.assert_close(*losses)
        close(*(torch.autograd.grad(loss, parameters) for loss in losses), GRADIENT)


def test_compiled_for_training_then_for_evaluation() -> None:
    """A model that never ran before it was compiled is compiled once for each."""
    torch._dynamo.reset()
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P)).train()
    compiled = torch.compile(model, backend="eager")
    compiled(input_ids=tokens(), labels=tokens()).loss.backward()
    compiled.eval()
    close(compiled(input_ids=tokens()).logits, model(tokens()).logits, MODEL)
