"""``prefix-attn train``."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.text import Text

from prefix_attn.cli.config import command_line_first
from prefix_attn.cli.shared import (
    ERR,
    AsJson,
    BatchSize,
    Delimiter,
    Device,
    Dtype,
    Encoding,
    Model,
    Quantize,
    SkipBadRows,
    Source,
    SpecialTokens,
    System,
    Target,
    Template,
    load,
    show,
    unescaped,
)
from prefix_attn.cli.train_checks import (
    Options,
    check,
    check_files,
    converses,
    files_of,
    loading_of,
    prefix_of,
    texts_of,
)
from prefix_attn.cli.train_options import (
    Accumulation,
    Checkpointing,
    ChunkTokens,
    Config,
    DistillData,
    DistillFrom,
    Dropout,
    DryRun,
    EarlyStopping,
    Epochs,
    FrozenTokens,
    Gate,
    Init,
    InitDocument,
    InitPath,
    InitText,
    KeepBest,
    LearningRate,
    MaxLength,
    Mlp,
    MlpActivation,
    MlpDepth,
    Mode,
    Output,
    Packing,
    PositionMode,
    ReportTo,
    Resume,
    Seed,
    SelfStudy,
    Sites,
    Steps,
    TopK,
    TrainingData,
    ValidateEvery,
    Validation,
    ValidationRows,
    ValidationShare,
    VirtualTokens,
)
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.quoting import quoted
from prefix_attn.training.data import CHUNK, Examples, hold_out
from prefix_attn.training.examples import Example, group
from prefix_attn.training.interrupt import Interrupted
from prefix_attn.training.prompts import Prompt, default_template
from prefix_attn.training.record import curve
from prefix_attn.training.resume import facts_of_settings, find_checkpoint, last_checkpoint
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.tables import read_text

Tables = Mapping[str, Examples]  # of the options that name them
EXCLUSIVE = (
    ("steps", "epochs"),
    ("data", "distill_from"),
    ("self_study", "distill_data"),
    ("validation", "validation_share"),
    ("init", "init_text", "init_document", "init_path"),
)


def train(
    context: typer.Context,
    output: Output,
    model: Model,
    config: Config = None,
    dry_run: DryRun = False,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    data: TrainingData = None,
    distill_from: DistillFrom = None,
    self_study: SelfStudy = None,
    distill_data: DistillData = None,
    chunk_tokens: ChunkTokens = None,
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
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = 8,
    gradient_accumulation_steps: Accumulation = 1,
    learning_rate: LearningRate = None,
    max_length: MaxLength = None,
    validate_every: ValidateEvery = 50,
    validation_rows: ValidationRows = 64,
    early_stopping: EarlyStopping = None,
    load_best_model_at_end: KeepBest = False,
    gradient_checkpointing: Checkpointing = False,
    packing: Packing = False,
    resume: Resume = False,
    seed: Seed = 0,
    report_to: ReportTo = None,
    as_json: AsJson = False,
) -> None:
    """Train a prefix. The model does not change.

    [bold]prefix-attn train --model Qwen/Qwen3-0.6B --data devset.csv --mlp 512 --steps 500 --output runs/e2e[/bold]

    [bold]prefix-attn train --model Qwen/Qwen3-0.6B --data devset.csv --mode infix --init-text "table-to-text:"
    --output runs/infix[/bold]

    [bold]prefix-attn train --model Qwen/Qwen3-0.6B --data chats.jsonl --template chat --skip-bad-rows
    --output runs/chat[/bold]

    [bold]prefix-attn train --model Qwen/Qwen3-0.6B --distill-from manual.txt --virtual-tokens 64
    --self-study 512 --output runs/manual[/bold]

    [bold]prefix-attn train --config runs/e2e/run.yaml --seed 1 --output runs/e2e-1[/bold]

    The one with --distill-from learns to do with 64 tokens what the whole text in front would do. It starts from pieces
    of the text. The model reads the text, writes 512 questions and answers about it, and the prefix learns from these.
    The last one repeats a run with another seed.
    """
    options = command_line_first(context, dict(locals()), EXCLUSIVE)
    check(options)
    prefix, settings = prefix_of(options), TrainingSettings(**_fields_of(TrainingSettings, options))
    tables = check_files(options)
    if dry_run:
        _dry_run(prefix, settings, options, tables)
        return
    find_checkpoint(settings, facts_of_settings(settings, prefix))
    try:
        if options["distill_from"]:
            metrics = _distill(prefix, settings, options, tables)
        else:
            metrics = _train(prefix, settings, options, tables)
    except Interrupted as stop:
        show(stop.metrics, as_json, _summary(stop.metrics, output))
        typer.echo(f"{stop}. To go on: {_resume_command()}", err=True)
        raise typer.Exit(128 + stop.signal) from None
    except KeyboardInterrupt:
        left = last_checkpoint(output)
        found = f"the last checkpoint is {left}" if left else "there is no checkpoint yet"
        if not left and options["distill_from"]:
            found += ", and what the model wrote and the teacher read is kept"
        typer.echo(f"stopped at once; {found}. To go on: {_resume_command()}", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    show(metrics, as_json, _summary(metrics, output))


def _resume_command() -> str:
    """The command that was typed, with ``--resume``."""
    script, *arguments = sys.argv
    program = ["prefix-attn"] if shutil.which("prefix-attn") == script else [script]
    if Path(script).name == "__main__.py":
        program = [sys.executable, "-m", "prefix_attn.cli"]
    return shlex.join([*program, *arguments, *(() if "--resume" in arguments else ("--resume",))])


def _fields_of(kind: Any, options: Options) -> dict[str, Any]:
    """Those of ``options`` that are fields of the dataclass ``kind``, which names them as the command line does."""
    return {field.name: options[field.name] for field in dataclasses.fields(kind) if field.name in options}


def _rows(options: Options, tables: Tables) -> tuple[Iterator[Example], list[Example], Prompt]:
    """Examples to train on and to validate on, all rows of them checked, and what stands around them."""
    examples, rows, share = tables["data"], options["validation_rows"], options["validation_share"]
    with ERR.status(f"reading {escape(options['data'])}"):
        examples.check()
    template = options["template"] and unescaped(options["template"])
    prompt = Prompt(
        template=template or default_template(next(iter(examples))),
        system=options["system"],
        special_tokens=options["special_tokens"],
        one_line=examples.one_line,
    )
    trained, held_out = iter(examples), list[Example]()
    if share is not None:
        trained, held_out = hold_out(examples, share, rows)
    elif "validation" in tables:
        other = tables["validation"]
        held_out = group(other if other is examples else other.checked())[:rows]
    return trained, held_out, prompt


def _train(config: PrefixConfig, settings: TrainingSettings, options: Options, tables: Tables) -> dict[str, Any]:
    trained, held_out, prompt = _rows(options, tables)
    model, tokenizer = _prefixed(config, settings.seed, options)
    from prefix_attn.training.train import train as run

    kept = _kept(options, template=prompt.template)
    skip = options["skip_bad_rows"]
    return run(model, tokenizer, trained, held_out, settings, prompt=prompt, skip_bad_rows=skip, options=kept)


def _dry_run(config: PrefixConfig, settings: TrainingSettings, options: Options, tables: Tables) -> None:
    trained, _, prompt = _rows(options, tables)
    model, tokenizer = _prefixed(config, settings.seed, options)
    from prefix_attn.training.preview import preview
    from prefix_attn.training.train import has_bfloat16

    more = {"skip_bad_rows": options["skip_bad_rows"], "bf16": has_bfloat16(model.device)}
    found = preview(model, tokenizer, trained, settings, prompt=prompt, **more)
    text = Text()
    for number, parts in enumerate(found.shown, start=1):
        text.append(f"row {number}\n", "bold")
        for part, is_trained in parts:
            text.append(f"\u27e6{part}\u27e7" if is_trained else part, "green" if is_trained else "")
        text.append("\n\n")
    text.append(
        f"{found.rows:,} rows of {found.tokens:,} tokens, {found.trained_tokens:,} of them trained; the longest row "
        f"has {found.longest:,}, and --max-length {found.max_length} cuts {found.cut:,} rows; "
        f"about {found.memory / 1e9:.1f} GB of memory with --batch-size {settings.batch_size}"
    )
    rows = [[{"text": part, "trained": flag} for part, flag in parts] for parts in found.shown]
    show(found._asdict() | {"shown": rows}, options["as_json"], text)


def _distill(config: PrefixConfig, settings: TrainingSettings, options: Options, tables: Tables) -> dict[str, Any]:
    texts = _texts(options)
    told = {name: list(_told(table)) for name, table in tables.items()}
    model, tokenizer = _prefixed(config, settings.seed, options, texts)
    from prefix_attn.training.distill import TOP_K, distill

    top_k = options["top_k"] or TOP_K
    kept: dict[str, Any] = {"top_k": top_k, "chunk_tokens": options["chunk_tokens"]}
    documents = texts["distill_from"]
    if not converses(options):
        other = "\n".join(texts["validation"]) if "validation" in texts else None
        options = _kept(options, top_k=top_k)
        return distill(model, tokenizer, documents, settings, validation=other, options=options, **kept)
    from prefix_attn.training.conversations import prompt_for
    from prefix_attn.training.self_study import self_study

    template = options["template"] and unescaped(options["template"])
    prompt = prompt_for(tokenizer, template, system=options["system"], special_tokens=options["special_tokens"])
    return self_study(
        model,
        tokenizer,
        documents,
        settings,
        conversations=told.get("distill_data") or options["self_study"],
        validation=told.get("validation"),
        prompt=prompt,
        skip_bad_rows=options["skip_bad_rows"],
        options=_kept(options, top_k=top_k, template=prompt.template),
        **kept,
    )


def _told(table: Examples) -> Iterator[tuple[int | None, Example]]:
    """Conversations, each with the number of the chunk that it is about."""
    for row, example in table.records(check=True):
        chunk = row.get(CHUNK)
        if chunk not in (None, "") and not str(chunk).isdecimal():
            raise ValueError(f"{table.spec}: 'chunk' must be the number of a chunk, from 0 on, got {quoted(chunk)}")
        yield None if chunk in (None, "") else int(chunk), example


def _texts(options: Options) -> dict[str, list[str]]:
    """The texts by the options that name them. A file that several name is read once."""
    read: dict[Path, str] = {}
    files = {name: files_of(options, name) for name in texts_of(options)}
    for path in (path for paths in files.values() for path in paths):
        if path not in read:
            read[path] = _text(path)
    return {name: [read[path] for path in paths] for name, paths in files.items()}


def _text(path: Path) -> str:
    if not (text := read_text(path)).strip():
        raise ValueError(f"{path}: holds no text; give a file that does")
    return text


def _kept(options: Options, **found: Any) -> dict[str, Any]:
    """What run.yaml says: ``options`` by their names on the command line, those not given with what was ``found``."""
    names = {name: "json" if name == "as_json" else name for name in options if name not in ("context", "config")}
    return {name: found.get(key, options[key]) for key, name in names.items()}


def _prefixed(
    config: PrefixConfig, seed: int, options: Options, texts: Mapping[str, list[str]] | None = None
) -> tuple[Any, Any]:
    """A new prefix on its base model, and the tokenizer."""
    import torch

    if config.init == "document":
        texts = texts or _texts(options)
        text = texts["init_document" if options["init_document"] is not None else "distill_from"]
        config = dataclasses.replace(config, init_text="\n".join(text))
    torch.manual_seed(seed)
    base, tokenizer = load(options["model"], **loading_of(options))
    from prefix_attn.hf.model import get_prefix_model

    return get_prefix_model(base, config, tokenizer), tokenizer


def _summary(metrics: dict[str, Any], output: Path) -> str:
    """What was trained, where it is, and how the losses went."""
    text = (
        f"{metrics['trainable_parameters']:,} parameters ({metrics['trainable_share']:.3%}) trained, saved in {output}"
    )
    validation, kept = metrics["validation_loss"], metrics["kept_step"]
    if len(validation) == 1:  # stopped before the next
        text += f"; validation loss {validation[0][1]:.3f} at step {validation[0][0]}"
    elif validation:
        losses = dict(map(tuple, validation))
        text += f"; validation loss {validation[0][1]:.3f} -> {losses.get(kept, validation[-1][1]):.3f}"
    if kept != metrics["steps"]:
        text += f", of step {kept}, the best of {metrics['steps']}"
    lines = [text]
    for name, values in (("training", metrics["train_loss"]), ("validation", validation)):
        if len(values) > 1:
            found = [loss for _, loss in values]
            lines.append(f"{name:<10} {found[0]:7.3f} {curve(found)} {found[-1]:.3f}")
    if metrics["seconds"]:
        lines.append(
            f"{metrics['seconds_per_step']:.3g} s a step, {metrics['tokens_per_second']:,.0f} tokens/s, "
            f"at most {metrics['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
    if "comparison" in metrics:
        from prefix_attn.training.comparison import shown

        lines.append("\n" + shown(metrics["comparison"]))
    encoding = sys.stdout.encoding or "utf-8"  # not all can show blocks
    return "\n".join(lines).encode(encoding, "replace").decode(encoding)
