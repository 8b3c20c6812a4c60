"""Serve a prefix with every engine that is installed, and time the first answer: ``make serve``.

Or ``python examples/serve.py``. Without a prefix of ``make demo``, one is made of a sentence.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from prefix_attn import PrefixConfig, get_prefix_model
from prefix_attn.hf.load import load_base

ENGINES = {"transformers": "fastapi", "vllm": "vllm"}  # and the package that each of them needs
HOST, TEXT = "127.0.0.1", "record : operation GetObject | service Amazon S3\n=>"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="examples/serve.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="any model that prefix-attn takes")
    parser.add_argument("--prefix", type=Path, default=Path("runs/demo"), help="folder of a prefix")
    parser.add_argument("--engine", choices=ENGINES, help="this one alone")
    parser.add_argument("--port", default="8123", help="a free port")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    if not (args.prefix / "adapter_config.json").is_file():
        base, tokenizer = load_base(args.model)
        config = PrefixConfig(init="text", init_text="Describe in one sentence what the operation does.")
        get_prefix_model(base, config, tokenizer).save_pretrained(args.prefix)
    for engine, package in ENGINES.items():
        if args.engine in (None, engine) and importlib.util.find_spec(package) is not None:
            show(args.model, args.prefix, engine, args.port)


def show(model: str, prefix: Path, engine: str, port: str) -> None:
    """Start a server, ask it with and without the prefix, and stop it."""
    arguments = ["serve", model, "--prefix", f"demo={prefix}", "--engine", engine, "--port", port]
    print("$ prefix-attn", *arguments, flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "prefix_attn", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for name in ("demo", model):
            body = {"model": name, "prompt": TEXT, "max_tokens": 24, "temperature": 0}
            answer = ask(process, port, body)
            first = f" ({time.perf_counter() - start:.0f} s after the start)" if name == "demo" else ""
            print(f"{name}{first}: {answer['choices'][0]['text']!r}, {answer['usage']}", flush=True)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def ask(process: subprocess.Popen[bytes], port: str, body: dict[str, Any]) -> dict[str, Any]:
    """The server's answer, once there is a server."""
    headers = {"Content-Type": "application/json"}
    request = Request(f"http://{HOST}:{port}/v1/completions", json.dumps(body).encode(), headers)
    while True:
        try:
            with urlopen(request) as response:
                return json.load(response)
        except (URLError, ConnectionError) as error:
            if isinstance(error, HTTPError) or process.poll() is not None:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main()
