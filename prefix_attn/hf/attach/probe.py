"""Find out on a few tokens whether a model's attention can be served, and what its modules are called with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_attn.hf.attach.attention import MASKED, NAME, AttentionCall, Capture
from prefix_attn.hf.attach.ranks import (
    Behind,
    gathering,
    heads_mesh,
    is_first,
    is_fully_sharded,
    of_all_processes,
    outputs,
)
from prefix_attn.hf.attach.running import Runner
from prefix_attn.hf.attach.slots import Slot, find_slots, is_causal
from prefix_attn.hf.attach.trained import is_read_by_the_first
from prefix_attn.hf.attach.window import Tables
from prefix_attn.hf.attach.wrapper import device_of, evaluating


class Probe:
    """Trial forwards of a model.

    ``reads_text``: the input is token ids. ``has_decoder``: the model is an encoder-decoder. ``masks_outside``: masks
    are made before the stacks are called.
    """

    def __init__(self, base: PreTrainedModel, runner: Runner) -> None:
        """Prepare to run ``base`` through the hooks of ``runner``."""
        self._base, self._runner = base, runner
        self._name = type(base).__name__
        self.reads_text = base.main_input_name == "input_ids"
        self.masks_outside = False
        self._is_spread = False  # whether each process runs some of the heads
        # config.is_encoder_decoder does not tell: an encoder taken out of such a model has it too.
        self.has_decoder = "decoder_input_ids" in inspect.signature(base.forward).parameters

    @torch.no_grad()
    def find_slots(self) -> list[Slot]:
        """Switch the model's attention to ours, and return its slots.

        Raises:
            NotImplementedError: the model does not run, or its outputs are not those of its own attention.
        """
        try:
            # The decoder gets another length than the encoder, which tells cross attention from self-attention.
            ids = [some_ids(e, n) for n, e in enumerate(self.embeddings(), start=3)]
            inputs = self._inputs(*ids)
            self._switch("eager")
            with Tables(*ids) as tables:
                expected = self._forward(inputs, None)
            for stack, positions in self._runner.positions.items():
                if "input_ids" in positions.names:  # the length of a sound is checked by its model
                    positions.limit = tables.positions(stack)
            self._switch(MASKED)
            state = Capture()
            got = self._forward(inputs, state)
            slots = find_slots(self._base, state.calls)
            self.masks_outside = state.masks_outside
            if all(getattr(call.module, "is_causal", True) == is_causal(call) for call in state.calls):
                self._switch(NAME)
                got = self._forward(inputs, Capture())
        except NotImplementedError:
            raise
        except Exception as error:  # the code of five hundred architectures: anything can come out
            raise NotImplementedError(f"{self._name} does not run on a few tokens alone ({error})") from error
        self._check_same(got, expected)
        self._is_spread = any(slot.ranks > 1 for slot in slots)
        return slots

    def capture(self, tokens: Tensor, decoder_ids: Tensor | None = None, *, shift: int = 0) -> list[AttentionCall]:
        """What each attention module is called with for ``tokens``; keys and values are those of all heads.

        The model runs in eval mode: without dropout, and without checkpointing, whose reentrant kind cuts the graph.

        Args:
            tokens: ids (T,), or input embeddings (T, hidden size), which the gradients of keys and values reach.
                Models that read sound get noise instead of ids.
            decoder_ids: for encoder-decoder models.
            shift: the position of the first token, to which keys are rotated.
        """
        state = Capture()
        state.shifts = dict.fromkeys(self._runner.positions, shift)
        needs_grad = tokens.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(needs_grad), outputs(gathering(self._base) if needs_grad else ()) as sharded:
            self._forward(self._inputs(tokens, decoder_ids), state)
        return [self._of_all_heads(call, sharded) for call in state.calls]

    def kv(self, slots: Iterable[Slot], tokens: Tensor, decoder_ids: Tensor | None = None) -> Tensor:
        """The captured keys and values as a prefix (2 * slots, H, T, D): slot i has its key at 2 * i, its value next.

        Arguments are those of ``capture``.
        """
        calls = {call.module: call for call in self.capture(tokens, decoder_ids)}
        slots = list(slots)
        if any(slot.module not in calls for slot in slots):
            raise RuntimeError(f"not every layer of {self._name} took the prefix: its attention was replaced")
        pairs = [(calls[slot.module].key, calls[slot.module].value) for slot in slots]
        length = min(key.shape[2] for key, _ in pairs)  # an encoder of sound has a length of its own
        return torch.stack([t[0, :, :length] for pair in pairs for t in pair])

    def embeddings(self) -> list[nn.Module]:
        """The input embeddings of the model, and those of its decoder if that has its own input."""
        own = self._base.get_input_embeddings()
        return [own, self._base.get_decoder().get_input_embeddings()] if self.has_decoder else [own]

    def embed(self, module: nn.Module, ids: Tensor) -> Tensor:
        """The input embeddings (T, hidden size) of ``ids``, which ``module``, one of ``embeddings``, makes."""
        if not is_fully_sharded(self._base):
            return module(ids)
        with outputs([module]) as made:
            self._forward(self._inputs(ids, ids if self.has_decoder else None), None)
        return made[module][0]

    def _of_all_heads(self, call: AttentionCall, sharded: Mapping[nn.Module, Tensor]) -> AttentionCall:
        pair = call.key, call.value
        if self._is_spread:
            pair = tuple(of_all_processes(t, 1, heads_mesh(call.module)) for t in pair)
        around = [out for module, out in sharded.items() if out.requires_grad and call.module in set(module.modules())]
        for out in around[:1]:  # the innermost one ended first
            pair = tuple(Behind.apply(t, out) for t in pair)
        return call._replace(key=pair[0], value=pair[1])

    def _forward(self, inputs: dict[str, Tensor], state: Capture | None) -> Tensor:
        """The last hidden states in eval mode. The model's head is not run, unless FSDP2 needs that."""
        inner = self._base.base_model
        with evaluating(self._base), self._runner.context(state):
            if not is_fully_sharded(self._base):
                return inner(**inputs, use_cache=False)[0]
            with outputs([inner]) as made:
                self._base(**inputs, use_cache=False)
            return made[inner]

    def _inputs(self, tokens: Tensor, decoder_ids: Tensor | None = None) -> dict[str, Tensor]:
        device = device_of(self._base.get_input_embeddings())
        name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
        inputs = {name: tokens[None].to(device)} if self.reads_text else {"input_features": self._noise()}
        return inputs if decoder_ids is None else inputs | {"decoder_input_ids": decoder_ids[None].to(device)}

    def _noise(self) -> Tensor:
        """(1, bins, frames) features of a sound, in the one length that Whisper accepts."""
        config = self._base.config
        sound = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
        return sound.to(device_of(self._base.get_input_embeddings()), self._base.dtype)

    def _switch(self, name: str) -> None:
        """Select the attention function ``name``, also in stacks that have a copy of the configuration."""
        self._base.set_attn_implementation(name)
        for stack in self._runner.positions:
            if stack.config._attn_implementation != name and stack._can_set_attn_implementation():
                stack.set_attn_implementation(name)

    def _check_same(self, got: Tensor, expected: Tensor) -> None:
        if is_read_by_the_first(self._base) and not is_first():
            return  # its weights are still to come
        finite = expected.isfinite()
        error, size = (t[finite].float().norm().item() for t in (got - expected, expected))
        if not error <= size * (1e-2 if self._is_exact(expected) else 0.2):
            raise NotImplementedError(
                f"{self._name} computes something else through transformers' AttentionInterface than with its own "
                f"attention (relative difference {error / size:.1g}): its masks or positions mean other things"
            )

    def _is_exact(self, output: Tensor) -> bool:
        """Whether everything is computed in float32 or better: no half precision, no quantised weights."""
        plain = all(
            (type(p.data) is Tensor or hasattr(p, "full_tensor")) and p.is_floating_point()
            for p in self._base.parameters()
        )
        return plain and output.dtype.itemsize >= 4


def check_class(base: PreTrainedModel) -> None:
    """Refuse what no forward is needed to find out.

    Raises:
        NotImplementedError: the model's attention cannot be switched, or its input is neither text nor sound.
    """
    name = type(base).__name__
    if not base._can_set_attn_implementation():
        raise NotImplementedError(
            f"{name} computes attention outside transformers' AttentionInterface: no prefix can enter it"
        )
    sound = base.main_input_name == "input_features" and hasattr(base.config, "num_mel_bins")
    if not (base.main_input_name == "input_ids" or sound):
        raise NotImplementedError(
            f"{name} reads {base.main_input_name}; this version serves models of text, of text with images, and Whisper"
        )


def some_ids(embeddings: nn.Module, length: int) -> Tensor:
    """Different ids from the middle of the vocabulary; special tokens are usually at its ends."""
    assert isinstance(embeddings.weight, Tensor)
    return embeddings.weight.shape[0] // 2 + torch.arange(length)
