"""A conversation with a model: answers appear as they are written, and what was read before is not read again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from prefix_attn.hf.attach.wrapper import evaluating
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.examples import Message
from prefix_attn.training.generate import Generator, inputs_of
from prefix_attn.training.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Read(NamedTuple):
    """What the model has read: its tokens, and their keys and values."""

    ids: list[int]
    cache: Any


class Conversation:
    """A conversation through the tokenizer's chat template, or single turns through a template of text.

    Keys and values of earlier turns are kept while their tokens stay the same, for models whose prefixes are not among
    them (mode "kv").

    Attributes:
        messages: what was said. Empty for a template of text.
        cut: how many answers did not see all of it, because the model has too few positions.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, prompt: Prompt, **decoding: Any) -> None:
        """Arguments and errors are those of ``Generator``."""
        self._generator = Generator(model, tokenizer, prompt=prompt, batch_size=1, **decoding)
        is_kv = isinstance(model, PrefixModel) and all(c.mode == "kv" for c in model.prefix_configs.values())
        self._keeps = prompt.is_chat and is_kv
        self.reset()

    @property
    def cut(self) -> int:
        """See the class."""
        return self._generator.cut

    def reset(self) -> None:
        """Forget what was said."""
        self.messages: list[Message] = []
        self._read: _Read | None = None

    def answer(
        self, text: str, show: Callable[[str], object] = lambda piece: None, stopped: Callable[[], bool] = lambda: False
    ) -> str:
        """Say ``text``, and get the answer, which becomes part of the conversation.

        Args:
            text: the user's message.
            show: called with each piece of the answer.
            stopped: asked after each token whether the answer is to end there.

        Raises:
            ValueError: the message does not fit into the model, or the chat template refuses it.
        """
        generator, model = self._generator, self._generator.model
        messages = [*self.messages, {"role": "user", "content": text}]
        source = messages if generator.prompt.is_chat else text
        ids, shown = generator.prompt_ids(source), _Shown(generator, show)
        options = generator.options([generator.seed_of(source)])
        known, self._read = self._read, None  # an interrupt would leave half of a token in it
        if known is not None and ids[: len(known.ids)] == known.ids and len(known.ids) < len(ids):
            options["past_key_values"] = known.cache
        with evaluating(model), torch.no_grad():
            found = model.generate(
                **inputs_of(model, generator.tokenizer.pad_token_id, [ids]),
                **options,
                streamer=shown,
                stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]),
                return_dict_in_generate=True,
            )
        sequence = found.sequences[0]
        answer = generator.text_of(sequence[1 if model.config.is_encoder_decoder else len(ids) :])
        show(answer[len(shown.text) :])
        if generator.prompt.is_chat:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        if self._keeps:
            length = found.past_key_values.get_seq_length()
            self._read = _Read(sequence[:length].tolist(), found.past_key_values)
        return answer


class _Shown(TextStreamer):
    """Hands on the text of an output as it grows, but not what may be the beginning of a stop text."""

    def __init__(self, generator: Generator, show: Callable[[str], object]) -> None:
        super().__init__(generator.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._generator, self._show, self._whole, self.text = generator, show, "", ""

    def put(self, value: Tensor) -> None:
        """Leave out what ends an output: not all tokenizers know it as a special token."""
        if self.next_tokens_are_prompt or value.item() not in self._generator.stop_ids:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._whole += text
        decoding = self._generator.decoding
        known = decoding.until_stop(self._generator.written(self._whole))
        held = max(
            (n for stop in decoding.stop for n in range(1, len(stop)) if known.endswith(stop[:n])),
            default=0,
        )
        ready = known[: len(known) - held]
        if len(ready) > len(self.text) and ready.startswith(self.text):
            self._show(ready[len(self.text) :])
            self.text = ready


class _Stopped(StoppingCriteria):
    """Ends an output when ``stopped`` says so."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self._stopped(), device=input_ids.device)
