"""``prefix-attn reproduce | ablate | pretrain | report``: run the experiments that are missing, print the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from prefix_attn.cli.shared import DATA, AsJson, Beams, Model, NewTokens, check_writable, show
from prefix_attn.experiments import plan, results
from prefix_attn.experiments.plan import Run

Task = Literal["e2e", "dart", "webnlg", "summary", "aws", "aws-summary"]
Ablation = Literal["length", "init", "mode", "lowdata", "sites"]
Number = TypeVar("Number", int, float)
Axis = Literal["step", "virtual_tokens", "examples", "method"]
_METHODS = ",".join(plan.METHODS)
_AXIS = {"length": "virtual_tokens", "lowdata": "examples", "init": "method", "mode": "method", "sites": "method"}

Out = Annotated[
    Path, typer.Option(help="Folder for results.jsonl, table.md and plot.png. Results already in it are kept.")
]
Train = Annotated[
    Path | None,
    typer.Option(help="File to train on. About a tenth is held out for validation. The 'aws' tasks need none."),
]
Test = Annotated[
    Path | None,
    typer.Option(help="File to generate for. If it is --train, a fifth of it is used. Default: no generation."),
]
Seeds = Annotated[str, typer.Option(help="Random seeds, such as 0,1,2.")]
Steps = Annotated[
    int, typer.Option(min=1, help="Steps of each run. Ablations with few examples take the paper's number.")
]
ValidateEvery = Annotated[
    int, typer.Option(min=1, help="Steps between validations. Runs with few examples keep the best of these.")
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=8, help="Tokens per row; with an encoder-decoder per source and per target. Default: set by the task."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per step.")]
Tokens = Annotated[int, typer.Option(min=1, help="Virtual tokens, unless the experiment varies them.")]
MlpWidth = Annotated[int, typer.Option(min=1, help="Hidden size of the MLP.")]
Rank = Annotated[
    int, typer.Option(min=1, help="Rank of LoRA. For SmolLM2, rank 2 stores as much as 10 virtual tokens.")
]
Rates = Annotated[
    str | None, typer.Option(help="Learning rates, such as 1e-2,3e-3. Default: one per method, the best on E2E.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Generate for this many inputs, evenly spaced. Default: all.")]
Unseen = Annotated[str | None, typer.Option(help="Categories to leave out of training, such as webnlg,e2e for DART.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")]
Device = Annotated[str | None, typer.Option(help="Device to run on. Default: the GPU if there is one.")]
Methods = Annotated[str, typer.Option(help="Methods to compare.")]
TaskBeams = Annotated[
    int | None,
    typer.Option(min=1, help="Number of beams. 1 decodes greedily. Default: the paper's 5, or 6 for summaries."),
]
Kind = Annotated[
    Ablation,
    typer.Argument(
        help="What to vary: figure 4, figure 5, table 4 or figure 3 of the paper; 'sites': where the prefix enters."
    ),
]
PrefixRate = Annotated[
    float | None, typer.Option(help="Learning rate of prefixes. Default: one per method, the best on E2E.")
]


def reproduce(
    task: Annotated[Task, typer.Argument(help="Task to train on. 'aws' and 'aws-summary' need no files.")],
    model: Model,
    out: Out,
    train: Train = None,
    test: Test = None,
    methods: Methods = _METHODS,
    seeds: Seeds = "0",
    steps: Steps = 300,
    batch_size: BatchSize = 8,
    max_length: MaxLength = None,
    validate_every: ValidateEvery = 10,
    learning_rate: Rates = None,
    virtual_tokens: Tokens = 10,
    mlp_width: MlpWidth = 512,
    rank: Rank = 2,
    limit: Limit = None,
    num_beams: TaskBeams = None,
    max_new_tokens: NewTokens = 64,
    unseen: Unseen = None,
    threads: Threads = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare prefix tuning with other methods, as in table 1 of the paper. Runs already in --out are not repeated.

    [bold]prefix-attn reproduce e2e --model gpt2-medium --train devset.csv --test testset_w_refs.csv
    --out runs/e2e[/bold]

    [bold]prefix-attn reproduce dart --model gpt2-medium --train dart.json.gz --test dart.json.gz --unseen webnlg
    --out runs/dart[/bold]

    Files: E2E is at github.com/tuetschek/e2e-dataset, DART at github.com/Yale-LILY/dart.
    """
    common = _common(
        task,
        train,
        test,
        model=model,
        steps=steps,
        batch_size=batch_size,
        max_length=max_length or plan.MAX_LENGTH[task],
        validate_every=validate_every,
        virtual_tokens=virtual_tokens,
        mlp_width=mlp_width,
        rank=rank,
        limit=limit,
        num_beams=num_beams or plan.NUM_BEAMS[task],
        max_new_tokens=max_new_tokens,
        unseen=tuple(unseen.split(",")) if unseen else (),
    )
    rates = _numbers("--learning-rate", learning_rate, float) if learning_rate else [None]
    runs = plan.reproduce(common, methods.split(","), _numbers("--seeds", seeds, int), rates)
    _run(runs, [train, test], out, "step", threads, device, as_json)


def ablate(
    kind: Kind,
    model: Model,
    out: Out,
    train: Train = None,
    test: Test = None,
    task: Annotated[Task, typer.Option(help="Task of the files.")] = "e2e",
    seeds: Seeds = "0",
    subsets: Annotated[str, typer.Option(help="Which random draws of the few examples, such as 0,1,2.")] = "0",
    steps: Steps = 300,
    batch_size: BatchSize = 8,
    max_length: MaxLength = None,
    validate_every: ValidateEvery = 10,
    learning_rate: PrefixRate = None,
    virtual_tokens: Tokens = 10,
    mlp_width: MlpWidth = 512,
    limit: Limit = None,
    num_beams: Beams = 1,
    max_new_tokens: NewTokens = 64,
    threads: Threads = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Vary one thing: the length of the prefix, its start, how or where it enters, or the number of examples.

    [bold]prefix-attn ablate length --model gpt2-medium --train devset.csv --seeds 0,1,2 --out runs/length[/bold]

    [bold]prefix-attn ablate lowdata --model gpt2-medium --train devset.csv --test testset_w_refs.csv --subsets 0,1,2
    --out runs/low[/bold]

    [bold]prefix-attn ablate sites --task dart --train dart.json.gz --model runs/t5 --max-length 256 --out runs/s[/bold]

    Runs already in --out are not repeated. "sites" needs an encoder-decoder: see prefix-attn pretrain.

    With few examples, training stops early by the loss on a third as many further rows, and the best step is kept.
    """
    common = _common(
        task,
        train,
        test,
        model=model,
        steps=steps,
        batch_size=batch_size,
        max_length=max_length or plan.MAX_LENGTH[task],
        validate_every=validate_every,
        learning_rate=learning_rate,
        virtual_tokens=virtual_tokens,
        mlp_width=mlp_width,
        limit=limit,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )
    runs = plan.ablate(kind, common, _numbers("--seeds", seeds, int), _numbers("--subsets", subsets, int))
    _run(runs, [train, test], out, _AXIS[kind], threads, device, as_json)


def pretrain(
    data: Annotated[str, typer.Argument(help=DATA)],
    out: Annotated[Path, typer.Option(help="Folder for the model. Give it to other commands as --model.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1500,
    batch_size: BatchSize = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens per source and per target.")] = 96,
    seed: Annotated[int, typer.Option(help="Seed of weights, masks and order.")] = 0,
    threads: Threads = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train a small T5 from scratch, half on the task and half on masked texts, if you have no encoder-decoder.

    [bold]prefix-attn pretrain devset.csv --out runs/t5[/bold]

    It learns from nine tenths of DATA. Use other files to test it and to train prefixes for it.
    """
    import torch

    from prefix_attn.hf.load import check_options
    from prefix_attn.training.data import read_examples

    check_options(device=device)
    check_writable(out)
    examples = read_examples(data)
    from prefix_attn.experiments import pretrain as pretraining

    if threads is not None:
        torch.set_num_threads(threads)
    found = pretraining.pretrain(
        examples,
        out,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        seed=seed,
        device=device,
    )
    (_, first), (_, last) = found["validation"]
    text = f"{found['parameters']:,} parameters, saved in {out}; validation loss {first:.3f} -> {last:.3f}"
    show(found, as_json, text)


def report(
    file: Annotated[Path, typer.Argument(help="A results.jsonl that reproduce or ablate wrote.", exists=True)],
    plot: Annotated[Path | None, typer.Option(help="Also draw a plot into this .png.")] = None,
    axis: Annotated[Axis, typer.Option(help="What the plot has on its axis.")] = "step",
    as_json: AsJson = False,
) -> None:
    """Print a file of results as a table.

    [bold]prefix-attn report runs/e2e/results.jsonl --plot curve.png[/bold]
    """
    from prefix_attn.experiments import report as reporting

    if plot is not None:
        check_writable(plot.parent, plot)
    found = results.read(file)
    if not found:
        raise ValueError(f"{file}: holds no results")
    if plot is not None:
        reporting.plot(found, axis, plot)
    typer.echo(json.dumps(found, indent=2) if as_json else reporting.table(found))


def _common(task: str, train: Path | None, test: Path | None, **settings: Any) -> dict[str, Any]:
    """The settings that all runs of a plan share."""
    if task.startswith("aws"):
        if train is not None or test is not None:
            raise ValueError(f"the task {task!r} needs no files: its data come from botocore")
        names = {"train": task, "test": task}
    elif train is None:
        raise ValueError(f"the task {task!r} needs --train")
    else:
        names = {"train": train.name, "test": test.name if test else None}
        if test is not None and test != train and test.name == train.name:
            raise ValueError(f"--train and --test must have different names, got {train} and {test}")
    start = {"init": "random", "init_text": plan.INSTRUCTIONS[task]}
    return {"task": task, **names, **start, **settings}


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between them, got {text!r}") from None


def _run(
    runs: Sequence[Run],
    files: Sequence[Path | None],
    out: Path,
    axis: str,
    threads: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Do the runs that ``out`` lacks, one line of results each. Then write the table and the plot of all ``runs``."""
    import torch

    from prefix_attn.hf.load import check_base

    for path in files:
        if path is not None:
            with path.open("rb"):  # an OSError names it
                pass
    for model in {run.model for run in runs}:
        check_base(model, device=device)
    check_writable(out)
    from prefix_attn.experiments import report as reporting
    from prefix_attn.experiments.methods import require
    from prefix_attn.experiments.runner import execute
    from prefix_attn.hf.io.writing import replace

    if threads is not None:
        torch.set_num_threads(threads)
    folders = {file.name: file for file in files if file is not None}
    file = out / "results.jsonl"
    done = {Run.from_dict(result["run"]) for result in results.read(file)}
    missing = [run for run in runs if run not in done]
    require(missing)
    typer.echo(f"{len(runs)} runs, {len(runs) - len(missing)} of them in {file} already", err=True)
    text = ""
    try:
        for number, run in enumerate(missing, start=1):
            typer.echo(f"run {number} of {len(missing)}: {_name(run)}", err=True)
            results.append(file, execute(run, folders, device))
    finally:  # finished runs get their table and plot even if a later run failed
        found = [result for result in results.read(file) if Run.from_dict(result["run"]) in set(runs)]
        if found:
            text = reporting.table(found)
            replace(out / "table.md", f"{text}\n".encode())
            reporting.plot(found, axis, out / "plot.png")
    typer.echo(json.dumps(found, indent=2) if as_json else text)


def _name(run: Run) -> str:
    shown = ("virtual_tokens", "sites", "init", "examples", "subset", "learning_rate", "steps")
    values = {name: "+".join(value) if isinstance(value, tuple) else value for name, value in vars(run).items()}
    found = [f"{name} {values[name]}" for name in shown if values[name] is not None]
    return ", ".join([f"{run.method}, seed {run.seed}", *found])
