"""Runs a script in a fork of a process that has imported torch and transformers, which takes longer than the script."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import warnings
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

LIBRARIES = ("torch._dynamo", "torch.distributed.tensor", "transformers.trainer", "peft")


@cache
def _forks() -> ForkServerContext:
    """Forks of a process that has imported the libraries and run nothing. One that does not exist is left out."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    return context


def _script(path: str, arguments: list[str], folder: str, search: list[str], output: str) -> None:
    """In the fork: what ``python -W error PATH ARGUMENTS`` does in ``folder``."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(Path(output, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ["PYTHONPATH"] = os.pathsep.join(search)  # for the processes that the script starts
    os.chdir(folder)
    warnings.simplefilter("error")
    sys.argv, sys.path[:] = [path, *arguments], [str(Path(path).parent), *search]
    runpy.run_path(path, run_name="__main__")


def run_script(path: Path, arguments: list[str], folder: Path, output: Path) -> str:
    """What ``python -W error PATH ARGUMENTS`` prints in ``folder``. It finds what this process finds."""
    search = [str(folder), *sys.path]
    process = _forks().Process(target=_script, args=(str(path), arguments, str(folder), search, str(output)))
    process.start()
    process.join()
    assert process.exitcode == 0, (output / "err").read_text(encoding="utf-8")
    return (output / "out").read_text(encoding="utf-8")
