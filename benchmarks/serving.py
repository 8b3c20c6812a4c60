"""A folder of prefixes behind vLLM: how long the server takes to start, what it holds, and what a first request costs.

    python -m benchmarks.serving --prefixes 1000 --out runs/serving.json

Every prefix has numbers of its own, so that none can be taken for another. Latencies are of one request at a time, for
one token: with a prefix that no request had before, with the same one again, and without a prefix. Memory is that of
all processes of the server. In the environment of ``make serve-env``. ``rates`` is another measurement: tokens a
second, see ``serving_rates``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from benchmarks import machine
from benchmarks.serving_rates import run as rates
from prefix_attn import PrefixConfig, get_prefix_model
from prefix_attn.hf.io.files import read_metadata
from prefix_attn.hf.io.stored import ADAPTER, ADAPTER_CONFIG
from prefix_attn.hf.load import load_base

HOST, PAGE = "127.0.0.1", os.sysconf("SC_PAGE_SIZE")


def make(model: str, folder: Path, number: int, length: int) -> int:
    """``number`` prefixes. Returns the bytes of one in float32."""
    base, tokenizer = load_base(model)
    prefixed = get_prefix_model(base, PrefixConfig(num_virtual_tokens=length), tokenizer)
    prefixed.save_pretrained(folder / "p0000")
    metadata, ((key, value),) = read_metadata(folder / "p0000" / ADAPTER), load_file(folder / "p0000" / ADAPTER).items()
    for i in range(1, number):
        (folder / f"p{i:04}").mkdir()
        shutil.copy(folder / "p0000" / ADAPTER_CONFIG, folder / f"p{i:04}")
        other = value + torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
        save_file({key: other}, folder / f"p{i:04}" / ADAPTER, metadata)
    return value.nbytes


def resident(group: int) -> float:
    """MB in memory of the processes of a group."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            total += (int(fields[2]) == group) * int((stat.parent / "statm").read_text().split()[1])
        except OSError:  # it has ended
            continue
    return total * PAGE / 2**20


def latency(client: httpx.Client, name: str, number: int) -> float:
    """Milliseconds until one token is there. ``number`` makes the text another one."""
    body = {"model": name, "prompt": f"{number} : Aromi | food : Italian\n=>", "max_tokens": 1, "temperature": 0}
    start = time.perf_counter()
    answer = client.post("/v1/completions", json=body)
    seconds = time.perf_counter() - start
    answer.raise_for_status()
    return 1000 * seconds


def measure(client: httpx.Client, group: int, model: str, number: int, asked: int) -> dict[str, Any]:
    """Of a server that runs."""
    latency(client, model, -1)
    found: dict[str, Any] = {"resident_mb_at_start": resident(group)}
    names = [f"p{i:04}" for i in range(0, number, max(1, number // asked))]
    kinds: dict[str, list[float]] = {"first": [], "warm": [], "without": []}
    for i, name in enumerate(names):
        for kind, asked_for in (("first", name), ("warm", name), ("without", model)):
            kinds[kind].append(latency(client, asked_for, 3 * i + list(kinds).index(kind)))
    found |= {f"{kind}_ms": spread(times) for kind, times in kinds.items()} | {"resident_mb_after": resident(group)}
    found["first_minus_warm_ms"] = spread([first - warm for first, warm in zip(kinds["first"], kinds["warm"])])
    lines = re.findall(r"^vllm:prefix_attn_(\w+)_total{.*} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return found | {"counts": {name: float(value) for name, value in lines}}


def spread(values: list[float]) -> dict[str, float]:
    """The least, the quartiles and the most."""
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    return {"min": min(values), **dict(zip(("25%", "50%", "75%"), quarters)), "max": max(values)}


def serve(model: str, folder: Path, number: int, asked: int, port: str) -> dict[str, Any]:
    """Start a server, measure it and stop it."""
    command = [sys.executable, "-m", "prefix_attn", "serve", model, "--engine", "vllm", "--port", port]
    command += ["--prefixes", str(folder), "--", "--max-model-len", "512", "--block-size", "32", "--enforce-eager"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://{HOST}:{port}", timeout=600) as client:
            wait(client, process)
            seconds = time.perf_counter() - start
            return {"seconds_to_start": seconds} | measure(client, process.pid, model, number, asked)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("folder", "rates"), default="folder")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prefixes", type=int, default=1000, help="in the folder")
    parser.add_argument("--length", type=int, default=16, help="P of those in the folder")
    parser.add_argument("--asked", type=int, default=200, help="of how many a first request is timed")
    parser.add_argument("--starts", type=int, default=1, help="servers that are started on the folder")
    parser.add_argument("--port", default="8124")
    parser.add_argument("--rounds", type=int, default=3, help="of rates")
    parser.add_argument("--requests", type=int, default=32, help="of a round of rates")
    parser.add_argument("--tokens", type=int, default=48, help="of a request of rates")
    parser.add_argument("--out", type=Path, default=Path("runs/serving.json"))
    args = parser.parse_args()
    if args.what == "rates":
        return rates(args.model, args.requests, args.tokens, args.rounds, args.out)
    with tempfile.TemporaryDirectory() as temporary:
        found: dict[str, Any] = {"prefixes": args.prefixes, "length": args.length, "model": args.model}
        found["bytes_each"] = make(args.model, Path(temporary), args.prefixes, args.length)
        found["machine"], found["starts"] = machine.describe("cpu"), []
        for _ in range(args.starts):
            one = serve(args.model, Path(temporary), args.prefixes, args.asked, args.port)
            found["starts"].append(one | {"load": os.getloadavg()[0]})
            print(json.dumps(found["starts"][-1], indent=2), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    return None


def wait(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    """Until the server answers."""
    while True:
        try:
            client.get("/health").raise_for_status()
            return
        except httpx.HTTPError:
            if process.poll() is not None:
                raise SystemExit("the server has ended") from None
            time.sleep(0.5)


if __name__ == "__main__":
    main()
