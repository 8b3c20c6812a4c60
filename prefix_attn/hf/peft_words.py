"""PEFT's words for named prefixes, so that scripts written for a PeftModel run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefix_attn.hf.config import PeftPrefixConfig, PrefixConfig
from prefix_attn.hf.encoder import PrefixEncoder
from prefix_attn.hf.io.stored import KEY, update_card
from prefix_attn.hf.prefixes import NamedPrefixes


class PeftWords(NamedPrefixes):
    """Named prefixes under the names that PEFT gives to adapters.

    As in PEFT, ``add_adapter`` and ``load_adapter`` leave the active adapter as it is; ``add_prefix`` and
    ``load_prefix`` make the new prefix active. ``peft.get_peft_model_state_dict`` and its reverse take such models.
    """

    def add_prefix(self, name: str, config: PrefixConfig | PeftPrefixConfig, tokenizer: Any = None) -> None:
        """See ``PrefixModel``."""
        raise NotImplementedError

    def load_prefix(self, path: str | Path, name: str, **options: Any) -> None:
        """See ``PrefixModel``."""
        raise NotImplementedError

    def add_adapter(self, adapter_name: str, peft_config: PrefixConfig | PeftPrefixConfig) -> None:
        """``add_prefix``, but the active prefix stays, if there is one."""
        active = self.active_prefix
        self.add_prefix(adapter_name, peft_config)
        self.make_active(active or adapter_name)

    def load_adapter(self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **options: Any) -> None:
        """``load_prefix``, but the active prefix stays, if there is one."""
        active = self.active_prefix
        self.load_prefix(model_id, adapter_name, is_trainable=is_trainable, **options)
        self.make_active(active or adapter_name)

    def set_adapter(self, adapter_name: str) -> None:
        """``set_prefix``."""
        self.set_prefix(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """``delete_prefix``."""
        self.delete_prefix(adapter_name)

    @property
    def active_adapter(self) -> str | None:
        """``active_prefix``."""
        return self.active_prefix

    @property
    def active_adapters(self) -> list[str]:
        """The active prefix, in a list; without one the list is empty."""
        return [] if self.active_prefix is None else [self.active_prefix]

    @property
    def peft_config(self) -> dict[str, PrefixConfig]:
        """``prefix_configs``."""
        return self.prefix_configs

    @peft_config.setter
    def peft_config(self, _: Any) -> None:
        """PEFT sets it on a model to which it adds an adapter of its own."""
        raise TypeError(
            "PEFT adds its adapters to a transformers model, not to one with prefixes: give base.add_adapter(...) the "
            "LoRA first, then get_prefix_model(base, ...) the base; it trains both"
        )

    @property
    def active_peft_config(self) -> PrefixConfig:
        """The configuration of the active prefix."""
        return self.find_prefix(str(self.active_prefix))[1]

    def get_base_model(self) -> PreTrainedModel:
        """``base_model``."""
        return self.base_model

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Give the model card beside a saved prefix its metadata: a Trainer asks for it behind a card of its own."""
        update_card(Path(output_dir), self.attachment.base.model_tags or ())

    def unload(self) -> PreTrainedModel:
        """The base model as it was before the first prefix. This model cannot run any more."""
        self.attachment.remove()
        return self.base_model

    @property
    def prompt_encoder(self) -> dict[str, PromptEncoder]:
        """What PEFT's functions ask for the prefixes."""
        return {name: PromptEncoder(self._alone(name)) for name in self.prefix_configs}

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """(P, 2 * slots * H * D) float32: what PEFT saves of a prefix."""
        return self._alone(adapter_name).prompt_embeddings().detach().cpu()

    def _alone(self, name: str) -> PrefixEncoder:
        """A prefix that is all that was trained: PEFT's functions would lose task heads."""
        if len(self.task_heads(name)):
            heads = list(self.task_heads(name))
            raise ValueError(f"{name!r} has task heads {heads}, which PEFT's functions do not see: use state_dict()")
        return self.find_prefix(name)[0]


class PromptEncoder:
    """A prefix as PEFT's functions see one."""

    def __init__(self, encoder: PrefixEncoder) -> None:
        """Show ``encoder``."""
        self._encoder = encoder

    @property
    def embedding(self) -> torch.nn.Embedding:
        """Its ``weight`` is what PEFT saves."""
        return torch.nn.Embedding.from_pretrained(self._encoder.prompt_embeddings().detach().cpu())

    @torch.no_grad()
    def _load_adapter_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """The reverse, which an MLP cannot take."""
        rows, encoder = state_dict[KEY], self._encoder
        if encoder.mlp is not None:
            raise ValueError("an MLP makes this prefix: fold() first, or load_state_dict() what state_dict() gave")
        if rows.shape != encoder.prompt_embeddings().shape:
            raise ValueError(f"{KEY} must be {tuple(encoder.prompt_embeddings().shape)}, got {tuple(rows.shape)}")
        encoder.embedding.copy_(rows[encoder.num_frozen_tokens :])
        if encoder.frozen is not None:
            encoder.frozen.copy_(rows[: encoder.num_frozen_tokens])
