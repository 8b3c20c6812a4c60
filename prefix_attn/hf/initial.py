"""Initial values of a prefix: the frozen model's keys, values or embeddings of tokens, numbers, or another prefix."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prefix_attn.hf.attach.attachment import Attachment
from prefix_attn.hf.attach.probe import Probe
from prefix_attn.hf.attach.slots import Slot
from prefix_attn.hf.attach.wrapper import device_of
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.encoder import PrefixEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PIECE = 64  # tokens of a document in a row: a sentence or two


class FromEmbeddings(nn.Module):
    """Turns trained input embeddings into a prefix by running the frozen model. Replaces the MLP of an encoder."""

    def __init__(self, attachment: Attachment, slots: list[Slot]) -> None:
        """Make the keys and values of ``slots``."""
        super().__init__()
        self._attachment, self._slots = attachment, slots

    def forward(self, embeddings: Tensor) -> Tensor:
        """(P, hidden size) -> (P, 2 * slots * H * D) float32: the model's own keys and values for them."""
        dtype = self._attachment.base.get_input_embeddings().weight.dtype
        kv = self._attachment.probe.kv(self._slots, embeddings.to(dtype))
        return kv.permute(2, 0, 1, 3).flatten(1).float()


def initial_kv(attachment: Attachment, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """(2 * slots, H, P, D) float32: the model's own keys and values of P tokens, or numbers."""
    base, P = attachment.base, config.num_virtual_tokens
    _, slots, heads, size = attachment.resolver.layout(config)
    if config.init in ("zero", "uniform"):
        return _numbers(config.init, 2 * len(slots), heads, P, size)
    if (
        config.init in ("text", "document")
        and not attachment.probe.reads_text
        and any(slot.site != "decoder" for slot in slots)
    ):
        raise ValueError(f"init={config.init!r}: the encoder of {type(base).__name__} reads {base.main_input_name}")
    limits = [stack.limit for stack in attachment.runner.positions.values() if stack.limit is not None]
    if (most := min(limits, default=P)) < P:
        raise ValueError(
            f"num_virtual_tokens must be at most {most}, the positions of {type(base).__name__}, or start from numbers "
            f"with init='zero' or 'uniform', got {P}"
        )
    first = (getattr(base.config.get_text_config(), name, None) for name in ("bos_token_id", "decoder_start_token_id"))
    tables = attachment.probe.embeddings()
    ids = [_initial_ids(embeddings, i, config, tokenizer) for embeddings, i in zip(tables, first)]
    kv = attachment.probe.kv(slots, *ids)
    if (length := kv.shape[2]) < P:
        raise ValueError(f"num_virtual_tokens must be at most {length} for {type(base).__name__}, got {P}")
    return kv[:, :, :P].float().cpu()


def initial_embeddings(
    base: PreTrainedModel,
    config: PrefixConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    probe: Probe | None = None,
) -> Tensor:
    """(P, hidden size) float32: the model's own input embeddings of P tokens, or numbers.

    ``probe`` is for models that have to run for it.
    """
    module = base.get_input_embeddings()
    if config.init in ("zero", "uniform"):
        return _numbers(config.init, config.num_virtual_tokens, module.weight.shape[1]).to(device_of(module))
    first = getattr(base.config.get_text_config(), "bos_token_id", None)
    with torch.no_grad():
        ids = _initial_ids(module, first, config, tokenizer).to(device_of(module))
        return (module(ids) if probe is None else probe.embed(module, ids)).float().clone()


@torch.no_grad()
def start_from_prefix(
    encoder: PrefixEncoder, config: PrefixConfig, other: PrefixEncoder, source: PrefixConfig, attachment: Attachment
) -> None:
    """Initialise ``encoder`` with the first tokens of ``other``, in the slots of ``encoder``. The gate is not copied.

    Raises:
        ValueError: ``other`` has too few tokens or slots, or no embeddings where ``mode="embedding"`` needs them.
    """
    P = config.num_virtual_tokens
    name = f"init_path: {config.init_path}" if config.init_prefix is None else f"init_prefix: {config.init_prefix}"
    if other.num_virtual_tokens < P:
        raise ValueError(f"{name} has {other.num_virtual_tokens} tokens, num_virtual_tokens={P} needs more")
    if config.mode == "embedding":
        if source.mode != "embedding":
            raise ValueError(f"{name} has keys and values, of which mode='embedding' cannot start")
        encoder.embedding.data = other.embedding[:P].detach().clone()
        return
    wanted, there = ([(s.site, s.layer) for s in attachment.resolver.layout(c).slots] for c in (config, source))
    if missing := [f"{site} {layer}" for site, layer in wanted if (site, layer) not in there]:
        raise ValueError(f"{name} has nothing for layers {', '.join(missing)}")
    if short := [f"{site} {layer}" for site, layer in wanted if source.length(layer) < config.length(layer)]:
        raise ValueError(f"{name} has too few tokens in layers {', '.join(short)}")
    rows = other.prompt_embeddings()[:P].view(P, len(there), 2, other.num_heads, other.head_dim)
    rows = rows[:, [there.index(slot) for slot in wanted]]
    encoder.set_kv(rows.flatten(1, 2).permute(1, 2, 0, 3))


def draw_pieces(config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None) -> PrefixConfig:
    """Draw the P tokens that ``init="document"`` starts from. They replace the document in the returned config.

    The tokens are pieces of PIECE tokens, in order and without overlap, at places drawn from torch's generator. A
    document of at most P tokens stays whole.
    """
    if config.init != "document":
        return config
    ids, P = _text_ids(config, tokenizer), config.num_virtual_tokens
    if (spare := len(ids) - P) > 0:
        skipped = torch.randint(spare + 1, (-(-P // PIECE),)).sort().values
        place = torch.arange(P)
        ids = torch.tensor(ids)[place + skipped[place // PIECE]].tolist()
    return replace(config, init_text=None, init_token_ids=ids)


def _numbers(init: str, *shape: int) -> Tensor:
    return torch.rand(shape) if init == "uniform" else torch.zeros(shape)


def _text_ids(config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if config.init_token_ids is not None:
        return list(config.init_token_ids)
    if tokenizer is None:
        raise ValueError("init_text needs the tokenizer: get_prefix_model(base, config, tokenizer=...)")
    return tokenizer(config.init_text, add_special_tokens=False, verbose=False)["input_ids"]


def _initial_ids(
    embeddings: nn.Module, first: int | None, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None
) -> Tensor:
    assert isinstance(embeddings.weight, Tensor)
    P, vocabulary = config.num_virtual_tokens, embeddings.weight.shape[0]
    if config.init == "random":
        ids = torch.randint(vocabulary, (P,))
    else:
        text = _text_ids(config, tokenizer)
        if not text or not all(0 <= i < vocabulary for i in text):
            raise ValueError(f"the initial text must have tokens in 0..{vocabulary - 1}, got {text[:8]}")
        ids = torch.tensor(text).repeat(-(-P // len(text)))[:P]
    if config.init != "text" and isinstance(first, int) and 0 <= first < vocabulary:
        # Models put the attention that they have no use for on the first position, and recognise it by its bos token.
        # SmolLM2 on E2E, P = 10, four seeds: 3.25 without prefix, 3.24 to 3.31 with bos, 3.30 to 3.51 without it.
        ids[0] = first
    return ids
