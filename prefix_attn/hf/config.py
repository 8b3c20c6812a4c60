"""``PrefixConfig``: PEFT's fields of a prefix, and ours."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol

from prefix_attn.dispatch import BY_NAME
from prefix_attn.hf.encoder import ACTIVATIONS
from prefix_attn.quoting import quoted

MODES = ("kv", "embedding", "infix")
INITS = ("random", "text", "document", "prefix", "zero", "uniform")
GATES = (None, "zero")
POSITION_MODES = ("shift", "none")
SITES = ("encoder", "cross", "decoder")  # the order of a prefix's keys and values
# A state_dict shows some fields by its shapes, and has to say others.
SHOWN_FIELDS = (
    *("num_virtual_tokens", "num_frozen_tokens", "prefix_projection", "encoder_hidden_size", "encoder_depth", "gate"),
    "modules_to_save",
)
UNSHOWN_FIELDS = ("mode", "sites", "layers", "encoder_activation", "position_mode")
BACKENDS = ("auto", *BY_NAME)
_OF_USE = ("inference_mode", "backend")
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


class PeftPrefixConfig(Protocol):
    """A PrefixTuningConfig or CartridgeConfig of PEFT, which need not be installed."""

    peft_type: Any
    task_type: Any
    num_virtual_tokens: Any
    inference_mode: Any
    base_model_name_or_path: Any


@dataclass
class PrefixConfig:
    """Configuration of one prefix. A model keeps a copy in which its own defaults replace None.

    Args:
        num_virtual_tokens: P, the length of the prefix.
        prefix_projection: train an MLP that makes the prefix, instead of the prefix (Li and Liang 2021, section 4.3).
        encoder_hidden_size: width of the MLP's hidden layers. Default: key/value heads times head size.
        encoder_depth: number of hidden layers of the MLP.
        encoder_activation: the activation after each hidden layer, a name in ``prefix_attn.hf.encoder.ACTIVATIONS``.
        dropout: on the prefix, in training.
        mode: what is trained. "kv": keys and values in every layer. "embedding": input embeddings, from which the
            frozen model computes keys and values (section 7.2); they stay visible past windows. "infix": keys and
            values between input and output, which only the output attends to (section 7.3); ``infix_start`` of
            ``PrefixModel.forward`` says where.
        sites: the attention that gets a prefix: "encoder" (self-attention that is not causal), "cross" (of a decoder
            to its encoder), "decoder" (causal self-attention). Each has its own prefix. Default: all that the model
            has.
        layers: "all", or the numbers of the layers that get a prefix, at each site, or {number: length}, in which a
            layer sees the first tokens alone. The text starts behind P tokens in all layers, and P rows are stored for
            each.
        init: where training starts. "random": keys and values that the model computes for its start token and random
            tokens. "text": for ``init_text`` or ``init_token_ids``. "document": for the start token and pieces drawn
            from all of the text (Cartridges). "prefix": another prefix. "zero": zeros, which still take softmax mass.
            "uniform": numbers in [0, 1), which the paper's ablation calls random (section 7.4). An MLP is fitted to
            each of these.
        init_text: the text for "text", cut or repeated to P tokens, or for "document", of any length. Needs the
            tokenizer.
        init_token_ids: the same as token ids.
        init_prefix: for "prefix": the name of a prefix in the same model. Its first P tokens are taken.
        init_path: for "prefix", instead of a name: the folder, file or Hub id of a saved prefix.
        num_frozen_tokens: number of first tokens that are not trained (PEFT's CARTRIDGE). An MLP makes the others. 1
            keeps the token on which models leave attention that they have no use for. P makes a hard prompt.
        gate: None, or "zero": each query head attends to the prefix in its own softmax, times a trained factor that
            starts at 0 (Zhang et al. 2023, LLaMA-Adapter). Training then starts exactly from the frozen model.
        position_mode: "shift": the text starts at position P, as in PEFT. "none": it starts at 0, and the prefix takes
            no room in the context window. Default: "none" for encoder-decoder models, with a gate and for an infix;
            otherwise "shift" if the model's positions can be shifted.
        task_type: PEFT's name of the model's task. Default: from the model's class.
        modules_to_save: task heads (children of the model) of which a copy is trained and saved with the prefix.
            Default: in a model for classification, question answering and the like, all that it adds to a pretrained
            model; in a language model, none.
        base_model_name_or_path: the model that the prefix was trained for.
        inference_mode: do not train the prefix (PEFT's field).
        backend: the backend of ``prefix_attention``. It is not saved: whoever loads a prefix chooses.

    Raises:
        ValueError: a field is out of range.
        NotImplementedError: a value that this version does not have.

    Examples:
        >>> PrefixConfig(num_virtual_tokens=20, prefix_projection=True, encoder_hidden_size=512).peft_type
        'PREFIX_TUNING'
        >>> PrefixConfig(mode="prompt")
        Traceback (most recent call last):
        ValueError: mode must be one of ('kv', 'embedding', 'infix'), got 'prompt'
    """

    num_virtual_tokens: int = 10
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    encoder_depth: int = 1
    encoder_activation: str = "tanh"
    dropout: float = 0.0
    mode: str = "kv"
    sites: Sequence[str] | None = None
    layers: Literal["all"] | Sequence[int] | Mapping[int, int] = "all"
    init: str = "random"
    init_text: str | None = None
    init_token_ids: Sequence[int] | None = None
    init_prefix: str | None = None
    init_path: str | os.PathLike[str] | None = None
    num_frozen_tokens: int = 0
    gate: str | None = None
    position_mode: str | None = None
    task_type: str | None = None
    modules_to_save: Sequence[str] | None = None
    base_model_name_or_path: str | None = None
    backend: str = "auto"
    inference_mode: bool = False

    def __post_init__(self) -> None:
        """Validate. Of a set, whose order differs from process to process, the order is that of its names."""
        for name in ("sites", "layers", "modules_to_save"):
            if isinstance(value := getattr(self, name), set | frozenset):
                setattr(self, name, sorted(value, key=str))
        for name in ("num_virtual_tokens", "encoder_depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {quoted(value)}")
        hidden = self.encoder_hidden_size
        if hidden is not None and (isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1):
            raise ValueError(f"encoder_hidden_size must be a positive int or None, got {quoted(hidden)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {quoted(self.dropout)}")
        allowed = {
            "mode": MODES,
            "init": INITS,
            "encoder_activation": tuple(ACTIVATIONS),
            "gate": GATES,
            "position_mode": (*POSITION_MODES, None),
            "task_type": (*TASK_TYPES, None),
            "backend": BACKENDS,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {quoted(getattr(self, name))}")
        self._check_start()
        if self.mode == "embedding" and (self.prefix_projection or self.num_frozen_tokens):
            raise NotImplementedError(
                "mode='embedding' has no MLP, and trains all its tokens: prefix_projection must be False, "
                "num_frozen_tokens 0"
            )
        self._check_frozen()
        self._check_places()
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save must be a list of names, got {quoted(self.modules_to_save)}")
        if self.mode == "infix" and self.position_mode == "shift":
            raise ValueError("mode='infix' leaves the tokens where they are: position_mode='none'")
        if self.gate is not None and self.position_mode == "shift":
            raise ValueError(
                "gate='zero' starts from the frozen model, whose tokens are not moved: position_mode='none'"
            )

    def _check_start(self) -> None:
        texts = (self.init_text is not None) + (self.init_token_ids is not None)
        if self.init in ("text", "document") and texts != 1:
            raise ValueError(f"init={self.init!r} needs either init_text or init_token_ids")
        if self.init not in ("text", "document") and texts:
            raise ValueError(f"init={self.init!r} reads no init_text or init_token_ids: 'text' and 'document' do")
        if self.init_path is not None:
            self.init_path = os.fspath(self.init_path)  # as JSON can hold it
        sources = (self.init_prefix is not None) + (self.init_path is not None)
        if self.init == "prefix" and (sources != 1 or "" in (self.init_prefix, self.init_path)):
            raise ValueError(
                "init='prefix' needs either init_prefix, a name in the model, or init_path, a folder, file or Hub id"
            )
        for name in ("init_prefix", "init_path"):
            if self.init != "prefix" and getattr(self, name) is not None:
                raise ValueError(f"init={self.init!r} reads no {name}: 'prefix' does")

    def _check_frozen(self) -> None:
        frozen = self.num_frozen_tokens
        most = self.num_virtual_tokens - self.prefix_projection
        if isinstance(frozen, bool) or not isinstance(frozen, int) or not 0 <= frozen <= most:
            why = ", of which an MLP must make one" if self.prefix_projection else ""
            raise ValueError(
                f"num_frozen_tokens must lie in 0..{most} of {self.num_virtual_tokens}{why}, got {quoted(frozen)}"
            )

    def _check_places(self) -> None:
        if self.sites is not None:
            sites = tuple(self.sites)
            if not sites or len(set(sites)) < len(sites) or not set(sites) <= set(SITES):
                raise ValueError(f"sites must be some of {SITES}, each once, or None, got {quoted(self.sites)}")
            self.sites = sites
        if self.layers != "all":
            given = quoted(self.layers)
            if not isinstance(self.layers, Iterable):
                raise ValueError(f"layers must be 'all', numbers of layers or {{number: length}}, got {given}")
            numbers = tuple(self.layers)
            if not numbers or len(set(numbers)) < len(numbers) or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(
                    f"layers must be 'all', numbers of layers, each once, or {{number: length}}, got {given}"
                )
            if isinstance(self.layers, Mapping):
                P, wrong = self.num_virtual_tokens, [n for n in self.layers.values() if type(n) is not int or n < 1]
                if wrong or max(self.layers.values()) != P:
                    raise ValueError(
                        f"the lengths in layers must be from 1 to num_virtual_tokens={P}, and one of them that, got "
                        f"{quoted(dict(self.layers))}"
                    )
            self.layers = {n: self.layers[n] for n in numbers} if isinstance(self.layers, Mapping) else numbers

    @classmethod
    def from_peft(cls, config: PeftPrefixConfig) -> PrefixConfig:
        """The same prefix as ``config``, a PrefixTuningConfig or CartridgeConfig of PEFT, with another start.

        PEFT starts from random numbers. Ours starts as ``init`` does by default, or from "zero" if PEFT's does. Sizes
        of the base model (token_dim, num_layers, ...) come from the model.

        Raises:
            ValueError: it is not the configuration of a prefix.
        """
        kind = getattr(config, "peft_type", None)
        kind = getattr(kind, "value", kind)
        if kind not in ("PREFIX_TUNING", "CARTRIDGE"):
            raise ValueError(
                "config must be a PrefixConfig, or a PrefixTuningConfig or CartridgeConfig of PEFT, got "
                f"{type(config).__name__}"
            )
        task = getattr(config.task_type, "value", config.task_type)
        return cls(
            num_virtual_tokens=config.num_virtual_tokens,
            prefix_projection=getattr(config, "prefix_projection", False),
            encoder_hidden_size=getattr(config, "encoder_hidden_size", None),
            init="zero" if getattr(config, "init_weights", None) == "zero" else "random",
            num_frozen_tokens=getattr(config, "num_frozen_tokens", 0),
            task_type=task,
            modules_to_save=getattr(config, "modules_to_save", None),
            base_model_name_or_path=config.base_model_name_or_path,
            inference_mode=config.inference_mode,
        )

    is_prompt_learning = True  # PEFT asks its configurations

    @property
    def peft_type(self) -> str:
        """PEFT's name of such a prefix, where it has one; ours otherwise."""
        if (
            self.layers != "all"
            or self.gate is not None
            or self.mode == "infix"
            or self.position_mode == "none"
            or len(self.sites or ()) > 1
        ):
            return "PREFIX_ATTN"
        return "CARTRIDGE" if self.num_frozen_tokens else "PREFIX_TUNING"

    @property
    def shift(self) -> int:
        """How much the prefix adds to the positions of the tokens after it."""
        return self.num_virtual_tokens if self.position_mode == "shift" else 0

    @property
    def has_lengths(self) -> bool:
        """Whether each layer has a length of its own."""
        return isinstance(self.layers, Mapping)

    def length(self, layer: int) -> int:
        """How many tokens of the prefix the layer sees."""
        return self.layers[layer] if isinstance(self.layers, Mapping) else self.num_virtual_tokens

    def fold(self) -> None:
        """Change the fields to those of a folded prefix, whose MLP or embeddings are replaced by keys and values."""
        self.mode = "kv" if self.mode == "embedding" else self.mode
        self.prefix_projection = False

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON, without those that say how the prefix is used."""
        values = {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}
        return {n: v for n, v in values.items() if n not in _OF_USE}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrefixConfig:
        """The reverse of ``to_dict``; an unknown field is an error.

        A ``backend``, as files of earlier versions have one, is checked and left behind: a file does not choose it.
        """
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown fields {quoted(unknown)}; known: {[f.name for f in fields(cls)]}")
        if isinstance(layers := values.get("layers"), Mapping):  # in JSON all keys are text
            numbers = {name: int(name) if str(name).isdecimal() else name for name in layers}
            values = values | {"layers": {numbers[name]: length for name, length in layers.items()}}
        return replace(cls(**values), backend="auto")
