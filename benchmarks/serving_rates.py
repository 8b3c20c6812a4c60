"""Tokens a second of one process: vLLM with and without prefixes, and ``generate`` for a batch and for one at a time.

    python -m benchmarks.serving rates --rounds 3 --out runs/rates.json

Each round asks the same texts in every way, in another order. They are other texts than those of the rounds before:
vLLM's cache holds prefixes by then, but no text. Requests have one of four prefixes. All ways have the same threads and
float32, and write as many tokens for each request as they are told, the likeliest ones. The spread shows how busy the
machine was, as does the load that the system counts. In the environment of ``make serve-env``.
"""

from __future__ import annotations

import json
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine
from prefix_attn import PrefixConfig, PrefixModel
from prefix_attn.hf.load import base_source, load_base
from prefix_attn.serve.vllm.choice import Choice
from prefix_attn.serve.vllm.launch import shape_of_base
from prefix_attn.serve.vllm.stored import Prefix, read

LENGTHS = {"a": 10, "b": 32, "c": 64, "d": 20}
SIZES = {"dtype": "float32", "max_model_len": 512, "block_size": 32, "enforce_eager": True}
FOODS = ("Italian", "Chinese", "Fast food", "English", "Indian", "French", "Japanese", "Thai")


class Job(NamedTuple):
    """A request."""

    prefix: str
    ids: list[int]


Rows = list[list[int]]
Way = Callable[[Sequence[Job]], Rows]


def measure(name: str, requests: int, tokens: int, rounds: int) -> dict[str, Any]:
    """All ways in turns. Returns tokens a second of each round, and how many answers are those of one at a time."""
    base, tokenizer = load_base(name, dtype="float32", device="cpu")
    model, shape = PrefixModel(base), shape_of_base(base.config)
    loads, equal = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folders = make(model, Path(temporary))
        choices = {own: _choice(read(folder, shape)) for own, folder in folders.items()}
        ways = _of_generate(model, tokens)
        ways |= _of_vllm(str(base_source(name)), folders, choices, requests, tokens)
        _round(ways, _jobs(tokenizer, -1, len(LENGTHS)), 0)  # fills caches, and is not counted
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            found = _round(ways, _jobs(tokenizer, number, requests), number)
            for way, (rows, seconds) in found.items():
                rates[way].append(sum(map(len, rows)) / seconds)
            right = found["generate, one by one"][0]
            equal += sum(map(operator.eq, found["vLLM with prefixes"][0], right))
            loads.append(os.getloadavg()[0])
    sizes = {"requests": requests, "tokens": tokens, "equal": equal, "of": requests * rounds}
    return sizes | {"tokens_a_second": rates, "load": loads, "machine": machine.describe("cpu")}


def _round(ways: dict[str, Way], jobs: Sequence[Job], first: int) -> dict[str, tuple[Rows, float]]:
    """What each way writes, and its seconds. The order begins with way number ``first``."""
    found, names = {}, list(ways)
    for i in range(len(ways)):
        way = names[(first + i) % len(ways)]
        start = time.perf_counter()
        found[way] = ways[way](jobs), time.perf_counter() - start
    return found


def make(model: PrefixModel, folder: Path) -> dict[str, Path]:
    """A prefix of each length, in files."""
    for name, length in LENGTHS.items():
        model.add_prefix(name, PrefixConfig(num_virtual_tokens=length, position_mode="shift"))
        model.save_pretrained(folder / name)
    model.eval()
    return {name: folder / name for name in LENGTHS}


def _jobs(tokenizer: Any, number: int, requests: int) -> list[Job]:
    """Requests of round ``number``."""
    texts = [
        f"{number}.{i} name : Aromi | food : {FOODS[i % 8]} | area : riverside{' | near : the centre' * (i % 5)}\n=>"
        for i in range(requests)
    ]
    return [Job(list(LENGTHS)[i % 4], tokenizer(text)["input_ids"]) for i, text in enumerate(texts)]


def _choice(prefix: Prefix) -> Choice:
    return Choice(prefix.digest, prefix.length)


def _of_generate(model: PrefixModel, tokens: int) -> dict[str, Way]:
    def batch(jobs: Sequence[Job]) -> Rows:
        width = max(len(job.ids) for job in jobs)
        found = model.generate(
            torch.tensor([[0] * (width - len(job.ids)) + job.ids for job in jobs]),
            attention_mask=torch.tensor([[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in jobs]),
            prefix_names=[job.prefix for job in jobs],
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return found[:, width:].tolist()

    return {
        "generate, one by one": lambda jobs: [batch([job])[0] for job in jobs],
        "generate, one batch": batch,
    }


def _of_vllm(
    source: str, folders: dict[str, Path], choices: dict[str, Choice], requests: int, tokens: int
) -> dict[str, Way]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="PrefixConnector",
        kv_connector_module_path="prefix_attn.serve.vllm",
        kv_role="kv_consumer",
        kv_connector_extra_config={"prefixes": {name: str(folder) for name, folder in folders.items()}},
    )
    llm = LLM(source, kv_transfer_config=transfer, max_num_seqs=requests, **SIZES)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def ask(jobs: Sequence[Job], *, prefixed: bool) -> Rows:
        prompts, params = [], []
        for job in jobs:
            prompt: dict[str, Any] = {"prompt_token_ids": job.ids}
            own = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            if prefixed:
                choice = choices[job.prefix]
                prompt = {"prompt_token_ids": [*choice.placeholders(vocabulary), *job.ids]}
                prompt["cache_salt"] = choice.salt()
                own.extra_args = {"kv_transfer_params": {"prefix": job.prefix}}
            prompts.append(prompt)
            params.append(own)
        return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, params, use_tqdm=False)]

    return {
        "vLLM with prefixes": lambda jobs: ask(jobs, prefixed=True),
        "vLLM without": lambda jobs: ask(jobs, prefixed=False),
    }


def run(name: str, requests: int, tokens: int, rounds: int, out: Path) -> None:
    """Measure, write what was found, and show it."""
    found = measure(name, requests, tokens, rounds)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{found['machine']['processor']}, {found['machine']['threads']} threads, load {found['load']}")
    print(f"{found['equal']} of {found['of']} answers of vLLM with prefixes are those of generate, one by one")
    print("| tokens a second | min | median | max |\n|---|---|---|---|")
    for way, rates in found["tokens_a_second"].items():
        print(f"| {way} | {min(rates):.1f} | {statistics.median(rates):.1f} | {max(rates):.1f} |")
