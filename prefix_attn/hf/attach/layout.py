"""Which slots of a model a prefix has, and what a configuration's open fields become on that model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from prefix_attn.hf.attach.positions import Positions
from prefix_attn.hf.attach.slots import Slot
from prefix_attn.hf.attach.task_heads import default_task_heads, find_task_heads, task_of
from prefix_attn.hf.config import SHOWN_FIELDS, SITES, UNSHOWN_FIELDS, PrefixConfig


class Layout(NamedTuple):
    """The slots of one prefix, in the order of its keys and values.

    ``heads`` and ``head_dim`` are those of the keys and values in all of these slots.
    """

    config: PrefixConfig
    slots: list[Slot]
    heads: int
    head_dim: int

    @property
    def shifted(self) -> dict[PreTrainedModel, None]:
        """The stacks whose own tokens come after the prefix."""
        return dict.fromkeys(slot.stack for slot in self.slots if slot.site != "cross")


class Resolver:
    """Checks configurations against one model, fills in their defaults and lays out their prefixes."""

    def __init__(
        self,
        base: PreTrainedModel,
        slots: Sequence[Slot],
        positions: Mapping[PreTrainedModel, Positions],
        *,
        has_decoder: bool,
    ) -> None:
        """Resolve for ``base``, whose stacks number their tokens as ``positions`` says."""
        self._base = base
        self._name = type(base).__name__
        self._slots = slots
        self._positions = positions
        self._has_decoder = has_decoder

    @property
    def decoder_layers(self) -> int:
        """The number of layers with causal self-attention."""
        return sum(slot.site == "decoder" for slot in self._slots)

    def resolve(self, config: PrefixConfig) -> PrefixConfig:
        """A copy of ``config`` in which the model's defaults replace None.

        Raises:
            NotImplementedError: the model lacks the sites or the mode, or its positions cannot be
                shifted.
            ValueError: the model lacks the layers or the task heads.
        """
        task = config.task_type or task_of(self._base, self._has_decoder)
        config = replace(
            config,
            sites=self._sites(config),
            task_type=task,
            modules_to_save=self._modules_to_save(config),
            base_model_name_or_path=config.base_model_name_or_path or self._base.config._name_or_path or None,
        )
        layout = self.layout(config)
        self._check_shift(config)
        self._check_mode(layout)
        self._check_gate(layout)
        return replace(config, position_mode=config.position_mode or self._default_position_mode(config))

    def unshown(self, config: PrefixConfig) -> dict[str, Any]:
        """The fields of a resolved ``config`` that neither the shapes of its parameters nor the model would tell."""
        told = {n: v for n, v in config.to_dict().items() if n in SHOWN_FIELDS}
        try:
            default = self.resolve(PrefixConfig.from_dict(told)).to_dict()
        except (NotImplementedError, ValueError):  # the model has no default: its layers differ, say
            default = {}
        return {n: v for n, v in config.to_dict().items() if n in UNSHOWN_FIELDS and v != default.get(n)}

    def unshiftable(self, config: PrefixConfig) -> list[PreTrainedModel]:
        """The stacks that a prefix enters and whose tokens cannot be moved behind it."""
        return [stack for stack in self.layout(config).shifted if not self._positions[stack].can_shift]

    def layout(self, config: PrefixConfig) -> Layout:
        """The slots of a prefix; ``config`` must be resolved."""
        slots = self._in_layers(self._at_sites(config), config)
        sizes = {(slot.heads, slot.head_dim) for slot in slots}
        if len(sizes) > 1:
            raise NotImplementedError(
                f"{self._name} has layers of different (key/value heads, head size): {sorted(sizes)}; a prefix needs "
                "sites and layers of one"
            )
        return Layout(config, slots, *sizes.pop())

    def _at_sites(self, config: PrefixConfig) -> list[Slot]:
        assert config.sites is not None
        slots = [slot for slot in self._slots if slot.site in config.sites]
        if missing := set(config.sites) - {slot.site for slot in slots}:
            here = sorted({slot.site for slot in self._slots}, key=SITES.index)
            raise NotImplementedError(f"{self._name} has no attention at sites {sorted(missing)}, but at {here}")
        return slots

    def _in_layers(self, slots: list[Slot], config: PrefixConfig) -> list[Slot]:
        if config.layers == "all":
            return slots
        if unknown := set(config.layers) - {slot.layer for slot in slots}:
            last = max(slot.layer for slot in slots)
            raise ValueError(f"layers must lie in 0..{last} for {self._name}, got {sorted(unknown)}")
        return [slot for slot in slots if slot.layer in config.layers]

    def _sites(self, config: PrefixConfig) -> Sequence[str]:
        if config.sites is not None:
            return config.sites
        return SITES if self._has_decoder else [s for s in SITES if any(s == slot.site for slot in self._slots)]

    def _modules_to_save(self, config: PrefixConfig) -> tuple[str, ...]:
        task_heads, chosen = find_task_heads(self._base), config.modules_to_save
        if chosen is None:
            chosen = default_task_heads(self._base)
        if unknown := sorted(set(chosen) - set(task_heads)):
            raise ValueError(f"modules_to_save: {self._name} has no head {unknown}; its heads are {list(task_heads)}")
        return tuple(chosen)

    def _check_shift(self, config: PrefixConfig) -> None:
        stacks = self.unshiftable(config)
        if config.position_mode == "shift" and stacks:
            raise NotImplementedError(
                f"position_mode='shift': {type(stacks[0]).__name__} of {self._name} numbers its tokens where nothing "
                "can move them; position_mode='none' works"
            )

    def _check_mode(self, layout: Layout) -> None:
        mode = layout.config.mode
        if mode == "embedding" and any(slot.site != "decoder" for slot in layout.slots):
            raise NotImplementedError(f"mode='embedding': {self._name} is not causal; see PrefixTuning")
        if mode == "infix" and (self._has_decoder or not self._base.can_generate()):
            raise NotImplementedError(
                f"mode='infix': {self._name} has no sequence of input and output between which an infix could stand"
            )

    def _check_gate(self, layout: Layout) -> None:
        if layout.config.gate is not None and len({slot.query_heads for slot in layout.slots}) > 1:
            raise NotImplementedError(f"gate: {self._name} has layers with different numbers of query heads")

    def _default_position_mode(self, config: PrefixConfig) -> str:
        """Shift as PEFT does, unless the model or the kind of prefix needs its tokens where they are."""
        in_place = self._has_decoder or config.gate is not None or config.mode == "infix" or self.unshiftable(config)
        return "none" if in_place else "shift"
