"""A frozen transformers model made ready for prefixes."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from prefix_attn.hf.attach.attention import FIRST, MASKED, NAME, STATE, Call, Capture, PrefixState, Watch
from prefix_attn.hf.attach.banks import Rows
from prefix_attn.hf.attach.gradient_checkpointing import Bridge, bridge_next
from prefix_attn.hf.attach.positions import Positions, is_packed, past, shifted
from prefix_attn.hf.attach.slots import Slot, find_slots, find_stacks, is_causal
from prefix_attn.hf.attach.task_heads import find_heads, task_of
from prefix_attn.hf.attach.wrapper import device_of, evaluating
from prefix_attn.hf.config import SITES, PrefixConfig


class Layout(NamedTuple):
    """The slots of one prefix, in the order of its keys and values, and what these have in common."""

    slots: list[Slot]
    heads: int
    head_dim: int

    @property
    def shifted(self) -> dict[PreTrainedModel, None]:
        """The stacks whose own tokens a prefix comes before."""
        return dict.fromkeys(slot.stack for slot in self.slots if slot.site != "cross")


class Attachment:
    """``base``, frozen, its attention routed through ours: the way for a prefix into each of its layers."""

    def __init__(self, base: PreTrainedModel) -> None:
        """Attach.

        Raises:
            NotImplementedError: the model's attention cannot be served; ``base`` is unchanged then.
        """
        self.base = base
        self._name = type(base).__name__
        self._now = _Now()
        if not base._can_set_attn_implementation():
            raise NotImplementedError(
                f"{self._name} computes attention outside transformers' AttentionInterface: no prefix can enter it"
            )
        sound = base.main_input_name == "input_features" and hasattr(base.config, "num_mel_bins")
        if not (self.reads_text or sound):
            raise NotImplementedError(
                f"{self._name} reads {base.main_input_name}; this version serves models of text, and Whisper"
            )
        models = [module for module in base.modules() if isinstance(module, PreTrainedModel)]
        self._before = [(model.config, model.config._attn_implementation) for model in models]
        self._trainable = [p.requires_grad for p in base.parameters()]
        self._positions = {stack: Positions(stack) for stack in find_stacks(base)}
        self._hooks: list[RemovableHandle] = []
        # Not by the configuration: its is_encoder_decoder is also that of an encoder taken out of such a model.
        self.has_decoder = "decoder_input_ids" in inspect.signature(base.forward).parameters
        try:
            self._slots = self._probe()
        except Exception:
            self.remove()
            raise
        for slot in self._slots:
            if slot.site != "cross":
                self._positions[slot.stack].add(slot.module)
        base.requires_grad_(False)
        self._checkpointed = [m for m in base.modules() if hasattr(m, "gradient_checkpointing")]

    def remove(self) -> None:
        """Leave ``base`` as it was."""
        self._listen([])
        for config, implementation in self._before:
            config._attn_implementation = implementation
        for parameter, flag in zip(self.base.parameters(), self._trainable):
            parameter.requires_grad_(flag)

    def resolve(self, config: PrefixConfig) -> PrefixConfig:
        """A copy of ``config`` with this model's defaults where it says None.

        Raises:
            NotImplementedError: sites that the model does not have, or positions that it does not let us shift.
            ValueError: layers or heads that it does not have.
        """
        sites = config.sites
        if sites is None:
            sites = SITES if self.has_decoder else [s for s in SITES if any(s == slot.site for slot in self._slots)]
        task, heads = config.task_type or task_of(self.base, self.has_decoder), find_heads(self.base)
        chosen = config.modules_to_save
        if chosen is None:
            chosen = heads if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else ()
        if unknown := sorted(set(chosen) - set(heads)):
            raise ValueError(f"modules_to_save: {self._name} has no head {unknown}; its heads are {list(heads)}")
        config = replace(
            config,
            sites=sites,
            task_type=task,
            modules_to_save=tuple(chosen),
            base_model_name_or_path=config.base_model_name_or_path or self.base.config._name_or_path or None,
        )
        fixed = self.fixed(config)
        if config.position_mode == "shift" and fixed:
            raise NotImplementedError(
                f"position_mode='shift': {type(fixed[0]).__name__} of {self._name} numbers its tokens where nothing "
                "can move them; position_mode='none' works"
            )
        if config.mode == "embedding" and any(slot.site != "decoder" for slot in self.layout(config).slots):
            raise NotImplementedError(f"mode='embedding': {self._name} is not causal; see PrefixTuning")
        if config.mode == "infix" and (self.has_decoder or not self.base.can_generate()):
            raise NotImplementedError(
                f"mode='infix': {self._name} has no sequence of input and output between which an infix could stand"
            )
        if config.gate is not None and len({slot.query_heads for slot in self.layout(config).slots}) > 1:
            raise NotImplementedError(f"gate: {self._name} has layers with different numbers of query heads")
        stays = self.has_decoder or fixed or config.gate is not None or config.mode == "infix"
        default = "none" if stays else "shift"
        return replace(config, position_mode=config.position_mode or default)

    def fixed(self, config: PrefixConfig) -> list[PreTrainedModel]:
        """The stacks that a prefix enters, and whose tokens cannot be moved behind it."""
        return [stack for stack in self.layout(config).shifted if not self._positions[stack].can_shift]

    def layout(self, config: PrefixConfig) -> Layout:
        """What a prefix of the resolved ``config`` consists of."""
        assert config.sites is not None
        slots = [slot for slot in self._slots if slot.site in config.sites]
        if missing := set(config.sites) - {slot.site for slot in slots}:
            here = sorted({slot.site for slot in self._slots}, key=SITES.index)
            raise NotImplementedError(f"{self._name} has no attention at sites {sorted(missing)}, but at {here}")
        if config.layers != "all":
            if unknown := set(config.layers) - {slot.layer for slot in slots}:
                last = max(slot.layer for slot in slots)
                raise ValueError(f"layers must lie in 0..{last} for {self._name}, got {sorted(unknown)}")
            slots = [slot for slot in slots if slot.layer in config.layers]
        sizes = {(slot.heads, slot.head_dim) for slot in slots}
        if len(sizes) > 1:
            raise NotImplementedError(
                f"{self._name} has layers of different (key/value heads, head size): {sorted(sizes)}; a prefix needs "
                "sites and layers of one"
            )
        return Layout(slots, *sizes.pop())

    @contextmanager
    def running(
        self,
        kv: Tensor,
        config: PrefixConfig,
        rows: Rows | None = None,
        gates: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Iterator[None]:
        """Forwards of ``base`` within the context attend to prefixes.

        Args:
            kv: a prefix (2 * slots, H, P, D), or a bank (N, 2 * slots, H, P, D).
            config: of the prefix, resolved; of any in a bank.
            rows: of a bank.
            gates: (slots, Hq), or of a bank (N, slots, Hq).
            starts: (B,) int64, the first column of each row that sees an infix.

        Raises:
            RuntimeError: on leaving, if a slot of a stack that ran did not ask for it. There is no silent "no prefix".
        """
        bridge = None
        made = [kv] if gates is None else [kv, gates]
        if torch.is_grad_enabled() and any(t.requires_grad for t in made) and self._is_reentrant():
            leaves = [t.detach().requires_grad_() for t in made]
            (kv, *rest), bridge = leaves, (leaves, *made)
            gates = rest[0] if rest else None
        layout = self.layout(config)
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
        with self._set(state, bridge):
            yield
        # Only what ran is due: an encoder runs once for many steps of its decoder, and layerdrop leaves layers out.
        ran = [slot for slot in layout.slots if slot.stack in state.entered] or layout.slots
        left = [slot for slot in ran if slot.module not in state.served and not _drops_layers(slot.stack)]
        if left:
            names = ", ".join(f"{slot.site} {slot.layer}" for slot in left)
            raise RuntimeError(f"{self._name} did not hand the prefix to layers {names}")

    @contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """Forwards that enter ``running`` within the context tell ``watch`` what share of the softmax prefixes get."""
        self._now.watch = watch
        try:
            yield
        finally:
            self._now.watch = None

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Forwards of ``base`` within the context are those of the frozen model."""
        with self._set(None, None):
            yield

    def capture(self, tokens: Tensor, decoder_ids: Tensor | None = None, *, shift: int = 0) -> list[Call]:
        """What each attention module is called with for these tokens: keys are rotated to positions from ``shift`` on.

        ``tokens`` are ids (T,), or input embeddings (T, hidden size), which the gradients of keys and values reach.
        ``decoder_ids`` are for encoder-decoder models. Models that read sound get noise for ids. The model is in eval
        mode meanwhile: no dropout, and no checkpointing, whose reentrant kind would cut the graph.
        """
        state = Capture()
        state.shifts = dict.fromkeys(self._positions, shift)
        with torch.set_grad_enabled(tokens.requires_grad and torch.is_grad_enabled()):
            self._forward(self._inputs(tokens, decoder_ids), state)
        return state.calls

    def kv(self, slots: Iterable[Slot], tokens: Tensor, decoder_ids: Tensor | None = None) -> Tensor:
        """What ``capture`` gives, as a prefix: (2 * slots, H, T, D), key and value of slot i at 2 * i and 2 * i + 1."""
        calls = {call.module: call for call in self.capture(tokens, decoder_ids)}
        pairs = [(calls[slot.module].key, calls[slot.module].value) for slot in slots]
        length = min(key.shape[2] for key, _ in pairs)  # an encoder of sound has a length of its own
        return torch.stack([t[0, :, :length] for pair in pairs for t in pair])

    @property
    def reads_text(self) -> bool:
        """Whether the input is token ids."""
        return self.base.main_input_name == "input_ids"

    @property
    def decoder_layers(self) -> int:
        """The number of layers of causal self-attention."""
        return sum(slot.site == "decoder" for slot in self._slots)

    def embeddings(self) -> list[nn.Module]:
        """The input embeddings of the model, and of its decoder where that has its own input."""
        own = self.base.get_input_embeddings()
        return [own, self.base.get_decoder().get_input_embeddings()] if self.has_decoder else [own]

    @contextmanager
    def _set(self, state: PrefixState | Capture | None, bridge: tuple[Any, ...] | None) -> Iterator[None]:
        before = self._now.state, self._now.bridge
        self._now.state, self._now.bridge = state, bridge
        try:
            yield
        finally:
            self._now.state, self._now.bridge = before

    @torch.no_grad()
    def _probe(self) -> list[Slot]:
        """The slots of ``base``, whose attention is ours from here on, and gives what its own gave."""
        self._listen(self._positions)
        try:
            # Another length for the decoder: this is how cross attention is known.
            given = self._inputs(*(some_ids(e, n) for n, e in enumerate(self.embeddings(), start=3)))
            self._switch("eager")
            expected = self._forward(given, None)
            self._switch(MASKED)
            state = Capture()
            got = self._forward(given, state)
            slots = find_slots(self.base, state.calls)
            if all(getattr(call.module, "is_causal", True) == is_causal(call) for call in state.calls):
                self._switch(NAME)
                got = self._forward(given, Capture())
        except NotImplementedError:
            raise
        except Exception as error:  # the code of five hundred architectures: anything can come out
            raise NotImplementedError(f"{self._name} does not run on a few tokens alone ({error})") from error
        finite = expected.isfinite()
        error, size = (t[finite].float().norm().item() for t in (got - expected, expected))
        if not error <= size * (1e-2 if self._is_exact(expected) else 0.2):
            raise NotImplementedError(
                f"{self._name} computes something else through transformers' AttentionInterface than with its own "
                f"attention (relative difference {error / size:.1g}): its masks or positions mean other things"
            )
        self._listen(dict.fromkeys(slot.stack for slot in slots))
        return slots

    def _is_exact(self, output: Tensor) -> bool:
        """Whether nothing rounds to fewer bits than float32: no half precision, and no weights that are quantised."""
        plain = all(type(p.data) is Tensor and p.is_floating_point() for p in self.base.parameters())
        return plain and output.dtype.itemsize >= 4

    def _forward(self, given: dict[str, Tensor], state: Capture | None) -> Tensor:
        """The last hidden states of ``base`` in eval mode; a head would have nothing to say."""
        with evaluating(self.base), self._set(state, None):
            return self.base.base_model(**given, use_cache=False)[0]

    def _inputs(self, tokens: Tensor, decoder_ids: Tensor | None = None) -> dict[str, Tensor]:
        device = device_of(self.base.get_input_embeddings())
        name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
        given = {name: tokens[None].to(device)} if self.reads_text else {"input_features": self._noise()}
        return given if decoder_ids is None else given | {"decoder_input_ids": decoder_ids[None].to(device)}

    def _switch(self, name: str) -> None:
        """Route attention through our function; a stack with its own copy of the configuration must be told itself."""
        self.base.set_attn_implementation(name)
        for stack in self._positions:
            if stack.config._attn_implementation != name and stack._can_set_attn_implementation():
                stack.set_attn_implementation(name)

    def _listen(self, stacks: Iterable[PreTrainedModel]) -> None:
        """Enter these stacks, and no others."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for stack in stacks:
            self._hooks.append(stack.register_forward_pre_hook(self._inject, with_kwargs=True))
            if (positions := self._positions[stack].embedding) is not None:
                hook = partial(self._shifted, stack)
                self._hooks.append(positions.register_forward_pre_hook(hook, with_kwargs=True))

    def _inject(self, stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before ``stack`` runs: hand it the state, the positions of its tokens and the bridge."""
        state, bridge = self._now.state, self._now.bridge
        weights = kwargs.get("output_attentions", getattr(stack.config, "output_attentions", False))
        if state is None:
            if not weights:
                return None
            state = Capture()
            state.weights = True
            return args, kwargs | {STATE: state}
        state.weights = bool(weights)
        state.entered.add(stack)
        positions = self._positions[stack]
        kwargs = dict(zip(positions.names, args)) | kwargs | {STATE: state}
        kwargs |= positions.arguments(kwargs, state.shifts.get(stack, 0))
        if is_packed(kwargs):  # with a cache transformers would not see where a sequence ends
            if kwargs.get("use_cache"):
                raise ValueError("packed sequences (position_ids that start again) need use_cache=False, got True")
            kwargs["use_cache"] = False
        if state.starts is not None:
            kwargs[FIRST] = past(kwargs)
        if bridge is not None:
            if kwargs.get("inputs_embeds") is not None:
                kwargs["inputs_embeds"] = Bridge.apply(kwargs["inputs_embeds"], *bridge)
            else:
                bridge_next(stack.get_input_embeddings(), bridge)
        return (), kwargs

    def _shifted(self, stack: PreTrainedModel, embedding: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before ``stack`` embeds positions."""
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

    def _noise(self) -> Tensor:
        """(1, bins, frames) features of a sound, as long as Whisper wants all of them to be."""
        config = self.base.config
        sound = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
        return sound.to(device_of(self.base.get_input_embeddings()), self.base.dtype)


class _Now(threading.local):
    """What the forwards of this thread run with: others may run the same model with other prefixes meanwhile."""

    state: PrefixState | Capture | None = None
    bridge: tuple[Any, ...] | None = None
    watch: Watch | None = None

    def __reduce__(self) -> tuple[type[_Now], tuple[()]]:
        """A copy of the model runs nothing yet."""
        return type(self), ()


def some_ids(embeddings: nn.Module, length: int) -> Tensor:
    """Different ids from the middle of the vocabulary: padding and other special ones are at its ends."""
    assert isinstance(embeddings.weight, Tensor)
    return embeddings.weight.shape[0] // 2 + torch.arange(length)


def _drops_layers(stack: PreTrainedModel) -> bool:
    return stack.training and bool(getattr(stack, "layerdrop", 0))
