"""A prefix on weights of 4 bits."""

from __future__ import annotations

import pytest
import torch

from prefix_attn import PrefixConfig, get_prefix_model
from tests.hf.models import tokens
from tests.hf.quantised import P, bitsandbytes, errors


def test_a_gradient_gets_through_4_bit_weights() -> None:
    """On CPUs with bfloat16 units bitsandbytes packs them where a model runs in eval mode: the gradient was 0."""
    pytest.importorskip("bitsandbytes")
    assert errors(bitsandbytes("load_in_4bit"))[1] == "yes"


def test_packed_weights_are_named(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes")
    base = bitsandbytes("load_in_4bit")
    linear = next(module for module in base.modules() if hasattr(module, "support_avx512bf16_for_cpu"))
    with torch.no_grad():
        base(tokens(1, 5))
    packed = getattr(linear.weight.quant_state, "packing_format_for_cpu", False)
    get_prefix_model(base, PrefixConfig(num_virtual_tokens=P))
    assert ("Load the model anew to train" in caplog.text) == packed
