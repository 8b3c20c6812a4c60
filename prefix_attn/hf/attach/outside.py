"""Serve the ways round a wrapper's own forward: another forward in its place, and methods and stacks of the base model.

Libraries replace ``model.forward`` (fused losses, autocast) or call a stack of the base model and its head themselves.
Such code was written for the base model. What it runs, it runs with the prefix.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

Context = Callable[[], AbstractContextManager[None]]


def refuse_continuous_batching(*_: Any, **__: Any) -> Any:
    """Stands in place of all ways into transformers' continuous batching."""
    raise NotImplementedError(
        "transformers' continuous batching runs the base model with paged attention, in a thread of its own, and no "
        "prefix reaches it there; generate takes batches of prompts padded on the left"
    )


class Reached(nn.Module):
    """A module with a frozen ``base_model``, which has the prefix whichever way it is reached through this module.

    A subclass says how: by ``_stacks``, the modules that a prefix enters, and ``_on_demand``.
    """

    generate_batch = init_continuous_batching = continuous_batching_context_manager = refuse_continuous_batching

    def __init__(self) -> None:
        """Without a model yet."""
        super().__init__()
        self._replacing = Replacing()

    @property
    def base_model(self) -> PreTrainedModel:
        """The frozen model itself: what runs through it alone has no prefix.

        In a forward that stands in place of this class's own, it is the frozen model without its head, as every model
        of transformers calls it. Such forwards (TRL's fused loss) were written for them.
        """
        base = self._base()
        return base.base_model if self._replacing.depth else base

    def _base(self) -> PreTrainedModel:
        base: Any = self._modules.get("base_model")
        if base is None:
            raise AttributeError(f"{type(self).__name__} has no base_model yet")
        return base

    def _of_base(self, name: str) -> Any:
        """The attribute ``name`` of the base model: what runs the model there, runs with the prefix."""
        optional, needed = (partial(self._on_demand, {}, needed=needed) for needed in (False, True))
        return within(getattr(self._base(), name), self._base(), self._stacks(), optional, needed)

    def _replace_forward(self, forward: Callable[..., Any]) -> None:
        """What ``model.forward = forward`` does."""
        vars(self).pop("forward", None)
        if getattr(forward, "__func__", None) is not type(self).forward:
            vars(self)["forward"] = replacement(forward, self)

    @contextmanager
    def replaced(self, given: dict[str, Any]) -> Iterator[None]:
        """The context of a forward that stands in place of the class's own, called with these arguments."""
        self._replacing.depth += 1
        try:
            with self._on_demand(given, needed=True):
                yield
        finally:
            self._replacing.depth -= 1

    @contextmanager
    def _own_forward(self) -> Iterator[None]:
        """The context of the class's own forward and generate."""
        depth, self._replacing.depth = self._replacing.depth, 0
        try:
            yield
        finally:
            self._replacing.depth = depth

    def _stacks(self) -> set[nn.Module]:
        raise NotImplementedError

    def _on_demand(self, given: dict[str, Any], *, needed: bool) -> AbstractContextManager[None]:
        """The context in which the stacks run with the prefix, for a call of forward with the arguments ``given``."""
        raise NotImplementedError


class Replacing(threading.local):
    """``depth`` counts the forwards of this thread that stand in place of a wrapper's own and now run."""

    def __init__(self) -> None:
        """In each thread. A class attribute would do, but torch.compile takes its guards back when it is shadowed."""
        self.depth = 0

    def __reduce__(self) -> tuple[type[Replacing], tuple[()]]:
        """A copy of the model runs nothing yet."""
        return type(self), ()


class Replacement:
    """The function of a forward that was put in place of a wrapper's own: it runs as ``model.replaced`` says."""

    def __init__(self, forward: Callable[..., Any], model: nn.Module) -> None:
        """``forward`` is what was set on ``model``."""
        self._is_bound = inspect.ismethod(forward) and forward.__self__ is model
        function = getattr(forward, "__func__", forward)  # a copy of the model binds it to itself
        self._forward = function if self._is_bound else forward
        functools.update_wrapper(self, self._forward, updated=())  # another's attributes are its own

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        with model.replaced(model.named(args, kwargs)):
            return self._forward(model, *args, **kwargs) if self._is_bound else self._forward(*args, **kwargs)


def replacement(forward: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """What to set as the forward of the wrapper ``model`` where someone sets ``forward``."""
    if inspect.ismethod(forward) and isinstance(forward.__func__, Replacement):
        return forward
    return types.MethodType(Replacement(forward, model), model)


def within(value: Any, base: nn.Module, stacks: set[nn.Module], optional: Context, needed: Context) -> Any:
    """An attribute of ``base`` as its wrapper hands it out.

    Methods run within ``optional()``. Modules that hold one of ``stacks`` run within ``needed()``. All else is itself.
    """
    if inspect.ismethod(value) and value.__self__ is base:

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            with optional():
                made = value(*args, **kwargs)
            return within(made, base, stacks, optional, needed) if isinstance(made, nn.Module) else made

        return method
    if isinstance(value, nn.Module) and value is not base and not stacks.isdisjoint(value.modules()):
        return _view(value, needed)
    return value


def _view(module: nn.Module, context: Context) -> nn.Module:
    """``module``, whose calls run within ``context()``; with its state, and equal to it."""
    kind = _kind_of_view(type(module))
    view = object.__new__(kind)
    object.__setattr__(view, "__dict__", module.__dict__)
    object.__setattr__(view, "viewed_module", module)
    object.__setattr__(view, "viewed_within", context)
    return view


@functools.cache
def _kind_of_view(kind: type[Any]) -> type[Any]:
    """The class of views of modules of the class ``kind``: transformers takes long to make one."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.viewed_within():
            return self.viewed_module(*args, **kwargs)

    own: dict[str, Any] = {"__slots__": ("viewed_module", "viewed_within"), "__module__": kind.__module__}
    own |= {"__call__": forward, "forward": forward, "__eq__": _same_module}
    own |= {"__hash__": lambda self: hash(self.viewed_module)}
    own |= {"__reduce_ex__": lambda self, _: (_view, (self.viewed_module, self.viewed_within))}
    return type(kind.__name__, (kind,), own)


def _same_module(view: Any, other: Any) -> bool:
    return view.viewed_module is getattr(other, "viewed_module", other)


@contextmanager
def called(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """A list of those of ``modules`` that are called within the context."""
    ran: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in modules]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()
