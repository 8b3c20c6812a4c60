"""``prefix-attn train``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from prefix_attn.cli.shared import (
    DATA,
    AsJson,
    BatchSize,
    Delimiter,
    Encoding,
    Model,
    SkipBadRows,
    Source,
    SpecialTokens,
    System,
    Target,
    Template,
    data_option,
    load,
    show,
    unescaped,
)
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.training.settings import LEARNING_RATES, TrainingSettings

prefix_option: Callable[..., Any] = partial(typer.Option, rich_help_panel="The prefix")
start_option: Callable[..., Any] = partial(typer.Option, rich_help_panel="Where it starts")

Output = Annotated[Path, typer.Option(help="Folder for the adapter, its checkpoints, metrics.json and loss.png.")]
TrainingData = Annotated[str | None, data_option(help=f"{DATA} Default: 'aws'.")]
DistillFrom = Annotated[
    Path | None, typer.Option(help="Instead of --data: a text that the prefix learns to replace.", dir_okay=False)
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
Mlp = Annotated[int | None, prefix_option(help="Train through an MLP of this width. It is dropped after training.")]
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

Steps = Annotated[int, typer.Option(min=1, help="Training steps.")]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="Default: {prefix:g}; {prefix-mlp:g} with --mlp, {embedding:g} with --mode embedding, {infix:g} with "
        "--mode infix.".format(**LEARNING_RATES)
    ),
]
MaxLength = Annotated[int, typer.Option(min=8, help="Tokens per row. Longer sources are cut.")]
ValidateEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints, and between validations.")]
ValidationRows = Annotated[int, typer.Option(min=0, help="How many examples to validate on.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Use less memory and more time.")]
Packing = Annotated[
    bool, typer.Option("--packing", help="Put the rows of a batch one behind the other instead of padding them.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --output.")]
Seed = Annotated[int, typer.Option(help="Seed of the start and of the order of the data.")]


def train(
    output: Output,
    model: Model = "smollm2",
    data: TrainingData = None,
    distill_from: DistillFrom = None,
    top_k: TopK = None,
    validation: Validation = None,
    validation_share: ValidationShare = None,
    source_column: Source = "source",
    target_column: Target = "target",
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    skip_bad_rows: SkipBadRows = False,
    template: Template = None,
    system: System = None,
    special_tokens: SpecialTokens = False,
    virtual_tokens: VirtualTokens = 10,
    mode: Mode = "kv",
    sites: Sites = None,
    mlp: Mlp = None,
    mlp_depth: MlpDepth = 1,
    mlp_activation: MlpActivation = "tanh",
    dropout: Dropout = 0.0,
    gate: Gate = None,
    frozen_tokens: FrozenTokens = 0,
    position_mode: PositionMode = None,
    init: Init = None,
    init_text: InitText = None,
    init_document: InitDocument = None,
    init_path: InitPath = None,
    steps: Steps = 200,
    batch_size: BatchSize = 8,
    learning_rate: LearningRate = None,
    max_length: MaxLength = 96,
    validate_every: ValidateEvery = 50,
    validation_rows: ValidationRows = 64,
    gradient_checkpointing: Checkpointing = False,
    packing: Packing = False,
    resume: Resume = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train a prefix. The model does not change.

    [bold]prefix-attn train --data aws --output runs/aws[/bold]

    [bold]prefix-attn train --data devset.csv --mlp 512 --steps 500 --output runs/e2e[/bold]

    [bold]prefix-attn train --data devset.csv --mode infix --init-text "table-to-text:" --output runs/infix[/bold]

    [bold]prefix-attn train --data chats.jsonl --template chat --skip-bad-rows --output runs/chat[/bold]

    [bold]prefix-attn train --distill-from manual.txt --virtual-tokens 64 --output runs/manual[/bold]

    The last one learns to do with 64 tokens what the whole text in front would do. It starts from pieces of the text.
    """
    _validate(data, distill_from, top_k, validation_share)
    if packing and (distill_from is not None or mode != "kv"):
        raise ValueError("--packing takes rows of --data and --mode kv: leave it out")
    start = _start(init, init_text, init_document, init_path, distill_from)
    encoder = _encoder(mlp, mlp_depth, mlp_activation)
    config = _config(model, virtual_tokens, mode, sites, dropout, gate, frozen_tokens, position_mode, start | encoder)
    settings = TrainingSettings(
        output,
        steps,
        batch_size,
        learning_rate,
        max_length,
        validate_every,
        seed,
        resume,
        gradient_checkpointing,
        packing,
    )
    if distill_from:
        metrics = _distill(config, settings, distill_from, validation, top_k)
    else:
        reading = {"source_column": source_column, "target_column": target_column, "delimiter": delimiter}
        reading |= {"encoding": encoding, "skip_bad_rows": skip_bad_rows}
        prompt = {"template": template and unescaped(template), "system": system, "special_tokens": special_tokens}
        metrics = _train(
            config, settings, data or "aws", validation, validation_share, validation_rows, reading, prompt
        )
    show(metrics, as_json, _summary(metrics, output))


def _validate(data: str | None, distill_from: Path | None, top_k: int | None, validation_share: float | None) -> None:
    if distill_from is not None and data is not None:
        raise ValueError("--data and --distill-from exclude one another")
    if distill_from is not None and validation_share is not None:
        raise ValueError("--validation-share holds out rows of --data, and --distill-from has none: give --validation")
    if distill_from is None and top_k is not None:
        raise ValueError("--top-k needs --distill-from")


def _start(
    init: str | None, text: str | None, document: Path | None, path: str | None, distill_from: Path | None
) -> dict[str, Any]:
    """The fields of PrefixConfig that say where a prefix starts."""
    if distill_from is not None and (init, text, document, path) == (None,) * 4:
        document = distill_from
    given = {"text": text, "document": document, "path": path}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"a prefix has one start, got {' and '.join(f'--init-{name}' for name in named)}")
    kind = "prefix" if named == ["path"] else named[0] if named else None
    if kind is not None and init not in (None, kind):
        raise ValueError(f"a prefix has one start, got --init {init} and --init-{named[0]}")
    if document is not None:
        from prefix_attn.training.tables import read_text

        text = read_text(document)
    return {"init": kind or init or "random", "init_text": text, "init_path": path}


def _encoder(width: int | None, depth: int, activation: str) -> dict[str, Any]:
    """The fields of PrefixConfig that describe its MLP."""
    if width is None and (depth, activation) != (1, "tanh"):
        raise ValueError("--mlp-depth and --mlp-activation need --mlp, the width of the MLP")
    return {
        "prefix_projection": width is not None,
        "encoder_hidden_size": width,
        "encoder_depth": depth,
        "encoder_activation": activation,
    }


def _config(
    model: str,
    virtual_tokens: int,
    mode: str,
    sites: str | None,
    dropout: float,
    gate: str | None,
    frozen_tokens: int,
    position_mode: str | None,
    start_and_encoder: dict[str, Any],
) -> PrefixConfig:
    return PrefixConfig(
        base_model_name_or_path=model,
        num_virtual_tokens=virtual_tokens,
        mode=mode,
        sites=sites.split(",") if sites else None,
        dropout=dropout,
        gate=gate,
        num_frozen_tokens=frozen_tokens,
        position_mode=position_mode,
        **start_and_encoder,
    )


def _train(
    config: PrefixConfig,
    settings: TrainingSettings,
    data: str,
    validation: str | None,
    validation_share: float | None,
    validation_rows: int,
    reading: dict[str, Any],
    prompt: dict[str, Any],
) -> dict[str, Any]:
    from prefix_attn.training.aws import AWS_TASKS
    from prefix_attn.training.data import Examples, hold_out, read_examples
    from prefix_attn.training.examples import Example
    from prefix_attn.training.prompts import Prompt, default_template
    from prefix_attn.training.train import train as run

    if validation is not None and validation_share is not None:
        raise ValueError("--validation and --validation-share exclude one another")
    if validation_share is not None and data in AWS_TASKS:
        raise ValueError(f"{data!r} has a split of its own to validate on: leave out --validation-share")
    examples = Examples(data, **reading)
    examples.check()
    template = prompt["template"] or default_template(next(iter(examples)))
    chosen = Prompt(**prompt | {"template": template, "one_line": examples.one_line})
    rows, held_out = iter(examples), list[Example]()
    if validation_share is not None:
        rows, held_out = hold_out(examples, validation_share, validation_rows)
    elif validation or data in AWS_TASKS:
        held_out = read_examples(validation or data, split="dev", **reading)[:validation_rows]
    model, tokenizer = _prefixed(config, settings.seed)
    skip = reading["skip_bad_rows"]
    return run(model, tokenizer, rows, held_out, settings, prompt=chosen, skip_bad_rows=skip)


def _distill(
    config: PrefixConfig, settings: TrainingSettings, source: Path, validation: str | None, top_k: int | None
) -> dict[str, Any]:
    from prefix_attn.training.distill import TOP_K, distill
    from prefix_attn.training.tables import read_text

    document = read_text(source)
    other = read_text(Path(validation)) if validation else None
    model, tokenizer = _prefixed(config, settings.seed)
    return distill(model, tokenizer, document, settings, validation=other, top_k=top_k or TOP_K)


def _prefixed(config: PrefixConfig, seed: int) -> tuple[Any, Any]:
    """A new prefix on its base model, and the tokenizer."""
    import torch

    from prefix_attn.hf.model import get_prefix_model

    torch.manual_seed(seed)
    base, tokenizer = load(str(config.base_model_name_or_path))
    return get_prefix_model(base, config, tokenizer), tokenizer


def _summary(metrics: dict[str, Any], output: Path) -> str:
    text = (
        f"{metrics['trainable_parameters']:,} parameters ({metrics['trainable_share']:.3%}) trained, saved in {output}"
    )
    if curve := metrics["validation_loss"]:
        text += f"; validation loss {curve[0][1]:.3f} -> {curve[-1][1]:.3f}"
    return text
