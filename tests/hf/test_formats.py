"""Prefixes that other libraries wrote: recognised by their files, read exactly, refused when they are not whole."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from prefix_attn import PrefixModel
from prefix_attn.hf.io import formats
from tests.hf import foreign
from tests.hf.foreign import BART, GPT2, HEADS, WIDTH, P, mlp, table
from tests.hf.models import tiny, tokens

EQUAL = {"encoder_layers": 2, "decoder_layers": 2}  # the original has one number of layers for both


def load(path: Path, name: str, **changes: Any) -> tuple[PrefixModel, Tensor]:
    """The tiny model with the prefix in ``path``; its rows (P, 2 * slots * H * D)."""
    model = PrefixModel.from_pretrained(tiny(name, **changes), path).eval()
    return model, model.prefixes["default"].prompt_embeddings().detach()


def seq2seq(name: str) -> dict[str, Tensor]:
    given = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 9).long()}
    given["attention_mask"][0, 6:] = 0
    return given


# PEFT -----------------------------------------------------------------------------------------------------------------


@pytest.mark.peft
@pytest.mark.parametrize(
    ("name", "layers", "decoder"),
    [("bart", 4, 4), ("bart", 3, 3), ("bart", 3, 2), ("t5", 4, 4), ("t5", 3, 2), ("pegasus", 2, 2), ("mt5", 6, 6)],
)
def test_peft_s_encoder_decoder_models(name: str, layers: int, decoder: int, tmp_path: Path) -> None:
    """Outputs are PEFT's, and what we say of its slots is what its gradients say."""
    t5 = name in ("t5", "mt5")
    sizes = ("num_layers", "num_decoder_layers") if t5 else ("encoder_layers", "decoder_layers")
    base = dict(zip(sizes, (layers, decoder))) | ({"d_kv": 8} if t5 else {})
    peft = get_peft_model(tiny(name, **base), PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)).eval()
    weight = peft.prompt_encoder["default"].embedding.weight
    expected = peft(**seq2seq(name)).logits
    expected.square().sum().backward()
    alive = weight.grad.view(P, layers, -1).abs().amax((0, 2)) > 0
    peft.save_pretrained(tmp_path)
    ours, rows = load(tmp_path, name, **base)
    with torch.no_grad():
        torch.testing.assert_close(ours(**seq2seq(name)).logits, expected)
        with ours.disable_prefix():
            assert (ours(**seq2seq(name)).logits - expected).abs().max() > 0.1
    config = ours.prefix_configs["default"]
    assert (config.sites, config.position_mode) == (("decoder",), "shift")
    found = formats.read(tmp_path, decoder_layers=decoder).of_peft_s_decoder
    assert found["dead_slots"] == (~alive).nonzero().flatten().tolist()
    slots = weight.detach().view(P, layers, -1)
    assert torch.equal(rows.view(P, decoder, -1), slots[:, found["slot_of_layer"]])
    halves = [[i, i + layers // 2] for i in range(layers // 2)] if layers % 2 == 0 else []
    assert found["layers_that_share"] == halves


def test_peft_s_decoder_is_too_long_for_its_file(tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    get_peft_model(tiny("bart"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 3 layers, and the decoder of the base model 4"):
        load(tmp_path, "bart", decoder_layers=4)
    with pytest.raises(ValueError, match="encoder-decoder model, and LlamaForCausalLM is none"):
        load(tmp_path, "llama")


@pytest.mark.peft
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("frozen", [0, 1, P])
def test_peft_s_cartridges(frozen: int, safe: bool, tmp_path: Path) -> None:
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_frozen_tokens=frozen)
    peft = get_peft_model(tiny("llama"), config).eval()
    peft.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / "adapter_model.bin").exists() != safe
    ours, _ = load(tmp_path, "llama")
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()).logits, peft(input_ids=tokens()).logits)
    assert ours.prefixes["default"].num_frozen_tokens == frozen


# adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["mlp", "flat"])
def test_adapters_of_a_decoder(flat: bool, tmp_path: Path) -> None:
    part, rows = mlp(3)
    if flat:
        part, rows = {"control_trans": table(3).flatten()}, table(3)
    foreign.adapters(tmp_path, "gpt2", "GPT2LMHeadModel", {"self_prefix": part}, flat=flat)
    torch.save({"lm_head.weight": torch.zeros(5, 5)}, tmp_path / "pytorch_model_head.bin")  # the base model's own
    model, got = load(tmp_path, "gpt2")
    assert torch.equal(got, rows)
    assert model.prefix_configs["default"].position_mode == "none"
    assert model.prefix_configs["default"].modules_to_save == ()


def test_adapters_of_an_encoder_decoder(tmp_path: Path) -> None:
    """Three prefixes, of 3 layers in the encoder and 2 at each site of the decoder, in another order than ours."""
    parts = {"encoder_prefix": mlp(3, seed=0), "self_prefix": mlp(2, seed=1), "cross_prefix": mlp(2, seed=2)}
    tensors = {name: part for name, (part, _) in parts.items()}
    foreign.adapters(tmp_path / "all", "bart", "BartForConditionalGeneration", tensors)
    _, rows = load(tmp_path / "all", "bart")
    wanted = [parts[name][1] for name in ("encoder_prefix", "cross_prefix", "self_prefix")]
    assert torch.equal(rows, torch.cat(wanted, dim=1))
    with pytest.raises(ValueError, match=r"has 192 numbers per token at 'encoder', the base model needs 128"):
        load(tmp_path / "all", "bart", encoder_layers=2, decoder_layers=3)
    del tensors["encoder_prefix"]
    foreign.adapters(tmp_path / "two", "bart", "BartForConditionalGeneration", tensors)
    model, rows = load(tmp_path / "two", "bart")
    assert model.prefix_configs["default"].sites == ("cross", "decoder")
    assert torch.equal(rows, torch.cat(wanted[1:], dim=1))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_adapters_of_a_classifier_have_its_head(safe: bool, tmp_path: Path) -> None:
    part, rows = mlp(3)
    foreign.adapters(tmp_path, "bert", "BertForSequenceClassification", {"self_prefix": part})
    head = {"classifier.weight": torch.randn(3, WIDTH), "classifier.bias": torch.randn(3)}
    if safe:
        tensors = torch.load(tmp_path / "pytorch_adapter.bin")
        save_file({name: t.clone() for name, t in tensors.items()}, tmp_path / "adapter.safetensors")
        save_file(head, tmp_path / "model_head.safetensors")
    else:
        torch.save(head, tmp_path / "pytorch_model_head.bin")
    model, got = load(tmp_path, "bert")
    assert torch.equal(got, rows)
    assert torch.equal(model.heads["default"]["classifier"].weight, head["classifier.weight"])


def test_adapters_of_t5_say_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their T5 counts distances of text from text P too far; a prefix that was trained so is a start, not the same."""
    parts = {name: {"control_trans": table(n, width=64).flatten()} for name, n in (("encoder_prefix", 3),)}
    foreign.adapters(tmp_path, "t5", "T5ForConditionalGeneration", parts, flat=True)
    model, rows = load(tmp_path, "t5")
    assert torch.equal(rows, table(3, width=64))
    assert model.prefix_configs["default"].sites == ("encoder",)
    assert "P too far" in caplog.text


# Cartridges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True], ids=["frozen_keys", "fixed_keys"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_cartridges(frozen: int, old: bool, tmp_path: Path) -> None:
    """The layout is PEFT's CARTRIDGE, which was made after it; parameters may be bfloat16."""
    rows = table(3, width=16).bfloat16()
    foreign.cartridge(tmp_path / "cache-step9.pt", rows, 2, frozen=frozen, old=old)
    for path in (tmp_path, tmp_path / "cache-step9.pt"):
        model, got = load(path, "llama")
        assert torch.equal(got, rows.float())
        assert model.prefix_configs["default"].position_mode == "shift"
        assert model.prefix_configs["default"].num_frozen_tokens == frozen
    foreign.cartridge(tmp_path / "cache-step10.pt", rows, 2, frozen=frozen)
    with pytest.raises(ValueError, match=r"has \['cache-step10.pt', 'cache-step9.pt'\]; name one of them"):
        load(tmp_path, "llama")
    foreign.cartridge(tmp_path / "cache_last.pt", rows + 1, 2, frozen=frozen)
    assert torch.equal(load(tmp_path, "llama")[1], (rows + 1).float())


# The original ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_original_gpt2(depth: int, zipped: bool, tmp_path: Path) -> None:
    part, rows = mlp(3, depth=depth)
    foreign.original(tmp_path, part, GPT2, zipped=zipped)
    model, got = load(tmp_path, "gpt2")
    assert torch.equal(got, rows)
    assert model.prefix_configs["default"].position_mode == "shift"
    assert torch.equal(load(tmp_path / "pytorch_model.bin", "gpt2")[1], rows)


def test_the_original_gpt2_without_mlp(tmp_path: Path) -> None:
    """A parameter of its own (get_prompt_p2), or past keys and values of real words (get_prompt_p2_shallow)."""
    rows = table(3)
    past = rows.view(P, 6, HEADS, 8).permute(1, 2, 0, 3)[:, None].contiguous()
    for name, flat in (("p2", rows.flatten()), ("shallow", past)):
        foreign.original(tmp_path / name, {"control_trans": flat}, GPT2)
        assert torch.equal(load(tmp_path / name, "gpt2")[1], rows)


def test_the_original_bart(tmp_path: Path) -> None:
    """One MLP for each site, named wte (decoder), wte_enc and wte2 (cross attention)."""
    tensors, wanted = {}, []
    for number, suffix in enumerate(("_enc", "2", "")):
        part, rows = mlp(2, seed=number)
        tensors |= {n.replace("wte", f"wte{suffix}").replace("trans", f"trans{suffix}"): t for n, t in part.items()}
        wanted.append(rows)
    foreign.original(tmp_path, tensors, BART)
    model, got = load(tmp_path, "bart", **EQUAL)
    assert torch.equal(got, torch.cat(wanted, dim=1))
    assert model.prefix_configs["default"].position_mode == "none"
    assert model.prefix_configs["default"].sites == ("encoder", "cross", "decoder")


def test_the_mlp_runs_as_its_authors_ran_it(tmp_path: Path) -> None:
    """Their get_prompt, in their words: the keys and values that GPT-2 was given, for a batch of one."""
    part, _ = mlp(3)
    foreign.original(tmp_path, part, GPT2)
    model, _ = load(tmp_path, "gpt2")
    hidden = torch.tanh(part["wte.weight"] @ part["control_trans.0.weight"].T + part["control_trans.0.bias"])
    flat = (hidden @ part["control_trans.2.weight"].T + part["control_trans.2.bias"])[None]
    past = flat.view(1, P, 3 * 2, HEADS, WIDTH // HEADS).permute([2, 0, 3, 1, 4]).split(2)
    kv = model.prefixes["default"]().detach()
    for layer, (key, value) in enumerate(past):
        torch.testing.assert_close(kv[2 * layer], key[0])
        torch.testing.assert_close(kv[2 * layer + 1], value[0])


# Bad files ------------------------------------------------------------------------------------------------------------


class Hostile:
    """Runs a command when it is unpickled by somebody who trusts the file."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("false",)


def gpt2(folder: Path, part: dict[str, Tensor] | None = None, **config: Any) -> Path:
    return foreign.original(folder, mlp(3)[0] if part is None else part, GPT2 | config)


def of_adapters(folder: Path, part: dict[str, Tensor] | None = None, **options: Any) -> Path:
    return foreign.adapters(folder, "gpt2", "GPT2LMHeadModel", {"self_prefix": part or mlp(3)[0]}, **options)


def cartridge(folder: Path, **content: Any) -> Path:
    path = foreign.cartridge(folder / "cache.pt", table(3), HEADS, frozen=1)
    kept = torch.load(path, weights_only=False)
    torch.save(kept | content, path)
    return path


def cut(path: Path, end: int) -> Path:
    path.write_bytes(path.read_bytes()[:end])
    return path.parent


def edited(folder: Path, **changes: Any) -> Path:
    file = of_adapters(folder) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def kv(*shape: int) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.zeros(shape)) for _ in range(3)])


def compressed(path: Path) -> Path:
    """The same records, deflated: a megabyte could unpack to a gigabyte."""
    with zipfile.ZipFile(path) as f:
        records = {name: f.read(name) for name in f.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as f:
        for name, content in records.items():
            f.writestr(name, content)
    return path.parent


def wide(folder: Path) -> Path:
    """16 MB whose product is 64 TB."""
    part = {"wte.weight": torch.zeros(2**21, 1), "control_trans.0.weight": torch.zeros(2**21, 1)}
    return gpt2(folder, part | {"control_trans.0.bias": torch.zeros(2**21)})


HUGE = torch.zeros(1).as_strided((1 << 40, WIDTH), (0, 0))
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an empty folder": (lambda f: f, "no such file"),
    "another file": (lambda f: gpt2(f, {"lm_head.weight": torch.zeros(2)}), "neither a cartridge"),
    "code": (lambda f: cartridge(f, trainable_keys=Hostile()), "more than tensors .it wants to run posix.system"),
    "truncated": (lambda f: cut(gpt2(f) / "pytorch_model.bin", -99), "damaged"),
    "half": (lambda f: cut(of_adapters(f) / "pytorch_adapter.bin", 999), "damaged"),
    "empty": (lambda f: cut(of_adapters(f) / "pytorch_adapter.bin", 0), "damaged"),
    "compressed": (lambda f: compressed(gpt2(f) / "pytorch_model.bin"), "damaged"),
    "a huge product": (wide, "2097152 x 2097152 numbers"),
    "larger than itself": (lambda f: gpt2(f, mlp(3)[0] | {"wte.weight": HUGE}), "more than the file holds"),
    "NaN": (lambda f: gpt2(f, {"control_trans": torch.full((P * 192,), torch.nan)}), "finite"),
    "integers": (lambda f: gpt2(f, {"control_trans": torch.ones(P * 192).long()}), "finite"),
    "infix": (lambda f: gpt2(f, mlp(3)[0] | {"wte2.weight": torch.zeros(P, WIDTH)}), "infix"),
    "embeddings": (lambda f: gpt2(f, mlp(3)[0] | dict.fromkeys(("control_trans.2.weight",), torch.zeros(32, 12)) | {
        "control_trans.2.bias": torch.zeros(32)}), "PrefixEmbTuning"),
    "another length": (lambda f: gpt2(f, {"control_trans": torch.ones(P * 192)}, preseqlen=7), "prefix of length 7"),
    "another model": (lambda f: gpt2(f, model_type="bart"), "trained for a base model"),
    "more layers": (lambda f: gpt2(f, mlp(4)[0], n_layer=4), "num_layers is 4, GPT2LMHeadModel needs 3"),
    "sizes that are none": (lambda f: gpt2(f, n_head="4" * 9), "num_attention_heads must be a positive int, got '444"),
    "another base": (lambda f: gpt2(f, _name_or_path="a/b"), "trained for a/b, this base model is somebody/tiny"),
    "other heads": (lambda f: gpt2(f, n_head=8), "num_attention_heads is 8, GPT2LMHeadModel needs 4"),
    "a wider MLP": (lambda f: of_adapters(f, mlp(4)[0]), r"need .*\(4, 192\).* has .*\(4, 256\)"),
    "an MLP without bias": (lambda f: of_adapters(f, {"wte.weight": torch.zeros(P, 32)}), "must have wte and layers"),
    "layers that do not fit": (
        lambda f: of_adapters(f, mlp(3)[0] | {"control_trans.0.weight": torch.zeros(12, 31)}),
        "do not fit one another",
    ),
    "a gate": (lambda f: of_adapters(f, use_gating=True), "use_gating"),
    "another activation": (lambda f: of_adapters(f, non_linearity="evil"), "evil"),
    "another method": (lambda f: edited(f, config={"architecture": "lora"}), "neither PEFT's"),
    "another name": (lambda f: edited(f, name="other"), "not of the prefix 'other'"),
    "another width": (lambda f: edited(f, hidden_size=64), "trained for a base model"),
    "no values": (lambda f: cartridge(f, trainable_values=[]), "must have one shape"),
    "fewer layers": (lambda f: cartridge(f, frozen_keys=[], frozen_values=[], trainable_keys=kv(1, 4, 4, 8)[:2],
        trainable_values=kv(1, 4, 4, 8)[:2]), "num_layers is 2, GPT2LMHeadModel needs 3"),
    "a batch": (lambda f: cartridge(f, trainable_keys=kv(2, 4, 3, 8)), "must be .1, heads, tokens, head size"),
    "no tensors": (lambda f: cartridge(f, trainable_keys=["x"]), "trainable_keys.0 must be a tensor"),
    "numbers": (lambda f: cartridge(f, trainable_keys=3), "TypeError"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_files_are_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    """One ValueError that names the file; the model in memory goes on as it was."""
    (tmp_path / "good").mkdir()
    model, _ = load(gpt2(tmp_path / "good"), "gpt2")
    model.base_model.config._name_or_path = "somebody/tiny"
    with torch.no_grad():
        before = model(tokens()).logits
        (tmp_path / "bad").mkdir()
        with pytest.raises(ValueError, match=message) as caught:
            model.load_prefix(make(tmp_path / "bad"), "bad")
        assert str(tmp_path / "bad") in str(caught.value)
        assert torch.equal(model(tokens()).logits, before)
    assert model.prefix_names == ["default"]
