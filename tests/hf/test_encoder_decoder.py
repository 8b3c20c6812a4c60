"""Encoder-decoder models: a prefix of its own for each layer of encoder, cross attention and decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from prefix_attn.hf.io import checkpoint
from tests.hf.concatenation import concatenation
from tests.hf.models import ENCODER_DECODERS, tiny, tokens
from tests.numerics import GRADIENT, MODEL, close, close_in_norm

P = 4
SITES = ("encoder", "cross", "decoder")
TABLES = ("t5", "mt5", "umt5")  # biases by distance
SHIFTED = ("bart", "mbart", "marian", "pegasus", *TABLES)  # models both of whose stacks can be moved


def inputs(name: str, batch: int = 3) -> dict[str, Tensor]:
    """An encoder's input of 7 tokens, the second row's last two of them padding, and a decoder's of 5."""
    decoder = {"decoder_input_ids": tokens(batch, 5)}
    if name == "whisper":
        return {"input_features": torch.randn(batch, 8, 24, generator=torch.Generator().manual_seed(batch))} | decoder
    ids = tokens(batch, 7)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask} | decoder


def modules(base: PreTrainedModel, name: str) -> list[tuple[str, int, nn.Module]]:
    """(site, layer, attention module) in the order of a prefix, by the names that the architectures gave them."""
    t5 = name in TABLES
    paths = {
        "encoder": "encoder.block.{}.layer.0.SelfAttention" if t5 else "model.encoder.layers.{}.self_attn",
        "cross": "decoder.block.{}.layer.1.EncDecAttention" if t5 else "model.decoder.layers.{}.encoder_attn",
        "decoder": "decoder.block.{}.layer.0.SelfAttention" if t5 else "model.decoder.layers.{}.self_attn",
    }
    return [(s, i, base.get_submodule(paths[s].format(i))) for s in SITES for i in range(3 if s == "encoder" else 2)]


def distances(name: str, site: str, module: nn.Module, base: PreTrainedModel) -> Any:
    """T5's bias of the P keys before a sequence, for queries that start at P; nothing in cross attention."""
    if name not in TABLES or site == "cross":
        return None
    stack = base.encoder if site == "encoder" else base.decoder
    table = module if module.has_relative_attention_bias else stack.block[0].layer[0].SelfAttention
    return lambda S: table.compute_bias(S, P + S, past_seen_tokens=P)[..., :P]


def move_positions(base: PreTrainedModel, config: PrefixConfig) -> None:
    """Let position i of the stacks with a prefix before their own tokens mean i + P."""
    for site in {"encoder", "decoder"} & set(config.sites or SITES):
        embedding = getattr(base.model, site).embed_positions
        embedding.weight = nn.Parameter(embedding.weight.detach().roll(-P, 0), requires_grad=False)


CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "encoder": {"sites": ("encoder",)},
    "cross": {"sites": ["cross"]},
    "decoder": {"sites": ("decoder",)},
    "two sites": {"sites": ("decoder", "encoder")},
    "second layer": {"layers": [1]},
    "third layer": {"layers": [2, 0]},
    "shift": {"position_mode": "shift"},
    "shift decoder": {"position_mode": "shift", "sites": ("cross", "decoder")},
    "shift nothing": {"position_mode": "shift", "sites": ("cross",)},
}
RUNS = [(name, "all") for name in ENCODER_DECODERS]
RUNS += [(name, case) for name in ("bart", "t5") for case in CASES if case != "all"]
RUNS += [(name, "shift") for name in SHIFTED[1:] if name != "t5"] + [("whisper", "shift decoder")]


@pytest.mark.parametrize(("name", "case"), RUNS, ids=[f"{n}-{c}" for n, c in RUNS])
def test_every_slot_against_concatenation(name: str, case: str) -> None:
    """Outputs, and the gradient of each site's every layer."""
    base, config = tiny(name), PrefixConfig(num_virtual_tokens=P, **CASES[case])
    model = get_prefix_model(base, config)
    given = inputs(name)
    leaf = model.prefixes["default"].embedding
    weight = torch.randn(3, 5, base.config.vocab_size)
    logits = model(**given).logits
    (grad,) = torch.autograd.grad((logits * weight).sum(), leaf)

    kv = model.prefixes["default"]()
    chosen = [
        (site, module)
        for site, layer, module in modules(base, name)
        if site in (config.sites or SITES) and (config.layers == "all" or layer in config.layers)
    ]
    assert len(kv) == 2 * len(chosen)
    shift = config.position_mode == "shift"
    prefixes = {
        module: (kv[2 * i], kv[2 * i + 1], distances(name, site, module, base) if shift else None)
        for i, (site, module) in enumerate(chosen)
    }
    if shift and name not in TABLES:
        move_positions(base, config)
    with model.disable_prefix(), concatenation(base, prefixes):
        expected = base(**given, use_cache=False).logits
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), leaf)
    # Of mT5, without AVX-512, concatenation is 2.1e-5 from float64, ours 8e-6.
    (close_in_norm if name == "mt5" else close)(logits, expected, MODEL)
    parts = [g.view(P, 2 * len(chosen), -1).unbind(1) for g in (grad, expected_grad)]
    for i, (got, wanted) in enumerate(zip(*parts)):
        slot = f"{chosen[i // 2][0]} {i // 2}, {'value' if i % 2 else 'key'}"
        close_in_norm(got, wanted, MODEL, name=slot)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_disabled_prefix_is_the_frozen_model(name: str) -> None:
    """Its eager one: torch's attention lets no query of UMT5 see what is behind it, in encoder and cross attention."""
    given, base = inputs(name), tiny(name)
    with concatenation(base, {}):
        expected = base(**given).logits
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P)).eval()
    with model.disable_prefix():
        got = model(**given).logits
    close(got, expected, MODEL)
    assert (model(**given).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize(("name", "case"), [r for r in RUNS if r[1] in ("all", "shift", "shift decoder")])
def test_generate(name: str, case: str) -> None:
    """Greedy, with a growing cache and a static one: the tokens of full forwards. Beams: those of no cache."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, **CASES[case])).eval()
    given = inputs(name)
    del given["decoder_input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0, 1]}
    ids = torch.full((3, 1), 2)
    with torch.no_grad():
        for _ in range(6):
            logits = model(**given, decoder_input_ids=ids, use_cache=False).logits[:, -1:]
            logits[..., :2] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1)], dim=1)
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(**given, **options, **cache)[:, -6:], ids[:, 1:])
    cached, full = (model.generate(**given, num_beams=3, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, full)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bart", "marian", "t5"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    """Padding on the left moves absolute positions, in the frozen model already: T5's are relative."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P)).eval()
    ids, decoder = tokens(2, 7), tokens(2, 5)
    parts = [torch.zeros(2, 3, dtype=torch.int64), ids]
    padded = torch.cat(parts if side == "left" and name == "t5" else parts[::-1], dim=1)
    alone = model(input_ids=ids, decoder_input_ids=decoder).logits
    got = model(input_ids=padded, attention_mask=(padded != 0).long(), decoder_input_ids=decoder).logits
    close(got, alone, MODEL)
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [0, 1]}
    together = model.generate(input_ids=padded, attention_mask=(padded != 0).long(), **options)
    assert torch.equal(together, model.generate(input_ids=ids, **options))


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "mlp"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("name", ["bart", "marian", "t5", "whisper"])
def test_gradient_checkpointing_changes_no_gradient(name: str, use_reentrant: bool, projection: bool) -> None:
    """Twice each. Encoder and decoder hand over their gradients one after the other, and neither counts twice."""
    config = PrefixConfig(num_virtual_tokens=P, prefix_projection=projection)
    model = get_prefix_model(tiny(name, use_cache=False), config)
    given, labels = inputs(name), tokens(3, 5)
    del given["decoder_input_ids"]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def grads() -> list[Tensor]:
        model.train().zero_grad()
        model(**given, labels=labels).loss.backward()
        return [p.grad.clone() for p in parameters]

    expected = grads()
    if not projection:
        per_slot = expected[0].view(P, 14, -1).abs().amax((0, 2))
        assert per_slot.min() > 0
    set_checkpointing(model, use_reentrant=use_reentrant)
    for _ in range(2):
        for got, wanted in zip(grads(), expected):
            close(got, wanted, GRADIENT)


@pytest.mark.peft
@pytest.mark.parametrize("name", ["bart", "mbart", "marian", "pegasus", "t5", "mt5"])
def test_what_peft_means_by_shift(name: str) -> None:
    """PEFT has a prefix in the decoder alone; with L layers, that of layer i is its slot 2 * i mod L."""
    base = {"d_kv": 8} if name in TABLES else {}  # PEFT takes the head size for d_model // num_heads
    peft = get_peft_model(tiny(name, **base), PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)).eval()
    config = PrefixConfig(num_virtual_tokens=P, sites=("decoder",), position_mode="shift")
    ours = get_prefix_model(tiny(name, **base), config).eval()
    slots = peft.prompt_encoder["default"].embedding.weight.detach().view(P, -1, 2, 4, 8)
    chosen = torch.stack([slots[:, 2 * i % slots.shape[1]] for i in range(2)], dim=1)
    ours.prefixes["default"].set_kv(chosen.permute(1, 2, 3, 0, 4).flatten(0, 1))
    given = inputs(name)
    with torch.no_grad():
        torch.testing.assert_close(ours(**given).logits, peft(**given).logits)
    del given["decoder_input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0, 1]}
    assert torch.equal(ours.generate(**given, **options), peft.generate(**given, **options))


@pytest.mark.parametrize("name", ["m2m_100", "whisper"])
def test_positions_that_cannot_be_moved(name: str) -> None:
    base = tiny(name)
    before = base.config._attn_implementation
    with pytest.raises(NotImplementedError, match=rf"position_mode='shift': \w+Encoder of {type(base).__name__}"):
        get_prefix_model(base, PrefixConfig(position_mode="shift"))
    assert base.config._attn_implementation == before
    assert any(p.requires_grad for p in base.parameters())


def test_defaults_are_the_model_s() -> None:
    """Open in the configuration that the user made, filled in by the model."""
    config = PrefixConfig()
    stored = get_prefix_model(tiny("t5"), config).prefix_configs["default"]
    assert (stored.sites, stored.position_mode, stored.task_type) == (SITES, "none", "SEQ_2_SEQ_LM")
    stored = get_prefix_model(tiny("llama"), config).prefix_configs["default"]
    assert (stored.sites, stored.position_mode, stored.task_type) == (("decoder",), "shift", "CAUSAL_LM")
    assert (config.sites, config.position_mode, config.task_type) == (None, None, None)


def test_stacks_that_copy_their_configuration() -> None:
    """T5's stacks have a copy of the model's configuration, which transformers does not switch."""
    base = tiny("t5")
    before = [base.encoder.config._attn_implementation, base.decoder.config._attn_implementation]
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P))
    assert base.encoder.config._attn_implementation == base.decoder.config._attn_implementation == "prefix_attn"
    model.attachment.remove()
    assert [base.encoder.config._attn_implementation, base.decoder.config._attn_implementation] == before
    base.encoder.set_attn_implementation("sdpa")
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P))
    base.encoder.set_attn_implementation("sdpa")
    with pytest.raises(
        RuntimeError, match=r"no encoder layer of T5Stack of T5For\w+ took the prefix: its attention was"
    ):
        model(**inputs("t5"))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_outputs_of_the_caller(name: str) -> None:
    """The encoder does not run, and so need not ask; a prefix of the encoder alone would reach nothing."""
    given = inputs(name)
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P)).eval()
    out = model(**given)
    del given["input_ids"]
    again = model(**given, encoder_outputs=(out.encoder_last_hidden_state,))
    torch.testing.assert_close(again.logits, out.logits)
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, sites=("encoder",)))
    with pytest.raises(RuntimeError, match="did not hand the prefix to layers encoder 0"):
        model(**given, encoder_outputs=(out.encoder_last_hidden_state,))


def test_layers_left_out_in_training() -> None:
    model = get_prefix_model(tiny("bart", encoder_layerdrop=1.0), PrefixConfig(num_virtual_tokens=P)).train()
    model(**inputs("bart")).logits.sum().backward()
    grad = model.prefixes["default"].embedding.grad.view(P, 14, -1).abs().amax((0, 2))
    assert (grad[:6] == 0).all()
    assert (grad[6:] > 0).all()


@torch.no_grad()
def test_initial_keys_are_the_model_s_own() -> None:
    """Of a text that both encoder and decoder read; zero stays zero."""
    base, ids = tiny("bart"), tokens(1, P)
    encoded = base.model.encoder(ids).last_hidden_state
    config = PrefixConfig(num_virtual_tokens=P, init="text", init_token_ids=ids[0].tolist())
    model = get_prefix_model(base, config)
    kv = model.prefixes["default"]()
    for i in range(2):
        attention = base.model.decoder.layers[i].encoder_attn
        for part, projection in enumerate((attention.k_proj, attention.v_proj)):
            expected = projection(encoded).view(P, 4, 8).transpose(0, 1)
            torch.testing.assert_close(kv[6 + 2 * i + part], expected)
    model.add_prefix("zero", PrefixConfig(num_virtual_tokens=P, init="zero"))
    assert (model.prefixes["zero"]() == 0).all()


def test_initial_keys_of_sound() -> None:
    base = tiny("whisper")
    with pytest.raises(ValueError, match=r"num_virtual_tokens must be at most 12 .* got 13"):
        get_prefix_model(base, PrefixConfig(num_virtual_tokens=13))
    with pytest.raises(ValueError, match="the encoder of WhisperForConditionalGeneration reads input_features"):
        get_prefix_model(base, PrefixConfig(init="text", init_token_ids=[5]))
    config = PrefixConfig(num_virtual_tokens=20, init="text", init_token_ids=[5], sites=("decoder",))
    assert get_prefix_model(base, config).prefixes["default"]().abs().min() > 0


@pytest.mark.parametrize("changes", [{}, {"sites": ("cross", "decoder"), "layers": [1]}], ids=["all", "some"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_round_trip(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The same bits; PEFT, which would take the slots for other layers', does not know the type."""
    config = PrefixConfig(num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=8, **changes)
    model = get_prefix_model(tiny(name), config).eval()
    model.save_pretrained(tmp_path, training_state=True)
    slots = 2 if changes else 7
    width = 2 * slots * 4 * (8 if name == "bart" else 16)
    assert {n: t.shape for n, t in load_file(tmp_path / checkpoint.ADAPTER).items()} == {checkpoint.KEY: (P, width)}
    with torch.no_grad():
        expected = model(**inputs(name)).logits
        for is_trainable in (False, True):
            again = PrefixModel.from_pretrained(tiny(name), tmp_path, is_trainable=is_trainable).eval()
            assert torch.equal(again(**inputs(name)).logits, expected)
    assert again.prefix_configs["default"] == model.prefix_configs["default"]
    with pytest.raises(KeyError, match="PREFIX_ATTN"):
        PeftModel.from_pretrained(tiny(name), str(tmp_path))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    get_prefix_model(tiny("bart"), PrefixConfig(num_virtual_tokens=P)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"ours/adapter_model.safetensors: trained for a base model"):
        PrefixModel.from_pretrained(tiny("llama"), tmp_path / "ours")
    with pytest.raises(ValueError, match="num_layers is 7, BartForConditionalGeneration needs 8"):
        PrefixModel.from_pretrained(tiny("bart", encoder_layers=4), tmp_path / "ours")
    (tmp_path / "ours" / checkpoint.ADAPTER_CONFIG).write_text('{"peft_type": "PREFIX_ATTN"}')
    PrefixModel.from_pretrained(tiny("bart"), tmp_path / "ours")


def test_trainer(tmp_path: Path) -> None:
    """Seq2SeqTrainer makes the decoder's input from the labels and generates to evaluate; the base stays as it was."""
    base = tiny("bart")
    before = {n: p.clone() for n, p in base.state_dict().items()}
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P))
    rows = [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t[:5]} for t in tokens(8, 7)]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=3e-2,
        predict_with_generate=True,
        generation_max_length=6,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        dataloader_pin_memory=False,
        save_strategy="no",
    )
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    out = model.generate(tokens(8, 7), max_length=6)
    assert torch.equal(torch.from_numpy(trainer.predict(rows).predictions)[:, : out.shape[1]], out)
    assert all(torch.equal(p, before[n]) for n, p in base.state_dict().items())


def two(name: str, **changes: Any) -> PrefixModel:
    """Prefixes "default" and "other", of unequal lengths."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, **changes))
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=P + 2, **changes))
    return model.eval()


@pytest.mark.parametrize("mode", ["none", "shift"])
@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_another_prefix_for_each_row(name: str, mode: str) -> None:
    """Each row of a batch is what its prefix alone makes of it; where that cannot be, the call is refused."""
    if mode == "shift" and name == "whisper":
        with pytest.raises(NotImplementedError, match="numbers its tokens where nothing can move them"):
            two(name, position_mode=mode)
        return
    model, batch, names = two(name, position_mode=mode), inputs(name), ["other", "default", None]
    if mode == "shift":
        with pytest.raises(NotImplementedError, match="position_mode='none' works"):
            model(**batch, prefix_names=names)
        return
    logits = model(**batch, prefix_names=names).logits
    for row, one in enumerate(names):
        alone = {n: t[row : row + 1] for n, t in batch.items()}
        close(logits[row : row + 1], model(**alone, prefix_names=[one]).logits, MODEL)
    if name == "whisper":
        return  # its generate wants the tokens of a language
    prompt = {n: t for n, t in batch.items() if not n.startswith("decoder")}
    quiet = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    out = model.generate(**prompt, prefix_names=names, **quiet)
    for row, one in enumerate(names):
        alone = {n: t[row : row + 1] for n, t in prompt.items()}
        assert torch.equal(model.generate(**alone, prefix_names=[one], **quiet)[0], out[row])


def test_prefixes_of_other_places_or_with_heads_do_not_share_a_batch() -> None:
    model = get_prefix_model(tiny("bart"), PrefixConfig(num_virtual_tokens=P, sites=("encoder", "decoder")))
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=P))
    with pytest.raises(ValueError, match="must have one sites, got"):
        model(**inputs("bart"), prefix_names=["default", "other", None])
    model = get_prefix_model(tiny("bert"), PrefixConfig(num_virtual_tokens=P))
    with pytest.raises(ValueError, match=r"with task heads cannot share a batch with others, got \['default'\]"):
        model(tokens(2, 5), prefix_names=["default", None])
