"""Launches a compiled kernel at once. Triton looks it up anew for each launch, which takes the host about 30 us.

Triton compiles a kernel for the types of its arguments, and for what some of their values have: a pointer that is
divisible by 16, an integer that is 1 or divisible by 16. ``key`` tells apart whatever it tells apart, and more. Where a
key is new, Triton launches and says which kernel served; from then on that one is launched. What grows in decoding is
in ``sizes``, whose values Triton does not look at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from prefix_attn.backends.triton.primitives import Array, Rows, Scores

MOST = 4096  # keys that are remembered
INT32 = 2**31 - 1
NO_ROWS = Rows(*[None] * len(Rows._fields))  # asked about once, not field by field
PLAIN = (1, *[None] * (len(Scores._fields) - 2))  # of scores, after the scale: likewise
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any, programs: int, args: tuple[Any, ...], sizes: tuple[int, ...], constants: dict[str, Any]
) -> None:
    """``kernel[(programs,)](*args, *sizes, **constants)``. ``sizes`` are those that are never specialised."""
    if not isinstance(kernel, JITFunction) or torch.version.hip:  # the interpreter; AMD's compiler asks for more
        kernel[(programs,)](*args, *sizes, **constants)
        return
    known = key(kernel, args, sizes, constants)
    found = _compiled.get(known)
    if found is not None:
        compiled, rest = found
        compiled[(programs, 1, 1)](*args, *sizes, *rest)
        return
    compiled = kernel[(programs,)](*args, *sizes, **constants)
    if compiled is not None:
        if len(_compiled) >= MOST:
            _compiled.clear()
        names = kernel.arg_names[len(args) + len(sizes) :]
        _compiled[known] = compiled, tuple(constants[name] for name in names)


def key(kernel: Any, args: tuple[Any, ...], sizes: tuple[int, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """What decides which compiled kernel serves these arguments."""
    first = args[0]
    device = (first.data if type(first) is Array else first).get_device()
    return id(kernel), device, max(sizes) > INT32, *constants.values(), *map(_special, args)


def _special(value: Any) -> Any:
    """What Triton may ask of an argument: type, and divisibility."""
    if value is None or value is NO_ROWS:
        return None
    kind = type(value)
    if kind is Array:
        data, batch, head, row = value
        every, place = batch | head | row, data.data_ptr()
        if not (place | every) & 15 and every <= INT32:
            return data.dtype
        return data.dtype, place & 15, _integer(batch), _integer(head), _integer(row)
    if kind is int:
        return _integer(value)
    if kind is float or (kind is Scores and value[1:] == PLAIN):
        return kind
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() & 15
    return tuple(map(_special, value))


def _integer(value: int) -> int:
    """Classes of integers: 1, divisible by 16, other; each in 32 bits or more."""
    return 1 if value == 1 else 2 + (value & 15 == 0) + 2 * (value > INT32)
