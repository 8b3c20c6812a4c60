"""Make a transformers model ready for prefixes, and undo it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefix_attn.hf.attach.layout import Resolver
from prefix_attn.hf.attach.probe import Probe, check_class
from prefix_attn.hf.attach.ranks import gathering
from prefix_attn.hf.attach.running import Runner
from prefix_attn.hf.attach.slots import Slot
from prefix_attn.hf.attach.trained import freeze, keep_differentiable
from prefix_attn.hf.attach.wrapper import check_base

ATTACHMENTS = "prefix_attn_attachments"  # the attribute of a base model: its attachments, oldest first


class Attachment:
    """A model whose attention goes through ours.

    ``probe`` runs the model on a few tokens, ``resolver`` checks configurations and lays out their prefixes, and
    ``runner`` has the contexts in which forwards see a prefix.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        """Attach to ``base``.

        Raises:
            TypeError: ``base`` is no bare transformers model.
            NotImplementedError: its attention cannot be served. It is unchanged then.
        """
        check_base(base)
        check_class(base)
        self.base = base
        self._configs = [
            (module, name, value)
            for module in base.modules()
            for name, value in vars(module).items()
            if isinstance(value, PreTrainedConfig)
        ]
        # The attention function's name is written there, and other models may be built from the same object.
        copies: dict[int, Any] = {}
        for module, name, config in self._configs:
            setattr(module, name, copy.deepcopy(config, copies))
        self._trained: dict[nn.Parameter, bool] = {}  # whether parameters were, if that may change
        self._all = vars(_inner(base)).setdefault(ATTACHMENTS, [])
        self._all.append(self)
        keep_differentiable(base)  # before the probe runs it
        self.runner = Runner(base)
        self.probe = Probe(base, self.runner)
        try:
            slots = self.probe.find_slots()
            self.runner.keep(slots)
            self._leave_others(slots)
        except Exception:
            self.remove()
            raise
        self.resolver = Resolver(base, slots, self.runner.positions, has_decoder=self.probe.has_decoder)

    def freeze(self) -> None:
        """Freeze what nobody chose to train of the model; ``remove`` undoes that, and what prefixes freeze later."""
        for module in gathering(self.base):  # what is frozen are the shards, whatever ran before
            module.reshard()
        self._trained = {parameter: parameter.requires_grad for parameter in self.base.parameters()}
        freeze(self.base)

    def _leave_others(self, slots: Iterable[Slot]) -> None:
        """Give what no prefix enters its own attention back, such as a vision tower."""
        stacks = {slot.stack for slot in slots}
        models = [module for module in self.base.modules() if isinstance(module, PreTrainedModel)]
        ours = {id(model.config) for model in models if not stacks.isdisjoint(model.modules())}
        for module, name, original in self._configs:
            config = getattr(module, name)
            if module in models and id(config) not in ours:
                config._attn_implementation = original._attn_implementation

    def remove(self) -> None:
        """Restore ``base`` as it was, when no other attachment to it is left. A second call does nothing."""
        if self not in self._all:
            return
        self.runner.remove()
        later = self._all[self._all.index(self) + 1 :]
        self._all.remove(self)
        if later:  # what they found is what this one made
            later[0].restores(self._configs, self._trained)
            return
        for module, name, config in self._configs:
            setattr(module, name, config)
        for parameter, trained in self._trained.items():
            parameter.requires_grad_(trained)

    def restores(self, configs: list[tuple[nn.Module, str, PreTrainedConfig]], trained: dict[Any, bool]) -> None:
        """Have ``remove`` restore these configurations, and what was trained: an earlier attachment is gone."""
        self._configs, self._trained = configs, self._trained | trained


def _inner(base: nn.Module) -> nn.Module:
    """``base``, or the model within it if it is torch.compile's."""
    return getattr(base, "_orig_mod", base)
