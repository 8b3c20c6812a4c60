"""Hours of training and generation in one process, whose memory must stay flat.

    python -m benchmarks.soak --minutes 60 --out runs/soak.json

A round trains an MLP prefix, generates for batches of other lengths, mixes, deletes and disables prefixes, saves and
loads. The memory of the process is written down every few seconds. The first third is for allocators to warm up. The
median of the last third may not lie above that of the middle one by more than ``--allowed`` megabytes: exit status 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model

STATUS = Path("/proc/self/statm")
EVERY = 2.0  # seconds
P = 8


def resident() -> float:
    """MB of this process in memory; where the system does not say so, the most so far."""
    if STATUS.exists():
        return int(STATUS.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def base() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=512, num_key_value_heads=2, max_position_embeddings=512, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def one_round(model: PrefixModel, optimizer: torch.optim.Optimizer, number: int, folder: Path) -> None:
    """Whatever a server and a trainer do to a model, with other sizes in every round."""
    batch, length = 1 + number % 4, 8 + 7 * number % 64
    ids = torch.randint(3, 512, (batch, length))
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    quiet = {"do_sample": False, "max_new_tokens": 1 + number % 16, "pad_token_id": 0, "eos_token_id": None}
    model.generate(ids, num_beams=1 + number % 2, **quiet)
    model.save_pretrained(folder, training_state=True)
    model.load_prefix(folder, "loaded", is_trainable=False)
    model.generate(ids, prefix_names=["loaded" if row % 2 else None for row in range(batch)], **quiet)
    with model.disable_prefix(), torch.no_grad():
        model(input_ids=ids)
    model.set_prefix("default")
    model.delete_prefix("loaded")


def run(minutes: float) -> dict[str, Any]:
    """Memory in MB against seconds, and how many rounds there were."""
    config = PrefixConfig(num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=64)
    model = get_prefix_model(base(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    samples: list[tuple[float, float]] = []
    start, rounds = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        while (now := time.monotonic() - start) < 60 * minutes:
            one_round(model, optimizer, rounds, Path(folder))
            rounds += 1
            if not samples or now - samples[-1][0] >= EVERY:
                gc.collect()
                samples.append((round(now, 1), round(resident(), 2)))
    return {"rounds": rounds, "steps": 4 * rounds, "minutes": minutes, "samples": samples}


def growth(samples: list[tuple[float, float]]) -> float:
    """MB by which the last third lies above the middle one."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    return statistics.median(mb for _, mb in last) - statistics.median(mb for _, mb in middle)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--allowed", type=float, default=8, help="MB from the middle third to the last")
    parser.add_argument("--out", type=Path, help="write all samples into this JSON file")
    given = parser.parse_args(arguments)
    found = run(given.minutes)
    found["growth_mb"] = round(growth(found["samples"]), 2)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found), encoding="utf-8")
    curve = found["samples"][:: max(1, len(found["samples"]) // 10)]
    print("MB after seconds:", ", ".join(f"{mb:.0f} ({seconds:.0f})" for seconds, mb in curve))
    rounds, steps, grown = (found[name] for name in ("rounds", "steps", "growth_mb"))
    print(f"{rounds} rounds, {steps} steps; the last third is {grown:+.2f} MB above the middle one")
    sys.exit(found["growth_mb"] > given.allowed)


if __name__ == "__main__":
    main()
