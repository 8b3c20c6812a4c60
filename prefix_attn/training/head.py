"""Read the logits of a model at chosen positions, some at a time.

A position's logits are as wide as the vocabulary: those of 4,096 positions of SmolLM2 take 0.8 GB, and a loss needs
them several times. Here the body of the model (all below its head) runs once. Then the model's own forward runs again
for some of the positions at a time, on the states that its body gave. So scales, biases, soft caps and adapters of the
head stay the model's own: nothing of a head is written here.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefix_attn.hf.attach.wrapper import Wrapper

AT_ONCE = 2**23  # logits: 32 MB in float32
Score = Callable[[Tensor, slice], Tensor]  # from logits (N, V) and which of the positions these are
_log = logging.getLogger(__name__)


def base_of(model: Any) -> Any:
    """The transformers model inside ours, PEFT's, or one that spreads it over devices."""
    model = getattr(model, "module", model)
    base = model.base_model if isinstance(model, Wrapper) else model
    return base.get_base_model() if hasattr(base, "get_base_model") else base


def can_leave_out_logits(model: Any) -> bool:
    """Whether the model's forward takes ``logits_to_keep``."""
    return "logits_to_keep" in inspect.signature(base_of(model).forward).parameters


def sum_over(model: Any, inputs: Mapping[str, Any], at: Tensor, score: Score) -> Tensor:
    """The sum of ``score`` over the logits at the positions ``at``, without all logits at once.

    All logits are computed at once where nothing shows what the head reads: in a compiled model, or one whose forward
    does not call its body. This is logged.

    Args:
        model: ours, PEFT's or one of transformers.
        inputs: keyword arguments of its forward, without labels.
        at: (B, S) bool. Its columns are the last ones of the logits: virtual tokens may stand before them.
        score: gives a scalar in float32, the sum over some of the positions. They are in the order of ``at``.

    Returns:
        A scalar in float32. It can be differentiated once: its gradient is computed with it.
    """
    base = base_of(model)
    reader = _Reader(base, at, score)
    with reader.reading() if not any(hasattr(m, "_orig_mod") for m in (model, base)) else ExitStack():
        output = model(**inputs)
    if reader.is_done:
        return output.loss
    _say_why(type(base).__name__)
    output = model(**inputs) if reader.has_cut else output
    return score(output.logits[:, -at.shape[1] :][at.to(output.logits.device)], slice(None))


@functools.cache
def _say_why(kind: str) -> None:
    _log.warning("%s does not show what its head reads: the logits of a whole batch are computed at once", kind)


class _Reader:
    """Lets the forward of ``base`` give the sum of ``score`` as its loss, if its body is found."""

    def __init__(self, base: Any, at: Tensor, score: Score) -> None:
        self.base, self.at, self.score, self.is_done = base, at, score, False
        self.has_cut = False
        self._hooks: list[Any] = []
        self._running: list[nn.Module] = []
        self._kept: tuple[nn.Module, Any] | None = None  # the body and what it gave

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The context in which it does."""
        for body in _bodies(self.base):
            self._hooks.append(body.register_forward_pre_hook(lambda module, _: self._running.append(module)))
            self._hooks.append(body.register_forward_hook(self._keep))
        forward = self.base.forward
        try:
            with _as_forward(self.base, lambda *args, **kwargs: self._read(forward, args, kwargs)):
                yield
        finally:
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, body: nn.Module, _: Any, output: Any) -> Any:
        """Keep the states that the body gives, and hand on one column of them, so that there is little to read."""
        self._running.pop()
        states = getattr(output, "last_hidden_state", None)
        if self._running or not isinstance(states, Tensor):  # a part of the body, or not one as we know it
            return None
        self._kept, self.has_cut = (body, output), True
        # Contiguous: for other states ``linear`` copies the weights of the whole vocabulary once per row.
        return _with(output, last_hidden_state=states[:, -1:].contiguous())

    def _read(self, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        self._remove_hooks()
        if self._kept is None or output.logits.shape[1] != 1:
            return output
        (body, given), self._kept = self._kept, None
        states = given.last_hidden_state
        if self.base.config.is_encoder_decoder:
            kwargs = kwargs | {"encoder_outputs": (states,)}  # or the encoder would run again
        states = states[:, -self.at.shape[1] :][self.at.to(states.device)]
        place = next(name for name, module in self.base.named_modules() if module is body)

        def score(some: Tensor, piece: slice) -> Tensor:
            with _in_place(self.base, place, _with(given, last_hidden_state=some[None])):
                return self.score(forward(*args, **kwargs).logits[0], piece)

        size = max(1, AT_ONCE // output.logits.shape[-1])
        pieces = [slice(start, start + size) for start in range(0, len(states), size)]
        trained = [p for p in self.base.parameters() if p.requires_grad]
        loss = _Sum.apply(score, pieces, torch.is_grad_enabled(), states, *trained)
        self.is_done = True
        return _with(output, loss=loss)


def _bodies(base: Any) -> list[nn.Module]:
    """What the forward of a transformers model may call: its base model, whatever its name, or the decoder alone."""
    found = [getattr(base, name, None) for name in ("base_model", "model")]
    if hasattr(base, "get_decoder"):  # OPT, T5
        found.append(base.get_decoder())
    return [body for body in dict.fromkeys(found) if isinstance(body, nn.Module) and body is not base]


def _with(output: Any, **changes: Any) -> Any:
    return type(output)(**dict(output) | changes)


@contextmanager
def _as_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The context in which ``forward`` is that of ``module``."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def _in_place(base: nn.Module, place: str, output: Any) -> Iterator[None]:
    """The context in which the module of ``base`` at ``place`` gives ``output``, whatever it reads."""
    parent, _, name = place.rpartition(".")
    owner, body = base.get_submodule(parent), base.get_submodule(place)
    setattr(owner, name, _Given(body, output))
    try:
        yield
    finally:
        setattr(owner, name, body)


class _Given(nn.Module):
    """Stands for a body without its hooks, which are about layers that do not run."""

    def __init__(self, body: nn.Module, output: Any) -> None:
        super().__init__()
        self.body, self.output = body, output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.body, name)


class _Sum(torch.autograd.Function):
    """The sum of a function over pieces of the states, and its gradients, which are computed piece by piece with it."""

    @staticmethod
    def forward(
        ctx: Any, score: Score, pieces: list[slice], needs_grad: bool, states: Tensor, *trained: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=states.device)
        if not (needs_grad and any(ctx.needs_input_grad)):
            return sum((score(states[piece], piece) for piece in pieces), total)
        grad, grads = torch.zeros_like(states), dict[int, Tensor]()
        for piece in pieces:
            with torch.enable_grad():
                some = states[piece].detach().requires_grad_()
                part = score(some, piece)
                own, *found = torch.autograd.grad(part, [some, *trained], allow_unused=True)
            grad[piece], total = own, total + part.detach()
            for i, new in enumerate(found):
                if new is not None:
                    grads[i] = grads[i].add_(new) if i in grads else new.float()
        ctx.grads = [grad, *(grads[i].to(p.dtype) if i in grads else None for i, p in enumerate(trained))]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(g if g is None else (g * grad).to(g.dtype) for g in ctx.grads)
