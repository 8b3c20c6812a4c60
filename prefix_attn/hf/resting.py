"""Which of several prefixes is trained: the one that was set, and those that a forward names. The others rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from threading import Lock
from weakref import WeakSet

import torch
from torch import Tensor, nn

Parameters = Callable[[], Mapping[str, nn.Parameter]]  # of a prefix, by their names


class Resting:
    """The prefixes whose parameters are not trainable while another one is active, and what comes back when they are.

    A parameter that its user froze was not trainable before, and does not come back. A prefix whose backward is still
    to come does not rest yet: autograd would drop its gradient. Threads may train and set prefixes at the same time.
    """

    def __init__(self) -> None:
        """Nobody rests."""
        self._lock = Lock()
        self._trainable: dict[str, set[str]] = {}  # of each prefix that rests: the names of its parameters
        self._graphs: dict[str, WeakSet[_Graph]] = {}  # of each prefix: the forwards whose backward is still to come

    def __reduce__(self) -> tuple[type[Resting], tuple[()], dict[str, set[str]]]:
        """A copy of the model runs nothing yet."""
        return type(self), (), self._trainable

    def __setstate__(self, trainable: dict[str, set[str]]) -> None:
        """The reverse."""
        self._trainable = trainable

    def rest(self, name: str, parameters: Parameters) -> None:
        """Freeze what is trainable of the prefix ``name``, whose parameters these are."""
        with self._lock:
            found = parameters()
            trainable = {n for n, parameter in found.items() if parameter.requires_grad}
            if trainable and not self._graphs.get(name):
                self._trainable[name] = trainable | self._trainable.get(name, set())
                for n in trainable:
                    found[n].requires_grad_(False)

    def wake(self, name: str, parameters: Parameters) -> None:
        """Make trainable again what was, if the prefix rests."""
        with self._lock:
            self._wake(name, parameters)

    def forget(self, name: str) -> None:
        """The prefix is gone."""
        with self._lock:
            self._trainable.pop(name, None)
            self._graphs.pop(name, None)

    def made(self, name: str, parameters: Parameters, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` makes of the prefix for a forward that trains it. It rests once its gradient is there.

        Compiled code cannot say when that is: there, backward has to come before ``set_prefix``.
        """
        if torch.compiler.is_compiling():
            self._wake(name, parameters)
            return make()
        graph = _Graph()
        with self._lock:
            graphs = self._graphs.setdefault(name, WeakSet())
            graphs.add(graph)
            self._wake(name, parameters)
        made = make()
        if made.requires_grad:  # autograd holds the hook, which holds the graph: it goes with autograd's
            made.register_hook(partial(_at_the_end, partial(graphs.discard, graph)))
        return made

    def _wake(self, name: str, parameters: Parameters) -> None:
        if name in self._trainable:
            found = parameters()
            for n in self._trainable.pop(name) & found.keys():
                found[n].requires_grad_(True)


class _Graph:
    """Of one forward of a prefix."""


def _at_the_end(then: Callable[[], None], _: Tensor) -> None:
    """Within a backward: call ``then`` after the last of its gradients is where it belongs."""
    torch.autograd.Variable._execution_engine.queue_callback(then)
