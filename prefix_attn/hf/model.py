"""Prefix tuning of a Hugging Face model: ``get_prefix_model`` and the model that it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_attn.hf.attach.banks import make_bank, make_rows, row_names
from prefix_attn.hf.attach.infix import end_of_prompt, start_of_targets
from prefix_attn.hf.attach.task_heads import copy_task_heads, task_heads_in_place
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.encoder import PrefixEncoder
from prefix_attn.hf.initial import draw_pieces, initial_embeddings, initial_kv, start_from_prefix
from prefix_attn.hf.io import checkpoint
from prefix_attn.hf.prefixes import NamedPrefixes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def get_prefix_model(
    base: PreTrainedModel, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> PrefixModel:
    """``base``, frozen, with one trainable prefix named "default".

    If some parameters of ``base`` are trainable and others are not, somebody chose them: a LoRA, norms, a head, the
    embeddings of new tokens. These stay trainable beside the prefix. If all are, as ``from_pretrained`` leaves them,
    nothing was chosen, and all are frozen. What a class freezes in every model, such as tables of positions, and
    quantised weights do not count. More can be unfrozen later: ``model.base_model.lm_head.requires_grad_(True)``.

    Args:
        base: a transformers model, decoder, encoder or both; its attention function is switched in place.
        config: the prefix.
        tokenizer: for ``init_text``.

    Raises:
        TypeError: ``base`` is no bare transformers model. NotImplementedError: its attention cannot be served.
        ValueError: the configuration does not fit it. ``base`` is unchanged then.
    """
    model = PrefixModel(base)
    try:
        model.add_prefix("default", config, tokenizer)
    except Exception:
        model.attachment.remove()
        raise
    return model


class PrefixModel(NamedPrefixes):
    """A frozen model with trained prefixes (Li and Liang 2021, section 4.2). Other attributes are the base model's.

    A forward or generate keeps the prefixes that it started with. Prefixes that are added, selected, deleted or
    disabled meanwhile, from a callback or another thread, count for later calls. Threads may run different prefixes at
    the same time, unless these have task heads, which replace the model's own while they run.

    ``state_dict`` holds what is trained, wherever the model is nested: the prefixes with their MLPs and task heads, and
    those parameters of the base model that are trainable. A Trainer saves it in its checkpoints and resumes from it.
    ``load_state_dict`` misses nothing that is frozen.
    """

    def add_prefix(self, name: str, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Add a trainable prefix, initialised as ``config`` says. It becomes the active one."""
        self.check_new_name(name)
        config = draw_pieces(self.attachment.resolver.resolve(config), tokenizer)
        encoder = self.make_encoder(config)
        if config.init == "prefix":
            start_from_prefix(encoder, config, *self._init_prefix(config), self.attachment)
        elif config.mode == "embedding":
            encoder.embedding.data = initial_embeddings(self.base_model, config, tokenizer)
        else:
            encoder.set_kv(initial_kv(self.attachment, config, tokenizer))
        task_heads = copy_task_heads(self.base_model, config.modules_to_save or ())
        self.install_prefix(name, config, encoder, task_heads, trainable=True)

    def load_prefix(self, path: str | Path, name: str, *, is_trainable: bool = False) -> None:
        """Add a prefix from a folder, a file or a Hub id, of any library in ``formats``. It becomes the active one."""
        self.check_new_name(name)
        config, encoder, task_heads = self._load(path, is_trainable=is_trainable)
        self.install_prefix(name, config, encoder, task_heads, trainable=is_trainable)

    def save_pretrained(self, path: str | Path, *, training_state: bool = False) -> None:
        """Write the active prefix, folded, in PEFT's format where PEFT has such prefixes.

        Args:
            path: the folder. A kill at any moment leaves the old files or the new ones.
            training_state: also write what continuing the training of an MLP needs.
        """
        if self.active_prefix is None:
            raise ValueError("there is no active prefix to save")
        encoder, config = self.find_prefix(self.active_prefix)
        task_heads = self.task_heads(self.active_prefix)
        checkpoint.save_prefix(Path(path), encoder, task_heads, config, self.attachment, training_state=training_state)

    @classmethod
    def from_pretrained(
        cls, base: PreTrainedModel, path: str | Path, *, is_trainable: bool = False, name: str = "default"
    ) -> PrefixModel:
        """``base`` with the prefix in ``path``: a folder, a file or a Hub id, of any library that ``formats`` knows.

        Raises:
            TypeError, NotImplementedError: as ``get_prefix_model``.
            ValueError: the files do not fit ``base``, or are damaged.
        """
        model = cls(base)
        try:
            model.load_prefix(path, name, is_trainable=is_trainable)
        except Exception:
            model.attachment.remove()
            raise
        return model

    def forward(
        self,
        *args: Any,
        prefix_names: Sequence[str | None] | None = None,
        adapter_names: Sequence[str | None] | None = None,
        infix_start: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward with the active prefix. Positions default to those that the mask implies.

        Args:
            args: positional arguments of the base model's forward.
            prefix_names: the prefix of each row, None = no prefix, instead of the active one for all.
            adapter_names: the same in PEFT's words, where "__base__" is no prefix.
            infix_start: (B,) int, for prefixes with ``mode="infix"``: the first column of each row that sees them;
                columns of padding and of the cache count. Default: the column before the first label that is not
                -100, where that label is predicted.
            kwargs: keyword arguments of the base model's forward.

        Raises:
            ValueError: unknown names, another number of names than of rows, prefixes that do not fit one batch, or
                nothing that says where an infix stands.
        """
        given = self.named(args, kwargs)
        prompts = (given.get(name) for name in ("input_ids", "inputs_embeds", "input_features"))
        names = row_names(prefix_names, adapter_names, *prompts)
        with self._own_forward(), self._running(names, partial(start_of_targets, infix_start, given)):
            return self.base_model(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        prefix_names: Sequence[str | None] | None = None,
        adapter_names: Sequence[str | None] | None = None,
        infix_start: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's generate with the active prefix, or those of ``prefix_names``. Each is made once.

        Args:
            args: positional arguments of the base model's generate.
            prefix_names: the prefix of each row of the prompt, None = no prefix. Its beams and sequences have it too.
            adapter_names: the same in PEFT's words, where "__base__" is no prefix.
            infix_start: as for ``forward``; default: the last column of the prompt.
            kwargs: keyword arguments of the base model's generate.

        Raises:
            ValueError: as ``forward``.
        """
        names = ("inputs", "inputs_embeds", self._base().main_input_name)
        prompts = (*args[:1], *(kwargs.get(name) for name in names))
        names = row_names(prefix_names, adapter_names, *prompts)
        with self._own_forward(), self._running(names, partial(end_of_prompt, infix_start, *prompts)):
            return self.base_model.generate(*args, **kwargs)

    @contextmanager
    def _running(self, names: Sequence[str | None] | None, start: Callable[[], Tensor]) -> Iterator[None]:
        """The context in which the rows of a batch have the prefixes ``names``, or all of them the active one.

        ``start`` says in which column of each row an infix begins to be seen.
        """
        names = [self.active_prefix] if names is None else names
        found = {name: self.find_prefix(name) for name in names if name is not None}
        runner, resolver = self.attachment.runner, self.attachment.resolver
        starts = None
        if not self._disabled and any(config.mode == "infix" for _, config in found.values()):
            starts = start()
        with ExitStack() as stack:
            if self._disabled or not found:
                stack.enter_context(runner.plain())
            elif len(set(names)) == 1:
                ((name, (encoder, config)),) = found.items()
                kv = encoder()
                stack.enter_context(task_heads_in_place(self._base(), self.task_heads(name)))
                stack.enter_context(runner.running(kv, resolver.layout(config), gates=encoder.gate, starts=starts))
            else:
                configs = {name: config for name, (_, config) in found.items()}
                self._check_together(configs)
                kvs = [encoder() for encoder, _ in found.values()]
                rows = make_rows(names, configs, kvs)
                gates: list[Tensor] = [encoder.gate for encoder, _ in found.values() if encoder.gate is not None]
                layout = resolver.layout(next(iter(configs.values())))
                bank = make_bank(kvs), layout, rows, torch.stack(gates) if gates else None
                if starts is not None:  # in rows with another prefix all columns see it
                    infix = [name is not None and configs[name].mode == "infix" for name in names]
                    starts = starts * torch.tensor(infix, device=starts.device)
                stack.enter_context(runner.running(*bank, starts))
            yield

    def _stacks(self) -> set[nn.Module]:
        return self.attachment.runner.stacks

    def _on_demand(self, given: dict[str, Any], *, needed: bool) -> AbstractContextManager[None]:
        prompts = (given.get(name) for name in ("input_ids", "inputs_embeds", "input_features"))
        names = row_names(given.get("prefix_names"), given.get("adapter_names"), *prompts)
        start = partial(start_of_targets, given.get("infix_start"), given)
        needed = needed and not self._disabled and any(names or [self.active_prefix])
        return self.attachment.runner.on_demand(partial(self._running, names, start), needed=needed)

    def _check_together(self, configs: dict[str, PrefixConfig]) -> None:
        for field in ("backend", "sites", "layers", "gate"):
            values = {name: getattr(config, field) for name, config in configs.items()}
            if any(value != next(iter(values.values())) for value in values.values()):
                raise ValueError(f"the prefixes of one batch must have one {field}, got {values}")
        if own := [name for name in configs if len(self.task_heads(name))]:
            raise ValueError(f"prefixes with task heads cannot share a batch with others, got {own}")

    def _load(self, path: str | Path, *, is_trainable: bool) -> tuple[PrefixConfig, PrefixEncoder, nn.ModuleDict]:
        config, parameters, saved = checkpoint.load_prefix(path, self.attachment, is_trainable=is_trainable)
        encoder = self.make_encoder(config)
        try:
            encoder.load_state_dict(parameters)
        except RuntimeError as error:
            raise ValueError(f"{path}: the saved MLP does not fit its configuration ({error})") from None
        task_heads = copy_task_heads(self.base_model, config.modules_to_save or ())
        task_heads.load_state_dict(saved)
        return config, encoder, task_heads

    def _init_prefix(self, config: PrefixConfig) -> tuple[PrefixEncoder, PrefixConfig]:
        """The prefix that a new one starts from: one of this model, or one from files."""
        if config.init_path is not None:
            source, encoder, _ = self._load(os.fspath(config.init_path), is_trainable=config.mode == "embedding")
            return encoder, source
        assert config.init_prefix is not None
        try:
            return self.find_prefix(config.init_prefix)
        except ValueError as error:
            raise ValueError(f"init_prefix: {error}; a folder, a file or a Hub id is given as init_path") from None
