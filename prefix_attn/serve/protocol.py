"""OpenAI's requests, and the answers to them: https://platform.openai.com/docs/api-reference."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

# What would change the output, and the embedded engine does not do. The values are those that ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "kv_transfer_params": (None,),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "presence_penalty": (None, 0),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "use_beam_search": (None, False),
}
# What changes no output, so that nothing is lost where it is not done.
TAKEN = ("metadata", "parallel_tool_calls", "prediction", "priority", "prompt_cache_key", "prompt_cache_retention")
TAKEN += ("request_id", "safety_identifier", "service_tier", "store", "user")


class StreamOptions(BaseModel):
    """What a stream tells beside text."""

    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of requests have. Unknown fields are refused, but those that change no output are taken."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("n", "stream", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: ValidationInfo) -> Any:
        return {"n": 1, "stream": False}[str(info.field_name)] if value is None else value

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if stop == "" or (isinstance(stop, list) and "" in stop):
            raise ValueError("a stop must be a text of at least one character")
        return stop

    def model_post_init(self, _: Any) -> None:
        """Refuse what would silently change nothing.

        Raises:
            ValueError: the request asks for something that is not done.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in NOTHING and name not in TAKEN:
                raise ValueError(f"{name:.100} is no field that this server knows: leave it out")
            nothing = NOTHING.get(name, (value,))
            if not any(value == none and isinstance(value, bool) == isinstance(none, bool) for none in nothing):
                raise ValueError(f"{name} is not supported here: leave it out")
        try:
            self.model_dump_json()
        except ValueError:
            raise ValueError("a text holds half of a character, a surrogate without its other half") from None


class CompletionRequest(Request):
    """The body of /v1/completions. A prompt is a text, token ids, or a list of either."""

    prompt: str | list[int] | list[str] | list[list[int]]

    def prompts(self) -> list[str | list[int]]:
        """One for each prompt.

        Raises:
            ValueError: there is none.
        """
        one = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        found: list[Any] = [self.prompt] if one else list(self.prompt)
        if not found:
            raise ValueError("prompt is an empty list: give a text")
        return found


class Message(BaseModel):
    """A message of a chat. Its content is a text, or parts of a text."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None

    def as_template(self) -> dict[str, Any]:
        """As chat templates take it.

        Raises:
            ValueError: a part is no text.
        """
        content = self.content
        if isinstance(content, list):
            if other := [part.get("type") for part in content if part.get("type") != "text"]:
                raise ValueError(f"messages may hold text only, got a part of the type {other[0]!r}")
            content = "".join(str(part.get("text", "")) for part in content)
        return {"role": self.role, "content": content, **(self.model_extra or {})}


class ChatRequest(Request):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class Answer:
    """The frame of the answers to one request."""

    def __init__(self, kind: Literal["completion", "chat"], model: str) -> None:
        """``model`` is the name that was asked for."""
        self.is_chat = kind == "chat"
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created, self.model = int(time.time()), model

    def whole(self, choices: list[tuple[str, str | None]], usage: dict[str, int]) -> dict[str, Any]:
        """The answer without a stream, of (text, finish_reason) pairs."""
        name = "chat.completion" if self.is_chat else "text_completion"
        found = []
        for index, (text, reason) in enumerate(choices):
            body = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            found.append({"index": index, **body, "logprobs": None, "finish_reason": reason})
        return self._frame(name, found) | {"usage": usage}

    def part(self, index: int, text: str, reason: str | None, *, first: bool = False) -> dict[str, Any]:
        """One event of a stream."""
        body: dict[str, Any] = {"text": text}
        if self.is_chat:
            delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
            body = {"delta": delta}
        return self._frame(self._part, [{"index": index, **body, "logprobs": None, "finish_reason": reason}])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last event of a stream that counts tokens."""
        return self._frame(self._part, []) | {"usage": usage}

    @property
    def _part(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _frame(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    """Numbers of tokens. Those of the prefix are no text and do not count."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error_of(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
