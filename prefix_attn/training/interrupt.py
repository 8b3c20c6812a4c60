"""Ctrl-C and SIGTERM: a training finishes its step and saves what it has."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_log = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """A training ended because it was told to. Its checkpoint, its prefix and its metrics are saved.

    Attributes:
        signal: the number of SIGINT or SIGTERM.
        metrics: what the training would have returned.
    """

    def __init__(self, number: int, metrics: dict[str, Any]) -> None:
        """See the class."""
        super().__init__(f"stopped by {signal.Signals(number).name} after step {metrics['steps']}")
        self.signal, self.metrics = number, metrics


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """The list of the signals that came. The first is only noted; a second one does what it did before.

    Signals that the process ignores, as under nohup, stay ignored. Only the main thread gets any.
    """
    noted: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        restore()
        _log.warning("finishing this step and saving; once more to stop at once")

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()
