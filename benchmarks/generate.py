"""Tokens per second of greedy decoding with SmolLM2-135M: the bare model, ours and PEFT with a prefix of P tokens.

The ways run in one process, alternating, each with its own copy of the base model in float32 and its own cache. Timed
is decoding alone, from the first new token to the last. The bare model has no prefix to read.

    python -m benchmarks.generate [--batch 64] [--prefix 512] [--prompt 32] [--new 17] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.measure import rotations, summarise, table, write
from benchmarks.train_step import base


class Clock(LogitsProcessor):
    """Notes when each token is about to be chosen."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return scores


def ours(device: str, tokens: int) -> Any:
    from prefix_attn import PrefixConfig, get_prefix_model

    return get_prefix_model(base(device), PrefixConfig(num_virtual_tokens=tokens))


def peft(device: str, tokens: int) -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(base(device), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))


def decode(model: Any, ids: Tensor, new: int) -> float:
    """Seconds per token of each row, first token excluded."""
    clock = Clock()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        logits_processor=LogitsProcessorList([clock]),
    )
    return (clock.times[-1] - clock.times[0]) / (new - 1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("batch", 64), ("prefix", 512), ("prompt", 32), ("new", 17), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    models = {"bare": base(options.device), "ours": ours(options.device, options.prefix)}
    models["PEFT"] = peft(options.device, options.prefix)
    ids = torch.randint(1000, 40000, (options.batch, options.prompt), device=options.device)
    samples: dict[str, list[float]] = {name: [] for name in models}
    for order in rotations(list(models), options.rounds):
        for name in order:
            samples[name].append(decode(models[name].eval(), ids, options.new))
    rows = summarise(samples, reference="ours")
    print(f"decoding, batch {options.batch}, prefix {options.prefix}, prompt {options.prompt}; ratio to ours")
    print(table(rows, unit="ms"))
    for name, row in rows.items():
        print(f"{name}: {options.batch / row.minimum:.0f} tokens/s")
    if options.out:
        names = ("batch", "prefix", "prompt", "new", "device")
        write(options.out, "generate", {"model": "smollm2"} | {n: getattr(options, n) for n in names}, samples)


if __name__ == "__main__":
    main()
