"""Tiny models of any architecture and head, and what their inputs are when virtual tokens are put in by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.hf.models import CONFIGS, VOCABULARY, tiny

P, WIDTH = 4, 32
SIZES = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "d_kv": 8,
    "rotary_dim": 4,
    "max_seq_len": 64,
    "decoder_start_token_id": 0,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 6,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_state": 4,
    "mamba_chunk_size": 8,
    **dict.fromkeys(("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"), 0.0),
    **dict.fromkeys(("dropout", "activation_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
}


def other(name: str, auto: Any, **changes: Any) -> PreTrainedModel:
    """A tiny random model of any architecture and head."""
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(name, **SIZES | changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def causal(name: str, **changes: Any) -> PreTrainedModel:
    """Of CONFIGS or not; Gemma 2 with the softcap that its default attention leaves out."""
    if name not in CONFIGS:
        return other(name, AutoModelForCausalLM, **changes)
    return tiny(name, **({"attn_implementation": "eager"} if name == "gemma2" else {}) | changes)


def concatenated(base: PreTrainedModel, table: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What the plain model would be given by hand."""
    embeddings = base.get_input_embeddings()(ids)
    return {
        "inputs_embeds": torch.cat([table.expand(len(ids), -1, -1).to(embeddings), embeddings], dim=1),
        "attention_mask": torch.cat([mask.new_ones(len(ids), P), mask], dim=1),
    }


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()
