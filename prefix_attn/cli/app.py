"""The commands of ``prefix-attn``: parse, call, print."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from prefix_attn.cli import experiments, generate, serve, tools, train, use
from prefix_attn.cli.shared import ERR

app = typer.Typer(
    name="prefix-attn",
    help="Prefix tuning: train a small prefix for a frozen language model, and use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _main(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    pass


for _command in (train.train, generate.generate, generate.chat, use.evaluate, use.inspect, tools.convert, tools.check):
    app.command()(_command)
app.command()(serve.serve)
for _command in (experiments.reproduce, experiments.ablate, experiments.pretrain, experiments.report):
    app.command()(_command)


def run() -> None:
    """Run a command. An error is one line on stderr and exit status 1, or a traceback with ``--debug``."""
    try:
        app(standalone_mode=True)
    except ModuleNotFoundError:
        raise  # to main, which knows the extras
    except (ValueError, NotImplementedError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if "--debug" in sys.argv:
            raise
        message = " ".join(str(error).split())
        ERR.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
