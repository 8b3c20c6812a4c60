"""``prefix-attn generate | chat``: write with a trained prefix."""

from __future__ import annotations

import hashlib
import itertools
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from prefix_attn.cli.decoding import (
    MaxNewTokens,
    NumBeams,
    RowsPerBatch,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    decoding_of,
    limited,
    notes,
)
from prefix_attn.cli.shared import (
    DATA,
    ERR,
    Adapter,
    AsJson,
    BaseModel,
    Delimiter,
    Device,
    Dtype,
    Encoding,
    Quantize,
    SkipBadRows,
    Source,
    System,
    Template,
    check_adapter,
    check_writable,
    data_option,
    prefixed_model,
    progress,
    prompt_of,
    show,
)

if TYPE_CHECKING:
    from prefix_attn.training.conversation import Conversation
    from prefix_attn.training.examples import Example
    from prefix_attn.training.generate import Generator
    from prefix_attn.training.outputs import OutputFile

BATCHES = 4  # that are sorted by length together, and written together
HINT = "/reset forgets the conversation, /quit or ctrl-D ends it, ctrl-C stops an answer"

InputData = Annotated[str | None, data_option(help=f"Inputs: {DATA} No outputs are needed.")]
InputFile = Annotated[
    Path | None, data_option(help="A text file with one input per line.", dir_okay=False, exists=True)
]
Output = Annotated[
    Path | None,
    typer.Option(help="Write rows here as they are finished: a .csv, .tsv or .jsonl file.", dir_okay=False),
]
OutputColumn = Annotated[str, typer.Option(help="With --output: the name of the column that is added.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with --output where it ends, after a kill.")]


class Inputs(NamedTuple):
    """What is put to the model."""

    records: Callable[[], Iterable[tuple[Mapping[str, Any], Example]]]  # the cells of each row, and its example
    columns: list[str]
    count: int
    digest: str  # of their content
    one_line: bool  # whether outputs are


def generate(
    adapter: Adapter,
    sources: Annotated[list[str] | None, typer.Argument(help="Inputs. Default: the lines of --file or stdin.")] = None,
    file: InputFile = None,
    data: InputData = None,
    source_column: Source = "source",
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    skip_bad_rows: SkipBadRows = False,
    template: Template = None,
    system: System = None,
    output: Output = None,
    output_column: OutputColumn = "output",
    resume: Resume = False,
    model: BaseModel = None,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    max_new_tokens: MaxNewTokens = None,
    num_beams: NumBeams = 1,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    stop: Stop = None,
    batch_size: RowsPerBatch = None,
    as_json: AsJson = False,
) -> None:
    """Generate an output for each input.

    [bold]prefix-attn generate runs/e2e "name : Aromi | eatType : coffee shop | area : city centre"[/bold]

    [bold]prefix-attn generate runs/tickets --data tickets.csv --source-column question --output answers.csv[/bold]

    Inputs are put to the model as in training. An output ends where the model ends it. --output has the columns of
    --data and one more; --json keeps outputs of several lines apart.
    """
    _check_output(output, resume)
    loading: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize}
    decoding = decoding_of(num_beams, temperature, top_p, top_k, seed, stop)
    check_adapter(adapter, model, **loading)
    prompt = prompt_of(adapter, template, system)
    reading = {"source_column": source_column, "delimiter": delimiter, "skip_bad_rows": skip_bad_rows}
    inputs = _inputs(sources, file, data, encoding, reading)
    prompt = replace(prompt, one_line=prompt.one_line or inputs.one_line)
    settings = {**asdict(prompt), **decoding, "max_new_tokens": max_new_tokens, "dtype": dtype, "quantize": quantize}
    table = _table(output, inputs, output_column, _made_by(adapter, model) | settings, resume) if output else None
    prefixed, tokenizer = prefixed_model(adapter, model, **loading)
    from prefix_attn.training.generate import Generator

    limit = limited(prefixed, max_new_tokens)
    generator = Generator(prefixed, tokenizer, prompt=prompt, batch_size=batch_size, max_new_tokens=limit, **decoding)
    if table is not None:
        _write(generator, inputs, table, output_column)
        show({"output": str(output), "rows": table.rows}, as_json, f"{table.rows} rows in {output}")
        return
    rows = list(inputs.records())
    with progress("generate", len(rows)) as advance:
        texts = generator.texts([example.prompt for _, example in rows], advance)
    notes(generator)
    found = [{**cells, output_column: text} for (cells, _), text in zip(rows, texts)]
    show(found, as_json, "\n".join(texts))


def _check_output(output: Path | None, resume: bool) -> None:
    from prefix_attn.training.outputs import check

    if output is None and resume:
        raise ValueError("--resume goes on with a file: give its --output")
    if output is not None:
        check(output, resume=resume)
        check_writable(output.parent, output)


def _inputs(
    sources: list[str] | None, file: Path | None, data: str | None, encoding: str | None, reading: dict[str, Any]
) -> Inputs:
    """The inputs, all of them checked."""
    from prefix_attn.training.data import Examples
    from prefix_attn.training.examples import Example
    from prefix_attn.training.outputs import file_digest
    from prefix_attn.training.tables import read_text

    given = [name for name, value in (("arguments", sources), ("--file", file), ("--data", data)) if value]
    if len(given) > 1:
        raise ValueError(f"inputs come from one place, got {' and '.join(given)}")
    if data is not None:
        read = Examples(data, split="test", target_column=None, encoding=encoding, **reading)
        columns, count = dict[str, None](), 0
        for cells, _ in read.records(check=True):
            columns |= dict.fromkeys(cells)
            count += 1
        return Inputs(read.records, list(columns), count, file_digest(Path(data)) or data, read.one_line)
    if reading != {"source_column": "source", "delimiter": None, "skip_bad_rows": False}:
        raise ValueError("--source-column, --delimiter and --skip-bad-rows are for --data")
    if encoding is not None and file is None:
        raise ValueError("--encoding is for --data and --file")
    if not sources:
        text = read_text(file, encoding) if file else sys.stdin.read()
        sources = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not sources:
        raise ValueError("nothing to generate from: give inputs as arguments, with --data or --file, or on stdin")
    records = [({"source": source}, Example(source, ())) for source in sources]
    digest = hashlib.sha256("\n".join(sources).encode()).hexdigest()
    return Inputs(lambda: records, ["source"], len(records), digest, False)


def _made_by(adapter: Path, model: str | None) -> dict[str, Any]:
    from prefix_attn.hf.io.checkpoint import describe, digest

    return {"adapter": digest(adapter)[:16], "model": model or describe(adapter)["base_model_name_or_path"]}


def _table(output: Path, inputs: Inputs, column: str, settings: dict[str, Any], resume: bool) -> OutputFile:
    from prefix_attn.training.outputs import OutputFile

    if column in inputs.columns:
        raise ValueError(f"the inputs have a column {column!r} already: give another --output-column")
    settings["data"] = inputs.digest[:16]
    return OutputFile(output, [*inputs.columns, column], settings, resume=resume)


def _write(generator: Generator, inputs: Inputs, table: OutputFile, column: str) -> None:
    """Write a row for each input that ``table`` does not have yet."""
    records = iter(inputs.records())
    for _, example in itertools.islice(records, table.rows):
        generator.seed_of(example.prompt)  # others are drawn as they would be after it
    try:
        with progress("generate", inputs.count - table.rows) as advance:
            while some := list(itertools.islice(records, BATCHES * generator.most_rows)):
                texts = generator.texts([example.prompt for _, example in some], advance)
                table.write({**cells, column: text} for (cells, _), text in zip(some, texts))
    except KeyboardInterrupt:
        ERR.print(f"stopped: {table.path} has {table.rows} of {inputs.count} rows; --resume goes on", soft_wrap=True)
        raise typer.Exit(130) from None
    notes(generator)


def chat(
    adapter: Adapter,
    template: Template = None,
    system: System = None,
    model: BaseModel = None,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    stop: Stop = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a model with its prefix. Answers appear as they are written; --json prints the messages at the end.

    [bold]prefix-attn chat runs/tickets --temperature 0.7 --top-p 0.9[/bold]

    /reset forgets the conversation. /quit or ctrl-D ends it. Ctrl-C stops an answer. Inputs are put to the model as in
    training: one that was not trained on chats answers each by itself.
    """
    loading: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize}
    decoding = decoding_of(1, temperature, top_p, top_k, seed, stop)
    check_adapter(adapter, model, **loading)
    prompt = prompt_of(adapter, template, system)
    prefixed, tokenizer = prefixed_model(adapter, model, **loading)
    from prefix_attn.training.conversation import Conversation

    limit = limited(prefixed, max_new_tokens)
    talk = Conversation(prefixed, tokenizer, prompt=prompt, max_new_tokens=limit, **decoding)
    if not prompt.is_chat:
        ERR.print(
            f"note: this prefix was trained with the template {prompt.template!r}, not to chat: it answers each input "
            "by itself (--template chat says otherwise)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    ERR.print(HINT, highlight=False)
    said: list[Any] = []
    while (text := _asked()) is not None:
        if text == "/reset":
            talk.reset()
        elif text.strip():
            said += _turn(talk, text, as_json)
    if as_json:
        show(said, as_json, "")


def _asked() -> str | None:
    """The user's next message. None at the end."""
    with suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                typer.echo()  # ctrl-D leaves the cursor behind the prompt
            return None
        except KeyboardInterrupt:
            ERR.print(f"\n{HINT}", highlight=False)
        else:
            return None if text.strip() == "/quit" else "/reset" if text.strip() == "/reset" else text


def _turn(talk: Conversation, text: str, as_json: bool) -> list[Any]:
    """Both messages of a turn, of which the answer is shown as it is written."""
    cut = talk.cut
    try:
        with _stoppable() as stopped:
            pieces = (lambda piece: None) if as_json else (lambda piece: typer.echo(piece, nl=False))
            answer = talk.answer(text, pieces, stopped.is_set)
    except ValueError as error:
        ERR.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return []
    if not as_json:
        typer.echo()
    if talk.cut > cut:
        ERR.print("note: the conversation is too long for the model: its first messages were left out", highlight=False)
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


@contextmanager
def _stoppable() -> Iterator[Event]:
    """An event that ctrl-C sets. A second ctrl-C interrupts as usual."""
    stopped = Event()

    def stop(number: int, frame: Any) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
