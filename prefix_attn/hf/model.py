"""Prefix tuning of a Hugging Face model: ``get_prefix_model`` and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_attn.hf import checkpoint
from prefix_attn.hf.attach import Attachment, FromEmbeddings, initial_embeddings, initial_kv
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.wrapper import Wrapper
from prefix_attn.prefix import PrefixEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def get_prefix_model(
    base: PreTrainedModel, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> PrefixModel:
    """``base``, frozen, with one trainable prefix named "default".

    Args:
        base: a decoder-only transformers model; its attention function is switched in place.
        config: the prefix.
        tokenizer: for ``init_text``.

    Raises:
        NotImplementedError: the model's attention cannot be served. ValueError: the configuration does not fit it.
    """
    model = PrefixModel(base)
    model.add_prefix("default", config, tokenizer)
    return model


class PrefixModel(Wrapper):
    """A frozen model and its prefixes (Li and Liang 2021, section 4.2). Other attributes are the model's own.

    ``state_dict`` holds the prefixes alone, MLPs included: a Trainer's checkpoint is that, and resumes from it.
    """

    def __init__(self, base_model: PreTrainedModel) -> None:
        """Attach to ``base_model``, without any prefix yet."""
        super().__init__()
        self._attachment = Attachment(base_model)
        self.base_model = base_model
        self.prefixes = nn.ModuleDict()
        self.prefix_configs: dict[str, PrefixConfig] = {}
        self.active_prefix: str | None = None
        self._disabled: list[None] = []  # one for each disable_prefix now open: to append and to pop is atomic

    # Prefixes ---------------------------------------------------------------------------------------------------------

    @property
    def prefix_names(self) -> list[str]:
        """Names of the prefixes, oldest first."""
        return list(self.prefix_configs)

    def add_prefix(self, name: str, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """A new trainable prefix, initialised as ``config`` says; it becomes the active one."""
        self._check_new(name)
        encoder = self._encoder(config)
        if config.mode == "embedding":
            encoder.embedding.data = initial_embeddings(self.base_model, config, tokenizer)
        else:
            encoder.set_kv(initial_kv(self._attachment, config, tokenizer))
        # A copy: the caller may use the same configuration for another model.
        config = replace(
            config,
            base_model_name_or_path=config.base_model_name_or_path or self.base_model.config._name_or_path or None,
        )
        self._install(name, config, encoder, trainable=True)

    def load_prefix(self, path: str | Path, name: str, *, is_trainable: bool = False) -> None:
        """A prefix from a folder or a Hub id, as ``save_pretrained`` or PEFT wrote it; it becomes the active one."""
        self._check_new(name)
        sizes = (self._attachment.layers, self._attachment.heads, self._attachment.head_dim)
        config, parameters = checkpoint.load_prefix(path, self.base_model, sizes, is_trainable=is_trainable)
        encoder = self._encoder(config)
        try:
            encoder.load_state_dict(parameters)
        except RuntimeError as error:
            raise ValueError(f"{path}: the saved MLP does not fit its configuration ({error})") from None
        self._install(name, config, encoder, trainable=is_trainable)

    def set_prefix(self, name: str) -> None:
        """Make ``name`` the active prefix: the one that forward, generate and training use."""
        self._find(name)
        self.active_prefix = name

    def delete_prefix(self, name: str) -> None:
        """Remove a prefix; the oldest remaining one becomes active if it was."""
        self._find(name)
        if self.active_prefix == name:  # first: another thread may ask for the active prefix at any moment
            self.active_prefix = next((other for other in self.prefix_configs if other != name), None)
        del self.prefix_configs[name], self.prefixes[name]

    @contextmanager
    def disable_prefix(self) -> Iterator[None]:
        """The frozen model as it was, within the context, whatever is active."""
        self._disabled.append(None)
        try:
            yield
        finally:
            self._disabled.pop()

    disable_adapter = disable_prefix  # PEFT's name

    def fold(self) -> None:
        """Replace the MLP, or the embeddings, of every prefix by the prefix that is made of them."""
        for name in self.prefix_configs:
            encoder, config = self._find(name)
            encoder.fold()
            config.mode, config.prefix_projection = "kv", False

    # Running ----------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward with the active prefix. Positions default to those that the mask implies."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
        }
        _one_prefix_a_batch(kwargs)
        with self._running():
            return self.base_model(**{n: v for n, v in given.items() if v is not None}, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate, with the active prefix, which is made once."""
        _one_prefix_a_batch(kwargs)
        with self._running():
            return self.base_model.generate(*args, **kwargs)

    def _running(self) -> AbstractContextManager[None]:
        if self._disabled or self.active_prefix is None:
            return self._attachment.plain()
        encoder, config = self._find(self.active_prefix)
        return self._attachment.running(encoder(), config)

    # Parameters -------------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The prefixes' parameters; the frozen base is not in it."""
        return self.prefixes.state_dict(destination=destination, prefix=f"{prefix}prefixes.", keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The reverse of ``state_dict``."""
        inner = {n.removeprefix("prefixes."): t for n, t in state_dict.items()}
        return self.prefixes.load_state_dict(inner, strict=strict, assign=assign)

    # Files ------------------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path, *, training_state: bool = False) -> None:
        """Write the active prefix, folded, in PEFT's format.

        Args:
            path: the folder. A kill at any moment leaves the old files or the new ones.
            training_state: also what continuing the training of an MLP needs.
        """
        if self.active_prefix is None:
            raise ValueError("there is no active prefix to save")
        encoder, config = self._find(self.active_prefix)
        checkpoint.save_prefix(Path(path), encoder, config, self.base_model, training_state=training_state)

    @classmethod
    def from_pretrained(
        cls, base: PreTrainedModel, path: str | Path, *, is_trainable: bool = False, name: str = "default"
    ) -> PrefixModel:
        """``base`` with the prefix in ``path`` (a folder or a Hub id).

        Raises:
            ValueError: the files do not fit ``base``, or are damaged.
        """
        model = cls(base)
        try:
            model.load_prefix(path, name, is_trainable=is_trainable)
        except Exception:
            model._attachment.remove()
            raise
        return model

    def _check_new(self, name: str) -> None:
        if name in self.prefix_configs:
            raise ValueError(f"there is a prefix named {name!r} already")
        if not name or "." in name or hasattr(self.prefixes, name):
            raise ValueError(f"a prefix cannot be named {name!r}: its name becomes that of a module")

    def _encoder(self, config: PrefixConfig) -> PrefixEncoder:
        layers, heads, size = self._attachment.layers, self._attachment.heads, self._attachment.head_dim
        hidden = (config.encoder_hidden_size or heads * size) if config.prefix_projection else None
        encoder = PrefixEncoder(
            config.num_virtual_tokens,
            layers,
            heads,
            size,
            hidden_size=hidden,
            depth=config.encoder_depth,
            dropout=config.dropout,
        )
        if config.mode == "embedding":
            width = self.base_model.get_input_embeddings().weight.shape[1]
            encoder.embedding = nn.Parameter(torch.zeros(config.num_virtual_tokens, width))
            encoder.mlp = FromEmbeddings(self._attachment)
        return encoder

    def _find(self, name: str) -> tuple[PrefixEncoder, PrefixConfig]:
        if name not in self.prefix_configs:
            raise ValueError(f"no prefix named {name!r}; there are {self.prefix_names}")
        encoder = self.prefixes[name]
        assert isinstance(encoder, PrefixEncoder)
        return encoder, self.prefix_configs[name]

    def _install(self, name: str, config: PrefixConfig, encoder: PrefixEncoder, *, trainable: bool) -> None:
        encoder.requires_grad_(trainable)
        encoder.train(self.training)
        self.prefixes[name] = encoder.to(self.base_model.get_input_embeddings().weight.device)
        self.prefix_configs[name] = config
        self.active_prefix = name


def _one_prefix_a_batch(kwargs: dict[str, Any]) -> None:
    for name in ("prefix_names", "adapter_names"):
        if kwargs.pop(name, None) is not None:
            raise NotImplementedError(f"{name}: this version has one prefix for a whole batch; see set_prefix")
