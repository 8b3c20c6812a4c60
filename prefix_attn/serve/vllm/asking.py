"""What of a request for a prefix is refused, and how the rest is asked of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefix_attn.serve.vllm.choice import MARK
from prefix_attn.serve.vllm.loads import NAME

_OWN = "is the server's own: leave it out"
# Fields that would read placeholders as text, or not read the prefix at all. The values are those that ask for nothing.
_NOT_WITH_A_PREFIX: dict[str, tuple[Any, ...]] = {
    "echo": (None, False),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "repetition_penalty": (None, 1),
    "routed_experts_prompt_start": (None, 0),
    "suffix": (None, ""),
    "use_beam_search": (None, False),
}
_OF_RENDERING = ("truncate_prompt_tokens", "truncation_side", "prompt_embeds", "suffix")


class Wrong(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, kind: str = "invalid_request_error"
    ) -> None:
        """``param``: the field that is wrong."""
        super().__init__(message)
        self.param, self.status, self.kind = param, status, kind


def check_bare(body: Mapping[str, Any]) -> None:
    """Refuse what only the server may say, from any client.

    Raises:
        Wrong: with the field.
    """
    if body.get("kv_transfer_params"):
        raise Wrong(f"kv_transfer_params {_OWN}, and give the name of a prefix as model", "kv_transfer_params")
    salt = body.get("cache_salt")
    if isinstance(salt, str) and salt.startswith(MARK):
        raise Wrong(f"a cache_salt that begins with {MARK} {_OWN}", "cache_salt")
    extra = body.get("vllm_xargs")
    if isinstance(extra, Mapping) and "kv_transfer_params" in extra:
        raise Wrong(f"kv_transfer_params in vllm_xargs {_OWN}", "vllm_xargs")


def check_prefixed(path: str, body: Mapping[str, Any]) -> None:
    """Refuse what would be wrong with a prefix.

    Raises:
        Wrong: with the field.
    """
    for name, nothing in _NOT_WITH_A_PREFIX.items():
        if not any(body.get(name) == value for value in nothing):
            raise Wrong(f"{name} is not supported with a prefix: leave it out", name)
    if "chat" in path:
        messages = body.get("messages")
        for message in messages if isinstance(messages, list) else ():
            content = message.get("content") if isinstance(message, Mapping) else None
            parts = content if isinstance(content, list) else []
            if other := [part for part in parts if not isinstance(part, Mapping) or part.get("type") != "text"]:
                raise Wrong(f"with a prefix, messages may hold text only, got {other[0]!r:.100}", "messages")
    elif not all_texts(body.get("prompt")):
        raise Wrong("the prompt is empty: give a text", "prompt")


def all_texts(prompt: Any) -> bool:
    """Whether no prompt is empty."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return all(prompt)
    return bool(prompt)


def completion(body: dict[str, Any], prompts: list[list[int]], name: str) -> dict[str, Any]:
    """The body of /v1/completions for ``prompts`` with their placeholders."""
    kept = {field: value for field, value in body.items() if field not in _OF_RENDERING}
    return kept | {"prompt": prompts, "kv_transfer_params": {NAME: name}}


def conversation(body: dict[str, Any], prompts: list[list[int]], name: str) -> dict[str, Any]:
    """The body of /v1/chat/completions. vLLM takes the tokens of a prompt beside its messages from there."""
    kept = {field: value for field, value in body.items() if field not in _OF_RENDERING}
    return kept | {"kv_transfer_params": {NAME: name, "prompt_token_ids": prompts[0]}}
