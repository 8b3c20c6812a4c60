"""``python -m benchmarks run | plot | compare | report | regret``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

# With another process on the machine, OpenMP threads that spin while they wait make every call several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks import machine, memory, model, operator, overhead, regret, results
from benchmarks.measure import noise
from benchmarks.peers import PEERS, STORES_SCORES, inputs, prepare
from benchmarks.results import Plan

PROGRAM = "python -m benchmarks"
SUITES = ("operator", "model", "memory", "overhead")
DESCRIPTION = """\
Benchmarks of attention with a shared prefix, compared with other implementations.

  run       time a suite and write a file of results
  plot      draw pictures from files of results
  compare   compare two files, case by case
  report    write a markdown report with pictures from files of results
  regret    check that auto chose the fastest backend; exit status 1 if any choice took over 10 % longer
"""
RUN = """\
Suites:
  operator   one attention call (forward, backward, decoding, prefill) compared with torch and other libraries
  model      training steps and decoding of whole models with prefixes of growing length, compared with PEFT
  memory     peak memory for growing batches and prefixes
  overhead   microseconds of a call that computes almost nothing, and of decoding one to four rows

Examples:
  run --suite operator --out operator.json
  run --suite operator --select what=decode B=64 dtype=float32 --out decode.json
  run --suite operator --grid full --list

Peers of one call: {calls}.
Ways of a whole model: {ways}.
"""


GRID = """default: ten minutes on two cores; quick: tiny shapes; full: every combination; flex: a few shapes, with the
peers that take minutes to compile"""
SELECT = "run only these cases, such as what=decode P=0,128; None matches cases without the field"


def positive(text: str) -> int:
    """Parses a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(prog=PROGRAM, description=DESCRIPTION, formatter_class=raw)
    commands = found.add_subparsers(dest="command", required=True)
    described = RUN.format(calls=", ".join(PEERS), ways=", ".join(model.WAYS))
    run = commands.add_parser("run", help="time a suite", description=described, formatter_class=raw)
    run.add_argument("--suite", choices=SUITES, required=True)
    run.add_argument("--out", type=Path, help="file of results (JSON); an existing file is replaced")
    run.add_argument("--figures", type=Path, help="folder for pictures of this run; needs --out")
    run.add_argument("--grid", choices=("default", "quick", "full", "flex"), default="default", help=GRID)
    run.add_argument("--select", nargs="+", default=[], metavar="NAME=VALUES", help=SELECT)
    run.add_argument("--list", action="store_true", help="list the cases and stop")
    run.add_argument("--peers", nargs="+", metavar="NAME", help="default: all that are reasonably fast on this device")
    run.add_argument("--rounds", type=positive, help="maximum number of samples per way (default: 30; models: 3)")
    run.add_argument("--seconds", type=float, default=1.5, help="sampling time per operator case, at least 5 rounds")
    run.add_argument("--budget", type=float, help="seconds after which no new case starts (default grid: 420)")
    run.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    files = {
        "plot": "draw pictures from files of results", "report": "write a markdown report with pictures",
        "compare": "compare two files, case by case", "regret": "how much longer auto's choices took than the fastest",
    }  # fmt: skip
    for name, help_ in files.items():
        command = commands.add_parser(name, help=help_, description=help_)
        command.add_argument("results", nargs=2 if name == "compare" else "+", type=Path)
        if name in ("plot", "report"):
            command.add_argument(
                "--out", type=Path, required=True, help="folder" if name == "plot" else "markdown file"
            )
        if name == "report":
            command.add_argument("--figures", type=Path, help="folder for the pictures (default: that of the results)")
    return found


def main(arguments: Sequence[str] | None = None, restart: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status. User errors print one line to stderr and return 2.

    If malloc needs other settings, a run restarts itself as ``python *restart *arguments``; None = it does not.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(given)
    if args.command == "run" and not args.list and restart:
        machine.tune_malloc([*restart, *given])
    try:
        if args.command == "run":
            return run(args, f"{PROGRAM} {shlex.join(given)}")
        return afterwards(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def afterwards(args: argparse.Namespace) -> int:
    """The commands that read files of results."""
    if args.command == "regret":
        found = regret.regrets(results.records(args.results))
        for r in found[:20]:
            print(f"{r.regret:7.1%}  {r.what:12} {r.chosen} {r.seconds[0] * 1e3:.3f} ms, {r.best} "
                  f"{r.seconds[1] * 1e3:.3f} ms  {results.title(r.case.items())}")  # fmt: skip
        print(regret.summary(found))
        return int(any(r.regret > regret.LIMIT for r in found))
    if args.command == "plot":
        from benchmarks import plot

        print("\n".join(map(str, plot.pictures(args.results, args.out))))
    elif args.command == "compare":
        from benchmarks import compare

        print(compare.table(*args.results))
    else:
        from benchmarks import plot, report

        folder = args.figures or args.results[0].parent
        pictures = plot.pictures(args.results, folder)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(report.markdown(args.results, pictures, args.out), encoding="utf-8")
        print(args.out)
    return 0


def plan(args: argparse.Namespace) -> Plan:
    """The (case, what) pairs of a run."""
    makers: dict[str, Any] = {
        "operator": operator.grid,
        "model": model.grid,
        "memory": lambda *grid: memory.grid(*grid) + model.memory_grid(*grid),
        "overhead": overhead.grid,
    }
    found = makers[args.suite](args.device, args.grid)
    return results.selected(found, results.parse_filters(args.select)) if args.select else found


def run(args: argparse.Namespace, command: str) -> int:
    """Times one suite."""
    pairs = plan(args)
    if args.list:
        print("\n".join(f"{what:12} {results.title(case.items())}" for case, what in pairs))
        print(f"{len(pairs)} cases")
        return 0
    if args.grid == "flex" and not args.peers:
        args.peers = [name for name in PEERS if name not in STORES_SCORES]
    known: tuple[str, ...] = {"model": model.WAYS, "overhead": ()}.get(args.suite, tuple(PEERS))
    if unknown := [name for name in args.peers or () if name not in known]:
        named = ", ".join(known) or "none to choose"
        raise ValueError(f"--peers: the suite {args.suite} has no {unknown[0]!r}; there are {named}")
    if args.figures and not args.out:
        raise ValueError("--figures needs --out: pictures are made from the file of results")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    quick = args.grid == "quick"
    ceilings = machine.ceilings(args.device, quick=quick)
    floor = noise(_noise_case(args.device), args.device, groups=1 if quick else 5)
    about = {"command": command, "machine": machine.describe(args.device), "ceilings": ceilings, "noise_floor": floor}
    log = results.Results(args.suite, args.out, **about)
    rates = ", ".join(f"{name} {rate / 1e9:.1f} G/s" for name, rate in ceilings.items())
    print(
        f"{about['machine']['device']}, {args.threads} threads; {rates}; the same twice differs by {floor:.1%}",
        flush=True,
    )
    left = _sweep(args, pairs, log, ceilings)
    for case, what in left:
        log.add(case, what, "", reason="the time was up")
    log.save()
    if args.figures:
        from benchmarks import plot

        print("\n".join(map(str, plot.pictures([args.out], args.figures))))
    if args.suite == "operator":
        print("\n" + regret.summary(regret.regrets(log.records)))
    if args.suite == "memory":
        print(memory.verdict(log.records))
    return 0


def _noise_case(device: str) -> Any:
    """A call of torch's attention that takes about a millisecond."""
    x = inputs(8, 12, 12, 128, 128, 16, 64, is_causal=True, dtype=torch.float32, device=device)
    return operator.way(prepare({"sdpa": PEERS["sdpa"]}, x, gradients=False).ready["sdpa"], "forward")


def _sweep(args: argparse.Namespace, pairs: Plan, log: results.Results, ceilings: dict[str, float]) -> Plan:
    """Runs the pairs; returns those that did not fit in the time."""
    # A group of whole models takes up to three minutes on two cores, so a run of 420 s ends within ten minutes.
    seconds = 420.0 if args.budget is None and args.grid == "default" else args.budget
    budget, flat = results.Budget(seconds), lambda groups: list(chain.from_iterable(groups))
    if args.suite == "operator":
        options = operator.RunOptions(args.device, args.rounds or 30, args.seconds, ceilings, args.peers)
        one = lambda group: operator.measure(group[0], group[1], log, options)
        left = results.sweep(operator.grouped(pairs), one, log, budget)
        return [(case, what) for case, kinds in left for what in kinds]
    if args.suite == "memory":
        of_calls = [pair for pair in pairs if "model" not in pair[0]]
        of_models = [pair for pair in pairs if "model" in pair[0]]
        one = lambda pair: memory.measure(pair[0], [pair[1]], log, args.device, args.peers)
        left = results.sweep(of_calls, one, log, budget)
        groups = [[p for p in of_models if p[1] == what] for what in model.WHAT]
        whole = lambda group: model.measure_memory(group, log, args.device)
        return left + flat(results.sweep([g for g in groups if g], whole, log, budget))
    if args.suite == "model":
        one = lambda group: model.measure(group, log, args.device, args.rounds or 3, args.peers)
        return flat(results.sweep(model.grouped(pairs), one, log, budget))
    calls = 5 if args.grid == "quick" else overhead.CALLS
    overhead.measure(pairs, log, args.device, args.rounds or 30, calls)
    return []
