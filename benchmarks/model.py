"""The whole-model suite: does a longer prefix cost anything? Training steps and decoding, compared with P = 0.

    train     forward, backward and AdamW of B rows of S tokens; P = 0 is the frozen model with a backward to its input
              embeddings, which no prefix tuning can avoid
    decode    seconds per token of greedy ``generate``, B rows after a prompt of S tokens; the first token, which reads
              the prompt, is not counted; P = 0 is the frozen model

All lengths of all ways take turns in one process, so relative times come from one run. PEFT and ``adapters`` are left
out, with a reason, if they are not installed or need more memory than there is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from benchmarks import memory
from benchmarks.machine import free_bytes
from benchmarks.measure import Way, back_to_back, rotations, spread
from benchmarks.model_ways import WAYS, Prefixed, cache_bytes, random_batch
from benchmarks.peers import Unable
from benchmarks.results import Case, Plan, Record, Results

WHAT = ("train", "decode")
LENGTHS = (0, 10, 128, 512, 2048, 4096)
NEW = 11  # tokens: 10 are timed


def case(model: str, B: int, S: int, P: int, **more: Any) -> Case:
    """S: tokens of a row in training, of the prompt in decoding."""
    return {"model": model, "B": B, "S": S, "P": P, "dtype": "float32", **more}


def grid(device: str, name: str = "default") -> Plan:
    """(case, what) pairs. ``name``: default, quick, full. ``device`` changes nothing."""
    if name == "quick":
        return [(case("tiny", 2, 8, P), what) for what in WHAT for P in (0, 4, 16)]
    plan = [(case("smollm2", 64, 32, P), "decode") for P in LENGTHS]
    plan += [(case("smollm2", 32, 32, P), "decode") for P in (0, 100)]
    plan += [(case("smollm2", 8, 96, P), "train") for P in LENGTHS]
    plan += [(case("smollm2", 8, 96, P, mlp=512), "train") for P in (0, 20)]
    few = LENGTHS if name == "full" else (0, 128, 512)
    for model in ("gpt2", "llama"):
        plan += [(case(model, 16, 32, P), "decode") for P in few]
        plan += [(case(model, 8, 96, P), "train") for P in few]
    if name == "full":
        plan += [(case("smollm2", B, 32, P), "decode") for B in (1, 8) for P in LENGTHS]
        plan += [(case("smollm2", B, 96, P), "train") for B in (1, 32) for P in LENGTHS]
    return plan


def memory_grid(device: str, name: str = "default") -> Plan:
    """Cases of the memory suite. The rows are short, so a prefix per row would dominate."""
    if name == "quick":
        return [(case("tiny", B, 8, P), what) for what in WHAT for B in (1, 2) for P in (4, 64)]
    plan = [(case("smollm2", B, 16, P), "decode") for B in (1, 8, 32) for P in (10, 512, 2048)]
    return plan + [(case("smollm2", B, 16, P), "train") for B in (1, 4, 8) for P in (10, 256, 1024)]


def grouped(plan: Plan) -> list[Plan]:
    """Groups of cases that differ only in P; each runs in one rotation."""
    groups: dict[tuple[Any, ...], Plan] = {}
    for c, what in plan:
        groups.setdefault((what, *((n, v) for n, v in c.items() if n != "P")), []).append((c, what))
    return list(groups.values())


def load(plan: Plan, device: str, asked: Sequence[str] | None, results: Results) -> dict[str, Prefixed]:
    """Every way that is installed, with all prefixes of the plan."""
    prefixes = sorted({c["P"] for c, _ in plan} - {0})
    first, what = plan[0]
    found = {}
    for name in asked or WAYS:
        try:
            found[name] = Prefixed(name, first["model"], device, prefixes, first.get("mlp"))
        except Unable as error:
            results.add(first | {"on": device}, what, name, reason=str(error))
    return found


def fitting(plan: Plan, loaded: Mapping[str, Prefixed], device: str, results: Results) -> dict[tuple[str, int], Case]:
    """The (way, P) that fit in memory. Others are recorded with a reason."""
    found = {}
    for name, way in loaded.items():
        for c, what in plan:
            if (name == "bare") != (c["P"] == 0):
                continue
            # Its cache, the copy that a layer's concatenation makes, and what the prefix is expanded from.
            needed = 0 if name in ("bare", "ours") else 2.5 * c["B"] * c["P"] * cache_bytes(way.model)
            if needed > 0.9 * free_bytes(device):
                reason = (
                    f"a prefix in every row: about {needed / 1e9:.0f} GB, {free_bytes(device) / 1e9:.0f} GB are free"
                )
                results.add(c | {"on": device}, what, name, reason=reason)
            else:
                found[name, c["P"]] = c
    return found


def measure(plan: Plan, results: Results, device: str, rounds: int, asked: Sequence[str] | None = None) -> None:
    """Measures one group: every length of every way in turn."""
    what = plan[0][1]
    loaded = load(plan, device, asked, results)
    cases = fitting(plan, loaded, device, results)
    samples = (_train if what == "train" else _decode)(cases, loaded, device, rounds)
    floor = min(samples["bare", 0]) if ("bare", 0) in samples else math.nan
    print(f"\n{what}  " + " ".join(f"{name}={value}" for name, value in plan[0][0].items() if name != "P"))
    for (name, P), seconds in sorted(samples.items(), key=lambda item: (item[0][1], item[0][0])):
        c, row = cases[name, P], spread(seconds)
        tokens = c["B"] * (c["S"] if what == "train" else 1) / (row["median"] or 1)
        results.add(c | {"on": device}, what, name, seconds=seconds, **row, tokens_per_second=tokens)
        over = (row["minimum"] or 0) / floor
        print(f"  {name:10} P={P:<6}{row['median']:9.3f} s median{tokens:10.0f} tokens/s{over:8.2f} x P=0", flush=True)


def _train(
    cases: Mapping[tuple[str, int], Case], loaded: Mapping[str, Prefixed], device: str, rounds: int
) -> dict[tuple[str, int], list[float]]:
    ways = {}
    for (name, P), c in cases.items():
        ways[name, P] = Way(*loaded[name].training(P, random_batch(c["B"], c["S"], device)))
    return back_to_back(ways, device, rounds=rounds)


def _decode(
    cases: Mapping[tuple[str, int], Case], loaded: Mapping[str, Prefixed], device: str, rounds: int
) -> dict[tuple[str, int], list[float]]:
    """One ``generate`` gives a sample per token."""
    samples: dict[tuple[str, int], list[float]] = {name: [] for name in cases}
    for number, order in enumerate(rotations(list(cases), 1 + rounds)):
        for name, P in order:
            c = cases[name, P]
            ids = random_batch(c["B"], c["S"], device)["input_ids"]
            gaps = token_times(loaded[name], P, ids, NEW if number else 2)  # the first round warms up
            samples[name, P] += gaps if number else []
    return samples


def token_times(way: Prefixed, P: int, ids: torch.Tensor, new: int) -> list[float]:
    """Seconds of each new token except the first."""
    from transformers import LogitsProcessorList

    times: list[float] = []

    def note(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return scores

    way.generating(P, ids, new, logits_processor=LogitsProcessorList([note]))
    return [b - a for a, b in pairwise(times)]


def measure_memory(plan: Plan, results: Results, device: str, asked: Sequence[str] | None = None) -> None:
    """Peak memory of ours and of the peers over one product of B and P."""
    what = plan[0][1]
    loaded = load(plan, device, [name for name in asked or WAYS if name != "bare"], results)
    for (c, _), (name, way) in ((pair, item) for pair in plan for item in loaded.items()):
        B, P = c["B"], c["P"]
        if (name, P) not in fitting([(c, what)], {name: way}, device, results):
            continue
        if what == "train":
            step, setup = way.training(P, random_batch(B, c["S"], device))
            run = lambda step=step, setup=setup: step(setup())
        else:
            run = lambda way=way, P=P, c=c: way.generating(P, random_batch(c["B"], c["S"], device)["input_ids"], 3)
        run()  # what stays, such as the optimizer's state, is there before
        found = memory.peak(run, device)
        results.add(c | {"on": device}, what, name, extra=found, copy=cache_bytes(way.model))
        print(f"{what} {name:10} B={B:<4} P={P:<6}{found / 1e6:10.1f} MB", flush=True)


def relative(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Time over that of P = 0 in the same run: what a longer prefix costs.

    "ratio" compares the fastest samples, since noise only adds time; "of_medians" compares medians.
    """
    found = []
    floors = {_group(r): r for r in records if r["way"] == "bare" and "seconds" in r}
    for r in records:
        if r.get("suite") == "model" and r["way"] != "bare" and "seconds" in r and _group(r) in floors:
            fastest, middle = (r[name] / floors[_group(r)][name] for name in ("minimum", "median"))
            same = {name: r[name] for name in ("what", "way", "case")}
            found.append({**same, "ratio": fastest, "of_medians": middle})
    return found


def _group(r: Record) -> tuple[Any, ...]:
    return (r["run"], r["what"], *((name, value) for name, value in sorted(r["case"].items()) if name != "P"))
