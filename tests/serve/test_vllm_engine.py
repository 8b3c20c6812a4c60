"""The connector in vLLM itself: every answer is what ``PrefixModel.generate`` writes. ``make serve-test``."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from prefix_attn.serve.vllm.choice import Choice
from prefix_attn.serve.vllm.loads import Claim, Planner
from tests.serve.vllm_world import LENGTHS, NEW, Job, World, make_world

pytestmark = pytest.mark.vllm
SIZES = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 32, "enforce_eager": True, "block_size": 32}


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> None:
    """Not here: vLLM's own model code has operations that deterministic mode refuses."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(os.environ.get("SERVE_TEST_BASE", "smollm2"), tmp_path_factory.mktemp("world"))


@contextmanager
def engine(world: World, **options: Any) -> Iterator[Any]:
    """vLLM in this process, so that its connector can be looked at."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory

    transfer = KVTransferConfig(
        kv_connector="PrefixConnector",
        kv_connector_module_path="prefix_attn.serve.vllm",
        kv_role="kv_consumer",
        kv_connector_extra_config={"prefixes": {name: str(path) for name, path in world.folders.items()}},
    )
    llm = LLM(world.source, kv_transfer_config=transfer, **SIZES | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def connectors(llm: Any) -> tuple[Any, Any]:
    """The scheduler's, and the worker's."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return llm.llm_engine.engine_core.engine_core.scheduler.connector, get_kv_transfer_group()


def prompt(llm: Any, job: Job) -> tuple[dict[str, Any], Any]:
    """What vLLM is asked."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    if job.prefix is None:
        return {"prompt_token_ids": job.ids}, params
    scheduler, _ = connectors(llm)
    choice = scheduler.registry.choice(job.prefix)
    params.extra_args = {"kv_transfer_params": {"prefix": job.prefix}}
    ids = [*choice.placeholders(scheduler.planner.vocabulary), *job.ids]
    return {"prompt_token_ids": ids, "cache_salt": choice.salt()}, params


def equal(llm: Any, world: World, asked: list[tuple[Any, Any]] | None = None) -> int:
    """How many answers are those of generate."""
    asked = asked or [prompt(llm, job) for job in world.jobs]
    outputs = llm.generate([one for one, _ in asked], [params for _, params in asked], use_tqdm=False)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    return sum(tokens == job.wanted for tokens, job in zip(found, world.jobs, strict=True))


def expected(jobs: list[Job], cached: set[Any]) -> Counter[str]:
    """What is counted for ``jobs``, one after the other. Whole blocks of a prompt are in the cache from then on."""
    counts = Counter[str]()
    for job in jobs:
        length, block = LENGTHS.get(job.prefix or "", 0), SIZES["block_size"]
        size = length + len(job.ids)
        whole = [(job.prefix, tuple(job.ids[: max(0, end - length)]), end) for end in range(block, size + 1, block)]
        found = 0
        while found < len(whole) and whole[found] in cached and whole[found][2] < size:
            found += 1
        cached.update(whole)
        if job.prefix is not None:
            missing = max(0, length - found * block)
            counts["injections" if missing else "hits"] += 1
            counts["tokens"] += missing
    return counts


def test_a_cold_and_a_warm_cache(world: World) -> None:
    """32 of 32. What vLLM's cache has of a prefix is not written again, and the rest is."""
    with engine(world, max_num_batched_tokens=16384) as llm:
        scheduler, worker = connectors(llm)
        cached: set[Any] = set()
        for _ in range(2):
            before = scheduler.counts.copy()
            assert equal(llm, world) == 32
            assert scheduler.counts - before == expected(world.jobs, cached)
            assert worker.counts["reads"] == 4


def test_chunked_prefill(world: World) -> None:
    with engine(world, max_num_batched_tokens=40, enable_prefix_caching=False) as llm:
        assert equal(llm, world) == 32


def test_preempted_requests_get_their_prefix_again(world: World) -> None:
    blocks = 48 if "smollm2" in world.base else 120
    with engine(world, num_gpu_blocks_override=blocks, enable_prefix_caching=False) as llm:
        assert equal(llm, world) == 32
        assert connectors(llm)[0].counts["injections"] > 30


def test_without_injection_answers_differ(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: what is measured here is the prefix."""
    with engine(world) as llm:
        monkeypatch.setattr(type(connectors(llm)[1]), "_write", lambda *_: None)
        assert 2 <= equal(llm, world) < 8  # those without a prefix at least


def test_shared_placeholders_without_a_salt_cross(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: vLLM's cache does hand blocks of one prefix to another, if nothing in their hash tells them apart."""

    def matched(self: Planner, request: Any, computed: int) -> tuple[int, bool]:
        name = (request.kv_transfer_params or {}).get("prefix")
        if name is None:
            return 0, False
        choice = choices[name]
        self._claims[request.request_id] = Claim(choice, computed, max(0, choice.length - computed))
        return self._claims[request.request_id].number, False

    monkeypatch.setattr(Planner, "matched", matched)
    with engine(world) as llm:
        choices: dict[str, Choice] = {name: connectors(llm)[0].registry.choice(name) for name in world.folders}
        asked = [prompt(llm, job) for job in world.jobs]
        for (one, _), job in zip(asked, world.jobs, strict=True):
            if job.prefix is not None:
                length = choices[job.prefix].length
                one["prompt_token_ids"] = [0] * length + one["prompt_token_ids"][length:]
                del one["cache_salt"]
        assert equal(llm, world, asked) < 32


def test_a_request_that_cannot_be_answered_fails_alone(world: World) -> None:
    """Forged placeholders, prompt_logprobs, a file that has changed: an error for it, right answers for the others."""
    from vllm import SamplingParams

    with engine(world) as llm:
        asked = [prompt(llm, job) for job in world.jobs[:8]]
        salt = asked[1][0]["cache_salt"]
        short = {"prompt_token_ids": asked[1][0]["prompt_token_ids"][:32], "cache_salt": salt}
        forged = {"prompt_token_ids": [5] * 60, "cache_salt": salt}
        scored = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0, extra_args=asked[1][1].extra_args)
        lost = SamplingParams(temperature=0, max_tokens=4, extra_args={"kv_transfer_params": {"prefix": "nobody"}})
        bad = [(short, asked[1][1]), (forged, asked[1][1]), (asked[1][0], scored), (asked[2][0], lost)]
        everyone = [*asked[4:6], *bad, *asked[:2]]
        outputs = llm.generate([one for one, _ in everyone], [params for _, params in everyone], use_tqdm=False)
        reasons = [output.outputs[0].finish_reason for output in outputs]
        assert reasons == ["length"] * 2 + ["error"] * 4 + ["length"] * 2
        found = [list(output.outputs[0].token_ids) for output in [*outputs[:2], *outputs[6:]]]
        assert found == [world.jobs[i].wanted for i in (4, 5, 0, 1)]
        assert equal(llm, world) == 32
        assert connectors(llm)[1].counts["failures"] == 1
