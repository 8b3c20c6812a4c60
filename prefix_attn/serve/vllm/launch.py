"""The command that runs vLLM's own server with prefixes: ``prefix-attn serve --engine vllm``."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.io import checkpoint, writing
from prefix_attn.hf.load import base_source, cache_folder, load_base
from prefix_attn.hf.model import PrefixModel
from prefix_attn.serve.vllm.middleware import CONNECTOR
from prefix_attn.serve.vllm.registry import Registry, Settings
from prefix_attn.serve.vllm.stored import Shape, digest_of, holds_embeddings
from prefix_attn.training.chat import Chat
from prefix_attn.training.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ENTRY = "vllm.entrypoints.openai.api_server"
# What this command says itself.
_OURS = ("--model", "--served-model-name", "--generation-config", "--kv-transfer-config", "--host", "--port")
# What would put another connector in the place of ours.
_OTHER_CONNECTORS = ("--kv-offloading-size", "--kv-offloading-backend")
CPU_CACHE = 2 << 30  # bytes
_UNLIMITED = 1 << 30  # tokens, of models that name no limit
_log = logging.getLogger(__name__)


def is_installed() -> bool:
    """Whether vLLM is there."""
    return importlib.util.find_spec("vllm") is not None


def command(
    base: str,
    prefixes: Mapping[str, Path],
    *,
    folder: Path | None = None,
    loading: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
    arguments: Sequence[str] = (),
) -> list[str]:
    """The command that serves ``prefixes`` of ``base``, which are checked.

    Args:
        base: whatever ``load_base`` takes. It is the name of the model without a prefix.
        prefixes: folder of each name. One with position_mode="none" is moved to "shift", once: a copy is kept.
        folder: as in ``Settings``.
        loading: as in ``Settings``.
        host: to listen on.
        port: to listen on.
        arguments: of vLLM, as its own command line has them.

    Raises:
        ValueError, NotImplementedError: a prefix or an argument cannot be used.
    """
    given_names = [given.split("=")[0].split(".")[0].replace("_", "-") for given in arguments]
    if taken := [own for own in _OURS if own in given_names]:
        raise ValueError(f"{taken[0]} is set by this command: leave it out")
    if other := [own for own in _OTHER_CONNECTORS if own in given_names]:
        raise ValueError(f"{other[0]} has vLLM use another KV connector, and prefixes need their own: leave it out")
    source = str(base_source(base))
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    config._name_or_path = base
    given = {name: str(folded(path, base)) for name, path in prefixes.items()}
    settings: dict[str, Any] = {"prefixes": given, "chat_stop_ids": chat_stop_ids(tokenizer)}
    settings |= {} if folder is None else {"folder": str(folder.resolve()), "loading": loading}
    Registry(Settings.of(settings), shape_of_base(config)).check()
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": "prefix_attn.serve.vllm",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": settings,
    }
    found = [sys.executable, "-m", ENTRY, "--model", source, "--served-model-name", base]
    found += ["--host", host, "--port", str(port), "--generation-config", str(generation_folder(source, tokenizer))]
    found += ["--kv-transfer-config", json.dumps(transfer), "--middleware", "prefix_attn.serve.vllm.Prefixes"]
    found += ["--enable-scale-out"]  # the middleware has the server render texts, at /render
    return [*found, *of_device(arguments), *arguments]


def of_device(arguments: Sequence[str]) -> list[str]:
    """The dtype that ``load_base`` has; on a CPU also a cache that leaves room for others. ``arguments`` go first."""
    given, on_gpu = {argument.split("=")[0] for argument in arguments}, torch.cuda.is_available()
    found = [] if "--dtype" in given else ["--dtype", "bfloat16" if on_gpu else "float32"]
    sized = {"--kv-cache-memory-bytes", "--gpu-memory-utilization", "--num-gpu-blocks-override"} & given
    if not on_gpu and not sized and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        found += ["--kv-cache-memory-bytes", str(CPU_CACHE)]  # vLLM would take 9 tenths of the machine's memory
    return found


def run(arguments: Sequence[str]) -> NoReturn:
    """Become the server. On a CPU, vLLM wants Intel's OpenMP to be loaded first, where it came with it."""
    environment = dict(os.environ)
    openmp = Path(sys.prefix, "lib", "libiomp5.so")
    if not torch.cuda.is_available():
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # cores are for others too
        if openmp.is_file():
            environment.setdefault("LD_PRELOAD", str(openmp))
    os.execve(arguments[0], list(arguments), environment)


def shape_of_base(config: PreTrainedConfig) -> Shape:
    """What a base model needs of a prefix, of its configuration. vLLM tells it anew when it starts."""
    text = config.get_text_config()
    heads, length = text.num_attention_heads, getattr(text, "max_position_embeddings", None)
    own = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(text.num_hidden_layers, own, size, config, length or _UNLIMITED)


def folded(path: Path, base: str) -> Path:
    """``path``; where it has input embeddings alone, the folder of the keys and values that ``base`` makes of them.

    Raises:
        ValueError: the file does not fit ``base``.
    """
    if not holds_embeddings(path):
        return path
    model = PrefixModel(load_base(base, device="cpu")[0])
    table, others = checkpoint.load_table(path, model.base_model)
    if others:
        raise ValueError(f"{path}: vLLM cannot serve this prefix: weights of the base model were trained with it")
    config = PrefixConfig(num_virtual_tokens=len(table), mode="embedding", position_mode="shift")
    model.add_prefix("folded", config)
    encoder, _ = model.find_prefix("folded")
    encoder.embedding.data.copy_(table)
    folder = cache_folder(f"folded-{digest_of(table)}-{_plain(base)}")
    _log.info("%s: its embeddings are folded into keys and values, in %s", path, folder)
    model.save_pretrained(folder)
    return folder


def chat_stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end the answers of chats, as the embedded engine has them."""
    try:
        return Chat(tokenizer, Prompt(template="chat")).stop_ids
    except ValueError:  # there are no chats with this model
        return []


def generation_folder(source: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with the base model's generation_config.json, and in it the end-of-text token of ``load_base``."""
    try:
        config = GenerationConfig.from_pretrained(source)
    except OSError:
        config = GenerationConfig()
    if not config.do_sample:  # vLLM would take them all the same
        config.temperature = config.top_p = config.top_k = config.min_p = None
    config.eos_token_id = tokenizer.eos_token_id
    content = json.dumps(config.to_diff_dict(), indent=2, sort_keys=True).encode()
    folder = cache_folder(f"generation-{_plain(source)}")
    folder.mkdir(parents=True, exist_ok=True)
    writing.replace(folder / "generation_config.json", content)
    return folder


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)[-80:]
