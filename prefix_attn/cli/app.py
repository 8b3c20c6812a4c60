"""The commands of ``prefix-attn``: parse, call, print."""

from __future__ import annotations

import errno
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperCommand

from prefix_attn import __version__
from prefix_attn.cli import experiments, generate, serve, tools, train, use
from prefix_attn.cli.shared import ERR
from prefix_attn.quoting import shortened

NAME = "prefix-attn"


# Parameters that mean something when they are empty or blank, or that say themselves what is wrong then.
MAY_BE_EMPTY = ("sources", "system", "template", "stop", "delimiter", "metrics")


class Command(TyperCommand):
    """A command whose help has <int> where typer has <int range> [x>=1]: so names fit into 80 columns.

    Names of files, folders, models, columns and choices are not empty: a path of no characters is the current folder.
    An error that begins with such a name says of which option it is.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (OSError, ValueError) as error:
            message = _of_file(error) if isinstance(error, OSError) else str(error)
            values = {p.opts[0]: str(ctx.params.get(p.name) or "") for p in self.params if p.opts[0][0] == "-"}
            named = [name for name, v in values.items() if v and message.startswith((f"{v}: ", f"{v!r} "))]
            if named and not any(name in message for name in named):
                message = f"{named[0]} {message}"
            if message == str(error):
                raise
            raise ValueError(message) from error

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, as typer has them."""
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if param.name not in MAY_BE_EMPTY:
                vars(param).setdefault("process_value", partial(_filled, param, param.process_value))
            if param.type_descriptor.is_ranged:
                param.metavar, param.min, param.max = f"<{param.type_descriptor.ranged_type_name}>", None, None
        return params


ADVICE = {
    errno.ENOENT: "give one that is there",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "give a folder for it",
    errno.EEXIST: "give a folder for it",
    errno.EACCES: "give one that you may use",
}


def _of_file(error: OSError) -> str:
    """What an error of the system says, with the file in front."""
    if not isinstance(error.filename, str | Path) or error.errno not in ADVICE or not error.strerror:
        return str(error)
    return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}; {ADVICE[error.errno]}"


def _filled(param: Any, process: Any, context: Any, value: Any) -> Any:
    """``process`` a value of ``param``, from the command line or a file, unless it is an empty text."""
    for text in value if isinstance(value, list | tuple) else (value,):
        if isinstance(text, str) and (not text.strip() or "\0" in text):
            wrong = "a name cannot hold a NUL character" if text.strip() else "it is empty"
            advice = "give a value" if param.required else "give a value, or leave it out"
            raise typer.BadParameter(f"{wrong}; {advice}", ctx=context, param=param)
    return process(context, value)


app = typer.Typer(
    name=NAME,
    help="Prefix tuning: train a small prefix for a frozen language model, and use it.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


for _command in (train.train, generate.generate, generate.chat, use.evaluate, use.inspect, tools.convert, tools.check):
    app.command(cls=Command)(_command)
app.command(cls=Command)(serve.serve)
for _command in (experiments.reproduce, experiments.ablate, experiments.pretrain, experiments.report):
    app.command(cls=Command)(_command)


def run() -> None:
    """Run a command. An error is one line on stderr and status 1 or 2, or with --debug a traceback."""
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first says what all find
        logging.getLogger("prefix_attn").setLevel(logging.ERROR)
    try:
        status = app(prog_name=NAME, standalone_mode=False)
    except ModuleNotFoundError:
        raise  # to main, which knows the extras
    except typer.TyperException as error:
        _fail(_usage(error), error.exit_code)
    except typer.Abort:
        _fail("aborted", 1)
    except (ValueError, NotImplementedError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError) as error:
        if "--debug" in sys.argv:
            raise
        _fail(str(error) or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__), 1)
    raise SystemExit(status if isinstance(status, int) else 0)


def _usage(error: Any) -> str:
    """What is wrong with the arguments, what was given, and where help is."""
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    if isinstance(error, typer.BadParameter):
        cause: Any = error.__cause__
        if cause is not None:  # pydantic's, which knows the value
            given = repr(cause.errors()[0]["input"])
            message += "" if given in message else f", got {given}"
        elif not error.message and getattr(error.param, "help", None):  # it is missing
            message += f": {error.param.help.rstrip('.')}"
    context = getattr(error, "ctx", None)
    return f"{message} (see {context.command_path} --help)" if context else message


def _fail(message: str, status: int) -> NoReturn:
    line = escape(shortened(" ".join(message.split()), 4000))
    ERR.print(f"[bold red]error:[/] {line}", highlight=False, soft_wrap=True)
    raise SystemExit(status)
