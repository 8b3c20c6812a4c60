"""Generate text with a model: greedily, by beams or by sampling, in batches that fit into memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefix_attn.hf.attach.wrapper import device_of, evaluating
from prefix_attn.training.chat import Chat
from prefix_attn.training.decoding import Decoding
from prefix_attn.training.examples import Message
from prefix_attn.training.head import can_leave_out_logits
from prefix_attn.training.positions import check_new_tokens, room_for_rows, taken_by_prefix
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.tokens import DEFAULT, prompt_ids, shortened, source_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = str | Sequence[Message]
MOST_ROWS = {"cpu": 16, "cuda": 64}  # of a batch that is chosen; more gain little
FEW_TOKENS = 4096  # of a batch: reading its padding costs less than another batch
_log = logging.getLogger(__name__)


def warpers(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None = None
) -> LogitsProcessorList:
    """What changes logits before a token is drawn, in the order of transformers. None changes nothing."""
    found = LogitsProcessorList()
    if temperature is not None and temperature != 1:
        found.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        found.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p != 1:
        found.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        found.append(MinPLogitsWarper(min_p))
    return found


def drawing(decoding: Decoding, seeds: Sequence[int]) -> LogitsProcessorList:
    """Draws a token for each row, whose draws have these ``seeds``."""
    found = warpers(decoding.temperature, decoding.top_k, decoding.top_p)
    return LogitsProcessorList([*found, _Draw(seeds)])


class _Draw(LogitsProcessor):
    """Draws one token for each row and leaves no other.

    ``do_sample=True`` would draw for all rows from one generator, so that a row's output would depend on its batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = "cpu" if scores.device.type == "mps" else scores.device  # which has no float64
        points = torch.cat([torch.rand(1, 1, generator=g, dtype=torch.float64) for g in self._generators]).to(place)
        reached = scores.to(place).double().softmax(-1).cumsum(-1)
        tokens = torch.searchsorted(reached, points * reached[:, -1:], right=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.to(scores.device), 0.0)


class Generator:
    """Writes outputs of a model.

    Attributes:
        count: outputs so far.
        cut: how many of their inputs were too long for the model and were cut.
        unfinished: how many of them reached ``max_new_tokens``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt: Prompt = DEFAULT,
        batch_size: int | None = None,
        **decoding: Any,
    ) -> None:
        """Take a model.

        Args:
            model: a causal model or an encoder-decoder, with or without a prefix.
            tokenizer: its tokenizer, with end-of-text and padding tokens.
            prompt: what stands around an input, as in training.
            batch_size: inputs per batch; default: what memory has room for. It is halved when memory does not suffice.
            decoding: those of ``Decoding``.

        Raises:
            ValueError: options do not fit together or to the model.
        """
        self.model, self.tokenizer, self.prompt = model, tokenizer, prompt
        self.decoding = Decoding(**decoding)
        self.most_rows = batch_size or MOST_ROWS.get(device_of(model).type, MOST_ROWS["cuda"])
        self.count = self.cut = self.unfinished = 0
        self._is_chosen = batch_size is None
        self._room, self._tail = _room(model, tokenizer, prompt, self.decoding.max_new_tokens)
        self._chat = Chat(tokenizer, prompt) if prompt.is_chat else None
        self.stop_ids = _ends(model, self._chat.stop_ids if self._chat else [tokenizer.eos_token_id])
        self._seen: Counter[str] = Counter()

    def texts(self, sources: Sequence[Source], progress: Callable[[int], object] | None = None) -> list[str]:
        """One output for each source, in their order. Sources of similar length share a batch.

        Args:
            sources: inputs, without the text that the prompt adds. For a chat also conversations before an answer.
            progress: called after each batch with its number of sources.

        Raises:
            ValueError: a source that the prompt does not take.
            RuntimeError: memory does not suffice for one row.
        """
        prompts = [self.prompt_ids(source) for source in sources]
        seeds = [self.seed_of(source) for source in sources]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        texts = [""] * len(prompts)
        with evaluating(self.model):
            while order:
                rows = order[: self._rows(len(prompts[order[0]]))]
                batch = rows[: _similar([len(prompts[i]) for i in rows])]
                outputs = self._outputs([prompts[i] for i in batch], [seeds[i] for i in batch])
                if outputs is None:  # too many rows
                    self.most_rows = len(batch) // 2
                    _log.warning("out of memory with %d rows a batch: %d from now on", len(batch), self.most_rows)
                    continue
                for i, output in zip(batch, outputs, strict=True):
                    texts[i] = self.text_of(output)
                del order[: len(batch)]
                if progress is not None:
                    progress(len(batch))
        self.count += len(texts)
        return texts

    def options(self, seeds: Sequence[int]) -> dict[str, Any]:
        """The arguments of transformers' ``generate`` beside the inputs, for rows whose draws have these ``seeds``."""
        decoding, pad = self.decoding, self.tokenizer.pad_token_id
        found: dict[str, Any] = {"eos_token_id": self.stop_ids, "pad_token_id": pad, "do_sample": False}
        found |= {"num_beams": decoding.num_beams, "max_new_tokens": decoding.max_new_tokens}
        if decoding.num_beams > 1:
            found["length_penalty"] = decoding.length_penalty
        if decoding.stop:
            found |= {"stop_strings": list(decoding.stop), "tokenizer": self.tokenizer}
        if decoding.draws:
            found["logits_processor"] = drawing(decoding, seeds)
        return found

    def warn_of_cuts(self) -> None:
        """Say how many sources were too long."""
        if self.cut:
            part = "encoder" if self.model.config.is_encoder_decoder else "model"
            _log.warning(
                "%d of %d sources are longer than %s of the %s's positions: cut",
                *(self.cut, self.count, self._room, part),
            )

    def seed_of(self, source: Source) -> int:
        """The seed of what is drawn for ``source``. Each time that it is asked for, it is another."""
        key = source if isinstance(source, str) else json.dumps(list(source), default=str)
        self._seen[key] += 1
        digest = hashlib.sha256(json.dumps([self.decoding.seed, self._seen[key], key]).encode()).digest()
        return int.from_bytes(digest[:8], "big")

    def prompt_ids(self, source: Source) -> list[int]:
        """Tokens of a prompt, as many as the model has positions for."""
        if self.model.config.is_encoder_decoder:
            if not isinstance(source, str):
                raise ValueError("an encoder-decoder takes texts, got conversations")
            ids = source_ids(self.tokenizer, source, special_tokens=self.prompt.special_tokens)
        elif self._chat is not None:
            ids, is_cut = self._chat.prompt_ids(self._chat.messages(source), self._room)
            self.cut += is_cut
            return ids
        else:
            ids = prompt_ids(self.tokenizer, source, self.prompt)
        if self._room is None or len(ids) <= self._room:
            return ids
        self.cut += 1
        return shortened(ids, self._room, self._tail)

    def _rows(self, width: int) -> int:
        if not self._is_chosen:
            return self.most_rows
        needed = _bytes_of_a_row(self.model, width, self.decoding)
        return max(1, min(self.most_rows, _free_bytes(device_of(self.model)) // 2 // needed))

    def _outputs(self, prompts: list[list[int]], seeds: list[int]) -> Tensor | None:
        """New tokens of each prompt. None: memory does not suffice for so many."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        inputs = inputs_of(self.model, self.tokenizer.pad_token_id, prompts)
        try:
            with torch.no_grad():
                output = self.model.generate(**inputs, **self.options(seeds))
        except RuntimeError as error:
            if len(prompts) == 1 or not should_reduce_batch_size(error):
                raise
        else:  # a decoder's output begins with its start token
            return output[:, 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1] :]
        clear_device_cache(garbage_collection=True)
        return None

    def text_of(self, output: Tensor) -> str:
        """The text of new tokens, up to where it ends."""
        ends = torch.isin(output, torch.tensor(self.stop_ids, device=output.device)).nonzero()
        text = self.tokenizer.decode(output[: ends[0]] if len(ends) else output, skip_special_tokens=True)
        whole = len(ends) > 0 or len(output) < self.decoding.max_new_tokens
        cut = self.decoding.until_stop(self.written(text))
        self.unfinished += not whole and len(cut) == len(self.written(text))
        return cut

    def written(self, text: str) -> str:
        """What an output says: its first line for prompts of one line, else all but the space before it."""
        if self.prompt.one_line:
            return next((line.strip() for line in text.splitlines() if line.strip()), "")
        return text if self.model.config.is_encoder_decoder or self._chat else text.removeprefix(self.prompt.lead)


def _ends(model: Any, known: Sequence[int]) -> list[int]:
    """The tokens that end an output: those ``known``, and those of a model whose generation config lists several."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return list(dict.fromkeys([*known, *(listed if isinstance(listed, list) else ())]))


def generate_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    *,
    prompt: Prompt = DEFAULT,
    batch_size: int | None = 32,
    progress: Callable[[int], object] | None = None,
    **decoding: Any,
) -> list[str]:
    """One output for each source, in their order: ``Generator`` and its ``texts``, which name arguments and errors.

    Sources that were too long are counted in one warning.
    """
    generator = Generator(model, tokenizer, prompt=prompt, batch_size=batch_size, **decoding)
    texts = generator.texts(sources, progress)
    generator.warn_of_cuts()
    return texts


def inputs_of(model: Any, pad_id: int, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """The arguments of ``generate`` for ``prompts``, padded on the left, so that all outputs start in one column.

    For an encoder they are padded on the right, as in training.
    """
    width, on_the_right = max(len(prompt) for prompt in prompts), model.config.is_encoder_decoder

    def padded(row: list[int], fill: int) -> list[int]:
        padding = [fill] * (width - len(row))
        return row + padding if on_the_right else padding + row

    device = device_of(model)
    ids = torch.tensor([padded(prompt, pad_id) for prompt in prompts], device=device)
    mask = torch.tensor([padded([1] * len(prompt), 0) for prompt in prompts], device=device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if can_leave_out_logits(model):
        # A list, not a number: with a number transformers slices the hidden states. The slice is not contiguous, and
        # for such an input ``linear`` copies the weights of the whole vocabulary once per row. generate would take a
        # tensor for one row per text and repeat it per beam.
        inputs["logits_to_keep"] = [-1]
    return inputs


def default_new_tokens(model: Any, wanted: int = 256) -> int:
    """``wanted``, or half of the model's positions where these are fewer than twice as many, of a decoder all."""
    room = room_for_rows(model)
    return wanted if room is None else max(1, min(wanted, room if model.config.is_encoder_decoder else room // 2))


def _room(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, new_tokens: int) -> tuple[int | None, int]:
    """How many tokens a prompt may have (None: any number), and how many of its last ones stay when it is cut."""
    room = room_for_rows(model)
    if model.config.is_encoder_decoder:
        check_new_tokens(model, new_tokens, 0)
        return room, 1
    tail = 1 if prompt.is_chat else prompt.tail(tokenizer)
    check_new_tokens(model, new_tokens, tail)
    return None if room is None else room - new_tokens, tail


# Batches --------------------------------------------------------------------------------------------------------------


def _similar(lengths: Sequence[int]) -> int:
    """How many of the first rows, longest first, share a batch. In a large one a third may be padding."""
    tokens = 0
    for count, length in enumerate(lengths, 1):
        tokens += length
        if count * lengths[0] > max(1.5 * tokens, FEW_TOKENS):
            return count - 1
    return len(lengths)


def _bytes_of_a_row(model: Any, width: int, decoding: Decoding) -> int:
    """About what a row takes: its keys and values, a layer's activations while the prompt is read, and its logits."""
    config, size = model.config.get_text_config(), next(model.parameters()).element_size()
    hidden = config.hidden_size
    heads = getattr(config, "num_attention_heads", 1)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    key_value = 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim * config.num_hidden_layers
    wide = 6 * hidden + 3 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    cache = (width + decoding.max_new_tokens + taken_by_prefix(model)) * key_value * decoding.num_beams
    logits = config.vocab_size * decoding.num_beams * (24 if decoding.draws else 8)
    return (cache + width * wide) * size + logits


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # accelerate's dependency

    return psutil.virtual_memory().available
