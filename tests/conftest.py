"""What every test runs under: offline, one thread, memory that is NaN until written."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell has what it runs in the background ignore Ctrl-C, and so would every command that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what runs TRL where it cannot be installed, as other marks are left out."""
    if sys.version_info < (3, 11):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("trl")])
        items[:] = [item for item in items if not item.get_closest_marker("trl")]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Deterministic mode fills every torch.empty with NaN and rejects torch ops that add in no fixed order."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
