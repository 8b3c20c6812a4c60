"""Which vLLM servers can have prefixes, and the command that starts one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefix_attn.hf.embedding import PrefixTuning
from prefix_attn.hf.model import PrefixModel
from prefix_attn.serve.vllm.launch import chat_stop_ids, command, folded, of_device
from prefix_attn.serve.vllm.limits import check_layer, check_server
from prefix_attn.serve.vllm.stored import read
from tests.hf.models import spread, tiny, tokens
from tests.numerics import MODEL, close_in_norm
from tests.serve.test_vllm_prefixes import SIZES, saved, shape
from tests.tokens import END, byte_tokenizer


def server(**changes: Any) -> Any:
    """A ``VllmConfig``, as far as it is read."""
    fields = {
        "runner_type": "generate",
        "is_encoder_decoder": False,
        "use_mla": False,
        "is_hybrid": False,
        "is_attention_free": False,
        "uses_alibi": False,
        "uses_mrope": False,
        "get_diff_sampling_param": lambda: changes.get("sampling", {}),
    }
    model = SimpleNamespace(**{name: changes.get(name, value) for name, value in fields.items()})
    parallel = SimpleNamespace(pipeline_parallel_size=changes.get("pipeline", 1))
    policy = SimpleNamespace(kv_load_failure_policy=changes.get("policy", "fail"))
    pages = {"cache_dtype": changes.get("dtype", "auto"), "calculate_kv_scales": changes.get("scales", False)}
    return SimpleNamespace(
        cache_config=SimpleNamespace(**pages),
        model_config=model,
        parallel_config=parallel,
        speculative_config=changes.get("speculative"),
        kv_transfer_config=policy,
    )


def cache(kind: str = "FullAttentionSpec", groups: int = 1, **window: int) -> Any:
    spec = type(kind, (), {"sliding_window": None, "attention_chunk_size": None} | window)()
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=["layers.0"])] * groups)


@pytest.mark.parametrize(
    ("config", "pages", "reason"),
    [
        (server(pipeline=2), cache(), "pipeline_parallel_size is 2"),
        (server(speculative=object()), cache(), "speculative decoding"),
        (server(dtype="int8_per_token_head"), cache(), "kv_cache_dtype is 'int8_per_token_head'"),
        (server(dtype="fp8", scales=True), cache(), "calculate_kv_scales"),
        (server(policy="recompute"), cache(), "kv_load_failure_policy is 'recompute'"),
        (server(sampling={"repetition_penalty": 1.1}), cache(), "repetition_penalty 1.1"),
        (server(runner_type="pooling"), cache(), "'pooling'"),
        (server(is_encoder_decoder=True), cache(), "an encoder"),
        (server(use_mla=True), cache(), "latent"),
        (server(is_hybrid=True), cache(), "layers without attention"),
        (server(uses_alibi=True), cache(), "ALiBi"),
        (server(uses_mrope=True), cache(), "more than one dimension"),
        (server(), cache("SlidingWindowSpec"), "layers.0 have a SlidingWindowSpec"),
        (server(), cache("MLAAttentionSpec"), "have a MLAAttentionSpec"),
        (server(), cache(sliding_window=8), "attend to a window"),
        (server(), cache(attention_chunk_size=8), "attend to a window"),
        (server(), cache(groups=2), "2 groups"),
        (server(pipeline=2, uses_alibi=True), cache(), "pipeline.*ALiBi"),  # all reasons at once
    ],
)
def test_servers_that_would_answer_wrongly_are_refused(config: Any, pages: Any, reason: str) -> None:
    for dtype in ("auto", "bfloat16", "fp8"):
        check_server(server(dtype=dtype), cache())
    with pytest.raises(NotImplementedError, match=reason):
        check_server(config, pages)


def test_layers_that_cannot_be_written_to_are_refused() -> None:
    def layer(**changes: Any) -> Any:
        impl = {"do_kv_cache_update": print, "alibi_slopes": None, "sliding_window": (-1, -1)}
        impl |= {name: value for name, value in changes.items() if name in impl}
        impl = {name: value for name, value in impl.items() if value != "missing"}
        return SimpleNamespace(impl=SimpleNamespace(**impl), num_kv_heads=changes.get("heads", 2))

    check_layer("layers.0", layer(), 2)
    for changes, reason in (
        ({"do_kv_cache_update": "missing"}, "no do_kv_cache_update"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"sliding_window": (7, 0)}, r"a window of \(7, 0\)"),
        ({"heads": 3}, "3 key/value heads here, and 2"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            check_layer("layers.0", layer(**changes), 2)


def at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model in a folder, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    spread(tiny("llama", **SIZES)).save_pretrained(folder / "base")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def test_input_embeddings_are_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's file has keys and values, and the same answers."""
    base = at_home(tmp_path, monkeypatch)
    model = spread(tiny("llama", **SIZES)).from_pretrained(base)
    tuned, ids = PrefixTuning(model, 4, 32).eval(), tokens() % 257
    tuned.save_pretrained(tmp_path / "table")
    with torch.no_grad():
        wanted = tuned(ids).logits
    options = dict(pairwise(command(str(base), {"mine": tmp_path / "table"})))
    extra = json.loads(options["--kv-transfer-config"])["kv_connector_extra_config"]
    folder = Path(extra["prefixes"]["mine"])
    assert folder == folded(tmp_path / "table", str(base)) and read(folder, shape()).length == 4
    assert folded(folder, str(base)) == folder
    other = PrefixModel.from_pretrained(type(model).from_pretrained(base), folder).eval()
    with torch.no_grad():
        close_in_norm(other(ids).logits, wanted, MODEL)


def test_the_command_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, prefix = at_home(tmp_path, monkeypatch), saved(tmp_path / "run")
    found = command(str(base), {"mine": prefix}, port=1, arguments=["--max-model-len", "64"])
    assert found[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    options = dict(pairwise(found))
    assert options["--model"] == options["--served-model-name"] == str(base)
    transfer = json.loads(options["--kv-transfer-config"])
    assert transfer["kv_connector_extra_config"] == {"prefixes": {"mine": str(prefix)}, "chat_stop_ids": [END]}
    assert options["--dtype"] == "float32" and options["--max-model-len"] == "64"
    assert options["--middleware"] == "prefix_attn.serve.vllm.Prefixes"
    config = json.loads(Path(options["--generation-config"], "generation_config.json").read_text())
    assert config["eos_token_id"] == END
    for given, reason in (
        ("--served_model_name=x", "--served-model-name is set by this command"),
        ("--kv-transfer-config.kv_connector", "--kv-transfer-config is set by this command"),
        ("--kv_offloading_size=4", "--kv-offloading-size has vLLM use another KV connector"),
    ):
        with pytest.raises(ValueError, match=reason):
            command(str(base), {"mine": prefix}, arguments=[given])
    with pytest.raises(ValueError, match="it has a gate"):
        command(str(base), {"mine": saved(tmp_path / "gated", gate="zero")})


def test_arguments_come_before_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dtype, room = ["--dtype", "float32"], ["--kv-cache-memory-bytes", str(2 << 30)]
    assert of_device([]) == [*dtype, *room]
    assert of_device(["--dtype=bfloat16"]) == room
    assert of_device(["--num-gpu-blocks-override", "48"]) == of_device(["--kv-cache-memory-bytes=1"]) == dtype
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert of_device([]) == dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert of_device([]) == ["--dtype", "bfloat16"]


def test_chats_end_where_the_template_ends_an_answer() -> None:
    tokenizer = byte_tokenizer()
    assert chat_stop_ids(tokenizer) == []
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    assert chat_stop_ids(tokenizer) == [END]
