"""``prefix-attn serve``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

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


Folder = Annotated[
    Path | None,
    typer.Option(
        "--prefixes",
        help="A folder whose folders are prefixes, under their names. vLLM reads each when it is first asked for, and "
        "sees what is put there later.",
        show_default=False,
    ),
]
ENGINES = ("vllm", "transformers")


def serve(
    base: Base,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="Arguments of vLLM's own server, after --.", metavar="[-- ARGUMENTS]", show_default=False),
    ] = None,
    prefix: Prefixes = [],  # noqa: B006  typer copies it
    prefixes: Folder = None,
    host: Annotated[str, typer.Option(help="Address to listen on. 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0: any that is free.")] = 8000,
    engine: Annotated[
        str | None,
        typer.Option(
            help="'vllm' starts vLLM's own server, 'transformers' runs in this process. Default: vLLM if it is there."
        ),
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Requests that are answered at the same time. Default: 16, with vLLM its.")
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(min=1, help="Requests that may wait. More are refused: 429. Default: 256. Not in vLLM."),
    ] = None,
    allow_loading: Annotated[
        bool,
        typer.Option(
            "--allow-loading",
            help="Let every client load prefixes from this machine's disk, and unload them, at /v1/load_prefix and "
            "/v1/unload_prefix. vLLM alone, with --prefixes, where links to them are kept.",
        ),
    ] = False,
) -> None:
    """Serve prefixes over OpenAI's API. The model name of a request is the name of a prefix, or BASE for none.

    [bold]prefix-attn serve smollm2 --prefix e2e=runs/e2e --prefix chat=runs/chat[/bold]

    [bold]curl localhost:8000/v1/completions -H 'Content-Type: application/json'
    -d '{"model": "e2e", "prompt": "name : Aromi", "temperature": 0}'[/bold]

    Chats are at /v1/chat/completions, and the names at /v1/models. Requests for all prefixes share batches, and never
    see each other's prefix.
    """
    engine = engine or ENGINES[importlib.util.find_spec("vllm") is None]
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine!r} is not known: {' and '.join(map(repr, ENGINES))} are")
    folders = named_folders(prefix, base)
    if not folders and prefixes is None:
        raise ValueError("there is nothing to serve: give --prefix NAME=FOLDER, or --prefixes")
    if prefixes is not None and not prefixes.is_dir():
        raise ValueError(f"--prefixes: there is no folder {prefixes}")
    if engine == "vllm":
        if max_waiting is not None:
            raise ValueError("--max-waiting is for --engine transformers: vLLM's queue has no limit")
        extra = [] if max_batch is None else ["--max-num-seqs", str(max_batch)]
        return _vllm(base, folders, prefixes, allow_loading, host, port, [*extra, *(arguments or ())])
    if arguments:
        raise ValueError(f"arguments of an engine, as {arguments[0]!r}, are for --engine vllm")
    if allow_loading:
        raise ValueError("--allow-loading is for --engine vllm: the other one reads all prefixes when it starts")
    inside = sorted(prefixes.iterdir()) if prefixes is not None else []
    folders = named_folders([*prefix, *(f"{f.name}={f}" for f in inside if not f.name.startswith("."))], base)
    return _transformers(base, folders, host, port, max_batch or 16, max_waiting or 256)


def _vllm(
    base: str, folders: dict[str, Path], inside: Path | None, loading: bool, host: str, port: int, rest: list[str]
) -> None:
    """Become vLLM's server."""
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError("--engine vllm needs the package vllm: pip install vllm", name="vllm")
    with ERR.status(f"loading {escape(base)} (a GGUF file is converted once: about a minute)"):
        from prefix_attn.serve.vllm.launch import command, run

        found = command(base, folders, folder=inside, loading=loading, host=host, port=port, arguments=rest)
    ERR.print(f"serving {', '.join(map(repr, [base, *folders]))} with vLLM", highlight=False, markup=False)
    run(found)


def _transformers(base: str, folders: dict[str, Path], host: str, port: int, max_batch: int, max_waiting: int) -> None:
    """Serve from this process."""
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
