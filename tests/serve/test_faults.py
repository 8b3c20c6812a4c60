"""What goes wrong for one client, and what the others see of it: nothing."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from typing import Any

import httpx
import pytest
import torch
from starlette.requests import ClientDisconnect

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import PrefixModel
from prefix_attn.serve.api import Pieces, make_app
from prefix_attn.serve.engine import Busy, Engine, Stopping
from prefix_attn.serve.prompts import Prompts
from prefix_attn.serve.request import Generation, Piece, Sampling, held_back
from tests.hf.models import spread, tiny
from tests.tokens import END, byte_tokenizer

SIZES = {"vocab_size": 257, "max_position_embeddings": 128, "eos_token_id": END, "pad_token_id": END}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
ASK = {"model": "p", "prompt": "abc", "max_tokens": 20, "temperature": 0}


@pytest.fixture
def model() -> PrefixModel:
    torch.manual_seed(0)
    model = PrefixModel(spread(tiny("llama", **SIZES)))
    model.add_prefix("p", PrefixConfig(num_virtual_tokens=3))
    torch.nn.init.normal_(next(model.prefixes["p"].parameters()).data)
    return model.eval()


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def answers(engine: Engine, *requests: dict[str, Any]) -> list[httpx.Response]:
    """Of requests that are sent at the same time."""

    async def run() -> list[httpx.Response]:
        app = make_app(engine, ["p"], "base")
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client,
        ):
            return await asyncio.gather(*(client.request(**request) for request in requests))

    return asyncio.run(run())


def post(body: dict[str, Any] | bytes, path: str = "completions") -> dict[str, Any]:
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    return {"method": "POST", "url": f"/v1/{path}", "headers": {"Content-Type": "application/json"}, **content}


def texts(found: list[httpx.Response]) -> list[str]:
    return [choice["text"] for answer in found for choice in answer.json()["choices"]]


def alone(model: PrefixModel, prompt: str) -> str:
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=END)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_every_error_has_the_form_of_openai(model: PrefixModel, tokenizer: Any) -> None:
    chat = {"model": "p", "messages": [{"role": "user", "content": None}]}
    half = b'{"model": "p", "messages": [{"role": "u", "content": "\\ud800"}]}'
    cases: list[tuple[dict[str, Any], int, str]] = [
        (post(b'{"model": '), 400, "the body is no JSON"),
        (post(b"[1]"), 400, "the body must be a JSON object"),
        (post(b'{"model": "p", "prompt": "\xff"}'), 400, "parsing the body"),
        (post(b'{"model": "p", "prompt": "\\ud800"}'), 400, "half of a character"),
        (post(half, "chat/completions"), 400, "half of a character"),
        (post(chat, "chat/completions"), 400, "the chat template refuses the messages"),
        (post(ASK | {"temp": 0}), 400, "temp is no field"),
        (post(ASK | {"logprobs": 0}), 400, "logprobs is not supported"),
        (post(ASK | {"prompt": ["a"] * 3, "n": 128}), 400, "384 outputs"),
        ({"method": "GET", "url": "/v1/nothing"}, 404, "Not Found: GET /v1/nothing"),
        ({"method": "GET", "url": "/v1/completions"}, 405, "Method Not Allowed"),
        (post(ASK | {"n": None, "stream": None, "user": "me"}), 200, ""),
    ]
    for (_, status, message), answer in zip(
        cases, answers(Engine(model, tokenizer), *(case[0] for case in cases)), strict=True
    ):
        assert answer.status_code == status, message
        if status != 200:
            error = answer.json()["error"]
            assert message in error["message"]
            assert (error["type"], error["code"]) == ("invalid_request_error", status)


def test_a_request_that_fails_fails_alone(model: PrefixModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = Generation.choose

    def fails(self: Generation, logits: torch.Tensor) -> torch.Tensor:
        if self.sampling.seed == 7 and len(self.tokens) == 3:
            raise RuntimeError("no such luck")
        return choose(self, logits)

    monkeypatch.setattr(Generation, "choose", fails)
    failed, cold, fine = answers(
        Engine(model, tokenizer), post(ASK | {"seed": 7}), post(ASK | {"temperature": 1e-40}), post(ASK)
    )
    assert failed.status_code == 500
    assert "no such luck" in failed.json()["error"]["message"]
    assert texts([cold, fine]) == [alone(model, "abc")] * 2


def test_the_base_models_generation_config(model: PrefixModel, tokenizer: Any) -> None:
    """A penalty is of a row's own tokens: padding is the end-of-text token, and no row's."""
    model.generation_config.repetition_penalty = 1.3
    prompts = ["a", "abc" * 9, "b"]
    found = answers(Engine(model, tokenizer, max_batch=3), *(post(ASK | {"prompt": p}) for p in prompts))
    assert texts(found) == [alone(model, prompt) for prompt in prompts]
    (off,) = answers(Engine(model, tokenizer), post(ASK | {"repetition_penalty": 1}))
    model.generation_config.repetition_penalty = None
    assert texts([off]) == [alone(model, "abc")] != texts(found)[:1]
    model.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(NotImplementedError, match="no_repeat_ngram_size=2, which prefix-attn serve"):
        Engine(model, tokenizer)


def test_a_tokenizer_needs_no_padding_token(model: PrefixModel, tokenizer: Any) -> None:
    tokenizer.pad_token = None
    (found,) = answers(Engine(model, tokenizer), post(ASK | {"prompt": ["a", "abcdef"]}))
    assert texts([found]) == [alone(model, "a"), alone(model, "abcdef")]


def test_rows_that_are_over_take_no_positions(tokenizer: Any) -> None:
    """In a table of 128: rows of a batch end where others, without a prefix or with shorter prompts, go on."""
    torch.manual_seed(0)
    model = PrefixModel(spread(tiny("gpt2", **SIZES)))
    model.add_prefix("p", PrefixConfig(num_virtual_tokens=40))
    bodies = [ASK | {"max_tokens": 40}, ASK | {"model": "base", "max_tokens": 120}, ASK | {"prompt": "a" * 80}]
    bodies[2]["max_tokens"] = 8
    found = answers(Engine(model.eval(), tokenizer), *map(post, bodies))
    assert [answer.status_code for answer in found] == [200] * 3
    alone = [answers(Engine(model, tokenizer), post(body))[0] for body in bodies]
    assert texts(found) == texts(alone)


def test_a_chat_template_that_cannot_be_used_leaves_completions(model: PrefixModel, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}|"
    chat = {"model": "p", "messages": [{"role": "user", "content": "a"}]}
    refused, fine = answers(Engine(model, tokenizer), post(chat, "chat/completions"), post(ASK))
    assert (refused.status_code, fine.status_code) == (400, 200)
    assert "the chat template writes an answer otherwise" in refused.json()["error"]["message"]


def test_stops_over_the_edges_of_tokens(model: PrefixModel, tokenizer: Any) -> None:
    """A stop that begins before a character whose bytes are not all there, and one that is a special token."""
    found: list[Piece] = []
    row = Generation([1], None, Sampling(9, stop=("a\N{GRINNING FACE}",)), tokenizer, found.append)
    for token in tokenizer("xa\N{GRINNING FACE}")["input_ids"]:
        row.add(token)
    assert "".join(piece.text for piece in found) == "x"
    assert found[-1].finish_reason == "stop"
    assert held_back("ab\ufffd", ("bc", "abc")) == 3
    special = copy.deepcopy(tokenizer)
    special.add_tokens(["<turn>"], special_tokens=True)
    assert special.convert_tokens_to_ids("<turn>") in Prompts(model, special).stop_ids(["<turn>", "x"], chat=False)


def listened(engine: Engine, tokens: int = 100) -> tuple[Generation, list[Piece]]:
    pieces: list[Piece] = []
    return Generation([5, 6], "p", Sampling(tokens, temperature=0), engine.tokenizer, pieces.append), pieces


def test_those_who_left_the_queue_make_room(model: PrefixModel, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer, max_waiting=2)
    rows = [listened(engine)[0] for _ in range(3)]
    engine.submit(rows[:2])
    with pytest.raises(Busy):
        engine.submit(rows[2:])
    rows[0].cancel()
    engine.submit(rows[2:])


def test_who_waits_when_the_engine_stops_is_told(
    model: PrefixModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another one's listener fails; and it starts again."""
    engine = Engine(model, tokenizer, max_batch=1)
    (running, first), (waiting, second) = listened(engine), listened(engine)
    begun = threading.Event()
    add = Generation.add
    monkeypatch.setattr(Generation, "add", lambda self, token: (begun.set(), time.sleep(0.05), add(self, token))[2])
    engine.submit([running, waiting])
    engine.start()
    assert begun.wait(30)
    engine.stop()
    assert first[-1].error == second[-1].error == "the server is stopping"
    assert len(running.tokens) < 8  # it does not wait for the next look at the queue
    with pytest.raises(Stopping):
        engine.submit([waiting])
    (answer,) = answers(engine, post(ASK))
    assert answer.status_code == 200


def test_a_client_that_leaves_while_tokens_come_is_noticed() -> None:
    async def run() -> int:
        pieces, count = Pieces(), 0
        listen = pieces.listener(0)

        async def gone() -> bool:
            return True

        async def tokens() -> None:
            while True:
                listen(Piece("a"))
                await asyncio.sleep(0.01)

        task = asyncio.create_task(tokens())
        async for _ in pieces.read(1, gone):
            count += 1
        task.cancel()
        return count

    assert 0 < asyncio.run(asyncio.wait_for(run(), 30)) < 100


def test_a_stream_that_nobody_reads_ends(model: PrefixModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client left before the first event."""
    submitted: list[Generation] = []
    monkeypatch.setattr(Engine, "submit", lambda self, rows: submitted.extend(rows))
    body = b'{"model": "p", "prompt": "abc", "stream": true}'
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "asgi": {"spec_version": "2.4"}}
    messages = iter([{"type": "http.request", "body": body}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(_: Any) -> None:
        raise OSError("the connection is closed")

    async def run() -> None:
        await make_app(Engine(model, tokenizer), ["p"], "base")(scope, receive, send)

    with pytest.raises(ClientDisconnect):
        asyncio.run(run())
    assert [row.is_over for row in submitted] == [True]


def test_a_listener_outlives_its_loop() -> None:
    async def run() -> Any:
        return Pieces().listener(0)

    asyncio.run(run())(Piece("nobody listens"))
