"""``prefix-attn evaluate | inspect``: measure a trained prefix."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from prefix_attn.cli.shared import (
    ERR,
    Adapter,
    AsJson,
    BatchSize,
    Beams,
    Data,
    Delimiter,
    Encoding,
    NewTokens,
    SkipBadRows,
    Source,
    System,
    Target,
    Template,
    prefixed_model,
    progress,
    prompt_of,
    show,
)

if TYPE_CHECKING:
    from prefix_attn.training.examples import Example
    from prefix_attn.training.prompts import Prompt
    from prefix_attn.training.tokens import Row


def evaluate(
    adapter: Adapter,
    data: Data = "aws",
    split: Annotated[str, typer.Option(help="Split of 'aws': train, dev or test.")] = "test",
    source_column: Source = "source",
    target_column: Target = "target",
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    skip_bad_rows: SkipBadRows = False,
    template: Template = None,
    system: System = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many inputs.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model. Default: the one that the adapter names.")] = None,
    frozen: Annotated[bool, typer.Option(help="Also score the model without its prefix.")] = True,
    num_beams: Beams = 1,
    max_new_tokens: NewTokens = 48,
    batch_size: BatchSize = 16,
    as_json: AsJson = False,
) -> None:
    """Score a prefix: BLEU, NIST, METEOR (needs nltk's WordNet), ROUGE-L, CIDEr, chrF++, TER, and the target loss.

    Inputs are put to the model as in training. The loss is that of all answers of a conversation; what is generated and
    scored is its last.

    [bold]prefix-attn evaluate runs/e2e --data testset_w_refs.csv --num-beams 5[/bold]
    """
    from contextlib import nullcontext

    from prefix_attn.training.data import Examples
    from prefix_attn.training.evaluate import validation_loss
    from prefix_attn.training.examples import group
    from prefix_attn.training.generate import generate_text
    from prefix_attn.training.metrics import score
    from prefix_attn.training.tokens import batches

    reading = {"source_column": source_column, "target_column": target_column, "delimiter": delimiter}
    read = Examples(data, split=split, encoding=encoding, skip_bad_rows=skip_bad_rows, **reading)
    prompt = prompt_of(adapter, template, system)
    prompt = replace(prompt, one_line=prompt.one_line or read.one_line)
    examples = group(read.checked())[:limit]
    prefixed, tokenizer = prefixed_model(adapter, model)
    loss_batches = batches(_rows(prefixed, tokenizer, examples, prompt), batch_size, tokenizer.pad_token_id)
    results: dict[str, dict[str, float]] = {}
    for name in ("frozen", "prefix") if frozen else ("prefix",):
        with (
            prefixed.disable_prefix() if name == "frozen" else nullcontext(),
            progress(name, len(examples)) as advance,
        ):
            options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
            asked = [example.prompt for example in examples]
            texts = generate_text(prefixed, tokenizer, asked, prompt=prompt, progress=advance, **options)
            results[name] = score(texts, [e.references for e in examples])
            results[name]["loss"] = validation_loss(prefixed, loss_batches)
    table = Table("", *next(iter(results.values())), title=Text(f"{adapter} on {data}, {len(examples)} inputs"))
    for name, metrics in results.items():
        table.add_row(name, *(f"{value:.2f}" for value in metrics.values()))
    show(results, as_json, table)


def _rows(model: Any, tokenizer: Any, examples: list[Example], prompt: Prompt) -> list[Row]:
    """Rows of ``examples``, as long as the model has positions for."""
    from prefix_attn.training.tokens import encode

    longest = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    longest -= max((config.num_virtual_tokens for config in model.prefix_configs.values()), default=0)
    rows, cut = encode(tokenizer, examples, longest, prompt=prompt, encoder_decoder=model.config.is_encoder_decoder)
    if cut:
        ERR.print(f"{cut} of {len(rows)} rows are longer than the model's {longest} positions: cut")
    return rows


def inspect(
    adapter: Adapter,
    mass: Annotated[
        str | None,
        typer.Option(
            help="Show what share of the softmax goes to the prefix on these data (as for train).", metavar="DATA"
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="With --mass: draw a heat map into this PNG file.", dir_okay=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="With --mass: use only this many inputs.")] = 64,
    source_column: Source = "source",
    target_column: Target = "target",
    model: Annotated[
        str | None, typer.Option(help="With --mass: the base model. Default: the one that the adapter names.")
    ] = None,
    batch_size: BatchSize = 16,
    as_json: AsJson = False,
) -> None:
    """Show what an adapter holds, without loading its base model. With --mass also how much attention it gets.

    [bold]prefix-attn inspect runs/e2e --mass testset_w_refs.csv --plot mass.png[/bold]
    """
    from prefix_attn.hf.io.checkpoint import describe

    if mass is None and plot is not None:
        raise ValueError("--plot is the heat map of --mass: give data with --mass")
    found = describe(adapter)
    table = Table(title=Text(str(adapter)), show_header=False)
    for name, value in found.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else Text(str(value)))
    if mass is None:
        show(found, as_json, table)
        return
    from prefix_attn.hf.mass import layers_of, mass_table, plot_mass, prefix_mass
    from prefix_attn.training.data import read_examples
    from prefix_attn.training.tokens import batches

    examples = read_examples(mass, split="dev", source_column=source_column, target_column=target_column)[:limit]
    prefixed, tokenizer = prefixed_model(adapter, model)
    rows = _rows(prefixed, tokenizer, examples, prompt_of(adapter, None, None))
    with progress("mass", len(rows)) as advance:
        shares = prefix_mass(prefixed, batches(rows, batch_size, tokenizer.pad_token_id), progress=advance)
    layers = layers_of(prefixed)
    if plot is not None:
        plot_mass(shares, layers, plot)
    sites = {site: {"layers": layers[site], "heads": values.tolist()} for site, values in shares.items()}
    table = Table("", "layer", "mean", "of heads", "each head", title=Text(f"softmax mass on {adapter}, {mass}"))
    for row in mass_table(shares, layers):
        table.add_row(*row)
    show(found | {"prefix_mass": sites}, as_json, table)
