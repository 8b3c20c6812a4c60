"""Self-tests behind ``prefix-attn check``: properties that a prefix must have on a given model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import PrefixModel, get_prefix_model

ROWS, TOKENS, NEW_TOKENS, VIRTUAL = 2, 12, 6, 5
LOGITS, GRADIENTS = 1e-3, 1e-3  # relative to the largest: float32 through many layers, in another order of sums


class Finding(NamedTuple):
    """One tested property: the measured error and the largest that is allowed."""

    name: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the property holds. It does not if the value is nan."""
        return self.value <= self.bound


def examine(base: PreTrainedModel, adapter: str | None = None) -> Iterator[Finding]:
    """Attach a prefix to a causal language model and test it, one property at a time.

    Args:
        base: a model in float32, whose weights come back as they were.
        adapter: a folder or a Hub id of a prefix; default: a new one of 5 virtual tokens.

    Raises:
        ValueError: the adapter does not fit.
        NotImplementedError: the model cannot be served, and why.
    """
    if base.config.is_encoder_decoder or not base.can_generate():
        raise NotImplementedError(f"{type(base).__name__} is no causal language model: check tries those alone")
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    ids = torch.randint(0, base.get_input_embeddings().weight.shape[0], (ROWS, TOKENS), generator=_seeded())
    ids = ids.to(base.device)
    own = base.config._attn_implementation
    base.eval().set_attn_implementation("eager")  # transformers' sdpa leaves out Gemma 2's softcap
    with torch.no_grad():
        bare = base(ids).logits
    base.set_attn_implementation(own)
    if adapter is None:
        model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=VIRTUAL))
    else:
        model = PrefixModel.from_pretrained(base, adapter, is_trainable=True)
    model.eval()
    with torch.no_grad(), model.disable_prefix():
        yield Finding("without the prefix, logits are the bare model's", _far(base(ids).logits, bare), LOGITS)
    for name, measure in MEASURES.items():
        yield Finding(name, measure(model, ids), GRADIENTS if "gradient" in name else LOGITS)
    _train(model, ids)
    moved = sum(not torch.equal(p, before[name]) for name, p in base.named_parameters())
    yield Finding("weights that a training step changed", float(moved), 0)


@torch.no_grad()
def _causality(model: PrefixModel, ids: Tensor) -> float:
    other = ids.clone()
    other[:, TOKENS // 2 :] = ids[:, TOKENS // 2 :].flip(1)
    return _far(_run(model, other).logits[:, : TOKENS // 2], _run(model, ids).logits[:, : TOKENS // 2])


@torch.no_grad()
def _padding(model: PrefixModel, ids: Tensor) -> float:
    width = 3
    mask = torch.ones(ROWS, width + TOKENS, dtype=torch.int64, device=ids.device)
    mask[:, :width] = 0
    padded = torch.cat([ids[:, :width], ids], dim=1)
    return _far(_run(model, padded, attention_mask=mask).logits[:, width:], _run(model, ids).logits)


def _cache(model: PrefixModel, ids: Tensor) -> float:
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "pad_token_id": 0,
    }
    options |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, "output_logits": True}
    first, second = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
    # Where two tokens are about as likely, the outputs part ways, and what follows cannot be compared.
    texts = [(first.sequences[:, : TOKENS + i], second.sequences[:, : TOKENS + i]) for i in range(NEW_TOKENS)]
    steps = [i for i, (one, other) in enumerate(texts) if torch.equal(one, other)]
    return torch.tensor([_far(first.logits[i], second.logits[i]) for i in steps]).max().item()


def _gradients(model: PrefixModel, ids: Tensor) -> float:
    """The gradient of every layer's prefix, against the same call in plain PyTorch."""
    assert model.active_prefix is not None
    config = model.prefix_configs[model.active_prefix]
    fast = _gradient(model, ids)
    backend, config.backend = config.backend, "eager"
    try:
        return _far(fast, _gradient(model, ids))
    finally:
        config.backend = backend


def _checkpointing(model: PrefixModel, ids: Tensor) -> float:
    """In training mode, in which models checkpoint, with the same dropout in both."""
    with _in_training(model):
        plain = _drawn_again(model, ids)
        set_checkpointing(model, use_reentrant=False)
        try:
            return _far(_drawn_again(model, ids), plain)
        finally:
            set_checkpointing(model, use_reentrant=None)


@torch.no_grad()
def _files(model: PrefixModel, ids: Tensor) -> float:
    expected = _run(model, ids).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.load_prefix(folder, "reloaded")
    far, name = _far(_run(model, ids).logits, expected), model.prefix_names[0]
    model.delete_prefix("reloaded")
    model.set_prefix(name)
    return far


MEASURES: dict[str, Callable[[PrefixModel, Tensor], float]] = {
    "causality: later tokens change no earlier logits": _causality,
    "left padding changes no logits": _padding,
    "generation with and without a cache": _cache,
    "gradient of the prefix, against plain PyTorch": _gradients,
    "gradient of the prefix under gradient checkpointing": _checkpointing,
    "saved and loaded again": _files,
}


def _run(model: PrefixModel, ids: Tensor, **given: Any) -> Any:
    """A forward in which all tokens see the prefix, an infix too."""
    if model.prefix_configs[model.active_prefix or ""].mode == "infix":
        given["infix_start"] = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    return model(ids, **given)


def _gradient(model: PrefixModel, ids: Tensor) -> Tensor:
    leaves = [p for p in model.parameters() if p.requires_grad]
    loss = _run(model, ids, labels=ids, use_cache=False).loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])


def _train(model: PrefixModel, ids: Tensor) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with _in_training(model):
        _run(model, ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()


def _drawn_again(model: PrefixModel, ids: Tensor) -> Tensor:
    """The gradient, with the same random numbers in every call."""
    with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
        torch.manual_seed(0)
        return _gradient(model, ids)


@contextmanager
def _in_training(model: PrefixModel) -> Iterator[None]:
    model.train()
    try:
        yield
    finally:
        model.eval()


def _far(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number; 0 where there are none, as of a prefix that is all frozen."""
    if not expected.numel():
        return 0.0
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
