"""OpenAI's API over an ``Engine``: model name = prefix name."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from prefix_attn.serve.engine import STOPPING, Busy, Engine, Stopping
from prefix_attn.serve.prompts import Prompts
from prefix_attn.serve.protocol import Answer, ChatRequest, CompletionRequest, Request, error_of, usage_of
from prefix_attn.serve.request import Generation, Piece, Sampling

CHECK_SECONDS = 0.5  # between two looks at whether a client still waits


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error"):
        """``param`` is the field of the request that is wrong."""
        super().__init__(message)
        self.status, self.body = status, error_of(message, kind, status, param)


class Pieces:
    """What arrives of several generations, in the event loop of a request."""

    def __init__(self) -> None:
        """Belongs to the loop that runs now."""
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()

    def listener(self, index: int) -> Callable[[Piece], None]:
        """Takes the pieces of generation ``index`` in the engine's thread."""

        def listen(piece: Piece) -> None:
            with suppress(RuntimeError):  # the loop was closed, and nobody listens
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        return listen

    async def read(self, count: int, gone: Callable[[], Any] | None = None) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces until ``count`` generations ended, or the client is ``gone``.

        Raises:
            ApiError: the engine failed.
        """
        look = self._loop.time() + CHECK_SECONDS
        while count:
            waiting = asyncio.ensure_future(self._queue.get())
            try:
                while not (await asyncio.wait({waiting}, timeout=CHECK_SECONDS))[0] or self._loop.time() >= look:
                    if gone is not None and await gone():
                        return
                    look = self._loop.time() + CHECK_SECONDS
            finally:
                waiting.cancel()  # nothing, if it is done
            index, piece = waiting.result()
            if piece.error is not None:
                raise ApiError(503 if piece.error == STOPPING else 500, piece.error, kind="server_error")
            count -= piece.finish_reason is not None
            yield index, piece


def make_app(engine: Engine, names: Sequence[str], base: str) -> fastapi.FastAPI:
    """The application.

    Args:
        engine: it is started and stopped with the application.
        names: of the prefixes that are served.
        base: the name under which the model answers without a prefix.
    """

    @asynccontextmanager
    async def running(_: fastapi.FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)

    app = fastapi.FastAPI(title="prefix_attn", lifespan=running)
    served = _Served(engine, Prompts(engine.model, engine.tokenizer), names, base)
    _answer_errors(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": served.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.prefix(name)
        return next(model for model in served.models() if model["id"] == name)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: fastapi.Request) -> Any:
        prefix = served.prefix(body.model)
        return await served.answer("completion", body, prefix, served.texts(body), 16, http)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: fastapi.Request) -> Any:
        prefix = served.prefix(body.model)
        return await served.answer("chat", body, prefix, served.conversation(body), None, http)

    return app


def _answer_errors(app: fastapi.FastAPI) -> None:
    """Every error is answered in OpenAI's form, whoever found it."""

    @app.exception_handler(ApiError)
    async def known(_: fastapi.Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status in (429, 503) else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        message, field = first["msg"].removeprefix("Value error, "), None
        if first["type"] == "json_invalid":
            message = f"the body is no JSON: {first['ctx']['error']}"
        elif first["type"] == "model_attributes_type":
            message = "the body must be a JSON object, sent with the header Content-Type: application/json"
        elif field := next((str(part) for part in first["loc"][1:]), None):
            message = f"{field}: {message}"
        return JSONResponse(error_of(message, "invalid_request_error", 400, field), 400)

    @app.exception_handler(HTTPException)
    async def http(request: fastapi.Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail}: {request.method} {request.url.path}"
        body = error_of(message, "invalid_request_error", error.status_code)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)  # it is in the log too
    async def unknown(_: fastapi.Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_of(f"{type(error).__name__}: {error}", "server_error", 500), 500)


class _Served:
    """Requests become generations, and these become answers."""

    def __init__(self, engine: Engine, prompts: Prompts, names: Sequence[str], base: str) -> None:
        self.engine, self.prompts, self.names, self.base = engine, prompts, tuple(names), base
        self.since = int(time.time())

    def models(self) -> list[dict[str, Any]]:
        frame = {"object": "model", "created": self.since, "owned_by": "prefix_attn"}
        return [
            {"id": self.base, **frame, "parent": None},
            *({"id": name, **frame, "parent": self.base} for name in self.names),
        ]

    def prefix(self, name: str) -> str | None:
        """The prefix of a model name."""
        if name == self.base:
            return None
        if name not in self.names:
            raise ApiError(404, f"there is no model {name!r:.200}; there are {[self.base, *self.names]}", "model")
        return name

    def texts(self, body: CompletionRequest) -> list[list[int]]:
        with _as_answer("prompt"):
            prompts = body.prompts()
            self._check_count(len(prompts) * body.n)
            return [self.prompts.text(prompt) for prompt in prompts]

    def conversation(self, body: ChatRequest) -> list[list[int]]:
        self._check_count(body.n)
        with _as_answer("messages"):
            return [self.prompts.chat([message.as_template() for message in body.messages])]

    def _check_count(self, count: int) -> None:
        """Refuse what the queue would never take, before texts are read."""
        if count > self.engine.max_waiting:
            raise ApiError(400, f"{count} outputs were asked for, and at most {self.engine.max_waiting} may wait here")

    async def answer(
        self,
        kind: Any,
        body: Request,
        prefix: str | None,
        prompts: list[list[int]],
        most: int | None,
        http: fastapi.Request,
    ) -> Any:
        """Generate for ``prompts``; ``most`` tokens each, unless the request says how many."""
        answer, pieces = Answer(kind, body.model), Pieces()
        wanted = getattr(body, "max_completion_tokens", None) or body.max_tokens
        generations = []
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(body.n)):
            with _as_answer("max_tokens"):
                room = self.prompts.room(prompt, prefix, wanted)
            sampling = self._sampling(body, room if wanted else min(room, most or room), index, kind)
            generations.append(Generation(prompt, prefix, sampling, self.engine.tokenizer, pieces.listener(index)))
        try:
            self.engine.submit(generations)
        except Busy as error:
            raise ApiError(429, str(error), kind="rate_limit_error") from None
        except Stopping as error:
            raise ApiError(503, str(error), kind="server_error") from None
        count = sum(map(len, prompts))
        if body.stream:
            return _Stream(generations, _events(answer, body, generations, pieces, count))
        return await _whole(answer, generations, pieces, count, http)

    def _sampling(self, body: Request, max_tokens: int, index: int, kind: str) -> Sampling:
        own = self.prompts.defaults

        def given(name: str, otherwise: float) -> Any:
            value = getattr(body, name)
            return own.get(name, otherwise) if value is None else value

        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        return Sampling(
            max_tokens,
            temperature=given("temperature", 1.0),
            top_p=given("top_p", 1.0),
            top_k=given("top_k", 0),
            min_p=given("min_p", 0.0),
            repetition_penalty=given("repetition_penalty", 1.0),
            seed=None if body.seed is None else body.seed + index,
            stop=stop,
            stop_ids=(*self.prompts.stop_ids(stop, chat=kind == "chat"), *(body.stop_token_ids or ())),
        )


class _as_answer:
    """A ValueError inside becomes an answer with status 400."""

    def __init__(self, param: str) -> None:
        self.param = param

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, ValueError):
            raise ApiError(400, str(error), self.param) from None


async def _whole(
    answer: Answer, generations: list[Generation], pieces: Pieces, prompt_tokens: int, http: fastapi.Request
) -> Any:
    texts, reasons = [""] * len(generations), list[str | None]([None]) * len(generations)
    try:
        async for index, piece in pieces.read(len(generations), http.is_disconnected):
            texts[index] += piece.text
            reasons[index] = piece.finish_reason
    finally:
        for generation in generations:
            generation.cancel()
    usage = usage_of(prompt_tokens, sum(len(generation.tokens) for generation in generations))
    return answer.whole(list(zip(texts, reasons, strict=True)), usage)


async def _events(
    answer: Answer, body: Request, generations: list[Generation], pieces: Pieces, prompt_tokens: int
) -> AsyncIterator[str]:
    def event(content: Any) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    try:
        if answer.is_chat:
            for index in range(len(generations)):
                yield event(answer.part(index, "", None, first=True))
        async for index, piece in pieces.read(len(generations)):
            yield event(answer.part(index, piece.text, piece.finish_reason))
        if body.stream_options and body.stream_options.include_usage:
            yield event(answer.usage(usage_of(prompt_tokens, sum(len(g.tokens) for g in generations))))
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status was sent already
        yield event(error.body)


class _Stream(StreamingResponse):
    """Events. When they end, and also where none was ever read, nothing more is generated."""

    def __init__(self, generations: list[Generation], events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.generations = generations

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            for generation in self.generations:
                generation.cancel()
