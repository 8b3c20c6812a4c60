"""``prefix-attn serve`` as users start it, and what it refuses before a model is loaded."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from prefix_attn.cli.serve import named_folders, serve
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import PrefixModel, get_prefix_model
from prefix_attn.serve.load import with_prefixes
from tests.hf.models import spread, tiny
from tests.tokens import END, byte_tokenizer

SIZES = {"vocab_size": 257, "max_position_embeddings": 128, "eos_token_id": END, "pad_token_id": END}


def saved_prefix(folder: Path, **options: object) -> Path:
    model = get_prefix_model(spread(tiny("llama", **SIZES)), PrefixConfig(**options))
    torch.nn.init.normal_(next(model.prefixes["default"].parameters()).data)
    model.save_pretrained(folder)
    return folder


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    base, tokenizer = spread(tiny("llama", **SIZES | {"max_position_embeddings": 1 << 16})).eval(), byte_tokenizer()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    saved_prefix(tmp_path / "run", num_virtual_tokens=4)
    command = [sys.executable, "-m", "prefix_attn.cli", "serve", str(tmp_path / "base")]
    command += ["--prefix", f"mine={tmp_path / 'run'}", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.:]+", line)))
        body = {"model": "mine", "prompt": "hello", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        long = body | {"max_tokens": 60000, "stop_token_ids": [], "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGINT)
            assert "the server is stopping" in [line for line in lines if line][-1]
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
    model = PrefixModel.from_pretrained(base, tmp_path / "run").eval()
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert answer.json()["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["run"], "takes NAME=FOLDER"),
        (["=run"], "takes NAME=FOLDER"),
        (["a="], "takes NAME=FOLDER"),
        (["base=run"], "'base' is the model without a prefix"),
        (["a=run", "a=run"], "'a' is"),
        (["a=nowhere"], "no folder nowhere"),
    ],
)
def test_wrong_prefix_arguments_are_refused(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        named_folders(given, "base")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "sglang"}, ValueError, "'sglang' is not known: 'vllm' and 'transformers' are"),
        ({"prefix": []}, ValueError, "nothing to serve"),
        ({"prefixes": Path("nowhere")}, ValueError, "--prefixes: there is no folder nowhere"),
        ({"engine": "vllm", "max_waiting": 3}, ValueError, "--max-waiting is for --engine transformers"),
        ({"arguments": ["--block-size", "32"]}, ValueError, "'--block-size', are for --engine vllm"),
        ({"allow_loading": True}, ValueError, "--allow-loading is for --engine vllm"),
        ({"engine": "vllm"}, ModuleNotFoundError, "pip install vllm"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # vLLM is nowhere
    with pytest.raises(error, match=message):
        serve("base", **{"prefix": ["a=run"], **options})


def test_every_folder_in_a_folder_is_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("more/x", "more/y", "more/.hidden", "run"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr("prefix_attn.cli.serve._transformers", lambda *arguments: seen.extend(arguments))
    serve("base", prefix=["a=run"], prefixes=Path("more"), engine="transformers", max_batch=3)
    folders = {"a": Path("run"), "x": Path("more/x"), "y": Path("more/y")}
    assert seen == ["base", folders, "127.0.0.1", 8000, 3, 256]


def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path) -> None:
    plain = saved_prefix(tmp_path / "plain", num_virtual_tokens=4)
    gated = saved_prefix(tmp_path / "gated", num_virtual_tokens=4, gate="zero", position_mode="none")
    with pytest.raises(ValueError, match=r"one gate, got {'plain': None, 'gated': 'zero'}"):
        with_prefixes(tiny("llama", **SIZES), {"plain": plain, "gated": gated})
    with pytest.raises(NotImplementedError, match="BartForConditionalGeneration has an encoder"):
        with_prefixes(tiny("bart"), {"plain": plain})
