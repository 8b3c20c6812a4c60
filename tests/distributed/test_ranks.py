"""Two processes give the gradients, losses and files of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.distributed.together", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 18
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
