"""Fused attention for learned prefixes, and the prefix tuning built on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefix_attn._ops import PrefixAttentionFunction as PrefixAttentionFunction
from prefix_attn.functional import explain as explain
from prefix_attn.functional import prefix_attention as prefix_attention
from prefix_attn.functional import prefix_attention_varlen as prefix_attention_varlen
from prefix_attn.nn import PrefixAttention as PrefixAttention

if TYPE_CHECKING:
    from prefix_attn.hf.accelerate import accelerate as accelerate
    from prefix_attn.hf.config import PrefixConfig as PrefixConfig
    from prefix_attn.hf.embedding import PrefixTuning as PrefixTuning
    from prefix_attn.hf.mass import prefix_mass as prefix_mass
    from prefix_attn.hf.model import PrefixModel as PrefixModel
    from prefix_attn.hf.model import get_prefix_model as get_prefix_model

__version__ = "0.1.0"

_HF = {
    "PrefixConfig": "config",
    "PrefixModel": "model",
    "PrefixTuning": "embedding",
    "accelerate": "accelerate",
    "get_prefix_model": "model",
    "prefix_mass": "mass",
}


def __getattr__(name: str) -> Any:
    """The Hugging Face names, imported when first used: the operator needs torch alone."""
    if name not in _HF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"prefix_attn.hf.{_HF[name]}"), name)
