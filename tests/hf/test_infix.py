"""mode="infix": [x ; INFIX ; y] against plain concatenation, in every way of running, and where y starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.training.evaluate import validation_loss
from prefix_attn.training.generate import generate_text
from prefix_attn.training.tokens import collate
from tests.hf.models import CACHE, VOCABULARY, tiny, tokens
from tests.hf.test_banks import QUIET, left_padded, only
from tests.hf.test_gate import open_gates
from tests.hf.test_gradients import checkpointing_changes_no_gradient, full_mask
from tests.numerics import GRADIENT, LONG, MODEL, close, close_in_norm
from tests.tokens import byte_tokenizer

P = 4
STARTS = torch.tensor([2, 5, 10])


def infixed(name: str = "llama", **options: Any) -> PrefixModel:
    return get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, mode="infix", **options)).eval()


def concatenating(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Independent of the project, row by row: keys of x, of the infix and of y, in this order, and one softmax."""
    layers, starts = kwargs["infix"]
    out = []
    for row, start in enumerate(starts):
        pk, pv = layers[module.layer_idx]
        group = query.shape[1] // pk.shape[0]
        k = torch.cat([key[row, :, :start], pk, key[row, :, start:]], dim=1).repeat_interleave(group, dim=0)
        v = torch.cat([value[row, :, :start], pv, value[row, :, start:]], dim=1).repeat_interleave(group, dim=0)
        seen = (torch.arange(query.shape[2]) >= start)[:, None].expand(-1, pk.shape[1])
        own = mask[row, 0]
        visible = torch.cat([own[:, :start], seen, own[:, start:]], dim=1)
        logits = query[row] @ k.mT * scaling
        if (softcap := kwargs.get("softcap")) is not None:
            logits = softcap * torch.tanh(logits / softcap)
        out.append(logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num() @ v)
    return torch.stack(out).transpose(1, 2).contiguous(), None


AttentionInterface.register("infix_by_hand", concatenating)
AttentionMaskInterface.register("infix_by_hand", full_mask)


def by_hand(model: PrefixModel, ids: Tensor, mask: Tensor, starts: Tensor) -> Tensor:
    base, kv = model.base_model, model.prefixes["default"]()
    given = list(zip(kv[::2], kv[1::2])), starts.tolist()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    before = base.config._attn_implementation
    base.set_attn_implementation("infix_by_hand")
    handle = base.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"infix": given}), with_kwargs=True
    )
    with model.disable_prefix():
        logits = base(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    handle.remove()
    base.set_attn_implementation(before)
    return logits


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_equals_concatenation(name: str) -> None:
    """Logits, and the gradient of every layer; rows that start apart, with left padding."""
    model = infixed(name)
    ids, mask = left_padded(3, 12)
    weight = torch.randn(3, 12, VOCABULARY) * mask[..., None]
    leaf = model.prefixes["default"].embedding
    logits = model(ids, attention_mask=mask, infix_start=STARTS).logits
    expected = by_hand(model, ids, mask, STARTS)
    close(logits[mask.bool()], expected[mask.bool()], MODEL)
    got, wanted = (torch.autograd.grad((t * weight).sum(), leaf)[0].view(P, 6, -1) for t in (logits, expected))
    close_in_norm(got, wanted, MODEL, dim=(0, 2))


def test_positions_of_padding_are_anything() -> None:
    """transformers' generate gives padding position 1: that is no packed row."""
    model, ids, mask = infixed(), *left_padded(3, 12)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    assert bool((positions.diff(dim=-1) < 0).any())
    got = model(ids, attention_mask=mask, position_ids=positions, infix_start=STARTS).logits
    expected = model(ids, attention_mask=mask, infix_start=STARTS).logits
    close(got[mask.bool()], expected[mask.bool()], MODEL)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_what_comes_before_it_is_the_frozen_model(name: str) -> None:
    """To the bit, and what predicts the first target is not: it sees the infix."""
    model, ids = infixed(name), tokens(3, 12)
    labels = torch.where(torch.arange(12) > STARTS[:, None], ids, -100)
    got = model(ids, labels=labels)
    with model.disable_prefix():
        frozen = model(ids).logits
    before = torch.arange(12) < STARTS[:, None]
    assert torch.equal(got.logits[before], frozen[before])
    assert (got.logits - frozen)[~before].abs().amax(-1).min() > 1e-3
    assert torch.equal(got.logits, model(ids, infix_start=STARTS).logits)
    first = got.logits[torch.arange(3), STARTS].square().sum()
    (grad,) = torch.autograd.grad(first, model.prefixes["default"].embedding)
    assert grad.view(P, 6, -1).abs().amax((0, 2)).min() > 0


def test_start_from_labels() -> None:
    """One column before the first target; targets in all columns, or in none; columns of a cache count."""
    model, ids = infixed(), tokens(3, 12)
    labels = torch.full_like(ids, -100)
    labels[0], labels[1, 7:9] = ids[0], ids[1, 7:9]
    expected = model(ids, infix_start=torch.tensor([0, 6, 12])).logits
    assert torch.equal(model(ids, labels=labels).logits, expected)
    with torch.no_grad():
        first = model(ids[:, :5], infix_start=torch.tensor([0, 6, 12], dtype=torch.int32), use_cache=True)
        rows = [1, 2]
        first[CACHE].batch_select_indices(torch.tensor(rows))
        second = model(ids[rows, 5:], labels=labels[rows, 5:], **{CACHE: first[CACHE]}).logits
    close(second, expected[rows, 5:], MODEL)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_generate_equals_forward(name: str) -> None:
    """The infix stands at the end of the prompt: without a cache, with a growing, a static and a sliding one."""
    model = infixed(name)
    ids, mask = left_padded(3, 9)
    out = model.generate(ids, attention_mask=mask, **QUIET)
    longer = torch.cat([mask, mask.new_ones(3, 6)], dim=1)
    with torch.no_grad():
        logits = model(out, attention_mask=longer, infix_start=torch.full((3,), 8)).logits
    assert torch.equal(logits[:, 8:-1].argmax(-1), out[:, 9:])
    for options in ({"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **QUIET), out)
    beams = model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, **QUIET)
    uncached = model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, use_cache=False, **QUIET)
    assert torch.equal(beams, uncached)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, row:], num_beams=3, num_return_sequences=2, **QUIET)
        assert torch.equal(alone, beams[2 * row : 2 * row + 2, row:])
        embeds = model.get_input_embeddings()(ids[row : row + 1, row:])
        assert torch.equal(model.generate(inputs_embeds=embeds, **QUIET)[0], out[row, 9:])
    early = model.generate(ids, attention_mask=mask, infix_start=torch.tensor([0, 1, 2]), **QUIET)
    assert not torch.equal(early, out)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_prompt_in_pieces(name: str) -> None:
    """Caches that grow and those of a fixed size, which count while a layer runs; starts in every piece."""
    model, ids, start = infixed(name), tokens(3, 12), torch.tensor([6, 2, 8])
    with torch.no_grad():
        whole = model(ids, infix_start=start).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
            pieces = [
                model(part, infix_start=start, **{CACHE: cache}).logits for part in ids.split((4, 4, 3, 1), dim=1)
            ]
            close(torch.cat(pieces, dim=1), whole, LONG)


def test_assisted_decoding() -> None:
    model, ids = infixed(), tokens(1, 9).repeat(1, 2)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **QUIET), model.generate(ids, **QUIET))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["new", "reentrant"])
def test_checkpointing_with_gates_and_frozen_tokens(use_reentrant: bool) -> None:
    model = infixed(prefix_projection=True, gate="zero", num_frozen_tokens=1)
    open_gates(model)
    ids = tokens(3, 12)
    labels = torch.where(torch.arange(12) > STARTS[:, None], ids, -100)
    checkpointing_changes_no_gradient(model, ids, labels, use_reentrant=use_reentrant)


def test_infixes_and_prefixes_share_a_batch() -> None:
    model = infixed()
    model.add_prefix("front", PrefixConfig(num_virtual_tokens=P + 2))
    model.add_prefix("long", PrefixConfig(num_virtual_tokens=P + 3, mode="infix"))
    model.eval()
    ids, mask = left_padded(4, 9)
    names, starts = ["front", "default", None, "long"], torch.tensor([6, 5, 4, 7])
    given = {"attention_mask": mask, "prefix_names": names}
    logits = model(ids, infix_start=starts, **given).logits
    out = model.generate(ids, num_beams=2, **given, **QUIET)
    for row, name in enumerate(names):
        with only(model, name):
            alone = model(ids[row : row + 1, row:], infix_start=starts[row : row + 1] - row).logits[0]
            close(logits[row, row:], alone, MODEL)
            assert torch.equal(model.generate(ids[row : row + 1, row:], num_beams=2, **QUIET)[0], out[row, row:])


def test_compiled() -> None:
    """One graph; loss and gradients as in eager execution."""
    torch._dynamo.reset()
    model = get_prefix_model(
        tiny("llama", num_hidden_layers=1), PrefixConfig(num_virtual_tokens=P, mode="infix", gate="zero")
    )
    open_gates(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    parameters, ids = list(model.prefixes.parameters()), tokens(3, 12)
    labels = torch.where(torch.arange(12) > STARTS[:, None], ids, -100)
    losses = [m(ids, labels=labels, use_cache=False).loss for m in (compiled, model)]
    torch.testing.assert_close(*losses)
    close(*(torch.autograd.grad(loss, parameters) for loss in losses), GRADIENT)


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "mlp"])
def test_files_and_folding(projection: bool, tmp_path: Path) -> None:
    model = infixed(prefix_projection=projection)
    model.save_pretrained(tmp_path, training_state=True)
    expected = model(tokens(3, 12), infix_start=STARTS).logits
    for is_trainable in (False, True):
        again = PrefixModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=is_trainable).eval()
        assert again.prefix_configs["default"].mode == "infix"
        assert torch.equal(again(tokens(3, 12), infix_start=STARTS).logits, expected)
    model.fold()
    assert torch.equal(model(tokens(3, 12), infix_start=STARTS).logits, expected)


def test_batches_of_the_package_carry_the_start() -> None:
    """Loss of a batch of targets is that of generate's logits: the two put the infix at the same place."""
    model = get_prefix_model(
        tiny("llama", vocab_size=257, max_position_embeddings=128),
        PrefixConfig(num_virtual_tokens=P, mode="infix"),
    ).eval()
    tokenizer = byte_tokenizer()
    sources = ["ab", "a longer one"]
    alone = [generate_text(model, tokenizer, [source], max_new_tokens=5)[0] for source in sources]
    assert generate_text(model, tokenizer, sources, max_new_tokens=5) == alone
    prompt, target = tokenizer("ab\n=>")["input_ids"], tokenizer(" cd")["input_ids"]
    row = {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}
    longer = {"input_ids": [5, *row["input_ids"]], "labels": [-100, *row["labels"]]}
    batch = collate([row, longer], pad_id=tokenizer.pad_token_id)
    logits = model(**batch).logits[0].log_softmax(-1)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=1, output_logits=True, return_dict_in_generate=True, do_sample=False
    )
    close(out.logits[0][0].log_softmax(-1), logits[len(prompt) - 1], MODEL)
    nll = -sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(target)) / len(target)
    close(validation_loss(model, [collate([row], 0)]), nll.item(), MODEL)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nowhere": ({}, ValueError, r"needs infix_start \(B,\), the first column of each row that sees it, or labels"),
    "one for all": ({"infix_start": 3}, ValueError, r"infix_start must be \(2,\) integers, .* got 3"),
    "rows": ({"infix_start": torch.tensor([1, 2, 3])}, ValueError, r"got torch.int64 \(3,\)"),
    "fractions": ({"infix_start": torch.tensor([1.0, 2.0])}, ValueError, "got torch.float32"),
    "packed": (
        {"labels": tokens(2, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)},
        NotImplementedError,
        "packed sequences have more than one start",
    ),
}


@pytest.mark.parametrize(("given", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(given: dict[str, Any], error: type[Exception], message: str) -> None:
    model = infixed()
    with pytest.raises(error, match=message):
        model(tokens(2, 6), **given)
    with model.disable_prefix():
        assert model(tokens(2, 6)).logits.isfinite().all()


def test_refused_configurations() -> None:
    with pytest.raises(ValueError, match="leaves the tokens where they are"):
        PrefixConfig(mode="infix", position_mode="shift")
    for name in ("bart", "bert"):
        with pytest.raises(NotImplementedError, match=r"mode='infix': .* has no sequence of input and output"):
            get_prefix_model(tiny(name), PrefixConfig(mode="infix"))
