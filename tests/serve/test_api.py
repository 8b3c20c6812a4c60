"""OpenAI's API over the embedded engine: every answer is what ``generate`` writes with the prefix that was named."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import torch

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import PrefixModel
from prefix_attn.serve.api import make_app
from prefix_attn.serve.engine import Engine
from tests.hf.models import spread, tiny
from tests.tokens import END, byte_tokenizer

SIZES = {"vocab_size": 257, "max_position_embeddings": 128, "eos_token_id": END, "pad_token_id": END}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
PREFIXES: dict[str, dict[str, Any]] = {
    "short": {"num_virtual_tokens": 3},
    "long": {"num_virtual_tokens": 9},
    "still": {"num_virtual_tokens": 5, "position_mode": "none"},
    "infix": {"num_virtual_tokens": 4, "mode": "infix"},
}
NAMES = [*PREFIXES, None]


@pytest.fixture(scope="module")
def model() -> PrefixModel:
    torch.manual_seed(0)
    model = PrefixModel(spread(tiny("llama", **SIZES)))
    for name, options in PREFIXES.items():
        model.add_prefix(name, PrefixConfig(**options))
        for parameter in model.prefixes[name].parameters():
            torch.nn.init.normal_(parameter.data)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@asynccontextmanager
async def served(model: PrefixModel, tokenizer: Any, **options: int) -> AsyncIterator[httpx.AsyncClient]:
    app = make_app(Engine(model, tokenizer, **options), list(PREFIXES), "base")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=60) as client,
    ):
        yield client


@pytest.fixture
def ask(model: PrefixModel, tokenizer: Any) -> Callable[..., Any]:
    """Run ``questions`` against a server."""

    def run(questions: Callable[[httpx.AsyncClient], Awaitable[Any]], **options: int) -> Any:
        async def inside() -> Any:
            async with served(model, tokenizer, **options) as client:
                return await questions(client)

        return asyncio.run(inside())

    return run


def reference(model: PrefixModel, tokenizer: Any, name: str | None, prompt: str, tokens: int) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    context = model.disable_prefix if name is None else None
    if context:
        with context():
            out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    else:
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False, prefix_names=[name])
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_many_clients_get_what_generate_writes(model: PrefixModel, tokenizer: Any, ask: Any) -> None:
    """Requests come while others run, join their batches, and leave them at different times."""
    jobs = [(NAMES[i % 5], f"prompt {i}" * (1 + i % 3), 3 + 5 * (i % 4)) for i in range(20)]

    async def questions(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        async def one(i: int, name: str | None, prompt: str, tokens: int) -> dict[str, Any]:
            await asyncio.sleep(0.01 * i)
            body = {"model": name or "base", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            return (await client.post("/v1/completions", json=body)).json()

        return await asyncio.gather(*(one(i, *job) for i, job in enumerate(jobs)))

    answers = ask(questions, max_batch=4)
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts == [reference(model, tokenizer, *job) for job in jobs]
    assert len(set(texts)) > 15
    for (name, prompt, tokens), answer in zip(jobs, answers, strict=True):
        assert answer["model"] == (name or "base")
        assert answer["usage"]["prompt_tokens"] == len(prompt)  # one token a byte; the prefix is no text
        assert answer["usage"]["total_tokens"] == len(prompt) + answer["usage"]["completion_tokens"]
        assert answer["usage"]["completion_tokens"] <= tokens
        assert answer["choices"][0]["finish_reason"] in ("length", "stop")


def events(text: str) -> Iterator[dict[str, Any]]:
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return (json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_streams_and_whole_answers_are_the_same(model: PrefixModel, tokenizer: Any, ask: Any) -> None:
    async def questions(client: httpx.AsyncClient) -> Any:
        chat = {"model": "long", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 12}
        text = {"model": "infix", "prompt": ["ab", "abcd"], "temperature": 0, "max_tokens": 12}
        found = []
        for path, body in (("chat/completions", chat), ("completions", text)):
            whole = (await client.post(f"/v1/{path}", json=body)).json()
            more = {"stream": True, "stream_options": {"include_usage": True}}
            found.append((whole, (await client.post(f"/v1/{path}", json=body | more)).text))
        return found

    (chat, chat_stream), (text, text_stream) = ask(questions)
    parts = list(events(chat_stream))
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    written = "".join(part["choices"][0]["delta"].get("content", "") for part in parts if part["choices"])
    assert written == chat["choices"][0]["message"]["content"] == reference(model, tokenizer, "long", "u:hi|a:", 12)
    assert parts[-1]["usage"] == chat["usage"]
    assert parts[-2]["choices"][0]["finish_reason"] == chat["choices"][0]["finish_reason"]
    parts = list(events(text_stream))
    for index, choice in enumerate(text["choices"]):
        mine = [c["text"] for part in parts for c in part["choices"] if c["index"] == index]
        assert "".join(mine) == choice["text"] == reference(model, tokenizer, "infix", ("ab", "abcd")[index], 12)
    assert parts[-1]["usage"] == text["usage"]


def test_models_and_unknown_names(ask: Any) -> None:
    async def questions(client: httpx.AsyncClient) -> Any:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/long")).json()
        wrong = [
            await client.get("/v1/models/nobody"),
            await client.post("/v1/completions", json={"model": "nobody", "prompt": "a"}),
            await client.post(
                "/v1/chat/completions", json={"model": "", "messages": [{"role": "user", "content": "a"}]}
            ),
        ]
        return listed, one, wrong

    listed, one, wrong = ask(questions)
    assert [model["id"] for model in listed["data"]] == ["base", *PREFIXES]
    assert one["parent"] == "base"
    for answer in wrong:
        assert answer.status_code == 404
        assert "['base', 'short', 'long', 'still', 'infix']" in answer.json()["error"]["message"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": []}, "empty list"),
    ({"prompt": [5, 257]}, "257 is no token"),
    ({"prompt": "a" * 130}, "leaves room for 0"),
    ({"prompt": "a" * 100, "max_tokens": 26}, "behind a prefix of 3 leaves room for 25, and 26"),
    ({"max_tokens": 0}, "max_tokens: "),
    ({"temperature": -1}, "temperature: "),
    ({"top_p": 0}, "top_p: "),
    ({"n": 0}, "n: "),
    ({"stop": ""}, "stop: "),
    ({"logprobs": 3}, "logprobs is not supported"),
    ({"echo": True}, "echo is not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
    ({"kv_transfer_params": {"prefix": "long"}}, "kv_transfer_params is not supported"),
    ({"seed": "x"}, "seed: "),
]


def test_what_is_not_done_is_refused(ask: Any) -> None:
    async def questions(client: httpx.AsyncClient) -> list[httpx.Response]:
        body = {"model": "short", "prompt": "a"}
        return [await client.post("/v1/completions", json=body | wrong) for wrong, _ in REFUSED]

    for answer, (wrong, message) in zip(ask(questions), REFUSED, strict=True):
        assert answer.status_code == 400, wrong
        assert message in answer.json()["error"]["message"], wrong


def test_stops_seeds_and_sampling(model: PrefixModel, tokenizer: Any, ask: Any) -> None:
    text = reference(model, tokenizer, "short", "abc", 24)
    stop = next(text[i : i + 2] for i in range(3, 20) if text[i : i + 2].isprintable() and text[i : i + 2].isascii())

    async def questions(client: httpx.AsyncClient) -> list[Any]:
        body = {"model": "short", "prompt": "abc", "max_tokens": 24}
        bodies = [
            body | {"temperature": 0, "stop": [stop, "never there"]},
            body | {"temperature": 0, "stop": stop, "stream": True},
            *(body | {"seed": seed, "top_k": 50, "top_p": 0.9, "min_p": 0.01} for seed in (1, 1, 2)),
            body | {"top_k": 1},
            body | {"n": 3, "seed": 1, "temperature": 1.5},
        ]
        return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    stopped, streamed, first, again, other, likeliest, three = ask(questions)
    expected = text[: text.find(stop)]
    assert stopped.json()["choices"][0]["text"] == expected
    assert stopped.json()["choices"][0]["finish_reason"] == "stop"
    assert "".join(c["text"] for part in events(streamed.text) for c in part["choices"]) == expected
    drawn = [answer.json()["choices"][0]["text"] for answer in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert likeliest.json()["choices"][0]["text"] == text
    assert len({choice["text"] for choice in three.json()["choices"]}) == 3


def test_a_full_queue_answers_429_and_a_client_that_left_makes_room(model: PrefixModel, tokenizer: Any) -> None:
    """The engine is held in its first step, so that what waits is known."""
    held, inside = threading.Event(), threading.Event()
    original = model.generate

    def slow(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        assert held.wait(30)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixModel, "generate", lambda self, *args, **kwargs: slow(*args, **kwargs))

        async def run() -> Any:
            async with served(model, tokenizer, max_batch=1, max_waiting=2) as client:
                body = {"model": "short", "prompt": "abc", "max_tokens": 100, "temperature": 0}
                running = [asyncio.create_task(client.post("/v1/completions", json=body))]
                await asyncio.to_thread(inside.wait, 30)
                running += [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(2)]
                await asyncio.sleep(0.2)
                refused = await client.post("/v1/completions", json=body)
                running[1].cancel()
                held.set()
                done = await asyncio.gather(*running, return_exceptions=True)
                return refused, done, await client.post("/v1/completions", json=body)

        refused, done, last = asyncio.run(run())
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert isinstance(done[1], asyncio.CancelledError)
    assert done[0].json()["choices"] == done[2].json()["choices"] == last.json()["choices"]


def test_a_failed_batch_is_an_error_and_the_server_goes_on(model: PrefixModel, tokenizer: Any, ask: Any) -> None:
    original, count = PrefixModel.generate, iter(range(10))

    def fails_once(self: PrefixModel, *args: Any, **kwargs: Any) -> Any:
        if next(count) == 0:
            raise RuntimeError("out of memory")
        return original(self, *args, **kwargs)

    async def questions(client: httpx.AsyncClient) -> Any:
        body = {"model": "short", "prompt": "abc", "max_tokens": 4, "temperature": 0}
        return [await client.post("/v1/completions", json=body) for _ in range(2)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixModel, "generate", fails_once)
        failed, fine = ask(questions)
    assert failed.status_code == 500
    assert "out of memory" in failed.json()["error"]["message"]
    assert fine.json()["choices"][0]["text"] == reference(model, tokenizer, "short", "abc", 4)
