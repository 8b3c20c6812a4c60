"""``prefix-attn evaluate | inspect``: measure a trained prefix."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from prefix_attn.cli.decoding import NumBeams, RowsPerBatch, decoding_option
from prefix_attn.cli.shared import (
    ERR,
    Adapter,
    AsJson,
    BaseModel,
    BatchSize,
    Data,
    Delimiter,
    Device,
    Dtype,
    Encoding,
    Quantize,
    SkipBadRows,
    Source,
    System,
    Target,
    Template,
    check_adapter,
    check_writable,
    data_option,
    prefixed_model,
    progress,
    prompt_of,
    show,
)
from prefix_attn.quoting import shortened

if TYPE_CHECKING:
    from prefix_attn.training.examples import Example
    from prefix_attn.training.prompts import Prompt
    from prefix_attn.training.tokens import Row

LOSS_ROWS = 16  # per batch

Metrics = Annotated[
    str | None,
    typer.Option(
        help="Those to compute, with commas between: bleu, nist, meteor, rougeL, cider, chrf, ter, loss; also rouge1, "
        "rouge2, exact, f1. Default: the first eight."
    ),
]
TextFile = Annotated[
    Path | None, typer.Option(help="Write the texts that are scored to this .csv, .tsv or .jsonl file.", dir_okay=False)
]
AsReferences = Annotated[
    int | None, decoding_option(min=1, help="Maximum length of each output. Default: that of the longest reference.")
]


def evaluate(
    adapter: Adapter,
    data: Data,
    split: Annotated[Literal["train", "dev", "test"], data_option(help="Split of 'aws': train, dev or test.")] = "test",
    source_column: Source = "source",
    target_column: Target = "target",
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    skip_bad_rows: SkipBadRows = False,
    template: Template = None,
    system: System = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many inputs.")] = None,
    model: BaseModel = None,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    frozen: Annotated[bool, typer.Option(help="Also score the model without its prefix.")] = True,
    metrics: Metrics = None,
    output: TextFile = None,
    num_beams: NumBeams = 1,
    max_new_tokens: AsReferences = None,
    batch_size: RowsPerBatch = None,
    as_json: AsJson = False,
) -> None:
    """Score a prefix: BLEU, NIST, METEOR (needs nltk's WordNet), ROUGE-L, CIDEr, chrF++, TER, and the target loss.

    Inputs are put to the model as in training. The loss is that of all answers of a conversation; what is generated and
    scored is its last.

    [bold]prefix-attn evaluate runs/e2e --data testset_w_refs.csv --num-beams 5[/bold]

    [bold]prefix-attn evaluate runs/tickets --data test.csv --metrics rougeL,exact,f1 --output texts.csv[/bold]
    """
    from prefix_attn.training.data import Examples
    from prefix_attn.training.examples import group
    from prefix_attn.training.metrics import choose
    from prefix_attn.training.outputs import check

    loading: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize}
    names = choose(metrics.replace(" ", "").split(",") if metrics is not None else None, besides=("loss",))
    if output is not None:
        if names == ["loss"]:
            raise ValueError("--output holds the texts, and --metrics loss writes none: leave one out")
        check(output, resume=None)
        check_writable(output.parent, output)
    check_adapter(adapter, model, **loading)
    reading = {"source_column": source_column, "target_column": target_column, "delimiter": delimiter}
    read = Examples(data, split=split, encoding=encoding, skip_bad_rows=skip_bad_rows, **reading)
    prompt = prompt_of(adapter, template, system)
    prompt = replace(prompt, one_line=prompt.one_line or read.one_line)
    examples = group(read.checked())[:limit]
    prefixed, tokenizer = prefixed_model(adapter, model, **loading)
    limits = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "batch_size": batch_size}
    scored, texts = _measure(names, prefixed, tokenizer, examples, prompt, frozen, **limits)
    if output is not None:
        _write_texts(output, examples, texts)
    table = Table("", *names, title=Text(f"{adapter} on {data}, {len(examples)} inputs"))
    for name, values in scored.items():
        table.add_row(name, *(f"{value:.2f}" for value in values.values()))
    show(scored, as_json, table)


def _measure(
    names: list[str], model: Any, tokenizer: Any, examples: list[Example], prompt: Prompt, frozen: bool, **limits: Any
) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """Scores and texts of the model with its prefix, and if asked for without."""
    from prefix_attn.training.evaluate import validation_loss
    from prefix_attn.training.generate import Generator
    from prefix_attn.training.metrics import score
    from prefix_attn.training.tokens import batches

    of_texts = [name for name in names if name != "loss"]
    rows = _rows(model, tokenizer, examples, prompt) if "loss" in names else []
    loss_batches = batches(rows, limits["batch_size"] or LOSS_ROWS, tokenizer.pad_token_id)
    limits["max_new_tokens"] = limits["max_new_tokens"] or _longest(model, tokenizer, examples)
    scored, texts = dict[str, dict[str, float]](), dict[str, list[str]]()
    for name in ("frozen", "prefix") if frozen else ("prefix",):
        found: dict[str, float] = {}
        with model.disable_prefix() if name == "frozen" else nullcontext():
            if of_texts:
                generator = Generator(model, tokenizer, prompt=prompt, **limits)
                with progress(name, len(examples)) as advance:
                    texts[name] = generator.texts([example.prompt for example in examples], advance)
                if name == "prefix":  # without it the same ones are
                    generator.warn_of_cuts()
                found = score(texts[name], [example.references for example in examples], of_texts)
            if "loss" in names:
                found["loss"] = validation_loss(model, loss_batches)
        scored[name] = {metric: found[metric] for metric in names}
    return scored, texts


def _longest(model: Any, tokenizer: Any, examples: list[Example]) -> int:
    """Room for the longest reference and its end, as far as the model has positions."""
    from prefix_attn.training.generate import default_new_tokens

    longest = max(len(tokenizer(text, verbose=False)["input_ids"]) for one in examples for text in one.references)
    return default_new_tokens(model, longest + 2)  # its end, and a token that a leading space may take


def _write_texts(path: Path, examples: list[Example], texts: dict[str, list[str]]) -> None:
    from prefix_attn.training.outputs import OutputFile

    columns = {"prefix": "output", "frozen": "output without prefix"}
    rows = [
        {
            "source": example.prompt,
            "reference": example.references[0] if len(example.references) == 1 else example.references,
            **{columns[name]: texts[name][i] for name in columns if name in texts},
        }
        for i, example in enumerate(examples)
    ]
    OutputFile(path, list(rows[0])).write(rows)


def _rows(model: Any, tokenizer: Any, examples: list[Example], prompt: Prompt) -> list[Row]:
    """Rows of ``examples``, as long as the model has positions for."""
    from prefix_attn.training.positions import room_for_rows
    from prefix_attn.training.tokens import encode

    longest = room_for_rows(model) or sys.maxsize
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
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    skip_bad_rows: SkipBadRows = False,
    template: Template = None,
    system: System = None,
    model: Annotated[
        str | None, typer.Option(help="With --mass: the base model. Default: the one that the adapter names.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    batch_size: BatchSize = 16,
    as_json: AsJson = False,
) -> None:
    """Show what an adapter holds, without loading its base model. With --mass also how much attention it gets.

    [bold]prefix-attn inspect runs/e2e --mass testset_w_refs.csv --plot mass.png[/bold]
    """
    loading: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize}
    if mass is None and plot is not None:
        raise ValueError("--plot is the heat map of --mass: give data with --mass")
    if plot is not None:
        check_writable(plot.parent, plot)
    check_adapter(adapter, model, **loading)
    from prefix_attn.hf.io.checkpoint import describe

    found = describe(adapter)
    table = Table(title=Text(str(adapter)), show_header=False)
    for name, value in found.items():
        table.add_row(name, f"{value:,}" if type(value) is int else Text(shortened(value, 1000)))
    if mass is None:
        show(found, as_json, table)
        return
    from prefix_attn.hf.mass import layers_of, mass_table, plot_mass, prefix_mass
    from prefix_attn.training.data import read_examples
    from prefix_attn.training.tokens import batches

    reading = {"source_column": source_column, "target_column": target_column, "delimiter": delimiter}
    reading |= {"encoding": encoding, "skip_bad_rows": skip_bad_rows}
    examples = read_examples(mass, split="dev", **reading)[:limit]
    prompt = prompt_of(adapter, template, system)
    prefixed, tokenizer = prefixed_model(adapter, model, **loading)
    rows = _rows(prefixed, tokenizer, examples, prompt)
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
