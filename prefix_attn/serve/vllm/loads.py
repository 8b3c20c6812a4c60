"""What is written into the paged cache, and where: the part of the connector that needs no vLLM."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from prefix_attn.quoting import shortened
from prefix_attn.serve.vllm.choice import Choice, Refused, choice_of
from prefix_attn.serve.vllm.registry import Held, Registry, Unknown

NAME = "prefix"  # of kv_transfer_params: where to look for the digest
_log = logging.getLogger(__name__)


class Request(Protocol):
    """What is read of a request of vLLM."""

    request_id: str
    cache_salt: str | None
    prompt_token_ids: Sequence[int] | None
    kv_transfer_params: Mapping[str, Any] | None
    skip_reading_prefix_cache: bool


class Load(NamedTuple):
    """Keys and values to write before the next forward.

    Attributes:
        name: under which the prefix is found.
        choice: what has to be found there.
        first: the first token to write, which begins a block. Those before it are in the cache already.
        blocks: all of the request's from that of ``first`` on. What is computed in any of them is wrong if this fails.
    """

    name: str
    choice: Choice
    first: int
    blocks: tuple[int, ...]


class Claim(NamedTuple):
    """What the scheduler was told of a request: ``number`` tokens from ``first`` on will be written."""

    choice: Choice | None
    first: int
    number: int


class Planner:
    """In the scheduler: how much of a prompt is a prefix, and which blocks it goes to."""

    def __init__(self, vocabulary: int, block_size: int) -> None:
        """``vocabulary``: the size of the model's. ``block_size``: tokens in a block."""
        self.vocabulary, self.block_size = vocabulary, block_size
        self.counts = Counter[str]()
        self._claims: dict[str, Claim] = {}
        self._loads: list[Load] = []
        self._failing: list[str] = []

    def matched(self, request: Request, computed: int) -> tuple[int, bool]:
        """How many tokens after the first ``computed`` will be written, and whether that takes longer than a step.

        A request that cannot be answered claims a token which takes longer, and never comes: so nothing of the request
        is computed, or gets into the cache, until it fails.
        """
        try:
            choice = choice_of(request.cache_salt, request.prompt_token_ids, self.vocabulary)
            if choice is None:
                return 0, False
            if request.skip_reading_prefix_cache:
                raise Refused("prompt_logprobs are not computed over a prefix")
        except Refused as refused:
            _log.error("request %s fails: %s", request.request_id, refused)
            request.skip_reading_prefix_cache = False  # else it would ask for nothing, and run without a prefix
            claim = Claim(None, computed, 1)
        else:
            claim = Claim(choice, computed, max(0, choice.length - computed))
        self._claims[request.request_id] = claim
        return claim.number, claim.choice is None

    def plan(self, request: Request, blocks: Sequence[int], number: int) -> None:
        """Note that ``number`` tokens are to be written into ``blocks``, which are those of ``request``.

        Raises:
            RuntimeError: another number than was claimed: the engine would run placeholders as if they were text.
        """
        claim = self._claims.pop(request.request_id, None)
        if number != (claim.number if claim else 0):
            raise RuntimeError(
                f"vLLM loads {number} tokens for {request.request_id}, and not what it was told: {claim}"
            )
        if claim is None:
            return
        if claim.choice is None:
            self.counts["refused"] += 1
            self._failing.append(request.request_id)
        elif number == 0:
            self.counts["hits"] += 1
        else:
            self.counts["injections"] += 1
            self.counts["tokens"] += number
            params = request.kv_transfer_params
            name = params.get(NAME) if isinstance(params, Mapping) else None
            behind = tuple(blocks[claim.first // self.block_size :])
            self._loads.append(Load(str(name), claim.choice, claim.first, behind))

    def take(self) -> tuple[list[Load], list[str]]:
        """What is to be written in the next step, and the requests that are to fail."""
        taken, self._loads, self._failing = (self._loads, self._failing), [], []
        return taken

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._claims.pop(request_id, None)


class Rank(NamedTuple):
    """The part of the heads that a process of tensor parallelism has."""

    number: int = 0
    size: int = 1

    def heads(self, total: int) -> slice:
        """Which key/value heads of ``total``. Where there are more processes than heads, several have the same one.

        Raises:
            ValueError: they cannot be divided.
        """
        if total % self.size == 0:
            own = total // self.size
            return slice(self.number * own, (self.number + 1) * own)
        if self.size % total == 0:
            head = self.number * total // self.size
            return slice(head, head + 1)
        raise ValueError(f"{total} key/value heads cannot be divided among {self.size} processes")


class Source:
    """In a worker: keys and values of this rank, from host memory or from disk."""

    def __init__(self, registry: Registry, rank: Rank, dtype: torch.dtype) -> None:
        """``dtype``: that of the model, in which vLLM takes keys and values."""
        self.registry, self.dtype = registry, dtype
        self.heads = rank.heads(registry.shape.heads)
        self.held = Held(registry.settings.host_bytes)
        self.counts = Counter[str]()

    def get(self, name: str, choice: Choice) -> Tensor:
        """(layers, 2, P, heads of this rank, head size).

        Raises:
            ValueError: it is not what was chosen: the file has changed, or there is none.
        """
        kv = self.held.get(choice.digest)
        if kv is None:
            try:
                prefix = self.registry.read(name)
            except Unknown:
                raise ValueError(f"there is no prefix {shortened(name)!r}") from None
            if prefix.digest != choice.digest:
                raise ValueError(f"the files of the prefix {shortened(name)!r} have changed since the request came")
            self.counts["reads"] += 1
            kv = prefix.kv[:, :, :, self.heads].permute(1, 2, 0, 3, 4).to(self.dtype).contiguous()
            self.held.put(choice.digest, kv)
        if kv.shape[2] != choice.length:
            raise ValueError(f"{shortened(name)!r} has {kv.shape[2]} tokens, and the request {choice.length}")
        return kv


def slots(load: Load, length: int, block_size: int) -> Tensor:
    """(tokens,) int64: where in the paged cache tokens ``load.first`` to ``length`` go."""
    places = torch.arange(length - load.first)
    return torch.tensor(load.blocks)[places // block_size] * block_size + places % block_size
