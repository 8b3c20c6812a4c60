"""The command line, ``prefix-attn``. ``cli.app`` holds the commands. This module must import without typer and rich."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, requires


def main() -> None:
    """Run a command. If a package is missing, name the extra that brings it and exit with status 1."""
    try:
        from prefix_attn.cli.app import run

        run()
    except ModuleNotFoundError as error:
        if "--debug" in sys.argv:
            raise
        extra = _extra_of(error.name)
        advice = f": pip install 'prefix-attn[{extra}]'" if extra else ""
        print(f"error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        raise SystemExit(1) from None


def _extra_of(module: str | None) -> str | None:
    """The first extra of this distribution that has the package of ``module``."""
    package = (module or "").partition(".")[0]
    try:
        requirements = requires("prefix-attn") or []
    except PackageNotFoundError:  # a source tree that is not installed
        return None
    for requirement in requirements:
        found = re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", requirement)
        if found and found[1].replace("-", "_") == package:
            return found[2]
    return None
