"""PrefixModel: initialisation, positions, generation in every way of caching, several prefixes, Trainer, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from tests.hf.models import CONFIGS, spread, tiny, tokens
from tests.numerics import LONG, MODEL, close

P = 4
QUIET = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_caches_change_nothing(name: str) -> None:
    """Left and right padding, the growing cache, the static one and none: the same logits and the same tokens."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P)).eval()
    ids = tokens(2, 9)
    left = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
    right = torch.cat([ids, torch.zeros(2, 3, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        logits = model(ids).logits
        for padded, place in ((left, slice(3, None)), (right, slice(0, 9))):
            got = model(padded, attention_mask=(padded != 0).long()).logits[:, place]
            close(got, logits, MODEL)
    out = model.generate(ids, max_new_tokens=6, **QUIET)
    with torch.no_grad():
        assert torch.equal(model(out).logits[:, 8:-1].argmax(-1), out[:, 9:])  # all at once, without any cache
    assert torch.equal(model.generate(left, attention_mask=(left != 0).long(), max_new_tokens=6, **QUIET)[:, 3:], out)
    assert torch.equal(model.generate(ids, max_new_tokens=6, use_cache=False, **QUIET), out)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(ids, max_new_tokens=6, **static, **QUIET), out)


@pytest.mark.parametrize("name", CONFIGS)
def test_disabled_prefix_is_the_frozen_model(name: str) -> None:
    """Gemma 2's default attention leaves out its softcap: the plain model is the eager one."""
    plain = tiny(name, attn_implementation="eager") if name == "gemma2" else tiny(name)
    expected = plain(tokens()).logits
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P)).eval()
    with model.disable_prefix():
        got = model(tokens()).logits
    close(got, expected, MODEL)
    assert (model(tokens()).logits - expected).abs().max() > 0.1


def test_sampling_and_return_sequences() -> None:
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P)).eval()
    ids = tokens(2, 5)
    options = {
        "max_new_tokens": 6,
        "pad_token_id": 0,
        "eos_token_id": None,
        "do_sample": True,
        "num_return_sequences": 3,
    }
    outs = []
    for _ in range(2):
        torch.manual_seed(7)
        outs.append(model.generate(ids, **options))
    assert outs[0].shape == (6, 11)
    assert torch.equal(*outs)
    assert not torch.equal(outs[0][0], outs[0][1])


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "mlp"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama", "qwen3", "gemma3_text"])
def test_text_init_is_the_hard_prompt(name: str, projection: bool) -> None:
    """A prefix made from a text equals that text in the context, to 1e-5; the MLP is fitted to it exactly."""
    base = tiny(name, **({"sliding_window": 64} if name == "gemma3_text" else {}))
    prompt, ids = tokens(1, P)[0], tokens(2, 9)
    with torch.no_grad():
        expected = base(torch.cat([prompt.expand(2, -1), ids], dim=1)).logits[:, P:]
        config = PrefixConfig(
            num_virtual_tokens=P, init="text", init_token_ids=prompt.tolist(), prefix_projection=projection
        )
        got = get_prefix_model(base, config).eval()(ids).logits
    if projection:
        close(got, expected, MODEL)
    else:
        torch.testing.assert_close(got, expected)


def test_text_shorter_and_longer_than_the_prefix() -> None:
    """Repeated, or cut."""
    prompt = tokens(1, 3)[0].tolist()
    kv = []
    for length, ids in ((5, prompt), (5, [*prompt, *prompt, *prompt])):
        config = PrefixConfig(num_virtual_tokens=length, init="text", init_token_ids=ids)
        kv.append(get_prefix_model(tiny("llama"), config).prefixes["default"]())
    assert torch.equal(*kv)


def test_position_mode_none_leaves_the_context_window_alone() -> None:
    """GPT-2 with 64 positions takes 64 tokens and a prefix of 200; shifted, the same tokens do not fit."""
    ids = tokens(1, 64)
    none = PrefixConfig(num_virtual_tokens=40, position_mode="none")
    model = get_prefix_model(tiny("gpt2"), none).eval()
    model.prefixes["default"].embedding = torch.nn.Parameter(torch.randn(200, 3 * 2 * 32))
    assert model(ids).logits.isfinite().all()
    shifted = get_prefix_model(tiny("gpt2"), PrefixConfig(num_virtual_tokens=40))
    with pytest.raises(IndexError, match="rows of 64 tokens after num_virtual_tokens=40 need 104 positions"):
        shifted(ids)


def test_gpt2_takes_1024_tokens_and_a_prefix_of_200() -> None:
    config = PrefixConfig(num_virtual_tokens=200, position_mode="none")
    model = get_prefix_model(tiny("gpt2", n_positions=1024, n_layer=2), config).eval()
    ids = tokens(1, 1024)
    with torch.no_grad():
        logits = model(ids).logits
        short = model(ids[:, :100]).logits
    close(logits[:, :100], short, LONG)
    assert logits.shape == (1, 1024, 97)


def test_several_prefixes() -> None:
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P)).eval()
    first = model(tokens()).logits
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=P + 2))
    assert model.prefix_names == ["default", "other"]
    assert model.active_prefix == "other"
    assert (model(tokens()).logits - first).abs().max() > 1e-2
    model.set_prefix("default")
    assert torch.equal(model(tokens()).logits, first)
    model.delete_prefix("default")
    assert model.active_prefix == "other"
    for call in (model.set_prefix, model.delete_prefix):
        with pytest.raises(ValueError, match="no prefix named 'default'; there are \\['other'\\]"):
            call("default")
    with pytest.raises(ValueError, match="a prefix named 'other' already"):
        model.add_prefix("other", PrefixConfig())
    for name in ("", "a.b", "keys", "__base__"):
        with pytest.raises(ValueError, match="cannot be named"):
            model.add_prefix(name, PrefixConfig())
    model.delete_prefix("other")
    assert model.active_prefix is None
    with pytest.raises(ValueError, match="no active prefix"):
        model.save_pretrained("nowhere")


def test_disabling_nests_and_outlives_what_happens_within() -> None:
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P)).eval()
    first = model(tokens()).logits
    model.add_prefix("second", PrefixConfig(num_virtual_tokens=P))
    second = model(tokens()).logits
    with model.disable_prefix():
        frozen = model(tokens()).logits
        with model.disable_adapter():
            assert torch.equal(model(tokens()).logits, frozen)
        assert torch.equal(model(tokens(), prefix_names=["default", "second"]).logits, frozen)
        model.set_prefix("default")
        model.delete_prefix("second")
        assert torch.equal(model(tokens()).logits, frozen)
    assert torch.equal(model(tokens()).logits, first)
    assert all((logits - frozen).abs().max() > 0.1 for logits in (first, second))
    with pytest.raises(ZeroDivisionError), model.disable_prefix():
        1 / 0  # noqa: B018
    assert torch.equal(model(tokens()).logits, first)


def test_dropout_of_the_prefix_is_for_training_alone() -> None:
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P, dropout=0.5)).train()
    assert not torch.equal(model(tokens()).logits, model(tokens()).logits)
    model.eval()
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)


def test_half_precision_base_with_a_float32_prefix() -> None:
    model = get_prefix_model(tiny("llama").bfloat16(), PrefixConfig(num_virtual_tokens=P))
    exact = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P))
    exact.prefixes.load_state_dict(model.prefixes.state_dict())
    losses = [m(tokens(), labels=tokens()).loss for m in (model, exact)]
    losses[0].backward()
    grad = model.prefixes["default"].embedding.grad
    assert grad.dtype == torch.float32
    assert grad.isfinite().all()
    assert grad.abs().max() > 0
    assert abs(losses[0].item() - losses[1].item()) < 0.1


def test_parameter_count(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == P * 2 * 3 * 2 * 8
    assert total == trainable + sum(p.numel() for p in model.base_model.parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,} || all params: {total:,}" in capsys.readouterr().out


SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_experts", "n_routed_experts"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 24),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "d_kv"), 8),
    **dict.fromkeys(("n_group", "topk_group", "num_experts_per_tok", "encoder_sparse_step", "decoder_sparse_step"), 1),
    "vocab_size": 97,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "max_source_positions": 32,
}
OUTSIDE = "computes attention outside transformers' AttentionInterface"
NOT_SERVED: dict[str, tuple[Any, str]] = {
    "bloom": (AutoModelForCausalLM, OUTSIDE),
    "mpt": (AutoModelForCausalLM, OUTSIDE),
    "falcon": (AutoModelForCausalLM, OUTSIDE),
    "led": (AutoModelForSeq2SeqLM, OUTSIDE),
    "mpnet": (AutoModelForSequenceClassification, OUTSIDE),
    "mamba": (AutoModelForCausalLM, "no layer of MambaForCausalLM calls transformers' AttentionInterface"),
    "rwkv": (AutoModelForCausalLM, OUTSIDE),
    "fnet": (AutoModelForSequenceClassification, "no layer of FNetForSequenceClassification calls"),
    "minimax": (AutoModelForCausalLM, r"layers \[1\] of MiniMaxForCausalLM do not call"),
    "deepseek_v3": (AutoModelForCausalLM, "DeepseekV3Model has keys of size 16 and values of size 8"),
    "glm_moe_dsa": (AutoModelForCausalLM, "GlmMoeDsaAttention chooses the keys of each query"),
    "albert": (AutoModelForSequenceClassification, "runs an attention module more than once"),
    "pegasus_x": (AutoModelForSeq2SeqLM, r"has no attention at sites \['encoder'\], but at \['cross', 'decoder'\]"),
    "nllb-moe": (AutoModelForSeq2SeqLM, "computes something else through transformers' AttentionInterface"),
    "moonshine": (
        AutoModelForSpeechSeq2Seq,
        "reads input_values; this version serves models of text, of text with images, and Whisper",
    ),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_models_that_cannot_be_served(name: str) -> None:
    """Each by name, with the reason, and as it was: sparse, latent, shared and recurrent attention, and other masks."""
    kind, reason = NOT_SERVED[name]
    base = spread(kind.from_config(AutoConfig.for_model(name, **SMALL)))
    models = [m for m in base.modules() if isinstance(m, PreTrainedModel)]
    before = [m.config._attn_implementation for m in models]
    with pytest.raises(NotImplementedError, match=reason):
        get_prefix_model(base, PrefixConfig())
    assert [m.config._attn_implementation for m in models] == before
    assert all(p.requires_grad for p in base.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in base.modules())


CONFIG_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "length": ({"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens must be a positive int, got 0"),
    "init": ({"init": "words"}, ValueError, "init must be one of .* got 'words'"),
    "text": ({"init": "text"}, ValueError, "needs either init_text or init_token_ids"),
    "positions": ({"position_mode": "rope"}, ValueError, "position_mode must be one of"),
    "dropout": ({"dropout": 1.0}, ValueError, "dropout must lie in"),
    "mode": ({"mode": "suffix"}, ValueError, "mode must be one of .* got 'suffix'"),
    "no MLP": ({"mode": "embedding", "prefix_projection": True}, NotImplementedError, "has no MLP"),
    "no site": ({"sites": ()}, ValueError, "sites must be some of"),
    "unknown site": ({"sites": ("head",)}, ValueError, "sites must be some of .* got \\('head',\\)"),
    "site twice": ({"sites": ["cross", "cross"]}, ValueError, "each once"),
    "no layer": ({"layers": []}, ValueError, "layers must be 'all', numbers"),
    "words for layers": ({"layers": "first"}, ValueError, "layers must be 'all', numbers of layers, .* got 'first'"),
    "a number for layers": ({"layers": 5}, ValueError, "layers must be 'all', numbers"),
    "layer twice": ({"layers": [1, 1]}, ValueError, "each once"),
    "length of nothing": (
        {"num_virtual_tokens": 3, "layers": {0: 3, 1: 0}},
        ValueError,
        "from 1 to num_virtual_tokens=3",
    ),
    "length too long": ({"num_virtual_tokens": 3, "layers": {0: 4}}, ValueError, "from 1 to num_virtual_tokens=3"),
    "no full length": ({"num_virtual_tokens": 3, "layers": {0: 2}}, ValueError, "and one of them that"),
    "layer from behind": ({"layers": [-1]}, ValueError, "layers must be"),
    "task": ({"task_type": "MASKED_LM"}, ValueError, "task_type must be one of .* got 'MASKED_LM'"),
}


@pytest.mark.parametrize(("fields", "error", "message"), CONFIG_ERRORS.values(), ids=CONFIG_ERRORS)
def test_config_errors(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrefixConfig(**fields)


def test_places_that_the_model_does_not_have() -> None:
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM has no attention at sites \['cross', 'encoder'\]"):
        get_prefix_model(tiny("llama"), PrefixConfig(sites=("encoder", "cross", "decoder")))
    with pytest.raises(ValueError, match=r"layers must lie in 0..2 for LlamaForCausalLM, got \[3, 7\]"):
        get_prefix_model(tiny("llama"), PrefixConfig(layers=[0, 3, 7]))


def test_some_layers() -> None:
    """Those that are not chosen have none; which are, and in which order they were named, is not the same thing."""
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P, layers=[2, 0])).eval()
    kv = model.prefixes["default"]()
    (grad,) = torch.autograd.grad(model(tokens()).logits.square().sum(), model.prefixes["default"].embedding)
    assert grad.view(P, 4, -1).abs().amax((0, 2)).min() > 0
    outs = [model(tokens()).logits]
    for name, layers in (("first", [0]), ("last", [2]), ("both", [0, 2])):
        model.add_prefix(name, PrefixConfig(num_virtual_tokens=P, layers=layers))
        model.prefixes[name].set_kv({"first": kv[:2], "last": kv[2:], "both": kv}[name])
        outs.append(model(tokens()).logits)
    assert torch.equal(outs[0], outs[3])
    assert all((outs[0] - out).abs().max() > 1e-3 for out in outs[1:3])


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="init_text needs the tokenizer"):
        get_prefix_model(tiny("llama"), PrefixConfig(init="text", init_text="summarise"))


def _trainer(model: PrefixModel, folder: Path, steps: int) -> Trainer:
    rows = [{"input_ids": t, "labels": t, "attention_mask": torch.ones_like(t)} for t in tokens(12, 7)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows)


def test_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The checkpoint holds the prefix alone, MLP included; six steps equal three, a restart and three more."""
    config = PrefixConfig(num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=8)

    def fresh() -> PrefixModel:
        torch.manual_seed(3)
        return get_prefix_model(tiny("llama"), config)

    straight = fresh()
    _trainer(straight, tmp_path / "a", 6).train()
    interrupted = fresh()
    _trainer(interrupted, tmp_path / "b", 3).train()
    checkpoint = tmp_path / "b" / "checkpoint-3"
    saved = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    assert saved < 4 * sum(p.numel() for p in interrupted.prefixes.parameters()) + 4096
    resumed = fresh()
    _trainer(resumed, tmp_path / "b", 6).train(resume_from_checkpoint=str(checkpoint))
    for (name, expected), got in zip(straight.prefixes.named_parameters(), resumed.prefixes.parameters()):
        assert torch.equal(got, expected), name
    start: Tensor = fresh().prefixes["default"].embedding
    assert not torch.equal(straight.prefixes["default"].embedding, start)
