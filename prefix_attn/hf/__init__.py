"""Prefix tuning of Hugging Face models.

The names below are public, and so are the modules ``load`` (base models) and ``edit`` (prefixes made of others). Each
name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefix_attn.hf.config import PrefixConfig
    from prefix_attn.hf.embedding import PrefixTuning
    from prefix_attn.hf.encoder import PrefixEncoder
    from prefix_attn.hf.io.convert import convert
    from prefix_attn.hf.load import load_base
    from prefix_attn.hf.mass import prefix_mass
    from prefix_attn.hf.model import PrefixModel, get_prefix_model

__all__ = [
    "PrefixConfig",
    "PrefixEncoder",
    "PrefixModel",
    "PrefixTuning",
    "convert",
    "get_prefix_model",
    "load_base",
    "prefix_mass",
]
_MODULES = {
    "PrefixConfig": "config",
    "PrefixEncoder": "encoder",
    "PrefixModel": "model",
    "PrefixTuning": "embedding",
    "convert": "io.convert",
    "get_prefix_model": "model",
    "load_base": "load",
    "prefix_mass": "mass",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Every public name, imported or not."""
    return sorted({*globals(), *__all__})
