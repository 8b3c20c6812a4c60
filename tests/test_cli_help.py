"""What the command line says of itself, and how it is started."""

from __future__ import annotations

import logging
import re
import runpy
import sys
from typing import Any

import pytest

from prefix_attn import __version__
from prefix_attn.cli import shared
from tests.test_cli import run
from tests.test_cli_errors import COMMANDS, options_of


@pytest.mark.parametrize("name", COMMANDS)
def test_names_of_options_are_whole_in_80_columns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, name, "--help") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for parameter in options_of(name):
        for option in (*parameter.opts, *parameter.secondary_opts):
            assert re.search(rf"{option}(?![\w-])", out), option


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_help_says_how_a_line_break_is_written(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As two characters, of which help left one out."""
    monkeypatch.setenv("COLUMNS", "300")
    assert run(monkeypatch, name, "--help") == 0
    out = capsys.readouterr().out
    assert r"several times for several; \n is a line break." in out
    assert r"a text with {source}, and with \n for line breaks" in out


def test_python_runs_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``python -m prefix_attn``, which torchrun takes too."""
    monkeypatch.setattr(sys, "argv", ["prefix_attn", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("prefix_attn", run_name="__main__")
    assert not stopped.value.code
    assert capsys.readouterr().out == f"prefix-attn {__version__}\n"


def test_bitsandbytes_does_not_say_at_every_product_what_it_rounds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it cannot do is still said."""
    theirs = logging.getLogger("bitsandbytes.autograd._functions")

    def load_base(*_: Any, **__: Any) -> tuple[None, None]:
        theirs.warning("MatMul8bitLt: inputs will be cast")
        theirs.error("no kernel")
        return None, None

    monkeypatch.setattr("prefix_attn.hf.load.load_base", load_base)
    level = logging.getLogger("bitsandbytes").level
    try:
        shared.load("model")
    finally:
        logging.getLogger("bitsandbytes").setLevel(level)
    assert [record.getMessage() for record in caplog.records] == ["no kernel"]


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"prefix-attn {__version__}\n"


def test_no_command_is_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 2
    assert "Commands" in capsys.readouterr().out


def test_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the shell asks for when the tab key is pressed."""
    monkeypatch.setenv("_PREFIX_ATTN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "prefix-attn train --valid")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert run(monkeypatch) == 0
    found = capsys.readouterr().out.split()
    assert {"--validate-every", "--validation", "--validation-rows", "--validation-share"} <= set(found)
