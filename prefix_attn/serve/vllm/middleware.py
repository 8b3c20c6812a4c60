"""OpenAI's API on vLLM's own server: model name = prefix name. ASGI middleware for ``vllm serve --middleware``.

A request for a prefix is rendered to tokens by the server itself (its /render), gets the placeholders of the prefix in
front and the salt that goes with them, and is asked of the base model. What comes back names the prefix again, and
counts the tokens of the text alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from prefix_attn.serve.protocol import error_of
from prefix_attn.serve.vllm.answers import Answer, Request, Whole, whole
from prefix_attn.serve.vllm.asking import Wrong, check_bare, check_prefixed, completion, conversation
from prefix_attn.serve.vllm.choice import Choice
from prefix_attn.serve.vllm.limits import shape_of
from prefix_attn.serve.vllm.registry import Registry, Settings, Unknown

RENDERED = {"/v1/completions": completion, "/v1/chat/completions": conversation}
CONNECTOR = "PrefixConnector"
AS_BASE = ("/tokenize", "/detokenize")  # have nothing to do with a prefix
_log = logging.getLogger(__name__)


class Prefixes:
    """The middleware. It finds its settings in the engine's, so there is one place for them."""

    def __init__(self, app: Any) -> None:
        """``app``: the server."""
        self.app = app
        self._server: _Server | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        server = self._server = self._server or _Server(self.app, scope["app"].state.vllm_config)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] == "POST" and is_json(scope):
            return await server.post(path, await Request.of(scope, receive), send)
        if scope["method"] == "GET" and (path == "/v1/models" or path.startswith("/v1/models/")):
            return await server.models(path, Request(scope, b"", receive), send)
        return await self.app(scope, receive, send)


def is_json(scope: Mapping[str, Any]) -> bool:
    """Whether the body of a request is, or may be, JSON."""
    kinds = [value.decode("latin-1") for name, value in scope["headers"] if name == b"content-type"]
    return not any(kind.split(";")[0].strip().startswith(("multipart/", "audio/", "image/")) for kind in kinds)


class _Server:
    """What is known once the engine runs."""

    def __init__(self, app: Any, config: Any) -> None:
        self.app, self.model, transfer = app, config.model_config, config.kv_transfer_config
        if transfer is None or transfer.kv_connector != CONNECTOR:  # placeholders would run as text
            found = None if transfer is None else transfer.kv_connector
            raise RuntimeError(f"the server's kv_connector is {found!r}, and prefixes need {CONNECTOR!r}")
        self.settings = Settings.of(transfer.kv_connector_extra_config)
        self.registry = Registry(self.settings, shape_of(config))
        names = self.model.served_model_name
        self.bases: list[str] = [names] if isinstance(names, str) else list(names or [self.model.model])
        self.vocabulary: int = self.model.get_vocab_size()
        self._reading: dict[str, asyncio.Lock] = {}

    async def post(self, path: str, request: Request, send: Any) -> None:
        """Answer a request with a JSON body."""
        body = request.json()
        if body is None:  # no JSON, which the server says itself
            return await self.app(*request.asgi(), send)
        try:
            if path in ("/v1/load_prefix", "/v1/unload_prefix"):
                return await self.change(path, body, request, send)
            check_bare(body)
            name = body.get("model")
            if not name or name in self.bases:
                return await self.bare(path, body, request, send)
            choice = await self.choice(name)
            if choice is None:  # another model, or nobody's: the server knows
                return await self.app(*request.asgi(), send)
            return await self.prefixed(path, body, choice, request, send)
        except Wrong as wrong:
            return await whole(send, wrong.status, error_of(str(wrong), wrong.kind, wrong.status, wrong.param))

    async def bare(self, path: str, body: dict[str, Any], request: Request, send: Any) -> None:
        """A request without a prefix."""
        if path == "/v1/chat/completions" and self.settings.chat_stop_ids:
            request = request.with_json(body | self.chat_stops(body))
        return await self.app(*request.asgi(), send)

    def chat_stops(self, body: dict[str, Any]) -> dict[str, Any]:
        """What ends the answer of a chat."""
        given = body.get("stop_token_ids")
        if given is not None and not isinstance(given, list):
            return {}  # wrong, and the server says so
        return {"stop_token_ids": [*(given or ()), *self.settings.chat_stop_ids]}

    async def choice(self, name: Any) -> Choice | None:
        """The prefix of a model name. None: there is none."""
        if not isinstance(name, str):
            return None
        async with self._reading.setdefault(name, asyncio.Lock()):
            try:
                return await asyncio.to_thread(self.registry.choice, name)
            except Unknown:
                return None
            except (ValueError, OSError) as error:
                raise Wrong(str(error), "model", status=400) from None
            finally:
                self._reading.pop(name, None)

    async def prefixed(self, path: str, body: dict[str, Any], choice: Choice, request: Request, send: Any) -> None:
        """A request for a prefix."""
        name, base = body["model"], {"model": self.bases[0]}
        if path in AS_BASE:
            return await self.app(*request.with_json(body | base).asgi(), send)
        if path not in RENDERED:
            raise Wrong(f"{name!r} is a prefix: it is served at {' and '.join(RENDERED)}, and not at {path}", "model")
        check_prefixed(path, body)
        rendered = await Whole.of(
            self.app, request.with_json(body | base | {"stream": False, "stream_options": None}), path + "/render"
        )
        if rendered.status != 200:  # the server does not like the request, and says why
            return await rendered.send(send)
        prompts = [one["token_ids"] for one in ([rendered.json()] if "chat" in path else rendered.json())]
        for prompt in prompts:
            self.check_room(len(prompt), choice.length, body)
        before = choice.placeholders(self.vocabulary)
        asked = RENDERED[path](body | base, [[*before, *prompt] for prompt in prompts], name)
        asked["cache_salt"] = choice.salt(body.get("cache_salt"))
        if "chat" in path:
            asked |= self.chat_stops(asked)
        answer = Answer(send, name, choice.length, len(prompts))
        return await self.app(*request.with_json(asked).asgi(), answer.send)

    def check_room(self, prompt: int, taken: int, body: Mapping[str, Any]) -> None:
        """Refuse what the context window has no room for."""
        limit, given = self.model.max_model_len, body.get("max_completion_tokens") or body.get("max_tokens")
        wanted, room = given if isinstance(given, int) else 1, limit - taken - prompt
        if room < max(wanted, 1):
            raise Wrong(
                f"the context window has {limit} tokens: a prompt of {prompt} behind a prefix of {taken} leaves room "
                f"for {max(room, 0)}, and {max(wanted, 1)} were asked for",
                "max_tokens",
            )

    async def models(self, path: str, request: Request, send: Any) -> None:
        """The server's models, and every prefix."""
        listed = await Whole.of(self.app, request, "/v1/models")
        if listed.status != 200:
            return await listed.send(send)
        found = listed.json()
        card = {n: v for n, v in found["data"][0].items() if n not in ("permission", "root")}
        names = await asyncio.to_thread(self.registry.names)
        found["data"] += [card | {"id": name, "root": name, "parent": card["id"]} for name in names]
        wanted = path.removeprefix("/v1/models").removeprefix("/")
        if not wanted:
            return await whole(send, 200, found)
        one = next((model for model in found["data"] if model["id"] == wanted), None)
        if one is None:
            error = error_of(f"there is no model {wanted!r:.200}", "NotFoundError", 404, "model")
            return await whole(send, 404, error)
        return await whole(send, 200, one)

    async def change(self, path: str, body: dict[str, Any], request: Request, send: Any) -> None:
        """Load or unload a prefix, in vLLM's words for LoRA."""
        known = await Whole.of(self.app, request.as_get(), "/v1/models")
        if known.status != 200:  # whoever may not ask may not load
            return await known.send(send)
        name, place = body.get("prefix_name"), body.get("prefix_path")
        loads = path == "/v1/load_prefix"
        if not isinstance(name, str) or not name or (loads and not isinstance(place, str)):
            raise Wrong("prefix_name must be a text" + (", prefix_path that of a folder" if loads else ""))
        if name in self.bases:
            raise Wrong(f"{name!r} is the model without a prefix; take another name", "prefix_name")
        try:
            if loads:
                inplace = body.get("load_inplace") is True
                await asyncio.to_thread(self.registry.load, name, str(place), replace=inplace)
            else:
                self.registry.unload(name)
        except Unknown:
            raise Wrong(f"there is no prefix {name!r:.200}", "prefix_name", 404, "NotFoundError") from None
        except (ValueError, OSError) as error:
            raise Wrong(str(error), "prefix_name") from None
        done = f"{'loaded' if loads else 'unloaded'} the prefix {name!r}"
        _log.info(done)
        return await whole(send, 200, {"object": "prefix", "id": name, "message": done})
