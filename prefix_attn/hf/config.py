"""What a prefix is: the fields that PEFT users know, and ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

MODES = ("kv", "embedding")
INITS = ("random", "text", "zero")
POSITION_MODES = ("shift", "none")


@dataclass
class PrefixConfig:
    """Configuration of one prefix.

    Args:
        num_virtual_tokens: P, the length of the prefix.
        prefix_projection: train an MLP that makes the prefix (Li and Liang 2021, section 4.3) instead of the prefix.
        encoder_hidden_size: width of the MLP's hidden layers; default: key/value heads times head size.
        encoder_depth: hidden layers of the MLP.
        dropout: on the prefix, in training.
        mode: what is trained: "kv", keys and values in every layer; "embedding", input embeddings alone, of which the
            frozen model makes keys and values (Li and Liang 2021, section 7.2); they stay visible past windows.
        sites: attention that gets a prefix; ("decoder",) for causal models.
        layers: "all".
        init: "random" starts from the model's own keys and values of its start token and random ones, "text" from those
            of ``init_text`` or ``init_token_ids``, "zero" from zeros (which still take softmax mass: not a no-op).
        init_text: cut, or repeated, to P tokens; needs the tokenizer.
        init_token_ids: the same as ids.
        num_frozen_tokens: 0.
        gate: None.
        position_mode: "shift": real tokens start at position P, as in PEFT; "none": at 0, and the prefix takes no room
            in the context window.
        task_type: "CAUSAL_LM".
        base_model_name_or_path: the model that the prefix was trained for.
        backend: of ``prefix_attention``.

    Raises:
        ValueError: a field is out of range. NotImplementedError: a value that this version does not have.
    """

    num_virtual_tokens: int = 10
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    encoder_depth: int = 1
    dropout: float = 0.0
    mode: str = "kv"
    sites: Sequence[str] = ("decoder",)
    layers: Literal["all"] = "all"
    init: str = "random"
    init_text: str | None = None
    init_token_ids: Sequence[int] | None = None
    num_frozen_tokens: int = 0
    gate: None = None
    position_mode: str = "shift"
    task_type: str | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in ("num_virtual_tokens", "encoder_depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            raise ValueError(f"encoder_hidden_size must be positive or None, got {self.encoder_hidden_size!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        for name, allowed in (("init", INITS), ("position_mode", POSITION_MODES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.init == "text" and (self.init_text is None) == (self.init_token_ids is None):
            raise ValueError("init='text' needs either init_text or init_token_ids")
        if self.mode not in MODES:
            raise NotImplementedError(f"mode={self.mode!r}: this version has {MODES}")
        if self.mode == "embedding" and self.prefix_projection:
            raise NotImplementedError("mode='embedding' has no MLP: prefix_projection must be False")
        here = {"sites": ("decoder",), "layers": "all", "num_frozen_tokens": 0, "gate": None}
        for name, only in here.items():
            value = getattr(self, name)
            value = tuple(value) if isinstance(value, list) else value
            if value != only:
                raise NotImplementedError(f"{name}={value!r}: this version has {name}={only!r} only")
        if self.task_type not in (None, "CAUSAL_LM"):
            raise NotImplementedError(f"task_type={self.task_type!r}: this version has 'CAUSAL_LM' only")

    @property
    def shift(self) -> int:
        """What the prefix adds to the positions of the tokens after it."""
        return self.num_virtual_tokens if self.position_mode == "shift" else 0

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON can hold them."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrefixConfig:
        """The reverse of ``to_dict``; an unknown field is an error."""
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown fields {unknown}; known: {[f.name for f in fields(cls)]}")
        return cls(**values)
