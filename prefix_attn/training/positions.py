"""How many positions a model has for rows of tokens, and what is asked of them."""

from __future__ import annotations

from typing import Any

from prefix_attn.hf.model import PrefixModel


def positions_of(model: Any) -> int | None:
    """The most tokens that ``model`` has positions for, those of a prefix included. None: it names no limit."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [getattr(text, "max_position_embeddings", None)]
    if isinstance(model, PrefixModel):  # RoBERTa's table has two rows that are no positions
        found += [stack.limit for stack in model.attachment.runner.positions.values()]
    return min((count for count in found if count is not None and count > 0), default=None)


def taken_by_prefix(model: Any) -> int:
    """How many positions the active prefix of ``model`` takes."""
    if isinstance(model, PrefixModel):
        config = model.prefix_configs.get(model.active_prefix or "")
        return 0 if config is None else config.shift
    configs = getattr(model, "peft_config", None) or {}  # of PEFT's own models
    return max((getattr(config, "num_virtual_tokens", 0) for config in configs.values()), default=0)


def room_for_rows(model: Any) -> int | None:
    """The most tokens of a row behind the active prefix. None: the model names no limit.

    Raises:
        ValueError: there is room for none.
    """
    positions, taken = positions_of(model), taken_by_prefix(model)
    if positions is None:
        return None
    if positions <= taken:
        raise ValueError(
            f"the prefix leaves no room for rows in the model's positions, {positions}: take fewer virtual tokens"
        )
    return positions - taken


def check_rows(model: Any, max_length: int) -> None:
    """Refuse rows of ``max_length`` tokens before a step meets one, where the model has no positions for them.

    Raises:
        ValueError: it names ``max_length`` and says how many there are.
    """
    room = room_for_rows(model)
    if room is not None and max_length > room:
        taken = taken_by_prefix(model)
        behind = f", of which the prefix takes {taken}" if taken else ""
        raise ValueError(
            f"max_length={max_length} is too long: the model has {positions_of(model)} positions{behind}; take at "
            f"most {room}"
        )


def check_new_tokens(model: Any, max_new_tokens: int, prompt: int) -> None:
    """Refuse outputs of ``max_new_tokens`` tokens behind prompts of at least ``prompt``: as ``check_rows``."""
    room = room_for_rows(model)
    if room is not None and max_new_tokens + prompt > room:
        positions = positions_of(model)
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: the model has {positions} positions, of which outputs and prefix take "
            f"{max_new_tokens + taken_by_prefix(model)}: too many; take at most {max(room - prompt, 0)}"
        )
