"""``prefix-attn train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prefix_attn.cli.shared import DATA, AsJson, BatchSize, Model, Source, Target, load, show

_PREFIX, _START = "The prefix", "Where it starts"  # panels of the help


def train(
    output: Annotated[Path, typer.Option(help="Folder for the adapter, its checkpoints, metrics.json and loss.png.")],
    model: Model = "smollm2",
    data: Annotated[str | None, typer.Option(help=f"{DATA} Default: 'aws'.")] = None,
    distill_from: Annotated[
        Path | None, typer.Option(help="Instead of --data: a text that the prefix is to stand for.", dir_okay=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Of --distill-from: likeliest tokens that are compared. Default: 20.")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="File to validate on; 'aws' has its own split.")] = None,
    source_column: Source = "source",
    target_column: Target = "target",
    virtual_tokens: Annotated[int, typer.Option(min=1, help="Its length.", rich_help_panel=_PREFIX)] = 10,
    mode: Annotated[
        str,
        typer.Option(
            help="'kv': keys and values of every layer; 'embedding': input embeddings alone; 'infix': keys and values "
            "between source and target, which the target alone attends to.",
            rich_help_panel=_PREFIX,
        ),
    ] = "kv",
    sites: Annotated[
        str | None,
        typer.Option(
            help="Attention that gets one, of 'encoder,cross,decoder'; default: all that the model has.",
            rich_help_panel=_PREFIX,
        ),
    ] = None,
    mlp: Annotated[
        int | None,
        typer.Option(help="Train through an MLP of this width (dropped at the end).", rich_help_panel=_PREFIX),
    ] = None,
    mlp_depth: Annotated[int, typer.Option(min=1, help="Its hidden layers.", rich_help_panel=_PREFIX)] = 1,
    mlp_activation: Annotated[
        str, typer.Option(help="'tanh', 'relu', 'gelu', 'silu', ...", rich_help_panel=_PREFIX)
    ] = "tanh",
    dropout: Annotated[float, typer.Option(help="On the prefix.", rich_help_panel=_PREFIX)] = 0.0,
    gate: Annotated[
        str | None,
        typer.Option(
            help="'zero': a factor for each head that starts at 0, so that training starts from the frozen model.",
            rich_help_panel=_PREFIX,
        ),
    ] = None,
    frozen_tokens: Annotated[
        int, typer.Option(min=0, help="So many at its beginning stay as they start.", rich_help_panel=_PREFIX)
    ] = 0,
    position_mode: Annotated[
        str | None,
        typer.Option(
            help="'shift' (as PEFT) or 'none' (the prefix takes no positions); default: what fits.",
            rich_help_panel=_PREFIX,
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="'random': activations of random tokens; 'zero'; 'uniform': numbers in [0, 1), the paper's random. "
            "Default: 'random', or pieces of what is distilled.",
            rich_help_panel=_START,
        ),
    ] = None,
    init_text: Annotated[
        str | None, typer.Option(help="Instead: activations of this text.", rich_help_panel=_START)
    ] = None,
    init_document: Annotated[
        Path | None,
        typer.Option(help="Instead: of pieces drawn from this text file.", dir_okay=False, rich_help_panel=_START),
    ] = None,
    init_prefix: Annotated[
        str | None, typer.Option(help="Instead: another adapter's prefix.", rich_help_panel=_START)
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    batch_size: BatchSize = 8,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 3e-2, with --mlp 1e-3.")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of a row; longer sources are cut.")] = 96,
    validate_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints and validation.")] = 50,
    validation_rows: Annotated[int, typer.Option(min=0, help="Examples to validate on.")] = 64,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Train a prefix; the model stays as it is.

    [bold]prefix-attn train --data aws --output runs/aws[/bold]

    [bold]prefix-attn train --data devset.csv --mlp 512 --steps 500 --output runs/e2e[/bold]

    [bold]prefix-attn train --data devset.csv --mode infix --init-text "table-to-text:" --output runs/infix[/bold]

    [bold]prefix-attn train --distill-from manual.txt --virtual-tokens 64 --output runs/manual[/bold]

    The last learns to do, in 64 tokens, what the whole text in front would do. It starts from pieces of the text.
    """
    import torch

    from prefix_attn.hf.config import PrefixConfig
    from prefix_attn.hf.model import get_prefix_model
    from prefix_attn.training.data import AWS_TASKS, read_examples
    from prefix_attn.training.distill import TOP_K, distill
    from prefix_attn.training.settings import TrainingSettings
    from prefix_attn.training.train import train as run

    if distill_from is not None and data is not None:
        raise ValueError("--data and --distill-from exclude one another")
    if mlp is None and (mlp_depth, mlp_activation) != (1, "tanh"):
        raise ValueError("--mlp-depth and --mlp-activation are of the MLP, whose width --mlp says")
    if distill_from is None and top_k is not None:
        raise ValueError("--top-k is of --distill-from, which is not given")
    document = _document(distill_from) if distill_from else None
    other = _document(Path(validation)) if distill_from and validation else None
    if distill_from and (init, init_text, init_document, init_prefix) == (None,) * 4:
        init_document = distill_from
    data, columns = data or "aws", {"source_column": source_column, "target_column": target_column}
    examples = read_examples(data, **columns) if document is None else []
    has_split = document is None and (validation or data in AWS_TASKS)
    held_out = read_examples(validation or data, split="dev", **columns) if has_split else []
    config = PrefixConfig(
        num_virtual_tokens=virtual_tokens,
        prefix_projection=mlp is not None,
        encoder_hidden_size=mlp,
        encoder_depth=mlp_depth,
        encoder_activation=mlp_activation,
        dropout=dropout,
        mode=mode,
        sites=sites.split(",") if sites else None,
        num_frozen_tokens=frozen_tokens,
        gate=gate,
        position_mode=position_mode,
        base_model_name_or_path=model,
        **_start(init, init_text, init_document, init_prefix),
    )
    torch.manual_seed(seed)
    base, tokenizer = load(model)
    prefixed = get_prefix_model(base, config, tokenizer)
    settings = TrainingSettings(
        output, steps, batch_size, learning_rate, max_length, validate_every, seed, resume, gradient_checkpointing
    )
    if document is None:
        metrics = run(prefixed, tokenizer, examples, held_out[:validation_rows], settings)
    else:
        metrics = distill(prefixed, tokenizer, document, settings, validation=other, top_k=top_k or TOP_K)
    text = (
        f"{metrics['trainable_parameters']:,} parameters ({metrics['trainable_share']:.3%}) trained, saved in {output}"
    )
    if curve := metrics["validation_loss"]:
        text += f"; validation loss {curve[0][1]:.3f} -> {curve[-1][1]:.3f}"
    show(metrics, as_json, text)


def _start(init: str | None, text: str | None, document: Path | None, prefix: str | None) -> dict[str, Any]:
    """The fields of PrefixConfig that say where a prefix starts."""
    given = {"text": text, "document": document, "prefix": prefix}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"a prefix has one start, got {' and '.join(f'--init-{name}' for name in named)}")
    if named and init not in (None, named[0]):
        raise ValueError(f"a prefix has one start, got --init {init} and --init-{named[0]}")
    if document is not None:
        text = _document(document)
    return {"init": named[0] if named else init or "random", "init_text": text, "init_path": prefix}


def _document(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
