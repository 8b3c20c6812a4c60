"""PrefixTuning: shared virtual tokens and those in every row, against embeddings concatenated by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, get_prefix_model
from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from tests.hf.by_hand import WIDTH, P, causal, concatenated, other
from tests.hf.models import CACHE, VOCABULARY, tiny, tokens
from tests.numerics import DOUBLE, FLOAT, GRADIENT, HALF, MODEL, close, close_in_norm

SHARED = ["gpt2", "opt", "gpt_neox", "llama", "qwen2", "qwen3", "phi3", "smollm3"]
PER_ROW = ["mistral", "gemma2", "gemma3_text", "gpt_oss"]  # their window is 6


@pytest.mark.parametrize("name", [*SHARED, *PER_ROW, "gptj", "gpt_neo", "bloom", "falcon_h1"])
def test_against_concatenation(name: str) -> None:
    """Logits, and the gradient through every layer; with right padding."""
    model, plain = PrefixTuning(causal(name), P, WIDTH), causal(name, attn_implementation="eager")
    in_interface = name == "gptj" and CACHE == "cache"  # it is since transformers 5.24
    assert model.shared == (name in SHARED or in_interface)
    ids = tokens(3, 11)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    weight = torch.randn(3, 11, VOCABULARY) * mask[..., None]
    logits = model(ids, attention_mask=mask).logits
    (grad,) = torch.autograd.grad((logits * weight).sum(), model.prefix)
    expected = plain(**concatenated(plain, model.prefix, ids, mask)).logits[:, P:]
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), model.prefix)
    real = mask.bool()
    close(logits[real], expected[real], MODEL)
    close_in_norm(grad, expected_grad, MODEL)
    assert grad.norm(dim=-1).min() > 1e-3 * grad.norm()


def test_exact_in_float64() -> None:
    """GPT-2 computes in float64 throughout, so nothing but rounding may be left."""
    model, plain = PrefixTuning(tiny("gpt2").double(), P, WIDTH).double(), tiny("gpt2").double()
    ids = tokens()
    logits = model(ids).logits
    expected = plain(**concatenated(plain, model.prefix, ids, torch.ones_like(ids))).logits[:, P:]
    weight = torch.randn_like(logits)
    grad, expected_grad = (torch.autograd.grad((t * weight).sum(), model.prefix)[0] for t in (logits, expected))
    close_in_norm(logits, expected, DOUBLE)
    close_in_norm(grad, expected_grad, DOUBLE)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_how_many_tokens_run(name: str) -> None:
    """Shared virtual tokens run once, and the batch without them."""
    model = PrefixTuning(tiny(name), P, WIDTH)
    shapes: list[tuple[int, ...]] = []
    model.base_model.model.layers[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    model(tokens(3, 11))
    assert shapes == ([(1, P, WIDTH), (3, 11, WIDTH)] if name == "llama" else [(3, P + 11, WIDTH)])


FORMS: dict[str, tuple[str, Any, dict[str, Any], bool]] = {
    "a window as wide as the context": ("mistral", AutoModelForCausalLM, {"sliding_window": 64}, True),
    "a narrower one": ("mistral", AutoModelForCausalLM, {"sliding_window": 63}, False),
    "no window": ("mistral", AutoModelForCausalLM, {"sliding_window": None}, True),
    "layers without windows": ("qwen3", AutoModelForCausalLM, {"layer_types": ["full_attention"] * 2}, True),
    "a classifier": ("llama", AutoModelForSequenceClassification, {}, True),
    "in both directions": (
        "gemma3_text",
        AutoModelForCausalLM,
        {"use_bidirectional_attention": True, "sliding_window": 64, "head_dim": 8},
        False,
    ),
    "attention of its own": ("bloom", AutoModelForCausalLM, {}, False),
    "recurrent layers": ("falcon_h1", AutoModelForCausalLM, {}, False),
    "an encoder": ("bert", AutoModelForMaskedLM, {}, False),
    "an encoder-decoder": ("bart", AutoModelForSeq2SeqLM, {}, False),
}


@pytest.mark.parametrize(("name", "auto", "changes", "shared"), FORMS.values(), ids=FORMS)
def test_which_models_share(name: str, auto: Any, changes: dict[str, Any], shared: bool) -> None:
    assert PrefixTuning(other(name, auto, **changes), P, WIDTH).shared is shared


@pytest.mark.parametrize(
    "name", ["gpt2", "opt", "llama", "mistral", "gemma2", "gemma3_text", "gptj", "gpt_neo", "bloom"]
)
def test_padding_and_caches_change_nothing(name: str) -> None:
    """Left and right padding, greedy and with beams, the cache and none: the same logits and the same tokens."""
    model, plain = PrefixTuning(causal(name), P, WIDTH).eval(), causal(name)
    ids = tokens(2, 9)
    left = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
    right = torch.cat([ids, torch.zeros(2, 3, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        logits = model(ids).logits
        for padded, place in ((left, slice(3, None)), (right, slice(0, 9))):
            got = model(padded, attention_mask=(padded != 0).long()).logits[:, place]
            close(got, logits, MODEL)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given = concatenated(plain, model.prefix, ids, torch.ones_like(ids))
    for options in (greedy, greedy | {"num_beams": 3}):
        out = model.generate(ids, **options)
        assert torch.equal(out, torch.cat([ids, plain.generate(**given, **options)], dim=1))
        assert torch.equal(model.generate(left, attention_mask=(left != 0).long(), **options)[:, 3:], out)
        assert torch.equal(model.generate(ids, use_cache=False, **options), out)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert not model.shared or torch.equal(model.generate(ids, **static, **options), out)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_sampling_and_return_sequences(name: str) -> None:
    model = PrefixTuning(tiny(name), P, WIDTH)
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": True}
    outs = []
    for _ in range(2):
        torch.manual_seed(7)
        outs.append(model.generate(tokens(2, 5), num_return_sequences=3, **options))
    assert outs[0].shape == (6, 11)
    assert torch.equal(*outs)
    assert not torch.equal(outs[0][0], outs[0][1])


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_caches_of_the_caller(name: str) -> None:
    """A conversation goes on from its cache, and assisted generation takes tokens back from one."""
    model = PrefixTuning(tiny(name), P, WIDTH).eval()
    ids = tokens(1, 14)
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :9], attention_mask=torch.ones(1, 9), use_cache=True)
        rest = model(ids[:, 9:], attention_mask=torch.ones(1, 14), **{CACHE: first[CACHE]}).logits
    close(torch.cat([first.logits, rest], dim=1), expected, MODEL)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assisted = model.generate(ids.repeat(1, 3), prompt_lookup_num_tokens=3, **options)
    assert torch.equal(assisted, model.generate(ids.repeat(1, 3), **options))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_a_loss_is_that_of_the_real_tokens(name: str) -> None:
    """The targets are those of the frozen model: a virtual token predicts none."""
    model = PrefixTuning(tiny(name), P, WIDTH).eval()
    ids = tokens()
    labels = ids.clone()
    labels[:, :4] = -100
    out = model(ids, labels=labels)
    assert out.logits.shape == (2, 9, VOCABULARY)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_embeddings_and_positions_of_the_caller(name: str) -> None:
    model = PrefixTuning(tiny(name), P, WIDTH).eval()
    ids = tokens()
    expected = model(ids).logits
    embeddings = model.base_model.get_input_embeddings()(ids)
    got = model(inputs_embeds=embeddings, position_ids=torch.arange(9)[None]).logits
    torch.testing.assert_close(got, expected)
    far = model(ids, position_ids=torch.arange(9)[None] * 2).logits
    assert (far - expected).abs().max() > 1e-2


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral", "t5", "bert"])
def test_gradient_checkpointing_changes_no_gradient(name: str, use_reentrant: bool) -> None:
    autos = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM}
    model = PrefixTuning(other(name, autos[name]) if name in autos else tiny(name), P, WIDTH)
    ids = tokens()

    def grad() -> Tensor:
        model.train().zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return model.prefix.grad.clone()

    expected = grad()
    set_checkpointing(model, use_reentrant=use_reentrant)
    for _ in range(2):
        assert expected.abs().max() > 0
        close(grad(), expected, GRADIENT)


def test_virtual_tokens_run_without_the_dropout_of_the_model() -> None:
    """Shared by all samples, they would have shared one mask. Modules stay in the modes that they were in."""
    model = PrefixTuning(tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), P, WIDTH).train()
    model.base_model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    slots = model._attachment.resolver.layout(model._config).slots
    assert torch.equal(*(model._attachment.probe.kv(slots, model.prefix) for _ in range(2)))
    assert [m.training for m in model.modules()] == modes
    assert not torch.equal(model(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_training_moves_the_table_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the Trainer; its checkpoint holds the table alone, and resumes bit for bit."""

    def train(folder: str, steps: int, resume: str | None = None) -> PrefixTuning:
        torch.manual_seed(3)
        model = PrefixTuning(tiny(name), P, WIDTH)
        rows = [{"input_ids": t, "labels": t, "attention_mask": torch.ones_like(t)} for t in tokens(12, 7)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            save_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-1,
            lr_scheduler_type="constant",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model

    straight = train("a", 6)
    train("b", 3)
    resumed = train("b", 6, str(tmp_path / "b" / "checkpoint-3"))
    assert torch.equal(straight.prefix, resumed.prefix)
    torch.manual_seed(3)
    start = PrefixTuning(tiny(name), P, WIDTH)
    assert (straight.prefix - start.prefix).abs().max() > 1e-2
    batch = {"input_ids": tokens(12, 7), "labels": tokens(12, 7)}
    assert straight.eval()(**batch).loss < start.eval()(**batch).loss - 0.05
    assert all(torch.equal(p, q) for p, q in zip(straight.base_model.parameters(), tiny(name).parameters()))
    assert all(p.grad is None and not p.requires_grad for p in straight.base_model.parameters())
    straight.print_trainable_parameters()
    assert f"trainable params: {P * WIDTH:,} ||" in capsys.readouterr().out


def test_state_dict_is_the_table() -> None:
    model, again = (PrefixTuning(tiny("llama"), P, WIDTH).eval() for _ in range(2))
    again.prefix.data.zero_()
    assert {n: t.shape for n, t in model.state_dict().items()} == {"prefix": (P, WIDTH)}
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert nn.ModuleList([model]).state_dict().keys() == {"0.prefix"}
    with pytest.raises(RuntimeError, match="size mismatch for prefix"):
        again.load_state_dict({"prefix": torch.zeros(P + 1, WIDTH)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        again.load_state_dict(model.state_dict() | {"lm_head.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", ["llama", "mistral", "t5"])
def test_files_are_those_of_prompt_tuning(name: str, tmp_path: Path) -> None:
    """PEFT loads what we save; we load what PEFT saves; and what is saved is what was trained, to the bit."""

    def fresh() -> PreTrainedModel:
        return other(name, AutoModelForSeq2SeqLM) if name == "t5" else tiny(name)

    model = PrefixTuning(fresh(), P, WIDTH).eval()
    batch = {"input_ids": tokens()} | ({"decoder_input_ids": tokens(2, 5)} if name == "t5" else {})
    batch["attention_mask"] = torch.ones_like(tokens())
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours").eval()
    assert isinstance(theirs.peft_config["default"], peft.PromptTuningConfig)
    got = theirs(**batch).logits[:, 0 if name == "t5" else P :]
    close(got, expected, MODEL)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = PrefixTuning.from_pretrained(fresh(), tmp_path / folder)
        assert not again.prefix.requires_grad
        assert torch.equal(again.eval()(**batch).logits, expected)
    assert PrefixTuning.from_pretrained(fresh(), tmp_path / "ours", is_trainable=True).prefix.requires_grad


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    """A clear error, before anything is done to the model."""
    PrefixTuning(tiny("llama"), P, WIDTH).save_pretrained(tmp_path / "table")
    get_prefix_model(tiny("llama"), PrefixConfig()).save_pretrained(tmp_path / "prefix")
    files = {
        "table": (tiny("llama", hidden_size=64), "trained for a base model"),
        "prefix": (tiny("llama"), "peft_type must be PROMPT_TUNING, got 'PREFIX_TUNING'"),
        "nothing": (tiny("llama"), "not a folder"),
    }
    for folder, (base, message) in files.items():
        with pytest.raises(ValueError, match=message):
            PrefixTuning.from_pretrained(base, f"{tmp_path}/{folder}")
        assert base.config._attn_implementation == "sdpa"
        assert all(p.requires_grad for p in base.parameters())
    file = tmp_path / "table" / "adapter_config.json"
    file.write_text(file.read_text().replace('"num_virtual_tokens": 4', '"num_virtual_tokens": 5'))
    with pytest.raises(ValueError, match=rf"need .*\(5, {WIDTH}\).* has .*\(4, {WIDTH}\)"):
        PrefixTuning.from_pretrained(tiny("llama"), tmp_path / "table")


def test_starts_from_the_models_own_embeddings() -> None:
    """Scaled where the model scales them."""
    base = tiny("gemma3_text")
    model = PrefixTuning(base, P, WIDTH)
    rows = base.get_input_embeddings()(torch.arange(VOCABULARY))
    assert all((rows == row).all(-1).any() for row in model.prefix)
    assert model.prefix.dtype == torch.float32


def test_half_precision() -> None:
    model, exact = (PrefixTuning(base, P, WIDTH) for base in (tiny("llama").bfloat16(), tiny("llama")))
    exact.load_state_dict(model.state_dict())
    grads = []
    for m in (model, exact):
        m(tokens(), labels=tokens()).loss.backward()
        grads.append(m.prefix.grad)
    assert grads[0].dtype == torch.float32
    assert torch.cosine_similarity(*(grad.flatten() for grad in grads), dim=0) > 0.999
    close_in_norm(*(grad.norm() for grad in grads), HALF)


def test_two_forwards_before_one_backward() -> None:
    model = PrefixTuning(tiny("llama"), P, WIDTH).train()
    set_checkpointing(model, use_reentrant=False)
    grads = []
    for batches in ([tokens(2, 9)], [tokens(3, 7)], [tokens(2, 9), tokens(3, 7)]):
        loss = sum(model(ids, labels=ids, use_cache=False).loss for ids in batches)
        grads.append(torch.autograd.grad(loss, model.prefix)[0])
    torch.testing.assert_close(grads[2], grads[0] + grads[1])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compile_fullgraph_forward_and_backward(training: bool) -> None:
    """One graph, although the virtual tokens run in eval mode."""
    torch._dynamo.reset()
    model = PrefixTuning(tiny("llama", num_hidden_layers=1), P, WIDTH).train(training)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = [m(tokens(), labels=tokens(), use_cache=False).loss for m in (compiled, model)]
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, model.prefix)[0] for loss in losses]
    close(*grads, GRADIENT)
    assert model.base_model.training is training


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_mode_embedding_is_prefix_tuning(name: str) -> None:
    """As one of the prefixes of a PrefixModel: the same logits, the same gradient of the same table."""
    alone = PrefixTuning(tiny(name), P, WIDTH)
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, mode="embedding"))
    encoder = model.prefixes["default"]
    encoder.load_state_dict({"embedding": alone.prefix})
    assert [p.shape for p in model.parameters() if p.requires_grad] == [(P, WIDTH)]
    logits, expected = model(tokens()).logits, alone(tokens()).logits
    torch.testing.assert_close(logits, expected)
    weight = torch.randn_like(logits)
    (grad,) = torch.autograd.grad((logits * weight).sum(), encoder.embedding)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), alone.prefix)
    close_in_norm(grad, expected_grad, FLOAT)
    set_checkpointing(model.train(), use_reentrant=True)
    (model(tokens(), use_cache=False).logits * weight).sum().backward()
    close_in_norm(encoder.embedding.grad, expected_grad, MODEL)


def test_mode_embedding_starts_from_a_text() -> None:
    base, prompt, ids = tiny("llama"), tokens(1, P)[0], tokens()
    with torch.no_grad():
        expected = base(torch.cat([prompt.expand(2, -1), ids], dim=1)).logits[:, P:]
        start = {"init": "text", "init_token_ids": prompt.tolist()}
        got = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P, mode="embedding", **start)).eval()(ids).logits
    torch.testing.assert_close(got, expected)


@pytest.mark.peft
def test_mode_embedding_folds_into_keys_and_values(tmp_path: Path) -> None:
    """Saved folded, as PEFT's prefix tuning; with the training state the embeddings go on."""
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P, mode="embedding")).eval()
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path, training_state=True)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert isinstance(theirs.peft_config["default"], peft.PrefixTuningConfig)
    close(theirs(tokens()).logits, expected, MODEL)
    for is_trainable, mode, shape in ((False, "kv", (P, 2 * 3 * 2 * 8)), (True, "embedding", (P, WIDTH))):
        again = PrefixModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=is_trainable).eval()
        assert again.prefix_configs["default"].mode == mode
        assert again.prefixes["default"].embedding.shape == shape
        assert torch.equal(again(tokens()).logits, expected)
    model.fold()
    assert model.prefix_configs["default"].mode == "kv"
    assert torch.equal(model(tokens()).logits, expected)
    assert model.get_nb_trainable_parameters()[0] == P * 2 * 3 * 2 * 8
