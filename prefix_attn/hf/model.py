"""Prefix tuning of a Hugging Face model: ``get_prefix_model`` and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_attn.hf.attach.attachment import Attachment
from prefix_attn.hf.attach.banks import NO_PREFIX, make_bank, make_rows, row_names
from prefix_attn.hf.attach.infix import end_of_prompt, start_of_targets
from prefix_attn.hf.attach.task_heads import copy_heads, heads_in_place
from prefix_attn.hf.attach.wrapper import Wrapper, device_of
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.encoder import PrefixEncoder
from prefix_attn.hf.initial import FromEmbeddings, draw_pieces, initial_embeddings, initial_kv, start_from_prefix
from prefix_attn.hf.io import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def get_prefix_model(
    base: PreTrainedModel, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> PrefixModel:
    """``base``, frozen, with one trainable prefix named "default".

    Args:
        base: a transformers model, decoder, encoder or both; its attention function is switched in place.
        config: the prefix.
        tokenizer: for ``init_text``.

    Raises:
        NotImplementedError: the model's attention cannot be served. ValueError: the configuration does not fit it.
        ``base`` is unchanged then.
    """
    model = PrefixModel(base)
    try:
        model.add_prefix("default", config, tokenizer)
    except Exception:
        model._attachment.remove()
        raise
    return model


class PrefixModel(Wrapper):
    """A frozen model and its prefixes (Li and Liang 2021, section 4.2). Other attributes are the model's own.

    A forward or generate keeps the prefixes that it started with. Adding, setting, deleting and disabling, from a
    callback or another thread, is for those that start later; threads may run different prefixes at the same time,
    unless these have heads, which take the place of the model's own while they run.

    ``state_dict`` holds the prefixes alone, with MLPs and heads: a Trainer's checkpoint is that, and resumes from it.
    """

    def __init__(self, base_model: PreTrainedModel) -> None:
        """Attach to ``base_model``, without any prefix yet."""
        super().__init__()
        self._attachment = Attachment(base_model)
        self.base_model = base_model
        self.prefixes = nn.ModuleDict()
        self.heads = nn.ModuleDict()  # of each prefix: nn.ModuleDict
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
        config = draw_pieces(self._attachment.resolver.resolve(config), tokenizer)
        encoder = self._encoder(config)
        if config.init == "prefix":
            start_from_prefix(encoder, config, *self._other(config), self._attachment)
        elif config.mode == "embedding":
            encoder.embedding.data = initial_embeddings(self.base_model, config, tokenizer)
        else:
            encoder.set_kv(initial_kv(self._attachment, config, tokenizer))
        heads = copy_heads(self.base_model, config.modules_to_save or ())
        self._install(name, config, encoder, heads, trainable=True)

    def load_prefix(self, path: str | Path, name: str, *, is_trainable: bool = False) -> None:
        """A prefix from a folder, a file or a Hub id, of any library in ``formats``; it becomes the active one."""
        self._check_new(name)
        config, encoder, heads = self._load(path, is_trainable=is_trainable)
        self._install(name, config, encoder, heads, trainable=is_trainable)

    def set_prefix(self, name: str) -> None:
        """Make ``name`` the active prefix: the one that forward, generate and training use."""
        self._find(name)
        self.active_prefix = name

    def delete_prefix(self, name: str) -> None:
        """Remove a prefix; the oldest remaining one becomes active if it was."""
        self._find(name)
        if self.active_prefix == name:  # first: another thread may ask for the active prefix at any moment
            self.active_prefix = next((other for other in self.prefix_configs if other != name), None)
        del self.prefix_configs[name], self.prefixes[name], self.heads[name]

    @contextmanager
    def disable_prefix(self) -> Iterator[None]:
        """The frozen model as it was, within the context, whatever is active or named by a call."""
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
            config.fold()

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
        token_type_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        prefix_names: Sequence[str | None] | None = None,
        adapter_names: Sequence[str | None] | None = None,
        infix_start: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward with the active prefix. Positions default to those that the mask implies.

        A Trainer keeps the columns of a data set that have the name of an argument.

        Args:
            input_ids: these, and all that are not described, are the base model's.
            attention_mask: see ``input_ids``.
            position_ids: see ``input_ids``.
            past_key_values: see ``input_ids``.
            inputs_embeds: see ``input_ids``.
            labels: see ``input_ids``.
            use_cache: see ``input_ids``.
            token_type_ids: see ``input_ids``.
            input_features: see ``input_ids``.
            decoder_input_ids: see ``input_ids``.
            decoder_attention_mask: see ``input_ids``.
            prefix_names: the prefix of each row, None = no prefix, instead of the active one for all.
            adapter_names: the same in PEFT's words, where "__base__" is no prefix.
            infix_start: (B,) int, for prefixes with ``mode="infix"``: the first column of each row that sees them;
                columns of padding and of the cache count. Default: the column before the first label that is not -100,
                where that label is predicted.
            kwargs: see ``input_ids``.

        Raises:
            ValueError: unknown names, another number of names than of rows, prefixes that do not fit one batch, or
                nothing that says where an infix stands.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "token_type_ids": token_type_ids,
            "input_features": input_features,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        names = row_names(prefix_names, adapter_names, input_ids, inputs_embeds, input_features)
        with self._running(names, partial(start_of_targets, infix_start, given | kwargs)):
            return self.base_model(**{n: v for n, v in given.items() if v is not None}, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        prefix_names: Sequence[str | None] | None = None,
        adapter_names: Sequence[str | None] | None = None,
        infix_start: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's generate, with the active prefix, or those of ``prefix_names``, which are made once.

        Args:
            args: the base model's, as ``kwargs``.
            prefix_names: the prefix of each row of the prompt, None = no prefix. Its beams and sequences have it too.
            adapter_names: the same in PEFT's words, where "__base__" is no prefix.
            infix_start: as for ``forward``; default: the last column of the prompt.
            kwargs: see ``args``.

        Raises:
            ValueError: as ``forward``.
        """
        names = ("inputs", "inputs_embeds", self.base_model.main_input_name)
        prompts = (*args[:1], *(kwargs.get(name) for name in names))
        names = row_names(prefix_names, adapter_names, *prompts)
        with self._running(names, partial(end_of_prompt, infix_start, *prompts)):
            return self.base_model.generate(*args, **kwargs)

    @contextmanager
    def _running(self, names: Sequence[str | None] | None, start: Callable[[], Tensor]) -> Iterator[None]:
        """The context in which the rows of a batch have the prefixes ``names``, or all of them the active one.

        ``start`` says in which column of each row an infix begins to be seen.
        """
        names = [self.active_prefix] if names is None else names
        found = {name: self._find(name) for name in names if name is not None}
        starts = None
        if not self._disabled and any(config.mode == "infix" for _, config in found.values()):
            starts = start()
        with ExitStack() as stack:
            if self._disabled or not found:
                stack.enter_context(self._attachment.runner.plain())
            elif len(set(names)) == 1:
                ((name, (encoder, config)),) = found.items()
                kv = encoder()
                stack.enter_context(heads_in_place(self.base_model, self._heads(name)))
                layout = self._attachment.resolver.layout(config)
                stack.enter_context(self._attachment.runner.running(kv, layout, gates=encoder.gate, starts=starts))
            else:
                configs = {name: config for name, (_, config) in found.items()}
                self._check_together(configs)
                kvs = [encoder() for encoder, _ in found.values()]
                rows = make_rows(names, configs, kvs)
                gates: list[Tensor] = [encoder.gate for encoder, _ in found.values() if encoder.gate is not None]
                layout = self._attachment.resolver.layout(next(iter(configs.values())))
                bank = make_bank(kvs), layout, rows, torch.stack(gates) if gates else None
                if starts is not None:  # in rows with another prefix all columns see it
                    infix = [name is not None and configs[name].mode == "infix" for name in names]
                    starts = starts * torch.tensor(infix, device=starts.device)
                stack.enter_context(self._attachment.runner.running(*bank, starts))
            yield

    def _check_together(self, configs: dict[str, PrefixConfig]) -> None:
        for field in ("backend", "sites", "layers", "gate"):
            values = {name: getattr(config, field) for name, config in configs.items()}
            if any(value != next(iter(values.values())) for value in values.values()):
                raise ValueError(f"the prefixes of one batch must have one {field}, got {values}")
        if heads := [name for name in configs if len(self._heads(name))]:
            raise ValueError(f"prefixes with heads cannot share a batch with others, got {heads}")

    # Parameters -------------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The parameters of the prefixes and their heads; the frozen base is not in it."""
        return self._own().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The reverse of ``state_dict``."""
        return self._own().load_state_dict(state_dict, strict=strict, assign=assign)

    def _own(self) -> nn.ModuleDict:
        return nn.ModuleDict({"prefixes": self.prefixes, "heads": self.heads})

    # Files ------------------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path, *, training_state: bool = False) -> None:
        """Write the active prefix, folded, in PEFT's format where PEFT has such prefixes.

        Args:
            path: the folder. A kill at any moment leaves the old files or the new ones.
            training_state: also what continuing the training of an MLP needs.
        """
        if self.active_prefix is None:
            raise ValueError("there is no active prefix to save")
        encoder, config = self._find(self.active_prefix)
        heads = self._heads(self.active_prefix)
        checkpoint.save_prefix(Path(path), encoder, heads, config, self._attachment, training_state=training_state)

    @classmethod
    def from_pretrained(
        cls, base: PreTrainedModel, path: str | Path, *, is_trainable: bool = False, name: str = "default"
    ) -> PrefixModel:
        """``base`` with the prefix in ``path``: a folder, a file or a Hub id, of any library that ``formats`` knows.

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
        if name == NO_PREFIX:
            raise ValueError(f"a prefix cannot be named {name!r}: adapter_names means no prefix by it")
        if not name or "." in name or hasattr(self.prefixes, name):
            raise ValueError(f"a prefix cannot be named {name!r}: its name becomes that of a module")

    def _encoder(self, config: PrefixConfig) -> PrefixEncoder:
        _, slots, heads, size = self._attachment.resolver.layout(config)
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
            encoder.mlp = FromEmbeddings(self._attachment, slots)
        return encoder

    def _load(self, path: str | Path, *, is_trainable: bool) -> tuple[PrefixConfig, PrefixEncoder, nn.ModuleDict]:
        config, parameters, saved = checkpoint.load_prefix(path, self._attachment, is_trainable=is_trainable)
        encoder = self._encoder(config)
        try:
            encoder.load_state_dict(parameters)
        except RuntimeError as error:
            raise ValueError(f"{path}: the saved MLP does not fit its configuration ({error})") from None
        heads = copy_heads(self.base_model, config.modules_to_save or ())
        heads.load_state_dict(saved)
        return config, encoder, heads

    def _other(self, config: PrefixConfig) -> tuple[PrefixEncoder, PrefixConfig]:
        """The prefix that ``config.init_prefix`` names, here or in files."""
        assert config.init_prefix is not None
        if config.init_prefix in self.prefix_configs:
            return self._find(config.init_prefix)
        other, encoder, _ = self._load(config.init_prefix, is_trainable=config.mode == "embedding")
        return encoder, other

    def _find(self, name: str) -> tuple[PrefixEncoder, PrefixConfig]:
        if name not in self.prefix_configs:
            raise ValueError(f"no prefix named {name!r}; there are {self.prefix_names}")
        encoder = self.prefixes[name]
        assert isinstance(encoder, PrefixEncoder)
        return encoder, self.prefix_configs[name]

    def _heads(self, name: str) -> nn.ModuleDict:
        heads = self.heads[name]
        assert isinstance(heads, nn.ModuleDict)
        return heads

    def _install(
        self, name: str, config: PrefixConfig, encoder: PrefixEncoder, heads: nn.ModuleDict, *, trainable: bool
    ) -> None:
        for module in (encoder, heads):
            module.requires_grad_(trainable)
            module.train(self.training)
        self.heads[name] = heads
        self.prefixes[name] = encoder.to(device_of(self.base_model.get_input_embeddings()))
        self.prefix_configs[name] = config
        self.active_prefix = name
