"""Results of runs in a file: one JSON object a line, each written whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def read(path: Path) -> list[Result]:
    """The results in ``path``; none where there is no file. A last line without an end was being written at a kill.

    Raises:
        ValueError: another line is no JSON object with "run".
    """
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(results[-1], dict) or "run" not in results[-1]:
            raise ValueError(f"{path}, line {number}: not a result, which is an object with 'run'")
    return results


def append(path: Path, result: Result) -> None:
    """Add a line to ``path``; a half-written one is removed. After a kill the line is there, or does not count."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
