"""Insert virtual tokens into every row of a batch: embedding-only prefix tuning for any transformers model.

Virtual tokens enter with the input embeddings. They stand between a row's left padding and its first token, so padding
changes nothing, not even under sliding windows. After the last layer they are cut out again, so that task heads,
poolers and losses see the sequence alone. In an encoder-decoder they stay in the encoder's output, because the decoder
attends to them.
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
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.utils import ModelOutput

from prefix_attn.hf.attach.outside import called
from prefix_attn.hf.attach.positions import cache_of, from_mask
from prefix_attn.hf.attach.slots import find_layers
from prefix_attn.hf.attach.window import Tables, check_length
from prefix_attn.hf.attach.wrapper import check_base, device_of, evaluating


class Insertion:
    """Inserts virtual tokens into the rows of ``base`` and cuts them out again.

    ``embeddings`` is the module that makes the input embeddings.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        """Find where in ``base`` tokens enter and leave.

        Raises:
            TypeError: ``base`` is no bare transformers model.
            NotImplementedError: the model takes no input embeddings, or does something else with them than with ids.
        """
        check_base(base)
        self._name = type(base).__name__
        self._decoder = base.get_decoder() if base.config.is_encoder_decoder else None
        self._layers = base.get_encoder() if self._decoder else find_layers(base)[0]
        self._first = next(m for m in self._layers.modules() if isinstance(m, nn.ModuleList))[0]
        self._entrance = _entrance(base, self._layers)
        self._names = list(inspect.signature(self._entrance.forward).parameters)
        if base.can_generate() and self._decoder is None and not self._counts_tokens(base):
            raise NotImplementedError(f"{self._name} has no past_key_values: virtual tokens would enter at every step")
        # The positions of other models are their own affair: RoBERTa's begin at 2.
        self._is_causal = base.can_generate() or any(getattr(m, "is_causal", False) for m in base.modules())
        self.embeddings = base.get_input_embeddings()
        self._filled: WeakSet[Cache] = _Caches()  # with virtual tokens
        self._is_running = False
        with torch.no_grad(), evaluating(base):
            self._rehearse(base.config.get_text_config().pad_token_id)

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

        def leave(_: nn.Module, __: Any, output: Any) -> Any:
            return output if last[-1] is None else _cut(output, last[-1])

        def cross(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if (mask := kwargs.get("encoder_attention_mask")) is not None:
                kwargs = kwargs | {"encoder_attention_mask": _Places(mask, len(table)).insert(mask.new_ones(()), mask)}
            return args, kwargs

        hooks = [self._entrance.register_forward_pre_hook(enter, with_kwargs=True)]
        if self._decoder is None:
            hooks += [module.register_forward_hook(leave) for module in {self._layers, self._entrance}]
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

    def _rehearse(self, padding: int | None) -> None:
        """Test insertion in three forwards of four tokens. None is the padding token, which models know by its id."""
        ids = torch.tensor([[i for i in range(5) if i != padding][:4]], device=device_of(self.embeddings))
        with Tables(ids) as tables:
            expected = self._entrance(input_ids=ids)[0]
        self._positions = tables.positions(self._entrance)
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
        tokens = self.embeddings(kwargs["input_ids"]) if tokens is None else tokens
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
        new = {"input_ids": None, "inputs_embeds": tokens, "attention_mask": places.insert(mask.new_ones(()), mask)}
        if not past:
            new["inputs_embeds"] = places.insert(table.to(tokens), tokens)
        if not past and (types := kwargs.get("token_type_ids")) is not None:
            new["token_type_ids"] = places.insert(types.new_zeros(()), types)
        if (given := kwargs.get("position_ids")) is not None:
            given = given.expand(B, -1)
            first = given.gather(1, places.padding.clamp(max=S - 1))
            virtual = first + torch.arange(P, device=given.device)
            new["position_ids"] = given + P if past else places.insert(virtual, given + P)
        elif self._is_causal and "position_ids" in self._names:
            new["position_ids"] = from_mask(new)
        return kwargs | new, None if past else places


class _Caches(WeakSet[Cache]):
    def __reduce__(self) -> tuple[type[_Caches], tuple[()]]:
        """A copy of the model has filled none yet."""
        return type(self), ()


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

    def cut(self, rows: Tensor) -> Tensor:
        """(B, P + T, ...) -> (B, T, ...): the reverse."""
        i = torch.arange(self.length - self.P, device=rows.device)
        return rows[self.rows, i + self.P * (i >= self.padding)]


def _entrance(base: PreTrainedModel, layers: nn.Module) -> nn.Module:
    """The innermost module around ``layers`` that takes input embeddings."""
    wanted = {"inputs_embeds", "attention_mask"}
    around = [m for m in base.modules() if wanted <= set(inspect.signature(m.forward).parameters)]
    around = [m for m in around if any(inner is layers for inner in m.modules())]
    if not around:
        raise NotImplementedError(f"{type(base).__name__} takes no inputs_embeds with an attention_mask")
    return around[-1]


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
    if position_ids is not None and position_ids.dim() != 2:
        raise NotImplementedError(f"position_ids must be (B, S), got {tuple(position_ids.shape)}")
    if mask is None and position_ids is not None and bool((position_ids.diff(dim=-1) < 0).any()):
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
