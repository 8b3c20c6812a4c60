"""Fused attention for learned prefixes, and the prefix tuning built on it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from prefix_attn._ops import PrefixAttentionFunction
from prefix_attn.functional import explain, prefix_attention, prefix_attention_varlen
from prefix_attn.nn import PrefixAttention

if TYPE_CHECKING:
    from prefix_attn.hf import PrefixConfig, PrefixModel, PrefixTuning, get_prefix_model, prefix_mass
    from prefix_attn.hf.accelerate import accelerate

__all__ = [
    "PrefixAttention",
    "PrefixAttentionFunction",
    "PrefixConfig",
    "PrefixModel",
    "PrefixTuning",
    "accelerate",
    "explain",
    "get_prefix_model",
    "prefix_attention",
    "prefix_attention_varlen",
    "prefix_mass",
]
__version__ = "0.1.0"
if find_spec("transformers") is None:  # `from prefix_attn import *` then takes what can be imported
    for _name in ("PrefixConfig", "PrefixModel", "PrefixTuning", "accelerate", "get_prefix_model", "prefix_mass"):
        __all__.remove(_name)


def __getattr__(name: str) -> Any:
    """Import a Hugging Face name at its first use. The operator needs torch alone."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("prefix_attn.hf.accelerate" if name == "accelerate" else "prefix_attn.hf"), name)


def __dir__() -> list[str]:
    """Every public name, imported or not."""
    return sorted({*globals(), *__all__})
