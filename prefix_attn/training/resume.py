"""What a run finds in its folder: the checkpoints of the run before."""

from __future__ import annotations

import json
from pathlib import Path


def checkpoints(output: Path) -> dict[int, Path]:
    """The complete checkpoints by their step. The Trainer writes trainer_state.json last: a killed one lacks it."""
    found = {}
    for path in output.glob("checkpoint-*"):
        try:
            found[int(json.loads((path / "trainer_state.json").read_text())["global_step"])] = path
        except (OSError, ValueError):  # none, or half of it
            continue
    return found


def last_checkpoint(output: Path) -> Path | None:
    """The complete checkpoint of the latest step."""
    found = checkpoints(output)
    return found[max(found)] if found else None
