"""Which of several prefixes is trained: the one that was set, and those that a forward names. The others rest."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakSet

import torch
from torch import Tensor, nn


class Resting:
    """The prefixes whose parameters are not trainable while another one is active, and what comes back when they are.

    A parameter that its user froze was not trainable before, and does not come back. A prefix whose backward is still
    to come does not rest yet: autograd would drop its gradient.
    """

    def __init__(self) -> None:
        """Nobody rests."""
        self._trainable: dict[str, set[str]] = {}  # of each prefix that rests: the names of its parameters
        self._graphs: dict[str, WeakSet[_Graph]] = {}  # of each prefix: the forwards whose backward is still to come

    def __reduce__(self) -> tuple[type[Resting], tuple[()], dict[str, set[str]]]:
        """A copy of the model runs nothing yet."""
        return type(self), (), self._trainable

    def __setstate__(self, trainable: dict[str, set[str]]) -> None:
        """The reverse."""
        self._trainable = trainable

    def rest(self, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
        """Freeze what is trainable of the prefix ``name``, whose parameters these are."""
        trainable = {n for n, parameter in parameters.items() if parameter.requires_grad}
        if trainable and not self._graphs.get(name):
            self._trainable[name] = trainable | self._trainable.get(name, set())
            for n in trainable:
                parameters[n].requires_grad_(False)

    def wake(self, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make trainable again what was, if the prefix rests."""
        for n in self._trainable.pop(name, set()) & parameters.keys():
            parameters[n].requires_grad_(True)

    def forget(self, name: str) -> None:
        """The prefix is gone."""
        self._trainable.pop(name, None)
        self._graphs.pop(name, None)

    def rests(self, name: str) -> bool:
        """Whether the prefix does."""
        return name in self._trainable

    def runs(self, name: str, made: Tensor) -> None:
        """A forward runs with ``made``, the keys and values of the prefix: it does not rest before their gradient came.

        Compiled code cannot say when that is: there, backward has to come before ``set_prefix``.
        """
        if made.requires_grad and not torch.compiler.is_compiling():
            graphs, graph = self._graphs.setdefault(name, WeakSet()), _Graph()
            graphs.add(graph)  # autograd holds the hook, which holds it: it goes with the graph
            made.register_hook(lambda _: graphs.discard(graph))


class _Graph:
    """Of one forward of a prefix."""
