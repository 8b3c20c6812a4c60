"""One setting of training in this process: seconds a step, by the clock and of the CPU, and the peak of its memory.

    python -m benchmarks.training --rows 8 --length 512 --gradient-checkpointing

Every column but the first is a target. The model is SmolLM2-135M with a prefix, trained as ``prefix-attn train`` trains
it: bfloat16 products where the device has units for them, else float32. The peak is that of the process, its libraries
and the weights included. To compare two commits, run both by turns, each in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from contextlib import nullcontext

import torch

from prefix_attn import PrefixConfig, get_prefix_model
from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from prefix_attn.hf.load import load_base
from prefix_attn.training.evaluate import target_loss
from prefix_attn.training.memory import give_back
from prefix_attn.training.train import has_bfloat16


def measure(rows: int, length: int, tokens: int, steps: int, *, checkpointing: bool, float32: bool) -> dict[str, float]:
    """The median seconds of ``steps`` steps after one more, the peak in GB, and the loss of the last step."""
    base, _ = load_base("smollm2", dtype=torch.float32)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=tokens)).train()
    if checkpointing:
        set_checkpointing(model, use_reentrant=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(1000, 40000, (rows, length), generator=torch.Generator().manual_seed(0)).to(base.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    seconds, busy, loss = [], [], torch.zeros(())
    for _ in range(1 + steps):
        start, cpu = time.perf_counter(), time.process_time()
        half = has_bfloat16(base.device) and not float32
        with torch.autocast(base.device.type, torch.bfloat16) if half else nullcontext():
            loss = target_loss(model, batch)
        tight = checkpointing and base.device.type == "cpu"
        if tight:
            give_back()
        loss.backward()
        if tight:
            give_back()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
    if base.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"seconds": seconds, "cpu_seconds": busy}
    medians = {name: round(sorted(values[1:])[steps // 2], 3) for name, values in found.items()}
    return medians | {"peak_gb": round(peak / 1e9, 3), "loss": float(loss.detach())}


def main() -> None:
    """Print the measurement as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=10, help="virtual tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", dest="checkpointing", action="store_true")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 products")
    given = vars(parser.parse_args())
    torch.set_num_threads(given.pop("threads"))
    print(json.dumps(given | measure(**given)), flush=True)


if __name__ == "__main__":
    main()
