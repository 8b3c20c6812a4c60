"""``prefix-attn serve``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from prefix_attn.cli.shared import ERR, load

Base = Annotated[
    str,
    typer.Argument(
        help="The base model: 'smollm2', a .gguf file, a local folder, or the name of a model on the Hub.",
        show_default=False,
    ),
]
Prefixes = Annotated[
    list[str],
    typer.Option(
        "--prefix",
        help="A prefix to serve, under a name that clients give as their model. Repeat it for more.",
        metavar="NAME=FOLDER",
        show_default=False,
    ),
]


def serve(
    base: Base,
    prefix: Prefixes,
    host: Annotated[str, typer.Option(help="Address to listen on. 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0: any that is free.")] = 8000,
    engine: Annotated[str, typer.Option(help="'transformers' runs in this process.")] = "transformers",
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that are answered at the same time.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait. More are refused: 429.")] = 256,
) -> None:
    """Serve prefixes over OpenAI's API. The model name of a request is the name of a prefix, or BASE for none.

    [bold]prefix-attn serve smollm2 --prefix e2e=runs/e2e --prefix chat=runs/chat[/bold]

    [bold]curl localhost:8000/v1/completions -H 'Content-Type: application/json'
    -d '{"model": "e2e", "prompt": "name : Aromi", "temperature": 0}'[/bold]

    Chats are at /v1/chat/completions, and the names at /v1/models. Requests for all prefixes share batches, and never
    see each other's prefix.
    """
    if engine != "transformers":
        raise ValueError(f"--engine {engine!r} is not known: 'transformers' is")
    folders = named_folders(prefix, base)
    import fastapi  # noqa: F401  they are missing before the model is loaded, not after
    import uvicorn  # noqa: F401

    from prefix_attn.hf.io.checkpoint import describe

    for folder in folders.values():
        describe(folder)
    model, tokenizer = load(base)
    from prefix_attn.serve.api import make_app
    from prefix_attn.serve.engine import Engine
    from prefix_attn.serve.listen import listen
    from prefix_attn.serve.load import with_prefixes

    prefixed = with_prefixes(model, folders)
    ERR.print(f"serving {', '.join(map(repr, [base, *folders]))}", highlight=False, markup=False)
    running = Engine(prefixed, tokenizer, max_batch=max_batch, max_waiting=max_waiting)
    listen(make_app(running, list(folders), base), running, host=host, port=port)


def named_folders(given: Sequence[str], base: str) -> dict[str, Path]:
    """The folders of ``NAME=FOLDER`` arguments.

    Raises:
        ValueError: an argument has another form, a name occurs twice or is that of the base model, or there is no such
            folder.
    """
    found: dict[str, Path] = {}
    for argument in given:
        name, sign, folder = argument.partition("=")
        if not (name and sign and folder):
            raise ValueError(f"--prefix takes NAME=FOLDER, such as e2e=runs/e2e, got {argument!r}")
        if name == base:
            raise ValueError(f"--prefix {argument}: {name!r} is the model without a prefix; take another name")
        if name in found:
            raise ValueError(f"--prefix {argument}: {name!r} is {found[name]} already; take another name")
        if not Path(folder).exists():
            raise ValueError(f"--prefix {argument}: there is no folder {folder}")
        found[name] = Path(folder)
    return found
