"""Tokens a second of training on padded and on packed batches of a data file, by turns, in this process.

    python -m benchmarks.packing devset.csv --rows 8 --steps 6

Tokens are those of rows, without padding. The model is SmolLM2-135M with a prefix of 10. Both kinds of batch have the
same rows; the first step of each kind is not counted. CPU seconds are those of the process: on a machine that others
use they say more than the clock.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from itertools import islice

import torch

from prefix_attn import PrefixConfig, get_prefix_model
from prefix_attn.hf.load import load_base
from prefix_attn.training.data import Examples
from prefix_attn.training.evaluate import target_loss
from prefix_attn.training.packing import pack
from prefix_attn.training.tokens import Encoder, Row, collate
from prefix_attn.training.train import has_bfloat16


def measure(file: str, rows: int, steps: int) -> dict[str, dict[str, float]]:
    """Tokens, share of padding, and tokens per second by the clock and of the CPU, for each kind of batch."""
    base, tokenizer = load_base("smollm2", dtype=torch.float32)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=10)).train()
    found = list(islice(Encoder(tokenizer, 512).rows(Examples(file)), 4000))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    pad = int(tokenizer.pad_token_id)
    kinds = {"padded": lambda some: collate(some, pad), "packed": pack}
    sums = {kind: {"tokens": 0.0, "columns": 0.0, "seconds": 0.0, "cpu_seconds": 0.0} for kind in kinds}
    for step in range(steps + 1):
        some: list[Row] = [found[i] for i in order[step * rows : (step + 1) * rows]]
        for kind, make in kinds.items():
            batch = {name: tensor.to(base.device) for name, tensor in make(some).items()}
            start, cpu = time.perf_counter(), time.process_time()
            with torch.autocast(base.device.type, torch.bfloat16) if has_bfloat16(base.device) else nullcontext():
                loss = target_loss(model, batch)
            loss.backward()
            model.zero_grad()
            if step:
                sums[kind]["seconds"] += time.perf_counter() - start
                sums[kind]["cpu_seconds"] += time.process_time() - cpu
                sums[kind]["tokens"] += sum(len(row["input_ids"]) for row in some)
                sums[kind]["columns"] += batch["input_ids"].numel()
    return {
        kind: {
            "tokens": s["tokens"],
            "padding": round(1 - s["tokens"] / s["columns"], 3),
            "tokens_per_second": round(s["tokens"] / s["seconds"], 1),
            "tokens_per_cpu_second": round(s["tokens"] / s["cpu_seconds"], 1),
        }
        for kind, s in sums.items()
    }


def main() -> None:
    """Print the measurement as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="what prefix-attn train takes as --data")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps(measure(given.file, given.rows, given.steps)), flush=True)


if __name__ == "__main__":
    main()
