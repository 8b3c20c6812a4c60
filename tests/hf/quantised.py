"""Quantised bases, with the libraries that transformers knows; tried when docs/models.md is written, where they are.

pip install torchao bitsandbytes
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from prefix_attn import PrefixConfig, get_prefix_model
from tests.hf import test_gradients  # noqa: F401  registers the attention "concatenating"
from tests.hf.models import tiny, tokens

P = 4
SIZES = {"hidden_size": 64, "intermediate_size": 64}  # blocks of bitsandbytes are of 64


def torchao(config: str) -> PreTrainedModel:
    quantization: Any = importlib.import_module("torchao.quantization")
    base = tiny("llama", **SIZES)
    quantization.quantize_(base, getattr(quantization, config)())
    return base


def bitsandbytes(option: str) -> PreTrainedModel:
    config: Any = BitsAndBytesConfig(**{option: True})
    with tempfile.TemporaryDirectory() as folder:
        tiny("llama", **SIZES).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


BASES: dict[str, tuple[str, Callable[[str], PreTrainedModel], str]] = {
    "int8 weights": ("torchao", torchao, "Int8WeightOnlyConfig"),
    "int8 weights and activations": ("torchao", torchao, "Int8DynamicActivationInt8WeightConfig"),
    "LLM.int8": ("bitsandbytes", bitsandbytes, "load_in_8bit"),
    "4-bit weights": ("bitsandbytes", bitsandbytes, "load_in_4bit"),
}


def errors(base: PreTrainedModel) -> tuple[str, str]:
    """Of logits and of the prefix's gradient, relative to concatenation; and whether the model has gradients at all."""
    model, ids = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P)).eval(), tokens(3, 11)
    leaf = model.prefixes["default"].embedding
    logits = model(ids).logits
    base.set_attn_implementation("concatenating")
    kv = model.prefixes["default"]()
    options = {"concatenated_prefix": list(zip(kv[::2], kv[1::2])), "position_ids": torch.arange(11)[None] + P}
    with model.disable_prefix():
        expected = base(ids, use_cache=False, **options).logits
    pairs = {"logits": (logits, expected)}
    weight = torch.randn_like(logits)
    try:
        wanted = torch.autograd.grad((expected * weight).sum(), leaf)[0]
    except RuntimeError:  # by concatenation there is no gradient either
        training = "not in the model"
    else:
        training = "yes"
        pairs["gradient"] = torch.autograd.grad((logits * weight).sum(), leaf)[0], wanted
    found = {name: float(((got - wanted).norm() / wanted.norm()).detach()) for name, (got, wanted) in pairs.items()}
    assert max(found.values()) <= 0.1
    return ", ".join(f"{name} {error:.0e}" for name, error in found.items()), training


def rows() -> list[str]:
    """Lines of a table. An exception is something that is wrong."""
    lines = []
    for title, (library, make, option) in BASES.items():
        version = importlib.import_module(library).__version__
        lines.append(f"| {' | '.join([title, f'{library} {version}, `{option}`', *errors(make(option))])} |")
    return lines
