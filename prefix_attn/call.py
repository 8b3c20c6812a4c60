"""One call of the operator, as a value: every tensor and option, and the rules that they obey.

``check`` is the only place where arguments are validated; after it, backends trust the shapes.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode  # make_fx's

MAX_HEAD_SIZE = 256
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTS = (torch.int32, torch.int64)
NUMBERS = (int, float, torch.SymInt, torch.SymFloat)  # a head size that is traced gives a default scale that is too


class Call(NamedTuple):
    """Arguments of ``prefix_attention``. The first seven tensors may need a gradient, the next eight cannot.

    B batch, Hq query heads, Hkv key/value heads, S queries, T sequence keys, P prefix length, N bank entries,
    D head size of query and key, Dv of value.
    """

    query: Tensor  # (B, Hq, S, D)
    key: Tensor  # (B, Hkv, T, D)
    value: Tensor  # (B, Hkv, T, Dv)
    prefix_key: Tensor | None = None  # (Hkv, P, D) or (N, Hkv, P, D)
    prefix_value: Tensor | None = None  # (Hkv, P, Dv) or (N, Hkv, P, Dv)
    sinks: Tensor | None = None  # (Hq,)
    bias: Tensor | None = None  # (1 or B, Hq, S, T)
    prefix_ids: Tensor | None = None  # (B,)
    prefix_lengths: Tensor | None = None  # (N,)
    prefix_start: Tensor | None = None  # (B,)
    key_lengths: Tensor | None = None  # (B,)
    key_mask: Tensor | None = None  # (B, T) bool
    seed: Tensor | None = None  # (1,) int64: of a fused backend's dropout, drawn by the operator
    # Packed sequences, for backends that take them as they lie: query is then (1, Hq, Nq, D), key (1, Hkv, Nk, D).
    cu_seqlens_q: Tensor | None = None  # (B + 1,)
    cu_seqlens_k: Tensor | None = None  # (B + 1,)
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    is_causal: bool = True
    window: int | None = None
    scale: float = 1.0
    softcap: float | None = None
    dropout_p: float = 0.0

    # Methods, not properties: Dynamo of torch 2.10 does not trace properties of a NamedTuple.
    def prefix_length(self) -> int:
        """P, the padded length of the prefix; 0 without one."""
        return 0 if self.prefix_key is None else self.prefix_key.shape[-2]

    def batch(self) -> int:
        """B, the rows of the batch, or of the packed sequences."""
        return self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    def has_bank(self) -> bool:
        """Whether the prefix is a bank of N entries rather than one that all rows share."""
        return self.prefix_key is not None and self.prefix_key.dim() == 4


if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class _CommonOptions(TypedDict, total=False):
        prefix_ids: Tensor | None
        prefix_lengths: Tensor | None
        prefix_start: Tensor | None
        prefix_gate: Tensor | None
        is_causal: bool
        window: int | None
        scale: float | None
        softcap: float | None
        sinks: Tensor | None
        dropout_p: float
        backend: str

    class Options(_CommonOptions, total=False, closed=True):
        """Options of ``prefix_attention``, except ``return_lse``, which decides the type that is returned."""

        key_lengths: Tensor | None
        key_mask: Tensor | None
        bias: Tensor | None

    class PackedOptions(_CommonOptions, closed=True):
        """Options of ``prefix_attention_varlen``, likewise."""


TENSORS = 15  # leading fields of Call that are tensors
DIFFERENTIABLE = 7  # of these, the ones that may need a gradient

_SHAPES = {  # of the fields of Call, in their order; ``check_shape`` takes them taken apart
    "query": "B Hq S D",
    "key": "B Hkv T D",
    "value": "B Hkv T Dv",
    "prefix_key": "Hkv P D",
    "prefix_value": "Hkv P Dv",
    "sinks": "Hq",
    "bias": "B Hq S T",
    "prefix_ids": "B",
    "prefix_lengths": "N",
    "prefix_start": "B",
    "key_lengths": "B",
    "key_mask": "B T",
}
_NEEDED = ("query", "key", "value")
_FLOATING = (*_NEEDED, "prefix_key", "prefix_value", "sinks", "bias")
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_LAYOUTS = {name: tuple(layout.split()) for name, layout in _SHAPES.items()}
_PACKED = {name: ("1", *_LAYOUTS[name][1:]) for name in _NEEDED}
_BANK = {name: ("N", *_LAYOUTS[name]) for name in ("prefix_key", "prefix_value")}


def check(call: Call) -> None:
    """Raise ValueError (shapes, ranges, devices) or TypeError (types, dtypes) unless the call is well formed."""
    given: list[tuple[str, Any]] = [(n, t) for n, t in zip(_SHAPES, call) if t is not None or n in _NEEDED]
    for name, tensor in given:
        if type(tensor) not in _PLAIN_TYPES:
            _check_type(name, tensor)
        if name == "query" or tensor.dtype != call.query.dtype or name not in _FLOATING:
            _check_dtype(name, tensor.dtype, call.query.dtype)
    if (call.prefix_key is None) != (call.prefix_value is None):
        raise ValueError("prefix_key and prefix_value must be given together, or both be None")
    sizes = {} if call.cu_seqlens_q is None else {"B": call.batch()}
    device, layouts = call.query.device, _layouts(call)
    for name, tensor in given:
        check_shape(name, tensor, layouts[name], sizes)
        if tensor.device != device:
            raise ValueError(f"{name} must be on query's device {device}, got {tensor.device}")
    _check_heads(call, sizes)
    _check_bank(call, sizes)
    _check_options(call)
    _check_values(call, sizes)


def _check_type(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "placements"):
        raise NotImplementedError(
            f"{name} is a DTensor, and the operator runs on the tensors of one process: call it through "
            "torch.distributed.tensor.experimental.local_map, with the batch or the heads sharded"
        )


def check_gate(gate: Tensor, call: Call) -> None:
    """Raise unless ``gate`` is one factor per query head of ``call``, for all rows or for each."""
    if not isinstance(gate, Tensor):
        raise TypeError(f"prefix_gate must be a tensor, got {type(gate).__name__}")
    _check_dtype("prefix_gate", gate.dtype, call.query.dtype)
    dims = ("B", "Hq")
    check_shape("prefix_gate", gate, dims if gate.dim() == 2 else dims[1:], dict(zip(dims, call.query.shape)))
    if gate.device != call.query.device:
        raise ValueError(f"prefix_gate must be on query's device {call.query.device}, got {gate.device}")


def check_shape(name: str, tensor: Tensor, dims: Sequence[str], sizes: dict[str, int]) -> None:
    """Match ``tensor`` against dimensions such as ("B", "Hq", "S", "D"); sizes seen for the first time are bound."""
    shape, bound = tensor.shape, len(sizes)
    fits = len(dims) == len(shape)
    for dim, n in zip(dims, shape):
        if n != (1 if dim == "1" else sizes.setdefault(dim, n)):
            fits = False
    if not fits:
        known = dict(list(sizes.items())[:bound]) | {"1": 1}
        needs = ", ".join(str(known.get(dim, "*")) for dim in dims)
        raise ValueError(f"{name} must be ({', '.join(dims)}) = ({needs}), got {tuple(shape)}")


def as_int(name: str, value: Any, low: int, needs: str = "an int") -> Any:
    """``value``, which may be a numpy integer or a tensor of one, as an int of at least ``low``."""
    given = value
    if not isinstance(value, (int, torch.SymInt)) and getattr(value, "dtype", None) != torch.bool:
        with contextlib.suppress(TypeError):
            value = operator.index(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be {needs}, got {type(given).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def as_number(value: Any) -> Any:
    """``value`` as Python's number if it is one of another library, or a tensor of one; else itself, for ``check``."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad and is_readable(value):
        value = value.item()
    return value if isinstance(value, NUMBERS) or not isinstance(value, numbers.Real) else float(value)


def is_readable(tensor: Tensor) -> bool:
    """Whether its values can be read here: no device to wait for, and nothing that is traced or mapped over."""
    plain = type(tensor) is Tensor and tensor.device.type == "cpu"
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return plain and not traced and get_proxy_mode() is None


def check_ids(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Raise unless low <= tensor <= high. Only where reading the values needs no device synchronisation."""
    if is_readable(tensor) and tensor.numel() and (int(tensor.min()) < low or int(tensor.max()) > high):
        raise ValueError(f"{name} must lie in {low}..{high}, got {tensor.tolist()}")


def _layouts(call: Call) -> dict[str, tuple[str, ...]]:
    layouts = _LAYOUTS
    if call.cu_seqlens_q is not None:
        layouts = layouts | _PACKED
    if call.has_bank():
        layouts = layouts | _BANK
    if call.bias is not None and call.bias.dim() == 4 and call.bias.shape[0] == 1:
        layouts = layouts | {"bias": ("1", *layouts["bias"][1:])}
    return layouts


def _check_dtype(name: str, dtype: torch.dtype, query: torch.dtype) -> None:
    allowed: tuple[torch.dtype, ...]
    if name in _NEEDED:
        allowed = _FLOATS if name == "query" else (query,)
    elif name in ("prefix_key", "prefix_value", "prefix_gate", "sinks", "bias"):
        allowed = (query, torch.float32)
    elif name == "key_mask":
        allowed = (torch.bool,)
    else:
        allowed = _INTS
    if dtype not in allowed:
        raise TypeError(f"{name} must be {' or '.join(str(a) for a in dict.fromkeys(allowed))}, got {dtype}")


def _check_heads(call: Call, sizes: dict[str, int]) -> None:
    if sizes["Hkv"] == 0 or sizes["Hq"] % sizes["Hkv"]:
        raise ValueError(f"query heads must be a multiple of key heads, got Hq = {sizes['Hq']}, Hkv = {sizes['Hkv']}")
    for dim, owner in (("D", "query"), ("Dv", "value")):
        if not 1 <= sizes[dim] <= MAX_HEAD_SIZE:
            raise ValueError(f"{owner}'s head size {dim} must lie in 1..{MAX_HEAD_SIZE}, got {sizes[dim]}")
    for name, tensor in zip(_SHAPES, call[:5]):
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got stride {tensor.stride(-1)}")


def _check_bank(call: Call, sizes: dict[str, int]) -> None:
    if not call.has_bank():
        for name in ("prefix_ids", "prefix_lengths"):
            if getattr(call, name) is not None:
                raise ValueError(f"{name} needs a bank: prefix_key (N, Hkv, P, D), prefix_value (N, Hkv, P, Dv)")
    elif call.prefix_ids is None and sizes["N"] not in (1, sizes["B"]):
        raise ValueError(f"prefix_ids is needed for a bank of N = {sizes['N']} entries and a batch of B = {sizes['B']}")


def _check_options(call: Call) -> None:
    if not isinstance(call.is_causal, bool):
        raise TypeError(f"is_causal must be a bool, got {type(call.is_causal).__name__}")
    for name in ("scale", "softcap", "dropout_p"):
        number = getattr(call, name)
        if number is not None and (isinstance(number, bool) or not isinstance(number, NUMBERS)):
            raise TypeError(f"{name} must be a number, got {type(number).__name__}")
    if not -math.inf < call.scale < math.inf:
        raise ValueError(f"scale must be finite, got {call.scale}")
    if call.softcap is not None and not 0 < call.softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {call.softcap}")
    if not 0 <= call.dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {call.dropout_p}")


def _check_values(call: Call, sizes: dict[str, int]) -> None:
    if call.prefix_ids is not None:
        check_ids("prefix_ids", call.prefix_ids, -1, sizes["N"] - 1)
    if call.prefix_lengths is not None:
        check_ids("prefix_lengths", call.prefix_lengths, 0, sizes["P"])
    if call.key_lengths is not None:
        check_ids("key_lengths", call.key_lengths, 0, sizes["T"])
