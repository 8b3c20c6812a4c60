"""Run the prefix of a PEFT model through ``prefix_attention``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefix_attn.hf.attach.attachment import Attachment
from prefix_attn.hf.attach.layout import Layout
from prefix_attn.hf.attach.outside import refuse_continuous_batching
from prefix_attn.hf.attach.wrapper import Wrapper, refuse_data_parallel
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.io.stored import slots_of_peft

SERVED = ("PREFIX_TUNING", "CARTRIDGE")
CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_REPLICATE = "_replicate_for_data_parallel"  # what nn.DataParallel calls


def accelerate(model: Any, *, backend: str = "auto") -> Callable[[], None]:
    """Let a PEFT model with a PREFIX_TUNING or CARTRIDGE adapter attend to its prefix through ``prefix_attention``.

    Forward, generate and training then make the prefix once per call, not once per sample, and the KV cache holds the
    text alone. The adapter stays PEFT's: its parameters, ``set_adapter``, ``disable_adapter``, ``save_pretrained``.
    Outputs are PEFT's, with two exceptions: past a sliding window PEFT loses the prefix, and in a bare forward it
    counts left padding as positions. Gradient checkpointing works, which PEFT refuses. In an encoder-decoder model
    layer i of the decoder has slot 2i mod L of the prefix, as in PEFT. A copy of the model is accelerated too, and runs
    its own prefix.

    Args:
        model: a ``peft.PeftModel`` over a transformers model; changed in place.
        backend: the backend of ``prefix_attention``.

    Returns:
        A function that undoes this.

    Raises:
        TypeError: not a PEFT model.
        ValueError: its active adapter has no prefix, or it is accelerated already.
        NotImplementedError: the model's attention cannot be served.

    Examples:
        >>> import peft
        >>> config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        >>> peft_model = peft.get_peft_model(base, config)
        >>> undo = accelerate(peft_model)
        >>> peft_model(ids).logits.shape
        torch.Size([1, 3, 257])
        >>> undo()
    """
    way = _Way(model, _attach(model, backend), backend)
    theirs = model.forward, model.generate

    def undo() -> None:
        """Restore PEFT's forward and generate, and the base model's attention."""
        if model.forward is not forward:
            raise ValueError("the model is not accelerated any more, or its adapter is disabled at the moment")
        model.forward, model.generate = theirs
        for name in CONTINUOUS_BATCHING:
            delattr(model, name)
        del vars(model)[_REPLICATE]
        way.attachment.remove()

    # Of what a deepcopy or a pickle of the model copies with it: a closure would go on running the original.
    forward = functools.update_wrapper(partial(_forward, way), theirs[0])
    generate = functools.update_wrapper(partial(_generate, way), theirs[1])
    model.forward, model.generate = forward, generate
    for name in CONTINUOUS_BATCHING:
        setattr(model, name, refuse_continuous_batching)
    vars(model)[_REPLICATE] = partial(refuse_data_parallel, f"{type(model).__name__}, accelerated,")
    return undo


class _Way(NamedTuple):
    """How an accelerated model runs."""

    model: Any
    attachment: Attachment
    backend: str


def _forward(way: _Way, *args: Any, **kwargs: Any) -> Any:
    with _running(*way):
        return way.attachment.base(*args, **kwargs)


@torch.no_grad()
def _generate(way: _Way, *args: Any, **kwargs: Any) -> Any:
    with _running(*way):
        return way.attachment.base.generate(*args, **kwargs)


def _attach(model: Any, backend: str) -> Attachment:
    """Attach to the base model of ``model``, whose active adapter must be one that can be served."""
    if isinstance(model, Wrapper) or not hasattr(model, "active_peft_config"):
        raise TypeError(f"accelerate needs a peft.PeftModel, got {type(model).__qualname__}")
    config = _check(model)
    if getattr(model.forward, "func", None) is _forward:
        raise ValueError("the model is accelerated already")
    attachment = Attachment(model.get_base_model())
    try:
        _layout(attachment, config, backend)
    except NotImplementedError as error:
        attachment.remove()
        name = type(attachment.base).__name__
        raise NotImplementedError(f"{name}: its tokens cannot start behind the prefix, as PEFT's do") from error
    return attachment


def _running(model: Any, attachment: Attachment, backend: str) -> AbstractContextManager[None]:
    """The context in which forwards of the base model see the active adapter's prefix."""
    config = _check(model)
    kv = _kv(model, config)
    if config.num_transformer_submodules > 1:
        pairs = kv.unflatten(0, (-1, 2))
        kv = pairs[slots_of_peft(len(pairs), attachment.resolver.decoder_layers)].flatten(0, 1)
    return attachment.runner.running(kv, _layout(attachment, config, backend))


def _layout(attachment: Attachment, config: Any, backend: str) -> Layout:
    """The slots that PEFT's ``config`` fills: of an encoder-decoder those of the decoder alone, as in PEFT."""
    sites, length = ("decoder",) if config.num_transformer_submodules > 1 else None, config.num_virtual_tokens
    ours = PrefixConfig(num_virtual_tokens=length, sites=sites, position_mode="shift", backend=backend)
    return attachment.resolver.layout(attachment.resolver.resolve(ours))


def _check(model: Any) -> Any:
    """The configuration of the active adapter, which must be a prefix."""
    config = model.active_peft_config
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in SERVED:
        raise ValueError(f"the active adapter {model.active_adapter!r} is {kind}; only {SERVED} have a prefix")
    return config


def _kv(model: Any, config: Any) -> Tensor:
    """(2 * L, H, P, D): the active adapter's prefix, as PEFT makes it, for a batch of one."""
    encoder, tokens = model.prompt_encoder[model.active_adapter], model.prompt_tokens[model.active_adapter]
    weight = encoder.embedding.weight
    P, heads = config.num_virtual_tokens, config.num_attention_heads
    flat = weight if config.inference_mode else encoder(tokens[None, :P].to(weight.device))[0]
    return flat.view(P, 2 * config.num_layers, heads, -1).permute(1, 2, 0, 3).contiguous()
