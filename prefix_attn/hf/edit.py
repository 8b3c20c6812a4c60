"""Make prefixes from others: concatenate, truncate, and move them to other positions.

A key encodes the position that it was made at. Rotary embeddings turn each pair of its coordinates by an angle that
grows with the position (Su et al. 2021), so turning the pairs further moves the key. Models and layers differ in which
coordinates are pairs and how fast they turn. To find out, the model runs on a few tokens at both positions. If no known
rotation reproduces the moved keys of a layer, the edit is refused. Learned positions cannot be moved, because they have
gone through the layers' weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prefix_attn.hf.attach.probe import some_ids
from prefix_attn.hf.attach.slots import Slot
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import PrefixModel

_NARROW = 1 << 28  # parameters of a model that is made to see how keys turn
_CHANGES = ("dynamic", "longrope")  # rotary embeddings whose angles depend on how long the sequence is


def concatenate(
    model: PrefixModel, sources: Sequence[str], name: str, *, rotate: bool = True, is_trainable: bool = False
) -> None:
    """Join prefixes, one after the other, into a new one, which becomes active. Keys turn to their new positions.

    With position_mode="none" every prefix starts where the text does, so nothing turns.

    Args:
        model: the model that has the prefixes.
        sources: their names, at least one.
        name: the name of the new prefix.
        rotate: whether to turn the keys of all prefixes after the first to their new positions. False leaves them, as
            PEFT's ``compose_cartridge_adapters`` and the Cartridges paper do: the prefixes then share their positions.
        is_trainable: whether the new prefix is trained. As many tokens as in the first source stay frozen.

    Raises:
        ValueError: unknown names, or prefixes that do not go together.
        NotImplementedError: the model's positions cannot be moved (``rotate=False`` works), or layers
            have different lengths. The model is unchanged then.

    Examples:
        >>> model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
        >>> model.add_prefix("more", PrefixConfig(num_virtual_tokens=6))
        >>> concatenate(model, ["default", "more"], "both")
        >>> model.prefix_configs["both"].num_virtual_tokens
        10
    """
    if not sources:
        raise ValueError("sources must name at least one prefix")
    configs = [model.find_prefix(source)[1] for source in sources]
    for field in ("sites", "layers", "position_mode", "backend"):
        values = {source: getattr(config, field) for source, config in zip(sources, configs)}
        if any(value != values[sources[0]] for value in values.values()):
            raise ValueError(f"prefixes that are put together must have one {field}, got {values}")
    if len({config.mode == "infix" for config in configs}) > 1:
        raise ValueError("an infix and a prefix cannot be put together: tokens see them from different positions on")
    if own := [s for s, config in zip(sources, configs) if config.gate is not None or config.modules_to_save]:
        raise ValueError(f"prefixes with gates or task heads of their own cannot be put together: {own}")
    _check_lengths(dict(zip(sources, configs)))
    parts, start = [], 0
    for source, config in zip(sources, configs):
        parts.append(_moved(model, _kv(model, source), config, start if rotate else 0))
        start += config.shift
    _add(model, name, configs[0], torch.cat(parts, dim=2), sources[0], is_trainable)


def truncate(
    model: PrefixModel,
    source: str,
    name: str,
    *,
    start: int = 0,
    stop: int | None = None,
    rotate: bool = True,
    is_trainable: bool = False,
) -> None:
    """Cut tokens ``start`` to ``stop`` out of a prefix. They become a new one, active, at the positions from 0.

    Args:
        model: the model that has the prefix.
        source: its name.
        name: the name of the new prefix.
        start: the first token to keep.
        stop: the token after the last one to keep, as in a slice. None keeps all to the end.
        rotate: whether keys turn to their new positions, as in ``concatenate``.
        is_trainable: whether the new prefix is trained. Tokens that were frozen stay frozen.

    Raises:
        ValueError: unknown name, or nothing is left.
        NotImplementedError: the model's positions cannot be moved, or layers have different lengths.

    Examples:
        >>> model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
        >>> truncate(model, "default", "short", stop=2)
        >>> model.prefix_configs["short"].num_virtual_tokens
        2
    """
    _, config = model.find_prefix(source)
    _check_lengths({source: config})
    kv = _kv(model, source)
    first, last, _ = slice(start, stop).indices(kv.shape[2])
    if first >= last:
        raise ValueError(f"nothing is left of {kv.shape[2]} tokens between start={start} and stop={stop}")
    kv = _moved(model, kv[:, :, first:last], config, -first if rotate and config.shift else 0)
    config = replace(config, num_frozen_tokens=min(max(config.num_frozen_tokens - first, 0), last - first))
    _add(model, name, config, kv, source, is_trainable)


def move(model: PrefixModel, source: str, name: str, *, position_mode: str, is_trainable: bool = False) -> None:
    """Copy a prefix into another ``position_mode``. The copy becomes active, and the outputs stay the same.

    From "shift" to "none" the text starts at 0, and the prefix goes to the positions before it. It then takes no room
    in the context window.

    Args:
        model: the model that has the prefix.
        source: its name.
        name: the name of the copy.
        position_mode: "shift" or "none".
        is_trainable: whether the new prefix is trained.

    Raises:
        ValueError: unknown name.
        NotImplementedError: the model has no rotary embeddings. Outputs would change.

    Examples:
        >>> model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
        >>> before = model(ids).logits
        >>> move(model, "default", "moved", position_mode="none")
        >>> bool((model(ids).logits - before).norm() < 1e-5 * before.norm())
        True
    """
    _, config = model.find_prefix(source)
    moved = model.attachment.resolver.resolve(replace(config, position_mode=position_mode))
    by = moved.shift - config.shift
    kv = _kv(model, source)
    if by:
        kv = _turned(kv, _turns_of_text(model, config, by), by)
    _add(model, name, moved, kv, source, is_trainable)


def move_kv(kv: Tensor, base: PreTrainedConfig, by: int) -> Tensor:
    """Keys and values of all layers for tokens that start elsewhere, with the same outputs.

    How keys turn follows from a model's configuration. A narrow model with random weights shows it.

    Args:
        kv: (2 * layers, H, P, D): keys and values of layer 0, of layer 1, ...
        base: of a causal language model.
        by: how many positions further on the keys belong.

    Raises:
        NotImplementedError: as ``move``; or such a model cannot be made narrow.
    """
    return _turned(kv, _turns_of(type(base), base.to_json_string(use_diff=False), kv.shape[-1], by), by)


@lru_cache(maxsize=64)
def _turns_of(kind: type[PreTrainedConfig], config: str, head_dim: int, by: int) -> list[Turn | None]:
    """What moves the keys of each layer of a model that has the ``config``, as JSON."""
    base = _narrow(kind.from_dict(json.loads(config)).get_text_config())
    # In an engine's worker, neither its random numbers nor its inference mode are ours.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        try:
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(base).num_parameters()
            if size > _NARROW:
                raise ValueError(f"{size} parameters")
            model = PrefixModel(AutoModelForCausalLM.from_config(base, dtype=torch.float32).eval())
            resolved = model.attachment.resolver.resolve(PrefixConfig(num_virtual_tokens=1, position_mode="none"))
            if (own := model.attachment.resolver.layout(resolved).head_dim) != head_dim:
                raise ValueError(f"heads of {own}, and not of {head_dim}")
        except NotImplementedError:
            raise
        except Exception as error:  # the code of five hundred architectures: anything can come out
            raise NotImplementedError(f"a small model of type {base.model_type!r} cannot be made ({error})") from error
        return _turns_of_text(model, resolved, by)


def _narrow(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same attention with two heads, and next to nothing behind it."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16}
    sizes |= dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 8)
    for name, size in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, size)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config


def _turns_of_text(model: PrefixModel, config: PrefixConfig, by: int) -> list[Turn | None]:
    """``_turns``, where the tokens that see the keys move along with them.

    Raises:
        NotImplementedError: outputs would change.
    """
    turns = _turns(model, config, by)
    if not any(turns):
        name = type(model.base_model).__name__
        raise NotImplementedError(f"{name} has no rotary embeddings: with another position_mode outputs change")
    return turns


def _check_lengths(configs: dict[str, PrefixConfig]) -> None:
    if own := [name for name, config in configs.items() if config.has_lengths]:
        raise NotImplementedError(
            f"prefixes of another length in each layer can be moved, but not cut or joined: {own}"
        )


class Turn(NamedTuple):
    """The rotation that moves the keys of a layer: pairs of the first coordinates turn, the others stay."""

    speeds: tuple[float, ...]  # of each pair, in radians per position
    interleaved: bool  # pairs are (0, 1), (2, 3)...; otherwise the first half and the second

    def __call__(self, keys: Tensor, by: int) -> Tensor:
        """``keys`` (..., D) at positions ``by`` further on."""
        angles = by * torch.tensor(self.speeds, dtype=torch.float64)
        cos, sin = angles.cos(), angles.sin()
        size = 2 * len(self.speeds)
        turning, rest = keys[..., :size].double(), keys[..., size:]
        a, b = (turning[..., ::2], turning[..., 1::2]) if self.interleaved else turning.chunk(2, dim=-1)
        pairs = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack(pairs, dim=-1).flatten(-2) if self.interleaved else torch.cat(pairs, dim=-1)
        return torch.cat([turned.to(keys.dtype), rest], dim=-1)


def _moved(model: PrefixModel, kv: Tensor, config: PrefixConfig, by: int) -> Tensor:
    """``kv`` (2 * slots, H, P, D) with its keys ``by`` positions further on."""
    hint = "; rotate=False leaves the keys as they are"
    return _turned(kv, _turns(model, config, by, hint), by) if by else kv


def _turned(kv: Tensor, turns: Sequence[Turn | None], by: int) -> Tensor:
    kv = kv.clone()
    for number, turn in enumerate(turns):
        if turn is not None:
            kv[2 * number] = turn(kv[2 * number], by)
    return kv


@torch.no_grad()
def _turns(model: PrefixModel, config: PrefixConfig, by: int, hint: str = "") -> list[Turn | None]:
    """What moves the keys of each slot; None where they are the same at every position.

    Raises:
        NotImplementedError: nothing known does.
    """
    attachment, name = model.attachment, type(model.base_model).__name__
    slots = attachment.resolver.layout(config).slots
    refusal = f"the positions of {name} cannot be moved{hint}"
    for slot in slots:
        if changes := sorted(set(_CHANGES) & set(_rope_types(slot.stack))):
            raise NotImplementedError(f"{refusal} (its rotary embeddings are {changes[0]}: they depend on the length)")
    some = [some_ids(embeddings, 3) for embeddings in attachment.probe.embeddings()]
    try:
        here, there = (
            {call.module: call.key for call in attachment.probe.capture(*some, shift=shift)} for shift in (0, abs(by))
        )
    except (IndexError, RuntimeError) as error:
        raise NotImplementedError(f"{refusal} (it has no position {abs(by)})") from error
    turns: list[Turn | None] = []
    for slot in slots:
        key, wanted = (keys[slot.module].float().cpu() for keys in (here, there))
        ways = [None, *_known(slot, key.shape[-1])]
        errors = [((key if way is None else way(key, abs(by))) - wanted).norm() / wanted.norm() for way in ways]
        error, way = min(zip(errors, ways), key=lambda pair: pair[0])
        if not error <= (1e-3 if here[slot.module].dtype.itemsize >= 4 else 0.05):
            raise NotImplementedError(f"{refusal} ({slot.site} layer {slot.layer}: keys differ by {error:.1g})")
        turns.append(way)
    return turns


def _known(slot: Slot, head_dim: int) -> Iterator[Turn]:
    """Every way in which the rotary embeddings of the slot's stack could turn its keys."""
    found = {tuple(b.tolist()) for n, b in slot.stack.named_buffers() if n.endswith("inv_freq") and b.dim() == 1}
    for speeds in sorted(found):
        if 2 * len(speeds) <= head_dim:
            yield from (Turn(speeds, interleaved) for interleaved in (False, True))


def _rope_types(stack: PreTrainedModel) -> Iterator[str]:
    for module in stack.modules():
        types = getattr(module, "rope_type", None)
        yield from types.values() if isinstance(types, dict) else [types] if isinstance(types, str) else []


@torch.no_grad()
def _kv(model: PrefixModel, name: str) -> Tensor:
    """(2 * slots, H, P, D) float32, folded."""
    encoder, _ = model.find_prefix(name)
    rows = encoder.prompt_embeddings().cpu()
    return rows.view(len(rows), -1, encoder.num_heads, encoder.head_dim).permute(1, 2, 0, 3)


def _add(model: PrefixModel, name: str, config: PrefixConfig, kv: Tensor, source: str, is_trainable: bool) -> None:
    """Install ``kv`` as a prefix, with what else ``source`` has: a gate, task heads."""
    model.check_new_name(name)
    mode = "infix" if config.mode == "infix" else "kv"
    config = replace(config, num_virtual_tokens=kv.shape[2], mode=mode, prefix_projection=False)
    encoder, gate = model.make_encoder(config), model.find_prefix(source)[0].gate
    encoder.set_kv(kv)
    if gate is not None and encoder.gate is not None:
        encoder.gate.data.copy_(gate)
    task_heads = copy.deepcopy(model.task_heads(source))
    assert isinstance(task_heads, nn.ModuleDict)
    model.install_prefix(name, config, encoder, task_heads, trainable=is_trainable)
