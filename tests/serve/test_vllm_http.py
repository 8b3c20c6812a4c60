"""``prefix-attn serve --engine vllm`` as users start it, and 32 clients of it. ``make serve-test``."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from benchmarks.serving import resident
from prefix_attn.serve.vllm.launch import chat_stop_ids
from tests.serve.vllm_world import EIGHT, NEW, Job, World, make_world

pytestmark = pytest.mark.vllm
HOST = "127.0.0.1"
BLOCKS = 160  # in the cache: fewer than 200 requests fill, so that blocks are evicted and requests preempted
# MB in 200 requests. vLLM's own worker grows by 20 to 60, also by requests without a prefix. The prefixes of so many
# requests, kept once for each, would be 300.
GROWTH = 80
PATIENCE = 1800.0  # seconds, for a server that starts on a busy machine


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> None:
    """Not here: the model runs in another process."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(os.environ.get("SERVE_TEST_BASE", "smollm2"), tmp_path_factory.mktemp("world"), EIGHT)


@pytest.fixture(scope="module")
def folder(world: World) -> Path:
    """With one more prefix, which no option names."""
    found = world.folders["a"].parent.parent / "more"
    shutil.copytree(world.folders["b"], found / "b2")
    return found


@pytest.fixture(scope="module")
def server(world: World, folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process, and its port."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "prefix_attn.cli", "serve", world.base, "--engine", "vllm", "--port", str(port)]
    for name, path in world.folders.items():
        command += ["--prefix", f"{name}={path}"]
    command += ["--prefixes", str(folder), "--allow-loading", "--max-batch", "32", "--"]
    command += ["--max-model-len", "1024", "--block-size", "32", "--enforce-eager", "--enable-prompt-tokens-details"]
    command += ["--num-gpu-blocks-override", str(BLOCKS)]
    with (folder.parent / "log").open("w") as log:  # what the server says
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        yield process, port
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers, if it left some


@pytest.fixture(scope="module")
def client(server: tuple[subprocess.Popen[str], int], folder: Path) -> Iterator[httpx.Client]:
    process, port = server
    """Once it answers."""
    url, start = f"http://{HOST}:{port}", time.monotonic()
    with httpx.Client(base_url=url, timeout=PATIENCE, limits=httpx.Limits(max_connections=64)) as client:
        while True:
            try:
                assert client.get("/health").status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None, (folder.parent / "log").read_text()[-4000:]
                assert time.monotonic() - start < PATIENCE
                time.sleep(1)
        yield client


def body_of(job: Job, world: World, **options: Any) -> dict[str, Any]:
    return {
        "model": job.prefix or world.base,
        "prompt": job.ids,
        "max_tokens": NEW,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    } | options


def equal(client: httpx.Client, world: World) -> int:
    """How many answers to 32 clients are those of generate."""

    def ask(job: Job) -> bool:
        answer = client.post("/v1/completions", json=body_of(job, world)).json()
        (choice,) = answer["choices"]
        usage = answer["usage"]
        assert answer["model"] == (job.prefix or world.base)
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(job.ids), NEW)
        assert usage["total_tokens"] == len(job.ids) + NEW
        assert choice["prompt_token_ids"] == job.ids
        return choice["token_ids"] == job.wanted

    with ThreadPoolExecutor(32) as clients:
        return sum(clients.map(ask, world.jobs))


def counted(client: httpx.Client, name: str) -> float:
    lines = re.findall(rf"^vllm:prefix_attn_{name}_total{{.*}} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return sum(map(float, lines))


def test_32_clients(client: httpx.Client, world: World) -> None:
    for _ in range(2):
        assert equal(client, world) == 32
    requests = counted(client, "injections") + counted(client, "hits")
    assert requests == 60 and counted(client, "refused") == counted(client, "failures") == 0
    assert counted(client, "bytes") > 0 and counted(client, "reads") == len(EIGHT)


def written(world: World, name: str | None, ids: list[int], ends: list[int] | None = None) -> str:
    """What generate writes. Of a character whose last bytes do not come, vLLM writes nothing."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": ends}
    found = world.model.generate(torch.tensor([ids]), prefix_names=[name], **options)
    return world.tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True).rstrip("\ufffd")


@pytest.mark.parametrize("name", ["c", "b2", None])
def test_texts_chats_and_streams(name: str | None, client: httpx.Client, world: World) -> None:
    text, model, same = world.jobs[0].text, name or world.base, name if name != "b2" else "b"
    body = {"model": model, "prompt": text, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    wanted = written(world, same, world.jobs[0].ids)
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"].rstrip("\ufffd") == wanted
    streamed = ""
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert event["model"] == model
                streamed += event["choices"][0]["text"]
    assert streamed.rstrip("\ufffd") == wanted
    messages = [{"role": "user", "content": text}]
    ids = world.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    body = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] == len(ids) and answer["model"] == model
    wanted = written(world, same, list(ids), chat_stop_ids(world.tokenizer))
    assert answer["choices"][0]["message"]["content"].rstrip("\ufffd") == wanted


def test_what_is_refused(client: httpx.Client, world: World) -> None:
    job = world.jobs[2]  # of "c", which has 64 tokens
    for body, status in (
        ({"model": "nobody"}, 404),
        ({"kv_transfer_params": {"prefix": "a"}}, 400),
        ({"cache_salt": "prefix_attn:x"}, 400),
        ({"prompt": ""}, 400),
        ({"prompt_logprobs": 1}, 400),
        ({"prompt": [5] * 950}, 400),
    ):
        assert client.post("/v1/completions", json=body_of(job, world) | body).status_code == status, body
    assert equal(client, world) == 32


def test_clients_that_leave(
    server: tuple[subprocess.Popen[str], int], client: httpx.Client, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice 200 requests, a third of which are cancelled in their stream: nothing crosses, and nothing is kept."""

    def ask(number: int) -> bool:
        job = world.jobs[number % 32]
        body = body_of(job, world, max_tokens=24)
        if number % 3:
            answer = client.post("/v1/completions", json=body).json()
            return answer["choices"][0]["token_ids"] == job.wanted[:24]
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            lines = (line for line in stream.iter_lines() if line)
            first, *_ = islice(lines, 1 + number % 5)
            return first.startswith("data: {")

    touch_the_cache(client, world)
    held = []
    for _ in range(2):
        with ThreadPoolExecutor(32) as clients:
            assert sum(clients.map(ask, range(200))) == 200
        wait_until_idle(client)
        held.append(resident(server[0].pid))
    with capsys.disabled():
        sys.stdout.write(f"\nresident after each 200 requests: {held} MB\n")
    assert held[1] - held[0] < GROWTH
    assert equal(client, world) == 32


def touch_the_cache(client: httpx.Client, world: World) -> None:
    """Write to every block once: the system counts memory from then on."""
    for number in range(6):
        ids = [(7 * i + number) % 250 for i in range(900)]
        body = {"model": world.base, "prompt": ids, "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == 200


def wait_until_idle(client: httpx.Client) -> None:
    """Until no request runs or waits, and every block of the cache is free. A cancelled request takes a moment."""
    end = time.monotonic() + 60
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while (busy := [gauge(client, name) for name in gauges]) != [0, 0, 0]:
        assert time.monotonic() < end, busy
        time.sleep(0.2)


def gauge(client: httpx.Client, name: str) -> float:
    lines = re.findall(rf"^vllm:{name}{{.*}} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert lines, name
    return sum(map(float, lines))


def test_prefixes_come_and_go(client: httpx.Client, world: World, folder: Path) -> None:
    """Another file under the same name: nothing that was computed with the old one is found again."""
    job = next(job for job in world.jobs if job.prefix == "d")
    body = body_of(job, world) | {"model": "new"}

    def tokens() -> list[int]:
        return client.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]

    assert client.post("/v1/completions", json=body).status_code == 404
    for name in ("d", "b"):
        load = {"prefix_name": "new", "prefix_path": str(world.folders[name]), "load_inplace": True}
        assert client.post("/v1/load_prefix", json=load).status_code == 200
        assert "new" in [model["id"] for model in client.get("/v1/models").json()["data"]]
        for _ in range(2):
            assert (tokens() == job.wanted) is (name == "d")
    assert client.post("/v1/unload_prefix", json={"prefix_name": "new"}).status_code == 200
    assert client.post("/v1/completions", json=body).status_code == 404
    assert sorted(os.listdir(folder)) == ["b2"]
