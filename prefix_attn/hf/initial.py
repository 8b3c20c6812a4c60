"""Where a prefix starts: the frozen model's own keys, values and embeddings of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_attn.hf.attach import Attachment
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.slots import Slot

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FromEmbeddings(nn.Module):
    """What stands in the place of a prefix's MLP where input embeddings are trained: the frozen model itself."""

    def __init__(self, attachment: Attachment, slots: list[Slot]) -> None:
        """Through the model of ``attachment``, for these slots."""
        super().__init__()
        self._attachment, self._slots = attachment, slots

    def forward(self, embeddings: Tensor) -> Tensor:
        """(P, hidden size) -> (P, 2 * slots * H * D) float32: the model's own keys and values for them."""
        dtype = self._attachment.base.get_input_embeddings().weight.dtype
        kv = self._attachment.kv(self._slots, embeddings.to(dtype))
        return kv.permute(2, 0, 1, 3).flatten(1).float()


def initial_kv(attachment: Attachment, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """(2 * slots, H, P, D) float32: the model's own keys and values of P tokens, or zeros."""
    base, P = attachment.base, config.num_virtual_tokens
    slots = attachment.layout(config).slots
    if config.init == "text" and not attachment.reads_text and any(slot.site != "decoder" for slot in slots):
        raise ValueError(f"init='text': the encoder of {type(base).__name__} reads {base.main_input_name}")
    first = (getattr(base.config.get_text_config(), name, None) for name in ("bos_token_id", "decoder_start_token_id"))
    ids = [_initial_ids(embeddings, i, config, tokenizer) for embeddings, i in zip(attachment.embeddings(), first)]
    kv = attachment.kv(slots, *ids)
    if (length := kv.shape[2]) < P:
        raise ValueError(f"num_virtual_tokens must be at most {length} for {type(base).__name__}, got {P}")
    kv = kv[:, :, :P].float().cpu()
    return torch.zeros_like(kv) if config.init == "zero" else kv


def initial_embeddings(
    base: PreTrainedModel, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None
) -> Tensor:
    """(P, hidden size) float32: the model's own input embeddings of P tokens, or zeros."""
    module = base.get_input_embeddings()
    first = getattr(base.config.get_text_config(), "bos_token_id", None)
    with torch.no_grad():
        embeddings = module(_initial_ids(module, first, config, tokenizer).to(module.weight.device)).float()
    return torch.zeros_like(embeddings) if config.init == "zero" else embeddings.clone()


def _initial_ids(
    embeddings: nn.Module, first: int | None, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None
) -> Tensor:
    assert isinstance(embeddings.weight, Tensor)
    P, vocabulary = config.num_virtual_tokens, embeddings.weight.shape[0]
    if config.init != "text":
        ids = torch.randint(vocabulary, (P,))
        # The first position is where models leave the attention that they have no use for, and they know it by its bos.
        # SmolLM2 on E2E, P = 10, four seeds: 3.25 without prefix, 3.24 to 3.31 with bos, 3.30 to 3.51 without it.
        if isinstance(first, int) and 0 <= first < vocabulary:
            ids[0] = first
        return ids
    ids = config.init_token_ids
    if ids is None:
        if tokenizer is None:
            raise ValueError("init_text needs the tokenizer: get_prefix_model(base, config, tokenizer=...)")
        ids = tokenizer(config.init_text, add_special_tokens=False)["input_ids"]
    if not len(ids) or not all(0 <= i < vocabulary for i in ids):
        raise ValueError(f"the initial text must have tokens in 0..{vocabulary - 1}, got {list(ids)[:8]}")
    return torch.tensor(ids).repeat(-(-P // len(ids)))[:P]
