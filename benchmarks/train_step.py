"""Seconds and memory of one training step of a prefix on SmolLM2-135M: forward, backward, AdamW.

Batch 8 x 96 tokens, 20 virtual tokens, MLP of width 512. The ways, in one process, alternating, each with its own copy
of the base model in float32:

    ours        get_prefix_model
    PEFT        PrefixTuningConfig with the same numbers: past_key_values, concatenated in every layer
    floor       the frozen model with no prefix, forward and backward to the input embeddings: no prefix tuning can be
                faster, as it must send a gradient through every layer (ours and PEFT stop at the first layer's prefix)

Peak memory: each way in a process of its own, the most that was resident during a few steps less what was resident
once everything was loaded and every weight read. On a GPU torch's own peak, less what was allocated after loading.

    python -m benchmarks.train_step [--out results.jsonl] [--steps 6] [--threads 2] [--only-memory ours|PEFT|floor]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.measure import interleave, summarise, table, write

BATCH, LENGTH, VIRTUAL, WIDTH = 8, 96, 20, 512
CASE = {"model": "smollm2", "batch": BATCH, "length": LENGTH, "virtual_tokens": VIRTUAL, "mlp": WIDTH}
Step = Callable[[], Any]


def base(device: str) -> Any:
    """A frozen copy of the base with torch's own attention."""
    from prefix_attn.hf.load import load_base

    model, _ = load_base("smollm2", dtype=torch.float32, device=device)
    model.set_attn_implementation("sdpa")
    for parameter in model.parameters():
        parameter.sum()  # weights are mapped from the file: a page not read yet would count as the first step's memory
    return model.requires_grad_(False)


def batch(device: str) -> dict[str, Tensor]:
    """Random tokens: the time does not depend on which they are."""
    ids = torch.randint(1000, 40000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def training(model: Any, device: str) -> Step:
    """One optimiser step of the model's trainable parameters."""
    model.train()
    inputs = batch(device)
    # fused: what the Hugging Face Trainer uses
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()

    return step


def ours(device: str) -> Step:
    from prefix_attn import PrefixConfig, get_prefix_model

    config = PrefixConfig(num_virtual_tokens=VIRTUAL, prefix_projection=True, encoder_hidden_size=WIDTH)
    return training(get_prefix_model(base(device), config), device)


def peft(device: str) -> Step:
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, prefix_projection=True, encoder_hidden_size=WIDTH
    )
    return training(get_peft_model(base(device), config), device)


def floor(device: str) -> Step:
    model, inputs = base(device), batch(device)
    model.train()
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    rest = {"attention_mask": inputs["attention_mask"], "labels": inputs["labels"], "use_cache": False}

    def step() -> None:
        embeddings.grad = None
        model(inputs_embeds=embeddings, **rest).loss.backward()

    return step


WAYS: dict[str, Callable[[str], Step]] = {"floor": floor, "ours": ours, "PEFT": peft}


def forget_peak() -> None:
    """Let ``peak_resident`` count from here. Linux can; elsewhere it keeps counting from the start of the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Bytes: the most that was resident since ``forget_peak``."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(way: str, device: str, steps: int = 3) -> dict[str, int]:
    """Bytes that the steps of one way need beyond the loaded model. For a process that has done nothing else."""
    step = WAYS[way](device)
    if device.startswith("cuda"):
        loaded = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            step()
        return {"bytes": torch.cuda.max_memory_allocated() - loaded, "loaded": loaded}
    forget_peak()
    loaded, before = psutil.Process().memory_info().rss, peak_resident()
    for _ in range(steps):
        step()
    if peak_resident() == before:
        raise RuntimeError("loading needed more memory than the steps, and its peak cannot be forgotten here")
    return {"bytes": peak_resident() - loaded, "loaded": loaded}


def memory_in_subprocess(way: str, device: str, threads: int) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.train_step", "--only-memory", way]
    command += ["--device", device, "--threads", str(threads)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each way")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only-memory", choices=list(WAYS), help="measure the peak memory of one way and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.only_memory:
        print(json.dumps(peak_memory(options.only_memory, options.device)))
        return
    memory = {way: memory_in_subprocess(way, options.device, options.threads) for way in WAYS}
    ways = {name: make(options.device) for name, make in WAYS.items()}
    samples = interleave(ways, rounds=options.steps)
    summaries = summarise(samples, reference="floor")
    print(f"training step, {CASE}, {options.device}, {options.threads} threads; ratio to the floor")
    print(table(summaries, unit="s"))
    print(
        f"ours/floor {summaries['ours'].ratio:.3f}, ours/PEFT {summaries['ours'].ratio / summaries['PEFT'].ratio:.3f}"
    )
    for way, numbers in memory.items():
        print(f"peak memory of the steps, {way}: {numbers['bytes'] / 2**20:.0f} MiB beyond the loaded model")
    if options.out:
        write(options.out, "train_step", CASE | {"on": options.device}, samples, memory=memory)


if __name__ == "__main__":
    main()
