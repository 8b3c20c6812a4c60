"""The same cases and ways under pytest-benchmark, for work on one of them: its storage, comparison and histograms.

    pytest benchmarks --benchmark-autosave -k "decode and cpu"          before a change
    pytest benchmarks --benchmark-compare -k "decode and cpu"           after it

These are absolute times of one way after the other. What is published comes from ``python -m benchmarks run``, where
the ways take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import model, model_ways, operator
from benchmarks.operator import GPT2, case, step, way
from benchmarks.peers import PEERS, inputs, prepare

CASES = {
    "decode": step(64, 128, 512, GPT2, "float32"),
    "forward": case(8, 128, 128, 100, GPT2),
    "both": case(8, 128, 128, 100, GPT2),
    "prefill": case(1, 1024, 1024, 128, GPT2),
}
WAYS = ("cpu", "composed", "sdpa", "cat + sdpa")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("what", CASES)
def test_operator(benchmark: Any, what: str, name: str) -> None:
    c, gradients = CASES[what], what in operator.WITH_GRADIENTS
    shape = {n: c[n] for n in ("B", "Hq", "Hkv", "S", "T", "P", "D", "is_causal")}
    x = inputs(**shape, dtype=getattr(torch, c["dtype"]), device="cpu")
    ready, reasons, _ = prepare({name: PEERS[name]}, x, gradients=gradients)
    assert name in ready, reasons[name]
    call = way(ready[name], what)
    benchmark.group = f"{what} P={c['P']}"
    benchmark.extra_info.update(c, way=name, threads=1, torch=torch.__version__, gflop=operator.flops(c, what) / 1e9)
    with call.context():
        benchmark.pedantic(lambda: call.run(call.setup()), rounds=20, warmup_rounds=2)
    assert benchmark.stats is None or benchmark.stats.stats.min > 0


@pytest.mark.parametrize("name", ["bare", "ours", "PEFT"])
@pytest.mark.parametrize("what", model.WHAT)
@pytest.mark.parametrize("shape", ["tiny", "gpt2"])
def test_model(benchmark: Any, what: str, name: str, shape: str) -> None:
    P = 0 if name == "bare" else 16
    loaded = model_ways.Prefixed(name, shape, "cpu", [16])
    batch = model_ways.random_batch(4, 32, "cpu")
    benchmark.group = f"{shape}, {what}"
    benchmark.extra_info.update(model=model_ways.MODELS[shape], way=name, P=P, threads=1, torch=torch.__version__)
    if what == "train":
        run, setup = loaded.training(P, batch)
        benchmark.pedantic(run, setup=lambda: ((setup(),), {}), rounds=5, warmup_rounds=1)
    else:
        benchmark.pedantic(lambda: loaded.generating(P, batch["input_ids"], 8), rounds=3, warmup_rounds=1)
    assert benchmark.stats is None or benchmark.stats.stats.min > 0
