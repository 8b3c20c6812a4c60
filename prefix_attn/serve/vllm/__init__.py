r"""Trained prefixes on vLLM: a KV connector, and ASGI middleware for its server.

    vllm serve BASE --kv-transfer-config '{"kv_connector": "PrefixConnector",
        "kv_connector_module_path": "prefix_attn.serve.vllm", "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"prefixes": {"e2e": "runs/e2e"}}}' \
        --middleware prefix_attn.serve.vllm.Prefixes --enable-scale-out

A prompt starts with P placeholders, which take the positions 0..P-1 and the slots of the prefix in the paged cache. The
connector tells the scheduler that these tokens are computed already, and writes the keys and values of the prefix into
their slots before the forward.

vLLM shares blocks between requests by a hash of token ids and ``cache_salt``. Both of them name the content of the
prefix here (see ``choice``), and nothing else chooses it. So what is in a block follows from its hash, and no block of
one prefix is ever handed to another.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """``PrefixConnector``, which needs vLLM, and ``Prefixes``, the middleware."""
    if name == "PrefixConnector":
        from prefix_attn.serve.vllm.connector import PrefixConnector

        return PrefixConnector
    if name == "Prefixes":
        from prefix_attn.serve.vllm.middleware import Prefixes

        return Prefixes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
