"""The connector in vLLM itself: every answer is what ``PrefixModel.generate`` writes. ``make serve-test``."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_attn.hf.embedding import PrefixTuning
from prefix_attn.hf.load import load_base
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


def scheduler_of(llm: Any) -> Any:
    """The scheduler's connector."""
    return llm.llm_engine.engine_core.engine_core.scheduler.connector


def connectors(llm: Any) -> tuple[Any, Any]:
    """The scheduler's, and the worker's."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return scheduler_of(llm), get_kv_transfer_group()


def prompt(llm: Any, job: Job) -> tuple[dict[str, Any], Any]:
    """What vLLM is asked."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    if job.prefix is None:
        return {"prompt_token_ids": job.ids}, params
    scheduler = scheduler_of(llm)
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


def test_each_of_two_processes_writes_its_heads(tmp_path: Path) -> None:
    """Tensor parallelism, with a model whose two key/value heads can be divided; those of SmolLM2 cannot."""
    world = make_world("tiny", tmp_path)
    with engine(world, tensor_parallel_size=2) as llm:
        for _ in range(2):
            assert equal(llm, world) == 32
        counts = scheduler_of(llm).counts
        assert counts["injections"] + counts["hits"] == 60


def test_embeddings_of_a_prompt(world: World, tmp_path: Path) -> None:
    """A table of input embeddings needs no connector: vLLM takes it before those of the text, beside other requests."""
    base, _ = load_base(world.base)
    tuned = PrefixTuning(base, 12, base.config.hidden_size).eval()
    with engine(world, enable_prompt_embeds=True) as llm:
        jobs, embed = world.jobs[:4], base.get_input_embeddings()
        asked = [prompt(llm, job) for job in jobs]
        for job in jobs:
            ids = torch.tensor(job.ids)
            with torch.no_grad():
                asked.append(({"prompt_embeds": torch.cat([tuned.prefix, embed(ids)])}, asked[0][1].clone()))
                asked[-1][1].extra_args = None
                found = tuned.generate(ids[None], max_new_tokens=NEW, do_sample=False, eos_token_id=None)
            jobs = [*jobs, Job(None, job.text, job.ids, found[0, len(job.ids) :].tolist())]
        assert len({tuple(job.wanted) for job in jobs}) > 4
        outputs = llm.generate([one for one, _ in asked], [params for _, params in asked], use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == [job.wanted for job in jobs]


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"}], ids=str)
def test_other_dtypes_of_the_cache(options: dict[str, Any], world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix is rounded as the text is: most first tokens are those of float32. Without it, few are."""

    def same() -> float:
        asked = [prompt(llm, job) for job in world.jobs if job.prefix]
        for _, params in asked:
            params.max_tokens = 8
        outputs = llm.generate([one for one, _ in asked], [params for _, params in asked], use_tqdm=False)
        pairs = zip(outputs, world.jobs, strict=False)
        found = [a == b for out, job in pairs for a, b in zip(out.outputs[0].token_ids, job.wanted, strict=False)]
        assert len(found) == 8 * 30
        return sum(found) / len(found)

    with engine(world, enable_prefix_caching=False, **options) as llm:
        right = same()
        monkeypatch.setattr(type(connectors(llm)[1]), "_write", lambda *_: None)
        wrong = same()
        assert right > 0.7 and wrong < 0.5
