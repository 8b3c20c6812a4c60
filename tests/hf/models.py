"""Tiny random models, one per architecture, that differ where attention differs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    LlamaForCausalLM,
    PreTrainedModel,
)

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
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "scale_embedding": True,
    "dropout": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
_WHISPER = {n: v for n, v in _BART.items() if n != "max_position_embeddings"} | {
    "max_source_positions": 12,
    "max_target_positions": 64,
    "num_mel_bins": 8,
    "bos_token_id": 1,
    "begin_suppress_tokens": None,
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": _BART,
    "mbart": _BART,
    "marian": _BART,
    "pegasus": _BART,
    "m2m_100": _BART | {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "whisper": _WHISPER,
}
_BERT = _MULTI_HEAD | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT | {"pad_token_id": 1},
    "xlm-roberta": _BERT | {"pad_token_id": 1},
    "electra": _BERT | {"embedding_size": 16},
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 3,
        "n_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "seq_classif_dropout": 0.0,
        "num_labels": 3,
    },
    "modernbert": _MULTI_HEAD | {"num_labels": 3, "local_attention": 8, "global_attn_every_n_layers": 2},
}


def tiny(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of the architecture ``name``, in eval mode. Dropout is off unless ``changes`` set it."""
    torch.manual_seed(seed)
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {"attention_dropout": 0.0}
    off |= {"dropout": 0.0} if name == "opt" else {}
    kinds = {
        AutoModelForCausalLM: CONFIGS,
        AutoModelForSequenceClassification: ENCODERS,
        AutoModelForSpeechSeq2Seq: {"whisper": ENCODER_DECODERS["whisper"]},
        AutoModelForSeq2SeqLM: ENCODER_DECODERS,
    }
    kind, configs = next((kind, configs) for kind, configs in kinds.items() if name in configs)
    config = AutoConfig.for_model(name, **configs[name] | off | changes)
    return spread(kind.from_config(config).eval())


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with larger weights: the usual 0.02 makes every attention nearly uniform, and every test blind."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


# Of a model's argument and output, since transformers 5.24 and before.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    """(batch, length) token ids, none of them padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch * 1000 + length))
