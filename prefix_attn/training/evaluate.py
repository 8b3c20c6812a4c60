"""Generate text with a model, and measure its loss on targets."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefix_attn.hf.attach.infix import start_of_targets
from prefix_attn.hf.attach.wrapper import Wrapper, evaluating
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.chat import Chat
from prefix_attn.training.examples import Message
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.tokens import DEFAULT, IGNORED, prompt_ids, shortened, source_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def generate_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str | Sequence[Message]],
    *,
    prompt: Prompt = DEFAULT,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Generate an output for each source, without sampling.

    Args:
        model: a causal model or an encoder-decoder, with or without a prefix.
        tokenizer: its tokenizer, with end-of-text and padding tokens.
        sources: inputs, without the text that the prompt adds. For a chat also conversations before an answer.
        prompt: what stands around an input, as in training.
        num_beams: 1 decodes greedily.
        length_penalty: beams are ranked by log-likelihood divided by length to this power.
        max_new_tokens: limit of each output.
        batch_size: sources per batch. Sources of similar length share a batch.
        progress: called after each batch with its number of sources.

    Returns:
        One text per source, in the order of ``sources``.
    """
    prompts, stop = _prompts(model, tokenizer, sources, prompt, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts, lead = [""] * len(prompts), "" if model.config.is_encoder_decoder or prompt.is_chat else prompt.lead
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            outputs = _generate(
                model,
                tokenizer,
                [prompts[i] for i in batch],
                eos_token_id=stop,
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                **({"length_penalty": length_penalty} if num_beams > 1 else {}),
            )
            for i, output in zip(batch, outputs, strict=True):
                text = tokenizer.decode(output, skip_special_tokens=True)
                texts[i] = _first_line(text) if prompt.one_line else text.removeprefix(lead)
            if progress is not None:
                progress(len(batch))
    return texts


@torch.no_grad()
def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], **options: Any) -> Tensor:
    """New tokens of each prompt. Prompts are padded on the left, so that all outputs start in the same column.

    For an encoder they are padded on the right, as in training, and the outputs do not contain the prompt.
    """
    width, on_the_right = max(len(prompt) for prompt in prompts), model.config.is_encoder_decoder

    def padded(row: list[int], fill: int) -> list[int]:
        padding = [fill] * (width - len(row))
        return row + padding if on_the_right else padding + row

    ids = torch.tensor([padded(prompt, tokenizer.pad_token_id) for prompt in prompts])
    mask = torch.tensor([padded([1] * len(prompt), 0) for prompt in prompts])
    device = next(model.parameters()).device
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        # Indices, for the reason in _last. generate would take a tensor for one row per text and repeat it per beam.
        **({"logits_to_keep": [-1]} if _can_leave_out_logits(model) else {}),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return output[:, 1:] if on_the_right else output[:, width:]  # a decoder's output begins with its start token


def _prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str | Sequence[Message]],
    prompt: Prompt,
    max_new_tokens: int,
) -> tuple[list[list[int]], int | list[int]]:
    """Tokens of each prompt, as many as the model has positions for, and the tokens that end an output."""
    if model.config.is_encoder_decoder:
        if any(not isinstance(source, str) for source in sources):
            raise ValueError("an encoder-decoder takes texts, got conversations")
        special = prompt.special_tokens
        found = [source_ids(tokenizer, str(source), special_tokens=special) for source in sources]
        return _within(model, found, "encoder", 0, 1), tokenizer.eos_token_id
    taken = max_new_tokens
    if isinstance(model, PrefixModel):
        taken += max((config.num_virtual_tokens for config in model.prefix_configs.values()), default=0)
    if not prompt.is_chat:
        found, tail = [prompt_ids(tokenizer, source, prompt) for source in sources], prompt.tail(tokenizer)
        return _within(model, found, "model", taken, tail), tokenizer.eos_token_id
    chat, room = Chat(tokenizer, prompt), _room(model, "model", taken, 1)
    fitted = [chat.prompt_ids(chat.messages(source), room) for source in sources]
    _warn(sum(cut for _, cut in fitted), len(fitted), "model", room)
    return [ids for ids, _ in fitted], chat.stop_ids


def _within(model: Any, sources: list[list[int]], part: str, taken: int, tail: int) -> list[list[int]]:
    """Cut ``sources`` to the model's positions minus those ``taken``. Their last ``tail`` tokens stay."""
    room = _room(model, part, taken, tail)
    if room is None:
        return sources
    _warn(sum(len(ids) > room for ids in sources), len(sources), part, room)
    return [shortened(ids, room, tail) for ids in sources]


def _room(model: Any, part: str, taken: int, tail: int) -> int | None:
    """How many tokens a prompt may have. None: any number."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return None
    if positions - taken < tail:
        raise ValueError(f"the {part} has {positions} positions, of which outputs and prefix take {taken}: too many")
    return positions - taken


def _warn(long: int, count: int, part: str, room: int | None) -> None:
    if long:
        _log.warning("%d of %d sources are longer than %d of the %s's positions: cut", long, count, room, part)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def target_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a batch in float32, without the logits that it does not need.

    No loss reads the logits before the first target of a batch, and each is as wide as the vocabulary. Models that
    cannot leave them out (no ``logits_to_keep``), or that add a loss of their own, compute their usual loss.

    Args:
        model: ours, PEFT's or one of transformers; causal or an encoder-decoder.
        batch: what ``tokens.collate`` makes, with at least one target token.

    Returns:
        Mean negative log-likelihood of the targets in nats, a scalar that can be differentiated.
    """
    labels = batch["labels"]
    if getattr(model.config, "output_router_logits", False):
        return model(**batch).loss
    if model.config.is_encoder_decoder:
        logits = model(**batch).logits
    elif _can_leave_out_logits(model):
        inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if isinstance(model, PrefixModel) and any(c.mode == "infix" for c in model.prefix_configs.values()):
            inputs["infix_start"] = start_of_targets(None, batch)  # the model would have found it in the labels
        if len(labels) == 1:  # rows that are packed have targets in several places
            keep = (labels[0, 1:] != IGNORED).nonzero().flatten()
            logits = model(**inputs, logits_to_keep=keep).logits[0]
            return torch.nn.functional.cross_entropy(logits.float(), labels[0, 1:][keep].to(logits.device))
        # The model predicts each token from those before it.
        first = max(int((labels != IGNORED).any(0).int().argmax()), 1)
        labels = labels[:, first:]
        logits = model(**inputs, logits_to_keep=_last(labels.shape[1] + 1, labels.device)[:-1]).logits
    else:
        return model(**batch).loss
    labels = labels.to(logits.device)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def _last(count: int, device: torch.device) -> Tensor:
    """The last ``count`` positions, for ``logits_to_keep``.

    Indices, not a number: with a number transformers slices the hidden states. The slice is not contiguous, and for
    such an input ``linear`` copies the weights of the whole vocabulary once per row (7 GB for 64 rows of SmolLM2).
    """
    return torch.arange(-count, 0, device=device)


def _can_leave_out_logits(model: Any) -> bool:
    base = model.base_model if isinstance(model, Wrapper) else model
    if hasattr(base, "get_base_model"):  # PEFT's
        base = base.get_base_model()
    return "logits_to_keep" in inspect.signature(base.forward).parameters


@torch.no_grad()
def validation_loss(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean negative log-likelihood of all target tokens in nats.

    Args:
        model: a causal model or an encoder-decoder, with or without a prefix.
        batches: what ``tokens.collate`` makes.

    Raises:
        ValueError: no batch has a target token.
    """
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in batches:
            # A causal model predicts each token from those before it, so the first one has no loss.
            first = 0 if model.config.is_encoder_decoder else 1
            count = int((batch["labels"][:, first:] != IGNORED).sum())
            if not count:
                continue  # the mean over no tokens would be nan
            loss = target_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
            total += float(loss) * count
            tokens += count
    if not tokens:
        raise ValueError("no target tokens to evaluate on")
    return total / tokens
