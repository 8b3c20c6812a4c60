"""Requests as ASGI hands them on, and answers on their way back to the client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

_LENGTH, _TYPE = b"content-length", b"content-type"


class Request(NamedTuple):
    """A request whose body was read."""

    scope: dict[str, Any]
    body: bytes
    receive: Any  # what comes after the body: that the client has left

    @classmethod
    async def of(cls, scope: dict[str, Any], receive: Any) -> Request:
        """Read the body."""
        parts = []
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return cls(scope, b"".join(parts), receive)

    def json(self) -> dict[str, Any] | None:
        """The body, where it is a JSON object."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def with_json(self, body: Mapping[str, Any]) -> Request:
        """The same with another body."""
        encoded = json.dumps(body).encode()
        headers = [(n, v) for n, v in self.scope["headers"] if n not in (_LENGTH, b"transfer-encoding")]
        return Request(self.scope | {"headers": [*headers, (_LENGTH, b"%d" % len(encoded))]}, encoded, self.receive)

    def as_get(self) -> Request:
        """A request of the same client that has no body."""
        headers = [(n, v) for n, v in self.scope["headers"] if n not in (_LENGTH, _TYPE, b"transfer-encoding")]
        return Request(self.scope | {"headers": headers, "method": "GET"}, b"", self.receive)

    def asgi(self, path: str | None = None) -> tuple[dict[str, Any], Any]:
        """``scope`` and ``receive`` of it, at another path if one is given."""
        scope, sent = dict(self.scope), False
        if path is not None:
            whole = scope.get("root_path", "") + path
            scope |= {"path": whole, "raw_path": whole.encode()}

        async def receive() -> Any:
            nonlocal sent
            if sent:
                return await self.receive()
            sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}

        return scope, receive


class Whole(NamedTuple):
    """An answer that was read to its end."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @classmethod
    async def of(cls, app: Any, request: Request, path: str) -> Whole:
        """What ``app`` answers at ``path``."""
        status, headers, parts = 500, [], []

        async def take(message: Any) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message.get("headers", ()))
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await app(*request.asgi(path), take)
        return cls(status, headers, b"".join(parts))

    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    async def send(self, send: Any) -> None:
        """Hand it on."""
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})


async def whole(send: Any, status: int, content: Any) -> None:
    """Answer with JSON."""
    body = json.dumps(content).encode()
    await Whole(status, [(_TYPE, b"application/json"), (_LENGTH, b"%d" % len(body))], body).send(send)


class Answer:
    """The base model's answer, as one of a prefix: its name, and tokens of the text alone."""

    def __init__(self, send: Any, name: str, length: int, prompts: int) -> None:
        """``length``: P. ``prompts``: how many the request has."""
        self._send, self.name, self.length, self.prompts = send, name, length, prompts
        self._start: Any = None
        self._streams, self._rest = False, b""

    async def send(self, message: Any) -> None:
        """Take what the server sends."""
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(_TYPE, b"")
            self._start, self._streams = message, kind.startswith(b"text/event-stream")
            return await self._send(message) if self._streams else None
        if message["type"] != "http.response.body":
            return await self._send(message)
        more = message.get("more_body", False)
        self._rest += message.get("body", b"")
        if self._streams:
            *events, self._rest = self._rest.split(b"\n\n")
            body = b"".join(self.event(event) + b"\n\n" for event in events)
            if not more:
                body, self._rest = body + self._rest, b""
            return await self._send({"type": "http.response.body", "body": body, "more_body": more})
        if more:
            return None
        body = self.changed(self._rest)
        headers = [(n, v) for n, v in self._start.get("headers", ()) if n != _LENGTH]
        await self._send(self._start | {"headers": [*headers, (_LENGTH, b"%d" % len(body))]})
        return await self._send({"type": "http.response.body", "body": body})

    def event(self, event: bytes) -> bytes:
        """One event of a stream."""
        mark = b"data: "
        return mark + self.changed(event[len(mark) :]) if event.startswith(mark + b"{") else event

    def changed(self, content: bytes) -> bytes:
        """``content``, JSON, with the name and the numbers of the prefix. Errors stay as they are."""
        try:
            answer = json.loads(content)
        except ValueError:
            return content
        if not isinstance(answer, dict) or "error" in answer or "model" not in answer:
            return content
        answer["model"] = self.name
        choices = answer.get("choices") or []
        for part in (answer, *choices):
            if isinstance(ids := part.get("prompt_token_ids"), list):
                part["prompt_token_ids"] = ids[self.length :]
        if isinstance(usage := answer.get("usage"), dict):
            streamed = self._streams and choices  # counts the one prompt that it continues
            _count(usage, self.length * (1 if streamed else self.prompts), self.length)
        return json.dumps(answer, ensure_ascii=False).encode()


def _count(usage: dict[str, Any], placeholders: int, length: int) -> None:
    """Take ``placeholders`` out of a usage, of which the cached tokens are those of one prompt."""
    for name in ("prompt_tokens", "total_tokens"):
        usage[name] -= placeholders
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict) and isinstance(cached := details.get("cached_tokens"), int):
        details["cached_tokens"] = max(0, cached - length)
