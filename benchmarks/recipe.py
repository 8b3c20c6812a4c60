"""The search for what a prefix lacks beside LoRA: one cell at a time, each a line of ``cells.jsonl``.

``python -m benchmarks.recipe devset.csv --out runs/recipe`` trains each cell for 100 steps on E2E with one seed and
notes its validation loss. Cells that are there are left out, so that a search that was stopped goes on when it is
started again; ``--only keys`` runs those whose names have these letters, and ``--list`` prints all of them.

A cell is a way to train ten virtual tokens, or LoRA of rank 2, which stores about as much. The rates of keys and values
are apart: a parameter that is divided by a factor and multiplied by it again learns that many times faster with Adam.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.experiments.loop import train
from prefix_attn.experiments.methods import sizes, wrap
from prefix_attn.experiments.plan import Run
from prefix_attn.experiments.runner import load, weights_to_bfloat16
from prefix_attn.hf.load import load_base
from prefix_attn.training.tokens import batches
from prefix_attn.training.train import VALIDATION_BATCH, has_bfloat16

RATES = (1e-2, 3e-2, 1e-1, 3e-1)
STARTS = {
    "random": {"init": "random"},
    "zero gate": {"init": "random", "gate": "zero"},
    "task": {"init": "text", "init_text": "Describe the restaurant in one or two English sentences."},
    "rows": {"init": "document"},  # of the training rows
    "infix": {"init": "random", "mode": "infix"},
}


class Scaled(nn.Module):
    """Multiplies keys and values by factors of their own. Stands for the MLP of an encoder."""

    def __init__(self, slots: int, keys: float, values: float) -> None:
        """``slots`` are layers."""
        super().__init__()
        self.register_buffer("factors", torch.tensor([keys, values]).repeat(slots), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """(P, 2 * slots * H * D), as ``PrefixEncoder`` has it."""
        assert isinstance(self.factors, Tensor)
        return (rows.unflatten(-1, (len(self.factors), -1)) * self.factors[:, None]).flatten(-2)


def cells() -> Iterator[dict[str, Any]]:
    """Every cell of the search, the simplest first."""
    for rate in RATES:
        yield {"name": f"lora 2, {rate / 10:g}", "method": "lora", "rank": 2, "rate": rate / 10}
    for start, keys, values in (
        *((start, rate, rate) for rate in RATES for start in STARTS),
        *(("random", keys, values) for keys in RATES for values in RATES if keys != values),
    ):
        yield {"name": f"{start}, keys {keys:g}, values {values:g}", "start": start, "keys": keys, "values": values}


def model_of(base: Any, tokenizer: Any, cell: dict[str, Any], text: str, P: int) -> tuple[Any, float]:
    """The model of a cell, and its learning rate."""
    if cell.get("method") == "lora":
        return wrap(base, tokenizer, Run("e2e", "lora", "", rank=cell["rank"])), cell["rate"]
    start = dict(STARTS[cell["start"]])
    if start["init"] == "document":
        start["init_text"] = text
    config: dict[str, Any] = {"num_virtual_tokens": P, **start}
    model = get_prefix_model(base, PrefixConfig(**config), tokenizer)
    if cell["keys"] != cell["values"]:
        scale(model, cell["keys"] / cell["values"])
    return model, cell["values"]


def scale(model: PrefixModel, keys: float) -> None:
    """Let keys learn ``keys`` times as fast as values. The prefix stays what it is."""
    encoder, _ = model.find_prefix("default")
    factors = Scaled(encoder.num_layers, keys, 1.0)
    with torch.no_grad():
        encoder.embedding.copy_(encoder.embedding / factors(torch.ones_like(encoder.embedding)))
    encoder.mlp = factors.to(encoder.embedding.device)


def execute(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train one cell. Rows, order and validation are those of the experiments."""
    since = time.perf_counter()
    base, tokenizer = load_base(options.model, dtype="float32")
    run = Run("e2e", "prefix", options.data.name, seed=options.seed, virtual_tokens=options.virtual_tokens)
    data = load(run, {options.data.name: options.data}, tokenizer)
    total = sum(p.numel() for p in base.parameters())
    if has_bfloat16(base.device):
        weights_to_bfloat16(base)
    torch.manual_seed(options.seed)
    text = "\n".join(tokenizer.decode(row["input_ids"]) for row in data.train[::100])
    model, rate = model_of(base, tokenizer, cell, text, options.virtual_tokens)
    held_out = batches(data.validation, VALIDATION_BATCH, tokenizer.pad_token_id)
    length = {"steps": options.steps, "batch_size": options.batch_size, "validate_every": options.steps}
    found = train(model, data.train, tokenizer.pad_token_id, held_out, learning_rate=rate, seed=options.seed, **length)
    row = cell | {"loss": found["validation"][-1][1], "start_loss": found["validation"][0][1], **length}
    row |= {"seed": options.seed, "stored": sizes(model, run, total)["stored_parameters"]}
    return row | {"seconds_per_step": found["seconds_per_step"], "wall": time.perf_counter() - since}


def main() -> None:
    """Run the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="E2E's devset.csv")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--virtual-tokens", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    wanted = [cell for cell in cells() if options.only in cell["name"]]
    if options.list:
        print("\n".join(cell["name"] for cell in wanted))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "cells.jsonl"
    key = ("name", "steps", "batch_size", "seed")
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    known = {tuple(row[name] for name in key) for row in done}
    for cell in wanted:
        if (cell["name"], options.steps, options.batch_size, options.seed) in known:
            continue
        row = execute(cell, options)
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(f"{row['loss']:.4f}  {row['wall']:5.0f} s  {row['name']}", flush=True)


if __name__ == "__main__":
    main()
