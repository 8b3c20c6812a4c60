"""Prefix tuning of a Hugging Face model: ``get_prefix_model`` and the model that it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_attn.hf.attach.banks import make_bank, make_rows, row_names
from prefix_attn.hf.attach.infix import end_of_prompt, start_of_targets
from prefix_attn.hf.attach.ranks import draw_alike, gathered, is_first
from prefix_attn.hf.attach.task_heads import copy_task_heads, task_heads_in_place
from prefix_attn.hf.attach.trained import changes, set_trained
from prefix_attn.hf.batched import Batched
from prefix_attn.hf.config import PeftPrefixConfig, PrefixConfig
from prefix_attn.hf.encoder import PrefixEncoder
from prefix_attn.hf.hub import download_options
from prefix_attn.hf.initial import draw_pieces, initial_embeddings, initial_kv, start_from_prefix
from prefix_attn.hf.io import checkpoint, formats
from prefix_attn.hf.io.stored import Stored
from prefix_attn.hf.io.writing import locked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def get_prefix_model(
    base: PreTrainedModel, config: PrefixConfig | PeftPrefixConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> PrefixModel:
    """Freeze ``base`` and give it one trainable prefix, named "default".

    If all parameters of ``base`` are trainable, as after ``from_pretrained``, all are frozen. If only some are, you
    chose them: a LoRA, norms, a head, the embeddings of new tokens. These stay trainable beside the prefix. Quantised
    weights do not count, nor does what a class freezes in every model, such as tables of positions. You can unfreeze
    more later: ``model.base_model.lm_head.requires_grad_(True)``. Everything that is trained is in ``state_dict``, in
    checkpoints and in the files of ``save_pretrained``.

    Args:
        base: a transformers model: decoder, encoder or both. Its attention function is switched in place.
        config: the prefix, or a PrefixTuningConfig or CartridgeConfig of PEFT (``PrefixConfig.from_peft``).
        tokenizer: needed for ``init_text``.

    Raises:
        TypeError: ``base`` is no bare transformers model.
        NotImplementedError: its attention cannot be served.
        ValueError: the configuration does not fit it. ``base`` is unchanged then.

    Examples:
        >>> model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
        >>> model(ids, labels=ids).loss.backward()
        >>> [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        ['prefixes.default.embedding']
    """
    model = PrefixModel(base)
    try:
        model.add_prefix("default", config, tokenizer)
    except Exception:
        model.attachment.remove()
        raise
    return model


class PrefixModel(Batched):
    """A frozen model with trained prefixes (Li and Liang 2021, section 4.2). Other attributes are the base model's.

    A forward or generate keeps the prefixes that it started with. If a callback or another thread adds, selects,
    deletes or disables prefixes meanwhile, that counts for later calls. Threads may run different prefixes at the same
    time. Prefixes with task heads may not, because task heads replace the model's own while they run.

    ``state_dict`` holds what is trained: the prefixes with their MLPs and task heads, and the trainable parameters of
    the base model. A Trainer saves it in its checkpoints and resumes from it. ``load_state_dict`` does not ask for what
    is frozen. ``from_pretrained`` reads what a Trainer saves, and the file of a state_dict, like a saved prefix.

    Examples:
        >>> model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
        >>> model.add_prefix("long", PrefixConfig(num_virtual_tokens=8))
        >>> model(ids.expand(3, -1), prefix_names=["default", "long", None]).logits.shape[:2]
        torch.Size([3, 3])
        >>> with model.disable_prefix():
        ...     frozen = model(ids)
    """

    def add_prefix(
        self, name: str, config: PrefixConfig | PeftPrefixConfig, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Add a prefix, initialised as ``config`` says. It becomes the active one.

        ``config`` may be PEFT's. The prefix is trained, unless ``inference_mode`` is set.
        """
        self.check_new_name(name)
        config = config if isinstance(config, PrefixConfig) else PrefixConfig.from_peft(config)
        config = self.attachment.resolver.resolve(config)
        draw_alike(slot.module for slot in self.attachment.resolver.layout(config).slots if slot.ranks > 1)
        config = draw_pieces(config, tokenizer)
        encoder = self.make_encoder(config)
        if config.init == "prefix":
            start_from_prefix(encoder, config, *self._init_prefix(config), self.attachment)
        elif config.mode == "embedding":
            encoder.embedding.data = initial_embeddings(self.base_model, config, tokenizer, self.attachment.probe)
        else:
            encoder.set_kv(initial_kv(self.attachment, config, tokenizer))
        task_heads = copy_task_heads(self.base_model, config.modules_to_save or ())
        self.install_prefix(name, config, encoder, task_heads, trainable=not config.inference_mode)

    def load_prefix(
        self,
        path: str | Path,
        name: str,
        *,
        is_trainable: bool = False,
        config: PrefixConfig | PeftPrefixConfig | None = None,
        **options: Any,
    ) -> None:
        """Add a prefix from a folder, a file or a Hub id, of any library in ``formats``. It becomes the active one.

        Args:
            path: where it is. If it has several prefixes, the one with this name is taken, otherwise the active one.
            name: the name of the new prefix.
            is_trainable: whether it is trained, with its MLP if that was saved.
            config: replaces the saved one. A state_dict needs it, because it does not say everything.
            options: subfolder, revision, token, cache_dir, local_files_only, force_download, as in PEFT.

        Raises:
            ValueError: the files do not fit the base model, are damaged, or have weights of the base model that would
                change the prefixes that are here. The model is unchanged then.
        """
        self.load_prefixes(path, name, is_trainable=is_trainable, config=config, **options)

    def save_pretrained(
        self,
        path: str | Path,
        *,
        training_state: bool = False,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        selected_adapters: Sequence[str] | None = None,
        safe_serialization: bool = True,
        save_function: Any = None,
    ) -> None:
        """Write the active prefix, folded, with a model card. The format is PEFT's if PEFT has such prefixes.

        Trainable weights of the base model are in the same file. ``from_pretrained`` sets them in a base model that is
        prepared as before training. So does PEFT.

        Args:
            path: the folder. A kill at any moment leaves the old files or the new ones.
            training_state: also write what resuming the training of an MLP needs.
            is_main_process: whether to write at all. With ``torch.distributed`` only the first process writes, as in
                transformers. If parameters are sharded, all processes have to call.
            state_dict: the values to write, as ``accelerator.get_state_dict(model)`` gives them.
            selected_adapters: the names of the prefixes to save instead. "default" goes into ``path``, each other one
                into a folder of its name in it, as in PEFT.
            safe_serialization: must be True. A pickle would not say which model and configuration it belongs to.
            save_function: not called. accelerate's scripts pass one for pickles.

        Raises:
            ValueError: there is no such prefix, or another wrong argument. Nothing is written then.
        """
        checkpoint.check_safe(safe_serialization)
        if self.active_prefix is None and selected_adapters is None:
            raise ValueError("there is no active prefix to save")
        names = [self.active_prefix] if selected_adapters is None else selected_adapters
        state = self.state_dict() if state_dict is None else state_dict
        with gathered(self) if self.is_made_together else nullcontext():
            saved = {str(name): checkpoint.parts(str(name), self.find_prefix(str(name))[0], state) for name in names}
        for name, parts in saved.items() if is_main_process and is_first() else ():
            folder = Path(path) if selected_adapters is None or name == "default" else Path(path) / name
            encoder, config = self.find_prefix(name)
            checkpoint.save_prefix(folder, parts, encoder, config, self.attachment, training_state=training_state)

    @classmethod
    def from_pretrained(
        cls,
        base: PreTrainedModel,
        path: str | Path,
        adapter_name: str | None = None,
        is_trainable: bool = False,
        config: PrefixConfig | PeftPrefixConfig | None = None,
        *,
        name: str | None = None,
        **options: Any,
    ) -> PrefixModel:
        """``base`` with the prefix in ``path``: ours, PEFT's, or that of another library that ``formats`` can read.

        Args:
            base: the model that the prefix was trained for.
            path: a folder, a file or a Hub id. If it has several prefixes, all are loaded under their names.
            adapter_name: PEFT's word for ``name``.
            is_trainable: whether the prefix is trained, with its MLP if that was saved.
            config: replaces the saved one. A state_dict needs it, because it does not say everything.
            name: the name of the prefix, "default" by default. Of several saved prefixes only this one is loaded.
            options: subfolder, revision, token, cache_dir, local_files_only, force_download, as in PEFT.

        Raises:
            TypeError: ``base`` is no bare transformers model.
            NotImplementedError: its attention cannot be served.
            ValueError: the files do not fit ``base``, or are damaged. ``base`` is unchanged then.
        """
        if None not in (name, adapter_name) and name != adapter_name:
            raise ValueError(f"name and adapter_name are the same thing, got {name!r} and {adapter_name!r}")
        model = cls(base)
        try:
            name = adapter_name if name is None else name
            model.load_prefixes(path, name, is_trainable=is_trainable, config=config, **options)
        except Exception:
            model.attachment.remove()
            raise
        return model

    def load_prefixes(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        is_trainable: bool = False,
        config: PrefixConfig | PeftPrefixConfig | None = None,
        **options: Any,
    ) -> None:
        """Add every prefix that ``path`` has, under its name. The one that was active becomes the active one.

        Arguments and errors are those of ``load_prefix``. A ``name`` adds only one, and a prefix alone is "default".
        """
        with locked(Path(path) / (options.get("subfolder") or "")):  # an MLP is in a file of its own
            found = self._read(path, options)
            if len(found) == 1 or name is not None:
                found = {name or "default": formats.choose(path, found, name)}
            for own in found:
                self.check_new_name(own)
            made = {own: self._made(stored, config, is_trainable=is_trainable) for own, stored in found.items()}
        for own, (*_, others) in made.items():
            if self.prefix_configs and (changed := changes(self.base_model, others)):
                raise ValueError(
                    f"{path}: {own} was trained with weights of the base model that are not those of "
                    f"{self.prefix_names}: {changed[:4]}; give it a base model of its own"
                )
        for own, parts in made.items():
            self._install(own, *parts)
        first = "default" if "default" in made else next(iter(made))
        self.make_active(next((own for own in made if found[own].active), first))

    def forward(
        self,
        *args: Any,
        prefix_names: Sequence[str | None] | None = None,
        adapter_names: Sequence[str | None] | None = None,
        infix_start: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward with the active prefix. Positions follow the mask by default.

        Args:
            args: positional arguments of the base model's forward.
            prefix_names: the prefix of each row, instead of the active one. None in it is no prefix.
            adapter_names: the same in PEFT's words, with "__base__" for no prefix.
            infix_start: (B,) int, for ``mode="infix"``: the first column of each row that sees the infix. Columns of
                padding and of the cache count. Default: the column before the first label that is not -100. That
                column predicts the label.
            kwargs: keyword arguments of the base model's forward.

        Raises:
            ValueError: unknown names, not one name per row, prefixes that do not fit into one batch, or no place for
                an infix.
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
        """The base model's generate with the active prefix, or with one prefix per row.

        Args:
            args: positional arguments of the base model's generate.
            prefix_names: the prefix of each row of the prompt. None in it is no prefix. Beams and returned sequences
                have the prefix of their row.
            adapter_names: the same in PEFT's words, with "__base__" for no prefix.
            infix_start: as in ``forward``. Default: the last column of the prompt.
            kwargs: keyword arguments of the base model's generate.

        Raises:
            ValueError: as in ``forward``.
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
                kv = self._kv_of(name, encoder)
                stack.enter_context(task_heads_in_place(self._base(), self.task_heads(name)))
                stack.enter_context(runner.running(kv, resolver.layout(config), gates=encoder.gate, starts=starts))
            else:
                configs = {name: config for name, (_, config) in found.items()}
                self.check_together(list(found))
                kvs = [self._kv_of(name, encoder) for name, (encoder, _) in found.items()]
                rows = make_rows(names, configs, kvs)
                gates: list[Tensor] = [encoder.gate for encoder, _ in found.values() if encoder.gate is not None]
                layout = resolver.layout(next(iter(configs.values())))
                bank = make_bank(kvs), layout, rows, torch.stack(gates) if gates else None
                if starts is not None:  # in rows with another prefix all columns see it
                    infix = [name is not None and configs[name].mode == "infix" for name in names]
                    starts = starts * torch.tensor(infix, device=starts.device)
                stack.enter_context(runner.running(*bank, starts))
            yield

    def _kv_of(self, name: str, encoder: PrefixEncoder) -> Tensor:
        """The keys and values of a prefix for a forward, which trains it."""
        if not torch.is_grad_enabled():
            return encoder()
        return self._resting.made(name, partial(self._parameters_of, name), encoder)

    def _stacks(self) -> set[nn.Module]:
        return self.attachment.runner.stacks

    def _on_demand(self, given: dict[str, Any], *, needed: bool) -> AbstractContextManager[None]:
        prompts = (given.get(name) for name in ("input_ids", "inputs_embeds", "input_features"))
        names = row_names(given.get("prefix_names"), given.get("adapter_names"), *prompts)
        start = partial(start_of_targets, given.get("infix_start"), given)
        needed = needed and not self._disabled and any(names or [self.active_prefix])
        return self.attachment.runner.on_demand(partial(self._running, names, start), needed=needed)

    def _read(self, path: str | Path, options: Mapping[str, Any]) -> dict[str, Stored]:
        layers = self.attachment.resolver.decoder_layers
        return formats.read_all(path, decoder_layers=layers, **download_options(options))

    def _made(
        self, stored: Stored, config: PrefixConfig | PeftPrefixConfig | None, *, is_trainable: bool
    ) -> tuple[PrefixConfig, PrefixEncoder, nn.ModuleDict, dict[str, Tensor]]:
        """What ``stored`` becomes on this model: configuration, encoder, task heads, weights of the base model."""
        if config is not None:
            config = config if isinstance(config, PrefixConfig) else PrefixConfig.from_peft(config)
            stored = stored._replace(config=config)
        loaded = checkpoint.load_prefix(stored, self.attachment, is_trainable=is_trainable)
        config = loaded.config
        encoder = self.make_encoder(config)
        try:
            encoder.load_state_dict(loaded.parameters)
        except RuntimeError as error:
            raise ValueError(f"{stored.path}: the saved MLP does not fit its configuration ({error})") from None
        if config.mode == "embedding" and not is_trainable:
            encoder.fold()
            config.fold()
        config.inference_mode = not is_trainable
        task_heads = copy_task_heads(self.base_model, config.modules_to_save or ())
        task_heads.load_state_dict(loaded.task_heads)
        return config, encoder, task_heads, loaded.others

    def _install(
        self, name: str, config: PrefixConfig, encoder: PrefixEncoder, task_heads: nn.ModuleDict, others: Any
    ) -> None:
        self.install_prefix(name, config, encoder, task_heads, trainable=not config.inference_mode)
        set_trained(self.base_model, others, trainable=not config.inference_mode)

    def _init_prefix(self, config: PrefixConfig) -> tuple[PrefixEncoder, PrefixConfig]:
        """The prefix that a new one starts from: one of this model, or one from files."""
        if config.init_path is not None:
            path = str(config.init_path)
            stored = formats.choose(path, self._read(path, {}), None)
            source, encoder, *_ = self._made(stored, None, is_trainable=config.mode == "embedding")
            return encoder, source
        assert config.init_prefix is not None
        try:
            return self.find_prefix(config.init_prefix)
        except ValueError as error:
            raise ValueError(f"init_prefix: {error}; a folder, a file or a Hub id is given as init_path") from None
