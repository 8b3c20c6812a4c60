"""Tiny random models, one per architecture, that differ where attention differs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_MULTI_HEAD = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_GEMMA = _LLAMA | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "opt": _MULTI_HEAD | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": _MULTI_HEAD,
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 6},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 16},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _LLAMA,
    "smollm3": _LLAMA,
    "gpt_oss": _LLAMA | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6},
}


def tiny(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random causal model of the architecture ``name``, in eval mode. Dropout is off unless ``changes`` set it."""
    torch.manual_seed(seed)
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {"attention_dropout": 0.0}
    off |= {"dropout": 0.0} if name == "opt" else {}
    config = AutoConfig.for_model(name, **CONFIGS[name] | off | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # the usual 0.02 makes every attention nearly uniform, and every test blind
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    """(batch, length) token ids, none of them padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch * 1000 + length))
