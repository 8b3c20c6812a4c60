"""The named prefixes of a frozen model: their modules, configurations and parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from prefix_attn.hf.attach.attachment import Attachment
from prefix_attn.hf.attach.banks import NO_PREFIX
from prefix_attn.hf.attach.ranks import gathering, several_processes
from prefix_attn.hf.attach.task_heads import train_copies
from prefix_attn.hf.attach.wrapper import Wrapper, device_of
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.encoder import PrefixEncoder
from prefix_attn.hf.initial import FromEmbeddings
from prefix_attn.hf.io import checkpoint
from prefix_attn.hf.io.state import check_same
from prefix_attn.hf.resting import Resting


class NamedPrefixes(Wrapper):
    """A frozen model and its prefixes by name. ``PrefixModel`` adds initialisation, files, forward and generate.

    ``attachment`` is the way into the model. It and the methods under "For other modules" are for this package.
    """

    def __init__(self, base_model: PreTrainedModel) -> None:
        """Attach to ``base_model``, without any prefix yet."""
        super().__init__()
        self.attachment = Attachment(base_model)
        self.attachment.freeze()
        self.prefixes = nn.ModuleDict()
        self.heads = nn.ModuleDict()  # its task heads, an nn.ModuleDict for each prefix
        self.prefix_configs: dict[str, PrefixConfig] = {}
        self.active_prefix: str | None = None
        self._resting = Resting()
        self._disabled: list[None] = []  # one for each disable_prefix now open: to append and to pop is atomic
        self._wrap(base_model)

    @property
    def prefix_names(self) -> list[str]:
        """Names of the prefixes, oldest first."""
        return list(self.prefix_configs)

    def set_prefix(self, name: str) -> None:
        """Make ``name`` the active prefix: the one that forward, generate and training use.

        It alone is trainable then, so that DistributedDataParallel has no unused parameters. The others are again once
        they are active, or once a forward names them; a parameter that its user froze stays frozen.
        """
        self.find_prefix(name)
        self.active_prefix = name
        for other in self.prefix_configs:
            if other != name:
                self._resting.rest(other, partial(self._parameters_of, other))
        self._wake(name)

    def delete_prefix(self, name: str) -> None:
        """Remove a prefix. If it was active, the oldest remaining one becomes active."""
        self.find_prefix(name)
        if self.active_prefix == name:  # first: another thread may ask for the active prefix at any moment
            self.active_prefix = next((other for other in self.prefix_configs if other != name), None)
        del self.prefix_configs[name], self.prefixes[name], self.heads[name]
        self._resting.forget(name)
        if self.active_prefix is not None:
            self._wake(self.active_prefix)

    @contextmanager
    def disable_prefix(self) -> Iterator[None]:
        """Within the context the model runs without any prefix, even if a call names some."""
        self._disabled.append(None)
        try:
            yield
        finally:
            self._disabled.pop()

    disable_adapter = disable_prefix  # PEFT's name

    def fold(self) -> None:
        """Replace the MLP, or the embeddings, of every prefix by the keys and values that they make."""
        for name in self.prefix_configs:
            encoder, config = self.find_prefix(name)
            encoder.fold()
            config.fold()
            encoder.unshown = self.attachment.resolver.unshown(config)

    @property
    def is_made_together(self) -> bool:
        """Whether the active prefix is made by a base that FSDP2 spreads, which takes all its processes at once."""
        config = self.prefix_configs.get(self.active_prefix or "")
        return config is not None and config.mode == "embedding" and bool(gathering(self))

    def check_resumable(self, folder: Path) -> None:
        """Raise a ValueError if ``folder`` was left by the training of another base model or of other prefixes."""
        config = self.prefix_configs.get(self.active_prefix or "")
        name = None if config is None else config.base_model_name_or_path
        if (state := checkpoint.read_resumable(folder, self.attachment.base, name)) is not None:
            check_same(self.state_dict(), state)

    def _parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        parts = nn.ModuleDict({"prefix": self.prefixes[name], "heads": self.heads[name]})
        return dict(parts.named_parameters())

    def _wake(self, name: str) -> None:
        self._resting.wake(name, partial(self._parameters_of, name))

    # For other modules ------------------------------------------------------------------------------------------------

    def find_prefix(self, name: str) -> tuple[PrefixEncoder, PrefixConfig]:
        """The encoder of a prefix and its resolved configuration.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self.prefix_configs:
            raise ValueError(f"no prefix named {name!r}; there are {self.prefix_names}")
        encoder = self.prefixes[name]
        assert isinstance(encoder, PrefixEncoder)
        return encoder, self.prefix_configs[name]

    def task_heads(self, name: str) -> nn.ModuleDict:
        """The copies of the model's heads that are trained with the prefix ``name``."""
        task_heads = self.heads[name]
        assert isinstance(task_heads, nn.ModuleDict)
        return task_heads

    def check_together(self, names: Sequence[str]) -> None:
        """Raise a ValueError if the prefixes ``names`` cannot share a batch."""
        configs = {name: self.find_prefix(name)[1] for name in names}
        for field in ("backend", "sites", "layers", "gate"):
            values = {name: getattr(config, field) for name, config in configs.items()}
            if any(value != next(iter(values.values())) for value in values.values()):
                raise ValueError(f"the prefixes of one batch must have one {field}, got {values}")
        if own := [name for name in configs if len(self.task_heads(name))]:
            raise ValueError(f"prefixes with task heads cannot share a batch with others, got {own}")

    def check_new_name(self, name: str) -> None:
        """Raise a ValueError if a new prefix cannot have this name."""
        if name in self.prefix_configs:
            raise ValueError(f"there is a prefix named {name!r} already")
        if name == NO_PREFIX:
            raise ValueError(f"a prefix cannot be named {name!r}: adapter_names means no prefix by it")
        if not name or "." in name or hasattr(self.prefixes, name):
            raise ValueError(f"a prefix cannot be named {name!r}: its name becomes that of a module")

    def make_active(self, name: str) -> None:
        """Make a new prefix the active one. Of several processes each then trains it alone, as by ``set_prefix``.

        One process may train several at once, so all stay trainable there.
        """
        if several_processes():
            self.set_prefix(name)
        self.active_prefix = name

    def make_encoder(self, config: PrefixConfig) -> PrefixEncoder:
        """An encoder with the shapes that the resolved ``config`` has on this model; its values are arbitrary."""
        _, slots, heads, size = self.attachment.resolver.layout(config)
        gated = None if config.gate is None else slots[0].query_heads
        hidden = (config.encoder_hidden_size or heads * size) if config.prefix_projection else None
        encoder = PrefixEncoder(
            config.num_virtual_tokens,
            len(slots),
            heads,
            size,
            hidden_size=hidden,
            depth=config.encoder_depth,
            activation=config.encoder_activation,
            dropout=config.dropout,
            num_frozen_tokens=config.num_frozen_tokens,
            gate_heads=gated,
        )
        if config.mode == "embedding":
            width = self.base_model.get_input_embeddings().weight.shape[1]
            encoder.embedding = nn.Parameter(torch.zeros(config.num_virtual_tokens, width))
            encoder.mlp = FromEmbeddings(self.attachment, slots)
        return encoder

    def install_prefix(
        self, name: str, config: PrefixConfig, encoder: PrefixEncoder, task_heads: nn.ModuleDict, *, trainable: bool
    ) -> None:
        """Add a finished prefix and make it the active one."""
        for module in (encoder, task_heads):
            module.requires_grad_(trainable)
            module.train(self.training)
        train_copies(self.base_model, task_heads, trainable=trainable)
        encoder.unshown = self.attachment.resolver.unshown(config)
        self.heads[name] = task_heads
        self.prefixes[name] = encoder.to(device_of(self.base_model.get_input_embeddings()))
        self.prefix_configs[name] = config
        self.make_active(name)
