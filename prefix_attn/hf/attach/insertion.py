"""Insert virtual tokens into every row of a batch: embedding-only prefix tuning for any transformers model.

Virtual tokens enter with the input embeddings. They stand between a row's left padding and its first token, so padding
changes nothing, not even under sliding windows. After the last layer they are cut out again, so that task heads,
poolers and losses see the sequence alone. In an encoder-decoder they stay in the encoder's output, because the decoder
attends to them.

A model of images and text makes masks, positions and the places of images from the token ids, before the stack of its
text is called. There, virtual tokens are put into the ids with an id of text, and the stack gets their embeddings.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.utils import ModelOutput

from prefix_attn.hf.attach.outside import called
from prefix_attn.hf.attach.positions import cache_of, from_mask, mask_of, starts_again
from prefix_attn.hf.attach.slots import find_layers
from prefix_attn.hf.attach.window import Tables, check_length
from prefix_attn.hf.attach.wrapper import check_base, device_of, evaluating


class Insertion:
    """Inserts virtual tokens into the rows of ``base`` and cuts them out again."""

    def __init__(self, base: PreTrainedModel) -> None:
        """Find where in ``base`` tokens enter and leave.

        Raises:
            TypeError: ``base`` is no bare transformers model.
            NotImplementedError: the model takes no input embeddings, or does something else with
                them than with ids.
        """
        check_base(base)
        self._base, self._name = base, type(base).__name__
        self._decoder = base.get_decoder() if base.config.is_encoder_decoder else None
        self._layers = base.get_encoder() if self._decoder else find_layers(base)[0]
        self._first = next(m for m in self._layers.modules() if isinstance(m, nn.ModuleList))[0]
        around = _around(base, self._layers)
        self._stack = around[-1]
        if self._decoder is not None and _has_towers(base, self._stack, self._decoder):
            raise NotImplementedError(f"{self._name} is an encoder-decoder that reads more than text")
        outer = [m for m in around if m is not base and self._decoder is None and _has_towers(m, self._stack)]
        self._entrance = [*outer, self._stack][0]
        self._names = list(inspect.signature(self._entrance.forward).parameters)
        if any("cross_attention" in name for name in self._names):
            raise NotImplementedError(f"{self._name} attends to images by cross attention, which counts their tokens")
        if base.can_generate() and self._decoder is None and not self._counts_tokens(base):
            raise NotImplementedError(f"{self._name} has no past_key_values: virtual tokens would enter at every step")
        # The positions of other models are their own affair: RoBERTa's begin at 2.
        self._is_causal = base.can_generate() or any(getattr(m, "is_causal", False) for m in base.modules())
        self._filled: WeakSet[Cache] = _Caches()  # with virtual tokens
        self._is_running = False
        self._text = _ids_of_text(base.config)
        try:
            with torch.no_grad(), evaluating(base):
                self._rehearse()
        except NotImplementedError:
            raise
        except Exception as error:  # as in Probe
            raise NotImplementedError(f"{self._name} does not run on a few tokens alone ({error})") from error

    @property
    def embeddings(self) -> Any:
        """The module that makes the input embeddings, which may be set on the base model at any time."""
        return self._base.get_input_embeddings()

    @property
    def stacks(self) -> set[nn.Module]:
        """The modules that virtual tokens enter by."""
        return {self._entrance}

    @contextmanager
    def running(self, table: Tensor, *, needed: bool = True) -> Iterator[None]:
        """Forwards of the model within the context have the virtual tokens ``table`` (P, hidden size) in every row.

        A context within another one changes nothing.

        Raises:
            RuntimeError: on leaving, if no forward inserted them, and ``needed`` or layers ran without them: a prefix
                is never lost silently.
        """
        if self._is_running:
            yield
            return
        last: deque[_Places | None] = deque(maxlen=1)  # what the last forward inserted, None if its cache holds it

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            kwargs, places = self._insert(table, dict(zip(self._names, args)) | kwargs)
            last.append(places)
            return (), kwargs

        def fill(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            if not last or last[-1] is None:
                return None
            given = kwargs.get("inputs_embeds")
            given = self.embeddings(kwargs["input_ids"]) if given is None else given
            return args, kwargs | {"input_ids": None, "inputs_embeds": last[-1].fill(table, given)}

        def leave(_: nn.Module, __: Any, output: Any) -> Any:
            return output if not last or last[-1] is None else _cut(output, last[-1])

        def cross(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if (mask := kwargs.get("encoder_attention_mask")) is not None:
                kwargs = kwargs | {"encoder_attention_mask": _Places(mask, len(table)).insert(mask.new_ones(()), mask)}
            return args, kwargs

        hooks = [self._entrance.register_forward_pre_hook(enter, with_kwargs=True)]
        if self._entrance is not self._stack:
            hooks += [self._stack.register_forward_pre_hook(fill, with_kwargs=True)]
        if self._decoder is None:
            hooks += [module.register_forward_hook(leave) for module in {self._layers, self._stack}]
        else:
            hooks += [self._decoder.register_forward_pre_hook(cross, with_kwargs=True)]
        self._is_running = True
        try:
            with called([self._first]) as ran:
                yield
        finally:
            self._is_running = False
            for hook in hooks:
                hook.remove()
        if not last and (needed or ran):
            raise RuntimeError(f"{self._name} did not run {type(self._entrance).__name__}: no virtual token entered it")

    def _counts_tokens(self, base: PreTrainedModel) -> bool:
        """Whether the model's cache knows how many tokens it holds. With recurrent layers alone it does not."""
        if not {"past_key_values", "cache"} & set(self._names):
            return False
        try:
            return DynamicCache(config=base.config).get_seq_length() == 0
        except ValueError:
            return False

    def _rehearse(self) -> None:
        """Test insertion in three forwards of four tokens."""
        ids = torch.tensor([self._text], device=device_of(self.embeddings))
        with Tables(ids) as tables:
            expected = self._entrance(input_ids=ids)[0]
        self._positions = tables.positions(self._stack)
        if not torch.allclose(self._entrance(inputs_embeds=self.embeddings(ids))[0], expected):
            raise NotImplementedError(f"{self._name} does not treat inputs_embeds as the embeddings of input_ids")
        with self.running(self.embeddings(ids[0, :1])):
            length = self._entrance(input_ids=ids)[0].shape[1]
        if length != (4 if self._decoder is None else 5):
            raise NotImplementedError(
                f"{self._name} does not hand on what its layers return: nothing can be cut out of it"
            )

    def _insert(self, table: Tensor, kwargs: dict[str, Any]) -> tuple[dict[str, Any], _Places | None]:
        """Add the virtual tokens to the entrance's arguments. Also return their places if the cache lacks them yet."""
        tokens, mask, cache = kwargs.get("inputs_embeds"), kwargs.get("attention_mask"), cache_of(kwargs)
        if tokens is None:
            tokens = kwargs["input_ids"] if self._entrance is not self._stack else self.embeddings(kwargs["input_ids"])
        (B, S), P = tokens.shape[:2], len(table)
        past = 0 if cache is None else cache.get_seq_length()
        length = past + S - (P if past else 0)
        if past and mask is None and cache in self._filled:  # generate drops a mask that hides nothing
            mask = tokens.new_ones(B, length, dtype=torch.int64)
        _check(kwargs | {"attention_mask": mask}, length)
        if cache is not None and not past:
            self._filled.add(cache)
        mask = torch.ones(B, S, dtype=torch.int64, device=tokens.device) if mask is None else mask
        places = _Places(mask, P)
        if self._positions is not None and length + P > self._positions:
            longest = int(mask.sum(-1).max()) if self._is_causal else length
            check_length(longest, P, self._positions)
        new = {"attention_mask": places.insert(mask.new_ones(()), mask)}
        if not past:
            virtual = table.to(tokens) if tokens.is_floating_point() else tokens.new_full((), self._text[0])
            tokens = places.insert(virtual, tokens)
            types = {n: t for n, t in kwargs.items() if n.endswith("token_type_ids") and isinstance(t, Tensor)}
            new |= {name: places.insert(t.new_zeros(()), t) for name, t in types.items()}
        new |= {"input_ids": None, "inputs_embeds": tokens} if tokens.is_floating_point() else {"input_ids": tokens}
        if (given := kwargs.get("position_ids")) is not None:
            given = given.expand(*given.shape[:-2], B, -1)
            new["position_ids"] = given + P if past else _insert_positions(given, places)
        elif self._is_causal and "position_ids" in self._names and self._entrance is self._stack:
            positions = from_mask(new, mask_of(new))  # of which padding may count beyond the last
            new["position_ids"] = positions if self._positions is None else positions.clamp(max=self._positions - 1)
        return kwargs | new, None if past else places


class _Caches(WeakSet[Cache]):
    def __reduce__(self) -> tuple[type[_Caches], tuple[()]]:
        """A copy of the model has filled none yet."""
        return type(self), ()


def _insert_positions(given: Tensor, places: _Places) -> Tensor:
    """(..., B, S) -> (..., B, P + S): virtual tokens start where the first token did, and all others come after."""
    given = given.movedim(0, -1) if given.dim() == 3 else given[..., None]
    first = given[places.rows, places.padding.clamp(max=given.shape[1] - 1)]
    virtual = first + torch.arange(places.P, device=given.device)[:, None]
    inserted = places.insert(virtual, given + places.P)
    return inserted.movedim(-1, 0) if inserted.shape[-1] > 1 else inserted[..., 0]


class _Places:
    """Where P virtual tokens stand in rows of tokens: after the left padding that ``mask`` (B, T) has."""

    def __init__(self, mask: Tensor, P: int) -> None:
        self.P, self.length = P, P + mask.shape[1]
        self.padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)  # (B, 1)
        self.rows = torch.arange(len(mask), device=mask.device)[:, None]

    def insert(self, virtual: Tensor, tokens: Tensor) -> Tensor:
        """(B, T, ...) -> (B, P + T, ...); ``virtual`` expands to (B, P, ...)."""
        virtual = virtual.expand(tokens.shape[0], self.P, *tokens.shape[2:])
        i = torch.arange(self.length, device=tokens.device)
        before, within = i < self.padding, i < self.padding + self.P
        source = torch.where(before, i + self.P, torch.where(within, i - self.padding, i))
        return torch.cat([virtual, tokens], dim=1)[self.rows, source]

    def fill(self, virtual: Tensor, rows: Tensor) -> Tensor:
        """``rows`` (B, P + T, width) with ``virtual`` (P, width) in the places of virtual tokens."""
        i = torch.arange(self.length, device=rows.device) - self.padding
        within = (i >= 0) & (i < self.P)
        return torch.where(within[..., None], virtual.to(rows)[i.clamp(0, self.P - 1)], rows)

    def cut(self, rows: Tensor) -> Tensor:
        """(B, P + T, ...) -> (B, T, ...): the reverse."""
        i = torch.arange(self.length - self.P, device=rows.device)
        return rows[self.rows, i + self.P * (i >= self.padding)]


def _around(base: PreTrainedModel, layers: nn.Module) -> list[nn.Module]:
    """The modules around ``layers`` that take input embeddings, outer ones first."""
    wanted = {"inputs_embeds", "attention_mask"}
    around = [m for m in base.modules() if wanted <= set(inspect.signature(m.forward).parameters)]
    around = [m for m in around if any(inner is layers for inner in m.modules())]
    if not around:
        raise NotImplementedError(f"{type(base).__name__} takes no inputs_embeds with an attention_mask")
    return around


def _has_towers(model: nn.Module, *parts: nn.Module) -> bool:
    """Whether ``model`` has models that are neither in ``parts`` nor around one of them: it reads more than text."""
    inside = {module for part in parts for module in part.modules()}
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return any(m not in inside and not any(part in m.modules() for part in parts) for m in models)


def _ids_of_text(config: PreTrainedConfig) -> list[int]:
    """The first four ids that ``config`` names nowhere: neither padding, which models know by its id, nor images."""
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    named = [value for part in parts for name, value in vars(part).items() if "token" in name]
    return [i for i in range(len(named) + 4) if i not in named][:4]


def _check(kwargs: dict[str, Any], length: int) -> None:
    """Refuse arguments with which virtual tokens would be lost. A complete mask has ``length`` columns."""
    mask, cache, position_ids = kwargs.get("attention_mask"), cache_of(kwargs), kwargs.get("position_ids")
    if isinstance(cache, StaticCache):
        raise NotImplementedError("a static cache has no room for virtual tokens in every row; take a dynamic one")
    if mask is None and cache is not None and cache.get_seq_length():
        raise ValueError("past_key_values need an attention_mask: its length says that they hold the virtual tokens")
    if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape[1:]) != (length,)):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be (B, {length}), one for each token that is not virtual, got {got}")
    if position_ids is not None and position_ids.dim() not in (2, 3):
        raise NotImplementedError(f"position_ids must be (B, S), got {tuple(position_ids.shape)}")
    if mask is None and position_ids is not None and starts_again(position_ids):
        raise NotImplementedError("packed sequences need virtual tokens each; pad them to rows of their own")


def _cut(output: Any, places: _Places) -> Any:
    """Cut the virtual tokens out of all hidden states (B, P + T, hidden size) in ``output``."""
    if isinstance(output, Tensor):
        return places.cut(output) if output.dim() == 3 and output.shape[1] == places.length else output
    if isinstance(output, ModelOutput):
        for name, value in output.items():
            output[name] = _cut(value, places)
        return output
    return tuple(_cut(value, places) for value in output) if isinstance(output, tuple) else output
