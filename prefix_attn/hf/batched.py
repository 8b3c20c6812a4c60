"""Named prefixes in transformers' continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefix_attn.hf.attach.continuous import bank_of, generate_batch
from prefix_attn.hf.peft_words import PeftWords

if TYPE_CHECKING:
    from transformers import GenerationConfig


class Batched(PeftWords):
    """Named prefixes, each for some of the requests that are answered together."""

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: Any = None,
        *,
        prefix_names: Sequence[str | None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The base model's generate_batch: transformers' continuous batching, with a prefix for each request.

        Args:
            inputs: the tokens of each prompt, without padding.
            generation_config: default: the model's own.
            continuous_batching_config: transformers' ContinuousBatchingConfig. The prefixes take none of its pages.
                Requests share blocks only where all have one prefix.
            prefix_names: the prefix of each request, None = no prefix. Default: the active one for all.
            options: max_new_tokens, record_timestamps, and ``progress``, which is called with 1 after each request.

        Returns:
            Transformers' GenerationOutput of each request, in the order of ``inputs``.

        Raises:
            NotImplementedError: the installed transformers takes no attention function of others
                (5.17 does), or a prefix is an infix.
            RuntimeError: the engine failed.
            ValueError: unknown names.
        """
        names = [self.active_prefix] * len(inputs) if prefix_names is None else list(prefix_names)
        if isinstance(prefix_names, str) or len(names) != len(inputs):
            raise ValueError(f"prefix_names must be a list with a name, or None, for each of {len(inputs)} inputs")
        if self._disabled:
            names = [None] * len(inputs)
        found = {name: self.find_prefix(name) for name in names if name is not None}
        self.check_together(list(found))
        layouts = [self.attachment.resolver.layout(config) for _, config in found.values()]
        bank = bank_of(found, layouts[0], self.device) if found else None
        given = {"generation_config": generation_config, "continuous_batching_config": continuous_batching_config}
        limits = [stack.limit for stack in self.attachment.runner.positions.values() if stack.limit is not None]
        shifts = [0 if name is None else found[name][1].shift for name in names]
        rooms = [min(limits) - shift for shift in shifts] if limits else ()
        return generate_batch(self._base(), bank, inputs, names, rooms=rooms, **given, **options)
