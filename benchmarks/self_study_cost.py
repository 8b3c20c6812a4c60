"""What the shared chunk of self-study saves: memory and tokens per second, beside the text in every prompt.

``python -m benchmarks.self_study_cost --rows 16 --tokens 1024`` writes answers to one question for so many rows, about
one chunk, twice: with the chunk as a shared prefix, as self-study does, and with its tokens in front of every row, as a
plain ``generate`` would. Each way runs in a process of its own. Memory is how much the process grew at its peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import psutil
import torch

from prefix_attn.hf.load import load_base
from prefix_attn.training.generate import inputs_of
from prefix_attn.training.prompts import CHAT, Prompt
from prefix_attn.training.record import peak_memory
from prefix_attn.training.teacher import Context
from prefix_attn.training.tokens import prompt_ids

WAYS = ("shared", "copied")
TEXT = "A package which has pending triggers, or which awaits triggers, is not considered properly installed. "


def measure(options: argparse.Namespace) -> dict[str, float | str]:
    """One way in this process."""
    base, tokenizer = load_base(options.model, dtype=options.dtype)
    text = (tokenizer(TEXT * options.tokens, verbose=False)["input_ids"])[: options.tokens]
    asked = prompt_ids(tokenizer, "When is a package properly installed?", Prompt(CHAT))
    on_gpu = base.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    since, spent = time.perf_counter(), time.process_time()
    model, row = base, [*text, *asked]
    if options.way == "shared":
        context = Context(base)
        context.put(text)
        model, row = context.model, asked
    new = {"min_new_tokens": options.new_tokens, "max_new_tokens": options.new_tokens, "do_sample": False}
    pad = tokenizer.pad_token_id
    with torch.no_grad():
        model.generate(**inputs_of(model, pad, [row] * options.rows), pad_token_id=pad, **new)
    written, seconds, cpu = options.rows * options.new_tokens, time.perf_counter() - since, time.process_time() - spent
    growth = (peak_memory(base.device) - before) / 2**20
    found: dict[str, float | str] = {"way": options.way, "MiB": round(growth), "seconds": round(seconds, 1)}
    found |= {"cpu_seconds": round(cpu, 1), "tokens_per_second": round(written / seconds, 1)}
    return found | {"tokens_per_cpu_second": round(written / cpu, 1)}


def main() -> None:
    """Both ways."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024, help="of the chunk")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(measure(options)))
        return
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.self_study_cost", *sys.argv[1:], "--way", way]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
