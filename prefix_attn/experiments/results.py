"""A file of results: one JSON object per line, never half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prefix_attn.hf.io.files import opened
from prefix_attn.quoting import shortened

Result = dict[str, Any]


def read(path: Path) -> list[Result]:
    """Read the results in ``path``. No file means no results. A last line without a newline was cut off and is ignored.

    Raises:
        ValueError: any other line is not a JSON object with "run".
    """
    if not path.exists():
        return []
    results = []
    with opened(path) as file:
        lines = file.read().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            results.append(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({shortened(error)})") from None
        if not isinstance(results[-1], dict) or "run" not in results[-1]:
            raise ValueError(f"{path}, line {number}: not a result, which is an object with 'run'")
    return results


def append(path: Path, result: Result) -> None:
    """Append a line to ``path``, after removing a half-written one. If killed, the line is complete or ignored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
