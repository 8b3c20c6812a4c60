"""What of a vLLM server cannot be combined with prefixes. Every reason is named when it starts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from prefix_attn.serve.vllm.stored import Shape

# Of --kv-cache-dtype: those into which vLLM's layers round each number by itself, with a scale that stays.
CACHES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


def shape_of(config: Any) -> Shape:
    """What the model of a ``VllmConfig`` needs of a prefix."""
    model = config.model_config
    base = copy.copy(model.hf_config)
    names = model.served_model_name
    base._name_or_path = names[0] if isinstance(names, list) else names or model.model
    return Shape(
        model.get_total_num_hidden_layers(),
        model.get_total_num_kv_heads(),
        model.get_head_size(),
        base,
        model.max_model_len,
    )


def check_server(config: Any, cache: Any) -> None:
    """Refuse a ``VllmConfig`` and a ``KVCacheConfig`` with which answers would be wrong.

    Raises:
        NotImplementedError: with all reasons.
    """
    if reasons := [*_of_server(config), *_of_model(config.model_config), *_of_cache(cache)]:
        raise NotImplementedError(f"prefixes cannot be served here: {'; '.join(reasons)}")


def _of_server(config: Any) -> Iterator[str]:
    parallel = config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) > 1:
            yield f"{name} is {size}, and only 1 is supported"
    if config.speculative_config is not None:
        yield "speculative decoding: a draft model has no prefix"
    if (kind := config.cache_config.cache_dtype) not in CACHES:
        yield f"kv_cache_dtype is {kind!r}, which was never tried with prefixes: {CACHES} are known"
    if getattr(config.cache_config, "calculate_kv_scales", False):  # of older versions
        yield "calculate_kv_scales would find scales for a cache that holds prefixes already"
    if (policy := config.kv_transfer_config.kv_load_failure_policy) != "fail":
        yield f"kv_load_failure_policy is {policy!r}, and would run placeholders as text: 'fail' is needed"
    if (penalty := config.model_config.get_diff_sampling_param().get("repetition_penalty", 1)) != 1:
        yield (
            f"the model's generation_config has repetition_penalty {penalty}, which would count placeholders: "
            """--override-generation-config '{"repetition_penalty": 1.0}' works"""
        )


def _of_model(model: Any) -> Iterator[str]:
    if model.runner_type != "generate":
        yield f"the server runs {model.runner_type!r} and not 'generate'"
    if model.is_encoder_decoder:
        yield "the model has an encoder"
    if model.use_mla:
        yield "the model has multi-head latent attention, whose cache holds no keys and values"
    if model.is_hybrid or model.is_attention_free:
        yield "the model has layers without attention, whose state a prefix does not set"
    if model.uses_alibi:
        yield "the model has ALiBi, which moves a prefix away from its text as that grows"
    if model.uses_mrope:
        yield "the model has positions of more than one dimension"


def _of_cache(cache: Any) -> Iterator[str]:
    for group in cache.kv_cache_groups:
        spec = group.kv_cache_spec
        if type(spec).__name__ != "FullAttentionSpec":
            yield f"layers such as {group.layer_names[0]} have a {type(spec).__name__}: full attention is needed"
        elif spec.sliding_window is not None or spec.attention_chunk_size is not None:
            yield f"layers such as {group.layer_names[0]} attend to a window, which the prefix would leave"
    if len(cache.kv_cache_groups) != 1:
        yield f"the cache has {len(cache.kv_cache_groups)} groups of layers, and 1 is needed"


def check_layer(name: str, layer: Any, heads: int) -> None:
    """Refuse a layer to whose cache keys and values cannot be written.

    Raises:
        NotImplementedError: with the reason.
    """
    impl = layer.impl
    if not hasattr(impl, "do_kv_cache_update"):
        raise NotImplementedError(f"{name}: {type(impl).__name__} has no do_kv_cache_update: take another backend")
    if getattr(impl, "alibi_slopes", None) is not None:
        raise NotImplementedError(f"{name} has ALiBi, which moves a prefix away from its text as that grows")
    if getattr(impl, "sliding_window", None) not in (None, -1, (-1, -1)):
        raise NotImplementedError(f"{name} attends to a window of {impl.sliding_window}, which the prefix would leave")
    if layer.num_kv_heads != heads:
        raise NotImplementedError(f"{name} has {layer.num_kv_heads} key/value heads here, and {heads} were expected")
