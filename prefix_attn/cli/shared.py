"""Options, loading and printing that several commands share."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from prefix_attn.training.prompts import PROMPT, Prompt

# Names and texts are printed unchanged: ":x:" is not an emoji and "[/x]" is not markup.
OUT, ERR = Console(emoji=False), Console(stderr=True, emoji=False)

base_option: Callable[..., Any] = partial(typer.Option, rich_help_panel="The base model")
Model = Annotated[str, base_option(help="A local folder, a .gguf file, the name of a model on the Hub, or 'smollm2'.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    base_option(help="Of the weights; 'auto': as they are stored. Default: bfloat16 on a GPU, float32 on a CPU."),
]
Device = Annotated[
    str | None,
    base_option(
        help="Such as cpu, cuda or cuda:1; 'auto' spreads the model over all GPUs. Default: the GPU if there is one."
    ),
]
Quantize = Annotated[
    int | None, base_option(help="Load the weights in 4 or 8 bits, with bitsandbytes.", metavar="[4|8]")
]
Adapter = Annotated[
    Path, typer.Argument(help="Folder of a prefix, saved by prefix-attn or by another library.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
DATA = (
    "'aws', 'aws-summary', or a file: .jsonl, .csv, .tsv, .parquet or .json with a column for inputs and one for "
    "outputs, or with 'messages'; E2E's .csv, DART's .json, WebNLG's .xml."
)
data_option: Callable[..., Any] = partial(typer.Option, rich_help_panel="The data")


def unescaped(text: str) -> str:
    r"""``text`` with line breaks and tabs for ``\n`` and ``\t``, which a shell leaves as they are."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _delimiter(text: str | None) -> str | None:
    return text and unescaped(text)


Data = Annotated[str, data_option(help=DATA)]
Source = Annotated[str, data_option(help="Column or JSON key of the input.")]
Target = Annotated[str, data_option(help="Column or JSON key of the output.")]
Delimiter = Annotated[
    str | None,
    data_option(help="Between the cells of a table. Default: what its header shows.", callback=_delimiter),
]
Encoding = Annotated[str | None, data_option(help="Of a text file, such as cp1252. Default: what its bytes show.")]
SkipBadRows = Annotated[
    bool, data_option("--skip-bad-rows", help="Leave out rows that cannot be used. Default: an error that names them.")
]
Template = Annotated[
    str | None,
    data_option(
        help="What stands around an input: 'chat', the tokenizer's chat template, or a text with {source}, and with "
        "\\n for line breaks. The output follows it, after a space if it does not end in white space. "
        f"Default: {PROMPT!r}; 'chat' for rows with 'messages'.",
        show_default=False,
    ),
]
System = Annotated[
    str | None, data_option(help="The system message of chats that have none, or the text for {system} in --template.")
]
SpecialTokens = Annotated[
    bool,
    data_option("--special-tokens", help="Read names such as </s> in texts as special tokens. Default: they are text."),
]
Beams = Annotated[int, typer.Option(min=1, help="Number of beams. 1 decodes greedily.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Maximum length of each output.")]
BaseModel = Annotated[str | None, base_option(help="Base model. Default: the one that the adapter names.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per batch.")]


def prompt_of(adapter: Path, template: str | None, system: str | None) -> Prompt:
    """What the adapter was trained with, unless it is given here."""
    saved = Prompt.load(adapter)
    if template is not None:  # the other template has its own system text
        return replace(saved, template=unescaped(template), system=system)
    return saved if system is None else replace(saved, system=system)


def load(model: str, **options: Any) -> tuple[Any, Any]:
    """A base model and its tokenizer. ``options`` are those of ``load_base``."""
    with ERR.status(f"loading {escape(model)} (a GGUF file is converted once: about a minute)"):
        from prefix_attn.hf.load import load_base  # with transformers, which takes seconds

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every product what it rounds
        return load_base(model, **options)


def check_adapter(adapter: str | Path, model: str | None = None, **options: Any) -> None:
    """Refuse an adapter that is not there, and what ``load_base`` would refuse, without transformers."""
    from prefix_attn.hf.io.files import find
    from prefix_attn.hf.load import check_base, check_options

    check_options(**options)
    if "/" not in str(adapter) and not Path(adapter).exists():  # no request, which takes a second
        raise ValueError(f"{adapter}: neither a folder nor the id of a Hub repository, which is owner/name")
    found = find(adapter, "adapter_config.json")
    if found.is_dir() and not any(found.iterdir()):
        raise ValueError(f"{adapter}: the folder is empty, and holds no prefix")
    if model is not None:
        check_base(model, **options)


def check_writable(folder: Path, file: Path | None = None) -> None:
    """Refuse a folder that cannot be made or written.

    Raises:
        ValueError: it names the folder, or the ``file`` that is to be in it.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{file or folder}: cannot be written: {there} is no folder that you may write to")


def prefixed_model(adapter: Path, model: str | None, **options: Any) -> tuple[Any, Any]:
    """The base model with the adapter on it, and the tokenizer. ``options`` are those of ``load_base``."""
    from prefix_attn.hf.io.checkpoint import describe
    from prefix_attn.hf.model import PrefixModel

    model = model or describe(adapter)["base_model_name_or_path"]
    if not model:
        raise ValueError(f"{adapter} does not name its base model: give --model")
    base, tokenizer = load(model, **options)
    return PrefixModel.from_pretrained(base, adapter).eval(), tokenizer


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr for ``total`` texts. Call what it yields to advance it."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=name, unit="text") as bar:
        yield bar.update


def show(result: Any, as_json: bool, text: Any) -> None:
    """Print ``result`` as JSON, or ``text``, which may be a table. Of torchrun's processes only the first prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    elif isinstance(text, str):
        typer.echo(text)
    else:
        OUT.print(text, soft_wrap=isinstance(text, Text))
