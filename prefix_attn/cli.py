"""The command line, ``prefix-attn``. Parses, calls, prints."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

# Before torch: threads that spin while they wait make every step slow beside another process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prefix_attn.experiments import commands

app = typer.Typer(
    name="prefix-attn",
    help="Prefix tuning: train a small prefix for a frozen language model, and use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# Names and texts are printed as they are: ":x:" is no picture and "[/x]" no markup.
_out, _err = Console(emoji=False), Console(stderr=True, emoji=False)

Model = Annotated[str, typer.Option(help="'smollm2', a .gguf file, a local folder or the name of a model on the Hub.")]
Adapter = Annotated[Path, typer.Argument(help="Folder of a prefix, ours or another library's.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
_DATA = "'aws', 'aws-summary', a .jsonl or .csv file (E2E's is recognised), DART's .json, WebNLG's .xml."
Data = Annotated[str, typer.Option(help=_DATA)]
Source = Annotated[str, typer.Option(help="Column or key of the input.")]
Target = Annotated[str, typer.Option(help="Column or key of the output.")]
Beams = Annotated[int, typer.Option(min=1, help="Beams; 1 is greedy.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Limit of each output.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows at once.")]
_PREFIX, _START = "The prefix", "Where it starts"  # panels of train's help


@app.callback()
def _main(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    pass


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder for the adapter, its checkpoints, metrics.json and loss.png.")],
    model: Model = "smollm2",
    data: Annotated[str | None, typer.Option(help=f"{_DATA} Default: 'aws'.")] = None,
    distill_from: Annotated[
        Path | None, typer.Option(help="Instead of --data: a text that the prefix is to stand for.", dir_okay=False)
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Of --distill-from: likeliest tokens that are compared.")] = 20,
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
        str,
        typer.Option(
            help="'random': activations of random tokens; 'zero'; 'uniform': numbers in [0, 1), the paper's random.",
            rich_help_panel=_START,
        ),
    ] = "random",
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
    learning_rate: Annotated[float | None, typer.Option(help="Default: 1e-2, with --mlp 1e-3.")] = None,
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

    from prefix_attn.data import AWS_TASKS, read_examples
    from prefix_attn.distill import distill
    from prefix_attn.hf.config import PrefixConfig
    from prefix_attn.hf.load import load_base
    from prefix_attn.hf.model import get_prefix_model
    from prefix_attn.train import Settings
    from prefix_attn.train import train as run

    if distill_from is not None and data is not None:
        raise ValueError("--data and --distill-from exclude one another")
    document = _document(distill_from) if distill_from else None
    other = _document(Path(validation)) if distill_from and validation else None
    if distill_from and (init, init_text, init_document, init_prefix) == ("random", None, None, None):
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
        num_frozen_tokens=frozen_tokens,
        gate=gate,
        position_mode=position_mode,
        base_model_name_or_path=model,
        **_start(init, init_text, init_document, init_prefix),
    )
    torch.manual_seed(seed)
    base, tokenizer = _load(load_base, model)
    prefixed = get_prefix_model(base, config, tokenizer)
    settings = Settings(
        output, steps, batch_size, learning_rate, max_length, validate_every, seed, resume, gradient_checkpointing
    )
    if document is None:
        metrics = run(prefixed, tokenizer, examples, held_out[:validation_rows], settings)
    else:
        metrics = distill(prefixed, tokenizer, document, settings, validation=other, top_k=top_k)
    text = (
        f"{metrics['trainable_parameters']:,} parameters ({metrics['trainable_share']:.3%}) trained, saved in {output}"
    )
    if curve := metrics["validation_loss"]:
        text += f"; validation loss {curve[0][1]:.3f} -> {curve[-1][1]:.3f}"
    _print(metrics, as_json, text)


@app.command()
def generate(
    adapter: Adapter,
    sources: Annotated[
        list[str] | None, typer.Argument(help="Inputs; default: one a line from --file or stdin.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file with one input a line.", dir_okay=False, exists=True)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Default: the model that the adapter names.")] = None,
    num_beams: Beams = 1,
    max_new_tokens: NewTokens = 48,
    batch_size: BatchSize = 16,
    as_json: AsJson = False,
) -> None:
    """Write an output for each input.

    [bold]prefix-attn generate runs/e2e "name : Aromi | eatType : coffee shop | area : city centre"[/bold]
    """
    from prefix_attn.evaluate import generate_text

    if not sources:
        lines = file.read_text(encoding="utf-8").splitlines() if file else sys.stdin.read().splitlines()
        sources = [line for line in lines if line.strip()]
    if not sources:
        raise ValueError("nothing to generate from: give inputs as arguments, with --file, or on stdin")
    prefixed, tokenizer = _prefixed(adapter, model)
    with _progress("generate", len(sources)) as advance:
        options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        outputs = generate_text(prefixed, tokenizer, sources, progress=advance, **options)
    rows = [{"source": source, "output": output} for source, output in zip(sources, outputs, strict=True)]
    _print(rows, as_json, "\n".join(outputs))


@app.command()
def evaluate(
    adapter: Adapter,
    data: Data = "aws",
    split: Annotated[str, typer.Option(help="Of 'aws': train, dev or test.")] = "test",
    source_column: Source = "source",
    target_column: Target = "target",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many inputs.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: the model that the adapter names.")] = None,
    frozen: Annotated[bool, typer.Option(help="Also score the model without its prefix.")] = True,
    num_beams: Beams = 1,
    max_new_tokens: NewTokens = 48,
    batch_size: BatchSize = 16,
    as_json: AsJson = False,
) -> None:
    """Score a prefix: BLEU, NIST, METEOR (with nltk's WordNet), ROUGE-L, CIDEr, chrF++, TER, and the loss on targets.

    [bold]prefix-attn evaluate runs/e2e --data testset_w_refs.csv --num-beams 5[/bold]
    """
    from contextlib import nullcontext

    from prefix_attn.data import collate, encode, read_examples
    from prefix_attn.evaluate import generate_text, validation_loss
    from prefix_attn.metrics import score

    examples = read_examples(data, split=split, source_column=source_column, target_column=target_column)[:limit]
    prefixed, tokenizer = _prefixed(adapter, model)
    rows, _ = encode(tokenizer, examples, max_length=512)
    batches = [collate(rows[i : i + batch_size], tokenizer.pad_token_id) for i in range(0, len(rows), batch_size)]
    results: dict[str, dict[str, float]] = {}
    for name in ("frozen", "prefix") if frozen else ("prefix",):
        with (
            prefixed.disable_prefix() if name == "frozen" else nullcontext(),
            _progress(name, len(examples)) as advance,
        ):
            options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
            texts = generate_text(prefixed, tokenizer, [e.source for e in examples], progress=advance, **options)
            results[name] = score(texts, [e.references for e in examples])
            results[name]["loss"] = validation_loss(prefixed, batches)
    table = Table("", *next(iter(results.values())), title=Text(f"{adapter} on {data}, {len(examples)} inputs"))
    for name, metrics in results.items():
        table.add_row(name, *(f"{value:.2f}" for value in metrics.values()))
    _print(results, as_json, table)


@app.command()
def inspect(
    adapter: Adapter,
    mass: Annotated[
        str | None,
        typer.Option(
            help="Data, as for train: show what share of the softmax goes to the prefix there.", metavar="DATA"
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="With --mass: its heat map, a PNG.", dir_okay=False)] = None,
    limit: Annotated[int, typer.Option(min=1, help="With --mass: use only so many inputs.")] = 64,
    source_column: Source = "source",
    target_column: Target = "target",
    model: Annotated[str | None, typer.Option(help="With --mass: default: the model that the adapter names.")] = None,
    batch_size: BatchSize = 16,
    as_json: AsJson = False,
) -> None:
    """Show what an adapter holds, without its base model; with --mass how much attention the prefix gets.

    [bold]prefix-attn inspect runs/e2e --mass testset_w_refs.csv --plot mass.png[/bold]
    """
    from prefix_attn.hf.checkpoint import describe

    if mass is None and plot is not None:
        raise ValueError("--plot is the heat map of --mass: give data with --mass")
    found = describe(adapter)
    table = Table(title=Text(str(adapter)), show_header=False)
    for name, value in found.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else Text(str(value)))
    if mass is None:
        _print(found, as_json, table)
        return
    from prefix_attn.data import collate, encode, read_examples
    from prefix_attn.hf.mass import layers_of, mass_table, plot_mass, prefix_mass

    examples = read_examples(mass, split="dev", source_column=source_column, target_column=target_column)[:limit]
    prefixed, tokenizer = _prefixed(adapter, model)
    rows, _ = encode(tokenizer, examples, max_length=512)
    batches = [collate(rows[i : i + batch_size], tokenizer.pad_token_id) for i in range(0, len(rows), batch_size)]
    with _progress("mass", len(rows)) as advance:
        shares = prefix_mass(prefixed, batches, progress=advance)
    layers = layers_of(prefixed)
    if plot is not None:
        plot_mass(shares, layers, plot)
    sites = {site: {"layers": layers[site], "heads": values.tolist()} for site, values in shares.items()}
    table = Table("", "layer", "mean", "of heads", "each head", title=Text(f"softmax mass on {adapter}, {mass}"))
    for row in mass_table(shares, layers):
        table.add_row(*row)
    _print(found | {"prefix_mass": sites}, as_json, table)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A prefix: folder, .pt or .bin file, Hub id.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Folder to write, other than the source's.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(help="'prefix-attn' (PEFT's files wherever PEFT has such a prefix), or 'peft' (or say why not)."),
    ] = "prefix-attn",
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the base model, of which only config.json is read."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a prefix of any library as ours or PEFT's, and say what is not as it was.

    It reads ours, PEFT's (PREFIX_TUNING, CARTRIDGE), adapters', cartridges (.pt) and the original PrefixTuning (.bin).

    MLPs are folded. Of pickles nothing is read but tensors.

    PEFT's files of encoder-decoders have slots that no layer uses, or two layers share: the report maps them.

    How many layers its decoder has, and how many heads a model of adapters has, is not in the files: --model says it.

    [bold]prefix-attn convert their-peft-bart-prefix converted --model facebook/bart-base[/bold]

    [bold]prefix-attn convert cache_last.pt converted --to peft --json[/bold]
    """
    from prefix_attn.hf.convert import convert as run
    from prefix_attn.hf.convert import read_config

    report = run(source, target, to=to, base=None if model is None else read_config(model))
    table = Table(title=Text(f"{report['format']} -> {target}"), show_header=False)
    for name, value in report.items():
        if name != "notes" and value not in (None, []):
            table.add_row(name, f"{value:,}" if isinstance(value, int) else Text(str(value)))
    _print(report, as_json, table)
    for note in () if as_json else report["notes"]:
        _err.print(f"[bold]note:[/] {escape(note)}", highlight=False, soft_wrap=True)


@app.command()
def check(
    model: Model = "smollm2",
    adapter: Annotated[str | None, typer.Option(help="Folder or Hub id of a prefix; default: a new one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Try on a model what must hold for a prefix on it: causality, padding, cache, gradients, files, frozen weights.

    Exit status 1 if anything does not hold. [bold]prefix-attn check --model Qwen/Qwen3-0.6B[/bold]
    """
    import torch

    from prefix_attn.hf.doctor import examine
    from prefix_attn.hf.load import load_base

    findings = []
    with _err.status("trying"):
        base, _ = load_base(model, dtype=torch.float32)
        for finding in examine(base, adapter):
            findings.append(finding._asdict() | {"holds": finding.holds})
            mark = "[green]holds[/]" if finding.holds else "[bold red]FAILS[/]"
            _err.print(
                f"{mark}  {finding.name}: {finding.value:.1e}, at most {finding.bound:.0e}",
                highlight=False,
                soft_wrap=True,
            )
    _print(findings, as_json, f"{sum(f['holds'] for f in findings)} of {len(findings)} hold")
    if not all(f["holds"] for f in findings):
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time attention and whole models beside every peer: run, plot, compare, report, regret.

    [bold]prefix-attn bench run --suite operator --out operator.json[/bold]
    """
    from prefix_attn.bench.main import main as run

    raise SystemExit(
        run(context.args or ["--help"], prog="prefix-attn bench", restart=("-m", "prefix_attn.cli", "bench"))
    )


app.command()(commands.reproduce)
app.command()(commands.ablate)
app.command()(commands.report)


def main() -> None:
    """Run a command; an error is one line on stderr and exit status 1, or a traceback with ``--debug``."""
    try:
        app(standalone_mode=True)
    except (ValueError, NotImplementedError, OSError, ImportError, RuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        message = " ".join(str(error).split())
        _err.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def _start(init: str, text: str | None, document: Path | None, prefix: str | None) -> dict[str, Any]:
    """The fields of PrefixConfig that say where a prefix starts."""
    given = {"text": text, "document": document, "prefix": prefix}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"a prefix has one start, got {' and '.join(f'--init-{name}' for name in named)}")
    if document is not None:
        text = _document(document)
    return {"init": named[0] if named else init, "init_text": text, "init_prefix": prefix}


def _document(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _load(load_base: Any, model: str) -> tuple[Any, Any]:
    with _err.status(f"loading {escape(model)} (a GGUF file is converted once: about a minute)"):
        return load_base(model)


def _prefixed(adapter: Path, model: str | None) -> tuple[Any, Any]:
    """The adapter on its base model, and the tokenizer."""
    from prefix_attn.hf.checkpoint import describe
    from prefix_attn.hf.load import load_base
    from prefix_attn.hf.model import PrefixModel

    model = model or describe(adapter)["base_model_name_or_path"]
    if not model:
        raise ValueError(f"{adapter} does not name its base model: give --model")
    base, tokenizer = _load(load_base, model)
    return PrefixModel.from_pretrained(base, adapter).eval(), tokenizer


class _progress:
    """A bar on stderr; its value advances it."""

    def __init__(self, name: str, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc=name, unit="text")

    def __enter__(self) -> Any:
        return self.bar.update

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _print(result: Any, as_json: bool, text: Any) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    elif isinstance(text, str):
        typer.echo(text)
    else:
        _out.print(text)


if __name__ == "__main__":
    main()
