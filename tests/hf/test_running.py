"""Ways of running a model with a prefix that its users take next: caches, compilation, packing, devices, weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DataCollatorWithFlattening,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, get_prefix_model
from prefix_attn.hf.attach.attention import AttentionCall, PrefixState
from prefix_attn.hf.attach.banks import BatchRows
from tests.hf import test_gradients
from tests.hf.models import CACHE, CONFIGS, ENCODER_DECODERS, tiny, tokens
from tests.numerics import GRADIENT, HALF, MODEL, close, close_in_norm

P = 4
QUIET = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}


def prefixed(name: str, **changes: Any) -> PrefixModel:
    return get_prefix_model(tiny(name, **changes), PrefixConfig(num_virtual_tokens=P)).eval()


# Attention weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "gemma2", "gpt_oss"])
def test_attentions_are_those_of_the_hard_prompt(name: str) -> None:
    """A prefix that is a text: the weights over [prefix ; sequence] are the bare model's over [text ; sequence]."""
    wide = {"sliding_window": 64} if "sliding_window" in CONFIGS[name] else {}
    prompt, ids = tokens(1, P)[0], tokens(2, 9)
    plain = tiny(name, attn_implementation="eager", **wide)
    expected = plain(torch.cat([prompt.expand(2, -1), ids], dim=1), output_attentions=True).attentions
    frozen = plain(ids, output_attentions=True).attentions
    config = PrefixConfig(num_virtual_tokens=P, init="text", init_token_ids=prompt.tolist())
    model = get_prefix_model(tiny(name, **wide), config).eval()
    got = model(ids, output_attentions=True).attentions
    close(got, tuple(weights[:, :, P:] for weights in expected), MODEL)
    with model.disable_prefix():
        close(model(ids, output_attentions=True).attentions, frozen, MODEL)
    assert model(ids).get("attentions") is None


def test_attentions_of_generate_and_of_more_keys_than_a_head_holds() -> None:
    model, ids = prefixed("llama", max_position_embeddings=512), tokens(2, 270)
    out = model.generate(ids, output_attentions=True, return_dict_in_generate=True, **QUIET)
    assert [step[2].shape for step in out.attentions] == [(2, 4, 270, P + 270)] + [
        (2, 4, 1, P + 270 + n) for n in range(1, 6)
    ]
    for step in out.attentions:
        close(step[0].sum(-1), torch.ones(step[0].shape[:3]), MODEL)
    assert (out.attentions[0][0][:, :, 0, P + 1 :] == 0).all()


@pytest.mark.parametrize("mode", ["none", "shift"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_attentions_of_every_site(name: str, mode: str) -> None:
    """The weights are those that the outputs were made with: applied to the values they give the same."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, position_mode=mode)).eval()
    out = model(input_ids=tokens(2, 7), decoder_input_ids=tokens(2, 5), output_attentions=True)
    shapes = {"encoder_attentions": (7, P + 7), "cross_attentions": (5, P + 7), "decoder_attentions": (5, P + 5)}
    for site, shape in shapes.items():
        for weights in out[site]:
            assert weights.shape == (2, 4, *shape)
            close(weights.sum(-1), torch.ones(2, 4, shape[0]), MODEL)
    assert out.encoder_attentions[0][..., :P].std() > 1e-3


# Caches ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_conversation_with_the_caller_s_cache(name: str) -> None:
    """Three turns, the first of them padded on the left: each is what the whole conversation at once gives."""
    model, ids = prefixed(name), tokens(2, 9)
    ids[0, :3] = 0
    mask = (ids != 0).long()
    cache = DynamicCache(config=model.base_model.config)
    for length in (3, 5, 1):
        made = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **QUIET)
        assert torch.equal(made, model.generate(ids, attention_mask=mask, **QUIET))
        ids = torch.cat([made, tokens(2, length)], dim=1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.int64)], dim=1)
    assert cache.get_seq_length() == ids.shape[1] - 2  # text alone, without what was never run


def test_token_by_token() -> None:
    model, ids, cache, logits = prefixed("llama"), tokens(2, 6), None, []
    for i in range(6):
        out = model(ids[:, i : i + 1], use_cache=True, **({} if cache is None else {CACHE: cache}))
        cache = out[CACHE]
        logits.append(out.logits)
    close(torch.cat(logits, dim=1), model(ids).logits, MODEL)


def test_static_cache_of_the_caller() -> None:
    model = prefixed("llama")
    cache = StaticCache(config=model.base_model.config, max_cache_len=32)
    made = model.generate(tokens(2, 9), **{CACHE: cache}, disable_compile=True, **QUIET)
    assert torch.equal(made, model.generate(tokens(2, 9), **QUIET))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_static_cache_compiled(name: str) -> None:
    """The steps after the first are one graph, whatever the length, with and without padding."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = prefixed(name), tokens(2, 9)
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True  # transformers compiles on GPUs alone, unless told
    static = {"cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(model.generate(ids, **static, **QUIET), model.generate(ids, **QUIET))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_chunks_of_a_prompt(name: str) -> None:
    model = prefixed(name)
    made = model.generate(tokens(2, 9), prefill_chunk_size=4, **QUIET)
    assert torch.equal(made, model.generate(tokens(2, 9), **QUIET))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("assistant", ["the model itself", "another model", "the prompt"])
def test_assisted_decoding(name: str, assistant: str) -> None:
    """Several tokens at a time are checked against the cache, and those that were wrong are taken back."""
    model, ids = prefixed(name), tokens(1, 9).repeat(1, 2)
    helper: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if assistant != "the prompt":
        helper = {"assistant_model": model if assistant == "the model itself" else tiny(name, seed=1)}
    assert torch.equal(model.generate(ids, **helper, **QUIET), model.generate(ids, **QUIET))


# Packing and padding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_flattened_batches_do_not_leak(name: str, training: bool) -> None:
    """With ``use_cache`` left at its default, where the bare model takes all for one sequence."""
    model = prefixed(name).train(training)
    leaf, parts = model.prefixes["default"].embedding, [tokens(1, 5)[0], tokens(1, 7)[0]]
    packed = DataCollatorWithFlattening()([{"input_ids": part.tolist()} for part in parts])
    logits = model(**packed).logits
    apart = torch.cat([model(part[None]).logits for part in parts], dim=1)
    close(logits, apart, MODEL)
    weight = torch.randn_like(logits)
    grads = [torch.autograd.grad((out * weight).sum(), leaf)[0] for out in (logits, apart)]
    close_in_norm(*grads, MODEL)
    with pytest.raises(ValueError, match=r"packed sequences .* need use_cache=False, got True"):
        model(packed["input_ids"], position_ids=packed["position_ids"], use_cache=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mistral", "gemma3_text", "gpt_oss"])
def test_training_on_padded_rows(name: str, side: str) -> None:
    """Loss and gradient of the prefix are those of the rows without padding."""
    model, ids = prefixed(name).train(), tokens(2, 9)
    leaf, padding = model.prefixes["default"].embedding, torch.zeros(2, 3, dtype=torch.int64)
    padded = torch.cat([padding, ids] if side == "left" else [ids, padding], dim=1)
    mask = (padded != 0).long()
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 3 if side == "left" else 0] = -100  # alone, a row's first token is predicted by nothing
    losses = [model(padded, attention_mask=mask, labels=labels).loss, model(ids, labels=ids).loss]
    torch.testing.assert_close(*losses)
    close(*(torch.autograd.grad(loss, leaf)[0] for loss in losses), GRADIENT)


# Weights and devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_models_of_half_precision(name: str, dtype: torch.dtype) -> None:
    """A float32 prefix trains under them; ``model.to(dtype)`` afterwards takes the prefix along."""
    given = {"input_ids": tokens(), "labels": tokens()}
    exact = prefixed(name)
    model = get_prefix_model(tiny(name).to(dtype), PrefixConfig(num_virtual_tokens=P)).eval()
    model.prefixes.load_state_dict(exact.prefixes.state_dict())
    grads = []
    for one in (exact, model):
        one(**given).loss.backward()
        grads.append(one.prefixes["default"].embedding.grad)
    assert grads[1].dtype == torch.float32
    assert torch.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0) > 0.97
    with torch.no_grad():
        logits = model(**given).logits
        moved = exact.half() if dtype == torch.float16 else exact.to(dtype)
        assert moved.prefixes["default"].embedding.dtype == moved(**given).logits.dtype == dtype
        close_in_norm(moved(**given).logits, logits, HALF)


OFFLOADED: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "to the CPU": lambda model, _: cpu_offload(model, execution_device=torch.device("cpu")),
    "to the disk": lambda model, folder: disk_offload(model, str(folder), execution_device=torch.device("cpu")),
}


@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device")
@pytest.mark.parametrize("where", OFFLOADED)
@pytest.mark.parametrize("name", ["llama", "bart", "t5"])
def test_offloaded_models(name: str, where: str, tmp_path: Path) -> None:
    """Their weights are on no device until a module runs."""
    expected, given = prefixed(name), {"input_ids": tokens(), "labels": tokens()}
    base = OFFLOADED[where](tiny(name), tmp_path)
    assert base.get_input_embeddings().weight.device.type == "meta"
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P)).eval()
    model.prefixes.load_state_dict(expected.prefixes.state_dict())
    losses = [one(**given).loss for one in (model, expected)]
    torch.testing.assert_close(*losses)
    grads = [
        torch.autograd.grad(loss, one.prefixes["default"].embedding)[0] for loss, one in zip(losses, (model, expected))
    ]
    torch.testing.assert_close(*grads)
    options = {n: v for n, v in QUIET.items() if n != "eos_token_id"} | {"suppress_tokens": [0, 1]}
    assert torch.equal(model.generate(tokens(), **options), expected.generate(tokens(), **options))
    if name not in ENCODER_DECODERS:
        tuned = PrefixTuning(base, P, 32)
        assert torch.autograd.grad(tuned(**given).loss, tuned.prefix)[0].abs().max() > 0


def test_device_map(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    places = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=str(tmp_path / "disk"))
    model, expected = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P)).eval(), prefixed("llama")
    model.prefixes.load_state_dict(expected.prefixes.state_dict())
    torch.testing.assert_close(model(tokens()).logits, expected(tokens()).logits)


@pytest.mark.parametrize("beside", ["cpu", "meta"])
@pytest.mark.parametrize("bank", [False, True], ids=["one", "bank"])
def test_layers_on_another_device(bank: bool, beside: str) -> None:
    """The prefix, kept where the embeddings are, goes where its layer is; where an infix starts, from the caller's."""
    module, kv, gates = nn.Module(), torch.randn(2, 2, 2, P, 8), torch.ones(2, 1, 4)
    rows = BatchRows(torch.tensor([1, -1]), 0, torch.tensor([P, P])) if bank else None
    kv, gates = (t.to(beside) for t in ((kv, gates) if bank else (kv[0], gates[0])))
    starts = torch.tensor([3, 4])
    state = PrefixState(kv, {module: 0}, shifts={}, backend="auto", rows=rows, gates=gates, starts=starts)
    there = torch.empty(2, 4, 9, 8, device="meta")
    prefix = state.take(AttentionCall(module, there, there[:, :2], there[:, :2], None))
    assert {t.device.type for t in prefix if t is not None} == {"meta"}
    assert sum(t is not None for t in prefix) == (6 if bank else 4)


class Int8Linear(nn.Module):
    """Weights as torchao and bitsandbytes keep them: integers, and a scale for each output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale, self.bias = nn.Buffer(scale), linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight * self.scale, self.bias)


def test_quantised_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer against concatenation; docs/models.md has what was tried with libraries of quantisation."""

    def quantised(name: str) -> PreTrainedModel:
        base = tiny(name)
        for path, module in list(base.named_modules()):
            if isinstance(module, nn.Linear) and "layers" in path:
                base.set_submodule(path, Int8Linear(module))
        return base

    monkeypatch.setattr(test_gradients, "tiny", quantised)
    test_gradients.test_every_layer_against_concatenation("llama")
