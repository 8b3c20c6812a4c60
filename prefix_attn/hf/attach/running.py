"""Run a model with a prefix: hooks on its stacks hand them the prefix of the current context."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from prefix_attn.hf.attach.attention import FIRST, PACKED, STATE, Capture, PrefixState, Watch
from prefix_attn.hf.attach.banks import BatchRows
from prefix_attn.hf.attach.gradient_checkpointing import Bridge, bridge_next
from prefix_attn.hf.attach.layout import Layout
from prefix_attn.hf.attach.outside import called
from prefix_attn.hf.attach.packed import Sequences
from prefix_attn.hf.attach.positions import Outer, Positions, is_packed, past, shifted
from prefix_attn.hf.attach.ranks import heads_mesh, of_this_process
from prefix_attn.hf.attach.slots import Slot, find_stacks


class Runner:
    """Contexts in which the forwards of ``base`` see a prefix.

    ``positions`` says how each stack of ``base`` numbers its tokens.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        """Put hooks on every stack of ``base``; outside of contexts they do nothing."""
        self._name = type(base).__name__
        models = [module for module in base.modules() if isinstance(module, PreTrainedModel)]
        self._names = {model: list(inspect.signature(model.forward).parameters) for model in models}
        self._now = _Now()
        self._hooks: list[RemovableHandle] = []
        self._checkpointed = [m for m in base.modules() if hasattr(m, "gradient_checkpointing")]
        self.positions = {stack: Positions(stack) for stack in find_stacks(base)}
        self._listen(self.positions)

    def keep(self, slots: Iterable[Slot]) -> None:
        """Leave hooks only on the stacks of ``slots``, which are all that a prefix can enter."""
        slots = list(slots)
        self._first = list({slot.stack: slot.module for slot in reversed(slots)}.values())
        for slot in slots:
            if slot.site != "cross":
                self.positions[slot.stack].add(slot.module)
        self._listen(dict.fromkeys(slot.stack for slot in slots))

    @property
    def stacks(self) -> set[nn.Module]:
        """The stacks that a prefix can enter."""
        return set(self._stacks)

    def remove(self) -> None:
        """Take all hooks off."""
        self._listen([])

    @contextmanager
    def running(
        self,
        kv: Tensor,
        layout: Layout,
        rows: BatchRows | None = None,
        gates: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Iterator[None]:
        """Forwards within the context attend to a prefix, or each row to its own of a bank.

        Args:
            kv: a prefix (2 * slots, H, P, D), or a bank (N, 2 * slots, H, P, D).
            layout: of the prefix, or of any prefix in the bank.
            rows: which row has which prefix of the bank.
            gates: (slots, Hq), or for a bank (N, slots, Hq).
            starts: (B,) int64, the first column of each row that sees an infix.

        Raises:
            RuntimeError: if a stack ran and none of its slots took its prefix, or on leaving, if one of them never did:
                a prefix is never lost silently.
        """
        on_demand = self._now.demand is not None and self._now.demand.answered
        bridge = None
        if layout.slots[0].ranks > 1:
            mesh = heads_mesh(layout.slots[0].module)
            kv, gates = of_this_process(kv, -3, mesh), None if gates is None else of_this_process(gates, -1, mesh)
        made = [kv] if gates is None else [kv, gates]
        if torch.is_grad_enabled() and any(t.requires_grad for t in made) and self._is_reentrant():
            leaves = [t.detach().requires_grad_() for t in made]
            (kv, *rest), bridge = leaves, (leaves, *made)
            gates = rest[0] if rest else None
        config = layout.config
        shift = config.shift if rows is None else rows.shifts
        state = PrefixState(
            kv,
            {slot.module: number for number, slot in enumerate(layout.slots)},
            shifts=dict.fromkeys(layout.shifted, shift),
            backend=config.backend,
            lengths=[config.length(slot.layer) for slot in layout.slots] if config.has_lengths else None,
            rows=rows,
            gates=gates,
            starts=starts,
            watch=self._now.watch,
        )
        for slot in layout.slots if layout.slots[0].layer == 0 else []:
            state.sites.setdefault(slot.stack, {}).setdefault(slot.site, set()).add(slot.module)
        with self.context(state, bridge):
            yield
        self._check_served(state, layout.slots, on_demand=on_demand)

    @contextmanager
    def on_demand(self, running: Callable[[], AbstractContextManager[None]], *, needed: bool) -> Iterator[None]:
        """The first stack that runs within this context and has no other enters ``running()``, for the rest of it.

        Raises:
            RuntimeError: on leaving, if ``needed`` and layers ran but no stack: they had no prefix.
        """
        outer = self._now.demand  # of the call that this one is part of, whose arguments say more
        demand = _Demand(running) if outer is None else outer
        met, demand.met, self._now.demand = demand.met, False, demand
        try:
            with ExitStack() if outer else demand.contexts, called(self._first if needed else []) as ran:
                yield
        finally:
            self._now.demand = outer
        if ran and not demand.met:
            raise RuntimeError(f"{self._name} ran its layers without the modules that hand them the prefix")
        demand.met |= met

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Forwards within the context are those of the frozen model."""
        with self.context(None):
            yield

    @contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """``running`` contexts that are entered within this one tell ``watch`` the prefix's share of the softmax."""
        self._now.watch = watch
        try:
            yield
        finally:
            self._now.watch = None

    @contextmanager
    def context(self, state: PrefixState | Capture | None, bridge: tuple[Any, ...] | None = None) -> Iterator[None]:
        """Forwards of this thread within the context have ``state``."""
        now = self._now
        before = now.state, now.bridge, now.demand, now.outer
        if now.demand is not None:
            now.demand.met = True
        now.state, now.bridge, now.demand, now.outer = state, bridge, None, None
        try:
            yield
        finally:
            now.state, now.bridge, now.demand, now.outer = before

    def _check_served(self, state: PrefixState, slots: list[Slot], *, on_demand: bool) -> None:
        # Not every slot has to ask: an encoder runs once for many steps of its decoder, and layerdrop skips layers.
        ran = [slot for slot in slots if slot.stack in state.entered] or ([] if on_demand else slots)
        left = [slot for slot in ran if slot.module not in state.served and not _drops_layers(slot.stack)]
        if left:
            names = ", ".join(f"{slot.site} {slot.layer}" for slot in left)
            raise RuntimeError(f"{self._name} did not hand the prefix to layers {names}")

    def _listen(self, stacks: Iterable[PreTrainedModel]) -> None:
        """Have hooks on these stacks and on no others."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._stacks = list(stacks)
        for model in self._names:  # first, because a stack may be the whole model
            if any(stack in self._stacks for stack in model.modules()):
                self._hooks.append(model.register_forward_pre_hook(self._hear, with_kwargs=True))
                self._hooks.append(model.register_forward_hook(self._forget, always_call=True))
        for stack in self._stacks:
            self._hooks.append(stack.register_forward_pre_hook(self._inject, with_kwargs=True))
            self._hooks.append(stack.register_forward_hook(self._left))
            if (positions := self.positions[stack].embedding) is not None:
                hook = partial(self._shifted, stack)
                self._hooks.append(positions.register_forward_pre_hook(hook, with_kwargs=True))

    def _hear(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a model around a stack runs: keep what may not reach the stack, unless one around it did."""
        if self._now.state is None and self._now.demand is not None:
            self._now.demand.answer()
        if self._now.state is None or self._now.outer is not None or model not in self._names:
            return
        given = dict(zip(self._names[model], args)) | kwargs
        mask = given.get("attention_mask")
        flat = isinstance(mask, Tensor) and mask.dim() == 2 and "decoder_input_ids" not in self._names[model]
        numbered, reads_ids = (given.get(name) is not None for name in ("position_ids", "input_ids"))
        self._now.outer = model, Outer(mask if flat else None, numbered, reads_ids)

    def _forget(self, model: PreTrainedModel, _: Any, __: Any) -> None:
        """After it ran."""
        if self._now.outer is not None and self._now.outer[0] is model:
            self._now.outer = None

    def _inject(self, stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before ``stack`` runs: add the state, the positions of its tokens and the bridge to its arguments."""
        if self._now.demand is not None:
            self._now.demand.met = True
        state, bridge = self._now.state, self._now.bridge
        weights = kwargs.get("output_attentions", getattr(stack.config, "output_attentions", False))
        if state is None:
            if not weights or STATE in kwargs:  # another model with prefixes of its own runs the stack
                return None
            state = Capture()
            state.weights = True
            return args, kwargs | {STATE: state}
        state.weights = bool(weights)
        state.entered.add(stack)
        if not torch.compiler.is_compiling():
            state.recent.difference_update(*state.sites.get(stack, {}).values())
        if isinstance(state, Capture):
            state.masks_outside |= kwargs.get("attention_mask") is not None
        positions = self.positions[stack]
        _, outer = self._now.outer or (stack, Outer())
        kwargs = dict(zip(positions.names, args)) | kwargs | {STATE: state}
        shift = state.shifts.get(stack, 0)
        longest = state.longest if isinstance(shift, Tensor) else shift
        kwargs |= positions.arguments(kwargs, shift, longest, outer)
        if is_packed(kwargs):  # with a cache transformers would not see where a sequence ends
            if kwargs.get("use_cache"):
                raise ValueError("packed sequences (position_ids that start again) need use_cache=False, got True")
            kwargs["use_cache"] = False
            if not weights and state.watch is None and kwargs["position_ids"].dim() == 2:
                kwargs[PACKED] = Sequences(kwargs["position_ids"])
        if state.starts is not None:
            kwargs[FIRST] = past(kwargs)
        if bridge is not None:
            if kwargs.get("inputs_embeds") is not None:
                kwargs["inputs_embeds"] = Bridge.apply(kwargs["inputs_embeds"], *bridge)
            else:
                bridge_next(stack.get_input_embeddings(), bridge)
        return (), kwargs

    def _left(self, stack: PreTrainedModel, _: Any, __: Any) -> None:
        """After ``stack`` ran: other code may have replaced its attention for some of its calls."""
        state = self._now.state
        if state is None or torch.compiler.is_compiling() or _drops_layers(stack):
            return
        if left := [site for site, modules in state.sites.get(stack, {}).items() if state.recent.isdisjoint(modules)]:
            names = f"{type(stack).__name__} of {self._name}"
            raise RuntimeError(f"no {', '.join(left)} layer of {names} took the prefix: its attention was replaced")

    def _shifted(self, stack: PreTrainedModel, embedding: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before ``stack`` embeds positions: shift them."""
        state = self._now.state
        shift = 0 if state is None else state.shifts.get(stack, 0)
        moves = isinstance(shift, Tensor) or shift != 0
        return (args, shifted(embedding, args, kwargs, shift)) if moves else None

    def _is_reentrant(self) -> bool:
        """Whether the next forward checkpoints with ``use_reentrant=True``."""
        for module in self._checkpointed:
            if module.gradient_checkpointing and module.training:
                function = getattr(module, "_gradient_checkpointing_func", None)
                return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
        return False


class _Demand:
    """What the stacks shall see that run with no state. It is made when the first of them asks."""

    def __init__(self, running: Callable[[], AbstractContextManager[None]]) -> None:
        self._running = running
        self.contexts = ExitStack()
        self.answered = False
        self.met = False

    def answer(self) -> None:
        """Enter the context."""
        self.answered = True
        self.contexts.enter_context(self._running())


class _Now(threading.local):
    """What the forwards of this thread run with. Other threads may run the same model with other prefixes."""

    state: PrefixState | Capture | None = None
    bridge: tuple[Any, ...] | None = None
    demand: _Demand | None = None
    watch: Watch | None = None
    outer: tuple[PreTrainedModel, Outer] | None = None

    def __reduce__(self) -> tuple[type[_Now], tuple[()]]:
        """A copy of the model runs nothing yet."""
        return type(self), ()


def _drops_layers(stack: PreTrainedModel) -> bool:
    return stack.training and bool(getattr(stack, "layerdrop", 0))
