"""What commands share: options, and how they load and print."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

# Names and texts are printed as they are: ":x:" is no picture and "[/x]" no markup.
OUT, ERR = Console(emoji=False), Console(stderr=True, emoji=False)

Model = Annotated[str, typer.Option(help="'smollm2', a .gguf file, a local folder or the name of a model on the Hub.")]
Adapter = Annotated[Path, typer.Argument(help="Folder of a prefix, ours or another library's.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
DATA = "'aws', 'aws-summary', a .jsonl or .csv file (E2E's is recognised), DART's .json, WebNLG's .xml."
Data = Annotated[str, typer.Option(help=DATA)]
Source = Annotated[str, typer.Option(help="Column or key of the input.")]
Target = Annotated[str, typer.Option(help="Column or key of the output.")]
Beams = Annotated[int, typer.Option(min=1, help="Beams; 1 is greedy.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Limit of each output.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows at once.")]


def load(model: str) -> tuple[Any, Any]:
    """A base model and its tokenizer."""
    from prefix_attn.hf.load import load_base

    with ERR.status(f"loading {escape(model)} (a GGUF file is converted once: about a minute)"):
        return load_base(model)


def prefixed_model(adapter: Path, model: str | None) -> tuple[Any, Any]:
    """The adapter on its base model, and the tokenizer."""
    from prefix_attn.hf.io.checkpoint import describe
    from prefix_attn.hf.model import PrefixModel

    model = model or describe(adapter)["base_model_name_or_path"]
    if not model:
        raise ValueError(f"{adapter} does not name its base model: give --model")
    base, tokenizer = load(model)
    return PrefixModel.from_pretrained(base, adapter).eval(), tokenizer


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr for ``total`` texts; what is yielded advances it."""
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit="text") as bar:
        yield bar.update


def show(result: Any, as_json: bool, text: Any) -> None:
    """``result`` as JSON, or ``text``, which may be a table."""
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    elif isinstance(text, str):
        typer.echo(text)
    else:
        OUT.print(text)
