"""OpenAI's API on vLLM's server: the middleware, before a stand-in that answers as vLLM 0.32 does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastapi
import httpx
import pytest
from fastapi.responses import JSONResponse, StreamingResponse

from prefix_attn.serve.vllm.choice import Choice, choice_of
from prefix_attn.serve.vllm.limits import shape_of
from prefix_attn.serve.vllm.middleware import CONNECTOR, Prefixes
from prefix_attn.serve.vllm.registry import Registry, Settings
from tests.hf.models import tiny
from tests.serve.test_vllm_prefixes import SIZES, saved

KEY = {"authorization": "Bearer secret"}
LIMIT = 64
STOP = 256
MODEL = SimpleNamespace(
    hf_config=tiny("llama", **SIZES).config,
    served_model_name=["base", "alias"],
    model="somewhere",
    max_model_len=LIMIT,
    get_vocab_size=lambda: 257,
    get_total_num_hidden_layers=lambda: 3,
    get_total_num_kv_heads=lambda: 2,
    get_head_size=lambda: 8,
)
PATHS = ("/v1/completions", "/v1/chat/completions")


class Stub:
    """vLLM's server: what it was asked, and answers that repeat the text behind the prefix."""

    def __init__(self, config: Any) -> None:
        self.asked: list[dict[str, Any]] = []
        self.app = fastapi.FastAPI()
        self.app.state.vllm_config = config
        self.app.middleware("http")(self._authenticate)
        for path in PATHS:
            self.app.post(path)(self._generate)
            self.app.post(path + "/render")(self._render)
        self.app.get("/v1/models")(self._models)
        self.app.post("/tokenize")(self._tokenize)
        self.app.post("/v1/responses")(self._tokenize)
        self.app.add_middleware(Prefixes)

    @staticmethod
    async def _authenticate(request: fastapi.Request, call_next: Any) -> Any:
        if request.url.path.startswith("/v1") and request.headers.get("authorization") != KEY["authorization"]:
            return JSONResponse({"error": "Unauthorized"}, 401)
        return await call_next(request)

    async def _models(self) -> Any:
        card = {"id": "base", "object": "model", "created": 1, "owned_by": "vllm", "root": "x", "parent": None}
        return {"object": "list", "data": [card | {"max_model_len": LIMIT, "permission": []}]}

    async def _tokenize(self, body: dict[str, Any]) -> Any:
        self.asked.append(body)
        return self._unknown(body) or {"count": 1, "tokens": [1]}

    @staticmethod
    def _unknown(body: dict[str, Any]) -> Any:
        if body.get("model") in (None, "base"):
            return None
        error = {"message": f"The model `{body['model']}` does not exist.", "type": "NotFoundError", "code": 404}
        return JSONResponse({"error": error}, 404)

    def _prompts(self, body: dict[str, Any]) -> list[list[int]]:
        """As vLLM renders and takes them."""
        if "messages" in body:
            given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
            return [given or [len(message["content"]) for message in body["messages"]] + [9]]
        prompt = body["prompt"]
        prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        return [[ord(c) for c in one] if isinstance(one, str) else list(one) for one in prompts]

    async def _render(self, body: dict[str, Any]) -> Any:
        if body.get("stream_options") and not body.get("stream"):
            return JSONResponse({"error": {"message": "stream_options needs stream", "code": 400}}, 400)
        if (wrong := self._unknown(body)) is not None:
            return wrong
        found = [{"token_ids": ids[-(body.get("truncate_prompt_tokens") or 0) :]} for ids in self._prompts(body)]
        return found[0] if "messages" in body else found

    async def _generate(self, body: dict[str, Any]) -> Any:
        self.asked.append(body)
        if (wrong := self._unknown(body)) is not None:
            return wrong
        prompts = self._prompts(body)
        usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": 3, "total_tokens": 0}
        usage["total_tokens"] = usage["prompt_tokens"] + 3
        usage["prompt_tokens_details"] = {"cached_tokens": len(prompts[0]) - 1}
        frame = {"id": "x", "object": "text_completion", "created": 1, "model": body.get("model") or "base"}
        choices = [{"index": i, "text": str(ids[-2:]), "prompt_token_ids": ids} for i, ids in enumerate(prompts)]
        if not body.get("stream"):
            return frame | {"choices": choices, "usage": usage}

        async def events() -> Any:
            text = ""
            for choice in choices:
                one = {"prompt_tokens": len(choice["prompt_token_ids"]), "completion_tokens": 1, "total_tokens": 0}
                one["total_tokens"] = one["prompt_tokens"] + 1
                text += f"data: {json.dumps(frame | {'choices': [choice], 'usage': one})}\n\n"
            text += f"data: {json.dumps(frame | {'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
            for i in range(0, len(text), 7):  # a chunk ends anywhere
                yield text[i : i + 7]

        return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("prefixes")
    (at / "all").mkdir()
    return {"a": saved(at / "a"), "long": saved(at / "long", num_virtual_tokens=40), "all": at / "all"}


@pytest.fixture
def stub(folders: dict[str, Path]) -> Stub:
    settings = {
        "prefixes": {name: str(folders[name]) for name in ("a", "long")},
        "folder": str(folders["all"]),
        "loading": True,
        "chat_stop_ids": [STOP],
    }
    transfer = SimpleNamespace(kv_connector=CONNECTOR, kv_connector_extra_config=settings)
    return Stub(SimpleNamespace(model_config=MODEL, kv_transfer_config=transfer))


@pytest.fixture
def ask(stub: Stub) -> Callable[..., Any]:
    """POST, or GET without a body."""

    def run(path: str, body: Any = None, *, headers: dict[str, str] = KEY) -> httpx.Response:
        async def inside() -> httpx.Response:
            transport = httpx.ASGITransport(stub.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers) as client:
                return await (client.get(path) if body is None else client.post(path, json=body))

        return asyncio.run(inside())

    return run


@pytest.fixture
def choices(stub: Stub) -> dict[str, Choice]:
    config = stub.app.state.vllm_config
    registry = Registry(Settings.of(config.kv_transfer_config.kv_connector_extra_config), shape_of(config))
    return {name: registry.choice(name) for name in ("a", "long")}


def chosen(body: dict[str, Any], prompt: list[int]) -> Choice | None:
    """What the connector makes of what the engine was asked."""
    return choice_of(body["cache_salt"], prompt, 257)


def test_a_completion_has_its_prefix_and_counts_its_text(ask: Any, stub: Stub, choices: dict[str, Choice]) -> None:
    answer = ask(
        "/v1/completions", {"model": "a", "prompt": "hello", "return_token_ids": True, "temperature": 0}
    ).json()
    (asked,) = stub.asked
    assert asked["model"] == "base" and asked["temperature"] == 0
    assert asked["prompt"] == [[*choices["a"].placeholders(257), *map(ord, "hello")]]
    assert chosen(asked, asked["prompt"][0]) == choices["a"]
    assert asked["kv_transfer_params"] == {"prefix": "a"}
    assert answer["model"] == "a"
    assert answer["choices"][0]["prompt_token_ids"] == list(map(ord, "hello"))
    details = {"prompt_tokens_details": {"cached_tokens": 4}}
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8} | details


def test_many_prompts_and_truncation(ask: Any, stub: Stub, choices: dict[str, Choice]) -> None:
    """The placeholders stand before what truncation has left."""
    for prompt in (["hello", "you"], [[104, 101, 108, 108, 111], [121, 111, 117]]):
        body = {"model": "a", "prompt": prompt, "truncate_prompt_tokens": 2, "truncation_side": "left"}
        answer = ask("/v1/completions", body).json()
        before = list(choices["a"].placeholders(257))
        assert stub.asked[-1]["prompt"] == [[*before, *map(ord, text)] for text in ("lo", "ou")]
        assert not {"truncate_prompt_tokens", "truncation_side"} & stub.asked[-1].keys()
        assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["total_tokens"] == 7


def test_a_chat_has_its_prefix(ask: Any, stub: Stub, choices: dict[str, Choice]) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "user", "content": "you"}]
    answer = ask("/v1/chat/completions", {"model": "long", "messages": messages, "stop_token_ids": [7]}).json()
    (asked,) = stub.asked
    assert asked["messages"] == messages and asked["stop_token_ids"] == [7, STOP]
    ids = asked["kv_transfer_params"]["prompt_token_ids"]
    assert ids == [*choices["long"].placeholders(257), 5, 3, 9]
    assert chosen(asked, ids) == choices["long"]
    assert answer["model"] == "long" and answer["usage"]["prompt_tokens"] == 3


def test_a_stream_names_the_prefix_and_counts_its_text(ask: Any) -> None:
    body = {"model": "a", "prompt": ["hello", "you"], "stream": True, "stream_options": {"include_usage": True}}
    response = ask("/v1/completions", body)
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    parts = [json.loads(event) for event in events]
    assert {part["model"] for part in parts} == {"a"}
    assert [part["usage"]["prompt_tokens"] for part in parts] == [5, 3, 8]
    assert [part["usage"]["total_tokens"] for part in parts] == [6, 4, 11]
    assert parts[1]["choices"][0]["prompt_token_ids"] == list(map(ord, "you"))


def test_a_client_s_own_salt_stays_its_own(ask: Any, stub: Stub, choices: dict[str, Choice]) -> None:
    salts = set()
    for own in (None, "mine", "yours", "x" * 100):
        ask("/v1/completions", {"model": "a", "prompt": "hello", "cache_salt": own})
        salts.add(stub.asked[-1]["cache_salt"])
        assert chosen(stub.asked[-1], stub.asked[-1]["prompt"][0]) == choices["a"]
    assert len(salts) == 4


@pytest.mark.parametrize("model", ["base", "alias", None, ""])
def test_requests_without_a_prefix_go_on_as_they_are(model: str | None, ask: Any, stub: Stub) -> None:
    body = {"model": model, "prompt": "hello", "cache_salt": "mine", "unknown": 1, "echo": True}
    ask("/v1/completions", body)
    assert stub.asked == [body]
    ask("/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": "x"}]})
    assert stub.asked[1]["stop_token_ids"] == [STOP]


def test_an_unknown_model_is_404(ask: Any) -> None:
    for name in ("nobody", "../a", "A", 3):
        response = ask("/v1/completions", {"model": name, "prompt": "hello"})
        assert response.status_code == 404 and "does not exist" in response.json()["error"]["message"]
    assert ask("/v1/models/nobody").status_code == 404


@pytest.mark.parametrize("model", ["a", "base"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"kv_transfer_params": {"prefix": "long"}}, "kv_transfer_params"),
        ({"kv_transfer_params": {"prompt_token_ids": [1]}}, "kv_transfer_params"),
        ({"cache_salt": Choice("a" * 40, 4).salt()}, "cache_salt"),
        ({"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs"),
    ],
)
def test_a_client_cannot_choose_a_prefix_another_way(
    model: str, body: dict[str, Any], field: str, ask: Any, stub: Stub
) -> None:
    for path, text in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": []})):
        response = ask(path, {"model": model} | text | body)
        assert response.status_code == 400 and response.json()["error"]["param"] == field
    assert stub.asked == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": ["x", ""]}, "the prompt is empty"),
        ({}, "the prompt is empty"),
        ({"prompt": "x", "echo": True}, "echo is not supported"),
        ({"prompt": "x", "prompt_logprobs": 0}, "prompt_logprobs is not supported"),
        ({"prompt": "x", "repetition_penalty": 1.1}, "repetition_penalty is not supported"),
        ({"prompt": "x", "use_beam_search": True}, "use_beam_search is not supported"),
        ({"prompt": "x", "prompt_embeds": "AAAA"}, "prompt_embeds is not supported"),
        ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ({"prompt": "x" * 24}, "64 tokens: a prompt of 24 behind a prefix of 40 leaves room for 0, and 1 were"),
        ({"prompt": "x", "max_tokens": 24}, "a prompt of 1 behind a prefix of 40 leaves room for 23, and 24 were"),
    ],
)
def test_what_would_be_wrong_with_a_prefix_is_refused(body: dict[str, Any], reason: str, ask: Any, stub: Stub) -> None:
    response = ask("/v1/completions", {"model": "long"} | body)
    assert response.status_code == 400 and reason in response.json()["error"]["message"]
    assert stub.asked == []


def test_messages_with_more_than_text_are_refused(ask: Any) -> None:
    """vLLM would render them itself, without placeholders."""
    picture = {"type": "image_url", "image_url": {"url": "data:"}}
    body = {"model": "a", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, picture]}]}
    response = ask("/v1/chat/completions", body)
    assert response.status_code == 400 and "may hold text only" in response.json()["error"]["message"]


def test_other_endpoints(ask: Any, stub: Stub) -> None:
    """Tokens of a text are those of the base model. What would run without the prefix is refused."""
    assert ask("/tokenize", {"model": "a", "prompt": "x"}).json() == {"count": 1, "tokens": [1]}
    assert stub.asked[-1]["model"] == "base"
    for path in ("/v1/responses", "/v1/completions/render"):
        response = ask(path, {"model": "a", "prompt": "x"})
        assert response.status_code == 400 and "it is served at /v1/completions and" in response.text


def test_models_are_listed(ask: Any) -> None:
    data = ask("/v1/models").json()["data"]
    assert [model["id"] for model in data] == ["base", "a", "long"]
    assert data[1]["parent"] == "base" and data[1]["max_model_len"] == LIMIT
    assert ask("/v1/models/long").json() == data[2]


def test_who_may_not_ask_learns_nothing(ask: Any, stub: Stub, folders: dict[str, Path]) -> None:
    """The middleware stands before vLLM's check of keys, and asks it."""
    no = {"authorization": "Bearer wrong"}
    assert ask("/v1/models", headers=no).status_code == 401
    for name in ("a", "base", "nobody"):
        assert ask("/v1/completions", {"model": name, "prompt": "x"}, headers=no).status_code == 401
    load = {"prefix_name": "new", "prefix_path": str(folders["a"])}
    assert ask("/v1/load_prefix", load, headers=no).status_code == 401
    assert list(folders["all"].iterdir()) == [] and stub.asked == []


def test_prefixes_come_and_go(ask: Any, stub: Stub, folders: dict[str, Path], choices: dict[str, Choice]) -> None:
    load = {"prefix_name": "new", "prefix_path": str(folders["a"])}
    assert ask("/v1/completions", {"model": "new", "prompt": "x"}).status_code == 404
    assert ask("/v1/load_prefix", load).json()["id"] == "new"
    assert ask("/v1/completions", {"model": "new", "prompt": "x"}).json()["model"] == "new"
    assert chosen(stub.asked[-1], stub.asked[-1]["prompt"][0]) == choices["a"]  # of the same content: the same blocks
    assert "new" in [model["id"] for model in ask("/v1/models").json()["data"]]
    assert ask("/v1/load_prefix", load).status_code == 400
    assert ask("/v1/load_prefix", load | {"load_inplace": True}).status_code == 200
    assert ask("/v1/unload_prefix", {"prefix_name": "new"}).status_code == 200
    assert ask("/v1/unload_prefix", {"prefix_name": "new"}).status_code == 404
    assert ask("/v1/completions", {"model": "new", "prompt": "x"}).status_code == 404
    for body in ({}, {"prefix_name": 1, "prefix_path": "x"}, {"prefix_name": "x"}, load | {"prefix_name": "base"}):
        assert ask("/v1/load_prefix", body).status_code == 400
    assert ask("/v1/load_prefix", {"prefix_name": "x", "prefix_path": "nowhere"}).status_code == 400


@pytest.mark.parametrize("connector", [None, "LMCacheMPConnector"])
def test_a_server_with_another_connector_answers_nothing(connector: str | None, ask: Any, stub: Stub) -> None:
    """It would run placeholders as text."""
    transfer = stub.app.state.vllm_config.kv_transfer_config
    transfer.kv_connector = connector
    stub.app.state.vllm_config.kv_transfer_config = transfer if connector else None
    for path, body in (("/v1/completions", {"model": "a", "prompt": "x"}), ("/v1/models", None)):
        with pytest.raises(RuntimeError, match="prefixes need 'PrefixConnector'"):
            ask(path, body)
    assert stub.asked == []


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff", b"[" * 100000, b""])
def test_a_body_that_is_no_json_is_the_server_s_business(body: bytes) -> None:
    async def inside() -> list[bytes]:
        async def server(scope: Any, receive: Any, send: Any) -> None:
            got.append((await receive())["body"])

        async def receive() -> Any:
            return {"type": "http.request", "body": body}

        got: list[bytes] = []
        transfer = SimpleNamespace(kv_connector=CONNECTOR, kv_connector_extra_config={})
        config = SimpleNamespace(model_config=MODEL, kv_transfer_config=transfer)
        app = SimpleNamespace(state=SimpleNamespace(vllm_config=config))
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "app": app}
        await Prefixes(server)(scope, receive, None)
        return got

    assert asyncio.run(inside()) == [body]
