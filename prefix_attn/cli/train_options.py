"""The options of ``prefix-attn train``, those of other commands apart. Each is one parameter of ``cli.train.train``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from prefix_attn.cli.config import read_config
from prefix_attn.cli.shared import DATA, data_option
from prefix_attn.cli.train_checks import TEXTS
from prefix_attn.training.settings import LEARNING_RATES, REPORTERS, STEPS

prefix_option: Callable[..., Any] = partial(typer.Option, rich_help_panel="The prefix")
training_option: Callable[..., Any] = partial(typer.Option, rich_help_panel="Training")
start_option: Callable[..., Any] = partial(typer.Option, rich_help_panel="Where it starts")

Output = Annotated[
    Path,
    typer.Option(help="Folder for the adapter, its checkpoints, run.yaml, metrics.json and loss.png.", file_okay=False),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="Take options from this YAML file, such as the run.yaml beside an adapter. Keys are "
        "names of options. What is given here as well wins. Paths are relative to the current "
        "folder.",
        callback=read_config,
        is_eager=True,
        dir_okay=False,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show three rows, with what is trained in \u27e6 \u27e7, counts of tokens, and how much memory it "
        "takes. Nothing is trained or written.",
    ),
]
TrainingData = Annotated[str | None, data_option(help=DATA)]
DistillFrom = Annotated[
    Path | None,
    typer.Option(
        help=f"Instead of --data: a text that the prefix learns to replace, or a folder of texts ({' '.join(TEXTS)})."
    ),
]
SelfStudy = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="With --distill-from: how many questions and answers about the text the model writes, such as 512. The "
        "prefix learns from them, not from the text itself, so that it can be asked about the text.",
    ),
]
DistillData = Annotated[
    str | None,
    typer.Option(
        help="With --distill-from: questions and answers of your own instead, in a file as --data takes it. A column "
        "'chunk' may number the chunk of the text that a row is about; other rows are about all of it."
    ),
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="With --distill-from: the most tokens of the text that the teacher reads at a time. Default: 1024 with "
        "--self-study, else what the model's window has room for.",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(min=1, help="With --distill-from: how many of the likeliest tokens to compare. Default: 20."),
]
Validation = Annotated[str | None, data_option(help="File to validate on. 'aws' has a split of its own.")]
ValidationShare = Annotated[
    float | None,
    data_option(help="Instead of --validation: keep this share of the inputs from training, chosen by their hash."),
]

VirtualTokens = Annotated[int, prefix_option(min=1, help="Length of the prefix.")]
Mode = Annotated[
    str,
    prefix_option(
        help="'kv': keys and values in every layer. 'embedding': input embeddings only. 'infix': keys and values "
        "between source and target; only the target attends to them."
    ),
]
Sites = Annotated[
    str | None,
    prefix_option(help="Which attention gets a prefix, of 'encoder,cross,decoder'. Default: all that the model has."),
]
Mlp = Annotated[
    int | None, prefix_option(min=1, help="Train through an MLP of this width. It is dropped after training.")
]
MlpDepth = Annotated[int, prefix_option(min=1, help="Hidden layers of the MLP.")]
MlpActivation = Annotated[str, prefix_option(help="'tanh', 'relu', 'gelu', 'silu', ...")]
Dropout = Annotated[float, prefix_option(help="Dropout on the prefix.")]
Gate = Annotated[
    str | None,
    prefix_option(help="'zero': one factor per head that starts at 0, so that training starts from the frozen model."),
]
FrozenTokens = Annotated[int, prefix_option(min=0, help="How many of the first virtual tokens are not trained.")]
PositionMode = Annotated[
    str | None,
    prefix_option(help="'shift' (as in PEFT) or 'none' (the prefix takes no positions). Default: what fits the model."),
]

Init = Annotated[
    str | None,
    start_option(
        help="'random': activations of random tokens. 'zero'. 'uniform': numbers in [0, 1), the paper's random. "
        "Default: 'random', or with --distill-from pieces of that text."
    ),
]
InitText = Annotated[str | None, start_option(help="Instead of --init: activations of this text.")]
InitDocument = Annotated[
    Path | None, start_option(help="Instead of --init: activations of pieces of this text file.", dir_okay=False)
]
InitPath = Annotated[
    str | None,
    start_option("--init-path", "--init-prefix", help="Instead of --init: another adapter, a folder, file or Hub id."),
]

Steps = Annotated[int | None, training_option(min=1, help=f"Training steps. Default: {STEPS}, or what --epochs makes.")]
Epochs = Annotated[
    float | None, training_option(help="Instead of --steps: passes over the training data, such as 3 or 0.5.")
]
Accumulation = Annotated[
    int, training_option("--gradient-accumulation-steps", min=1, help="Batches per step. Each target counts the same.")
]
EarlyStopping = Annotated[
    int | None,
    training_option(
        min=1,
        help="Stop after this many validations in a row without a lower loss. Includes --load-best-model-at-end.",
    ),
]
KeepBest = Annotated[
    bool,
    training_option(
        "--load-best-model-at-end",
        help="Save the prefix of the lowest validation loss. Default: that of the last step.",
    ),
]
LearningRate = Annotated[
    float | None,
    training_option(
        help="Default: {prefix:g}; {prefix-mlp:g} with --mlp, {embedding:g} with --mode embedding, {infix:g} with "
        "--mode infix.".format(**LEARNING_RATES)
    ),
]
MaxLength = Annotated[
    int | None,
    training_option(
        min=8,
        help="Tokens per row. Longer sources are cut. Default: the longest row, if memory and the model's positions "
        "have room for it; with --distill-from 96, with --self-study 256.",
    ),
]
ValidateEvery = Annotated[int, training_option(min=1, help="Steps between checkpoints, and between validations.")]
ValidationRows = Annotated[int, training_option(min=0, help="How many examples to validate on.")]
Checkpointing = Annotated[bool, training_option("--gradient-checkpointing", help="Use less memory and more time.")]
Packing = Annotated[
    bool, training_option("--packing", help="Put the rows of a batch one behind the other instead of padding them.")
]
Resume = Annotated[bool, training_option("--resume", help="Continue from the last checkpoint in --output.")]
ReportTo = Annotated[
    str | None, training_option(help=f"What shows the losses: {', '.join(REPORTERS)}, or several with commas.")
]
Seed = Annotated[int, training_option(help="Seed of the start and of the order of the data.")]
