"""How much memory something took at its peak."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> int:
    """Bytes of this process that lie in memory now."""
    return _of_status("VmRSS") if STATUS.exists() else _highest()


@contextmanager
def peak_growth() -> Iterator[Callable[[], int]]:
    """Within the context, or after it, call what it yields: bytes of memory at the peak so far beyond the start."""
    if CLEAR.exists():  # Linux forgets the peak when it is told so; elsewhere it is that of the process
        CLEAR.write_text("5")
    before = resident()
    yield lambda: (_of_status("VmHWM") if CLEAR.exists() else _highest()) - before


def _of_status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) << 10


def _highest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
