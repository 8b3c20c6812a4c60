"""Which backend runs a call: the first, in order of preference, that refuses nothing."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from prefix_attn.backends import composed, cpu, eager, triton
from prefix_attn.backends.triton import interpreter
from prefix_attn.call import Call

ORDER: tuple[ModuleType, ...] = (cpu, composed, triton, eager)  # the fastest first; eager, the last, refuses nothing
# Triton's interpreter is for testing the kernels: it runs when it is named, never because nothing else can.
AUTO = tuple(backend for backend in ORDER if not (backend is triton and interpreter.ACTIVE))
BY_NAME: dict[str, ModuleType] = {backend.NAME: backend for backend in ORDER}
LONG = 1024  # virtual tokens, see ``slow``
NOT_IN_THIS_VERSION = ("cuda",)  # names that the public contract reserves


class Explanation(NamedTuple):
    """What ``backend="auto"`` does with a call."""

    backend: str
    refused: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        """One line per backend."""
        lines = [f"auto -> {self.backend}"]
        lines += [f"{name}: {'; '.join(reasons)}" for name, reasons in self.refused.items()]
        return "\n".join(lines)


def slow(call: Call) -> str | None:
    """Why torch's own kernels are faster than those of ``cpu``, if they are: on this processor, or for this call.

    The second was measured (``python -m benchmarks regret``) on a Zen 5: one float32 query for each key head, so that
    nothing is shared, and the whole prefix is packed for one row. From P = 1024 on ``cpu`` took 7 to 35 % longer; at
    512 either may be faster, by what is in the caches.
    """
    if reason := cpu.slow():
        return reason
    alone = call.query.dtype == torch.float32 and call.batch() * call.query.shape[1] == call.key.shape[1]
    # Where some keys are hidden composed copies all of them.
    whole = call.key_mask is None and call.key_lengths is None
    if alone and whole and call.query.shape[2] == 1 and call.prefix_length() >= LONG:
        return f"one query for each key head, and {LONG} or more virtual tokens: torch's kernels are faster"
    return None


def _auto(call: Call) -> tuple[ModuleType, ...]:
    """``AUTO``, but where ``cpu`` is slow it comes after torch's own kernels."""
    return (composed, cpu, *AUTO[2:]) if slow(call) else AUTO


def select(call: Call, backend: str = "auto") -> ModuleType:
    """The backend for ``call``. A named one is used or the call raises: there is no silent fallback."""
    if backend == "auto":
        return next(b for b in _auto(call) if not list(b.refuse(call)))
    if backend in NOT_IN_THIS_VERSION:
        raise NotImplementedError(f"backend={backend!r} is not part of this version; it has {sorted(BY_NAME)}")
    if backend not in BY_NAME:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BY_NAME)}, got {backend!r}")
    if reasons := list(BY_NAME[backend].refuse(call)):
        raise NotImplementedError(f"backend={backend!r} cannot run this call: {'; '.join(reasons)}")
    return BY_NAME[backend]


def select_packed(call: Call, backend: str = "auto") -> ModuleType | None:
    """The backend that takes this call's packed sequences as they lie; None = they must be padded first."""
    able = (b for b in (_auto(call) if backend == "auto" else ORDER) if backend in ("auto", b.NAME) and b.PACKED)
    return next((b for b in able if not list(b.refuse(call))), None)


def explain(call: Call) -> Explanation:
    """What ``select(call)`` picks, and why each backend that it would not pick was refused."""
    refused = {b.NAME: tuple(b.refuse(call)) for b in ORDER}
    refused |= dict.fromkeys(NOT_IN_THIS_VERSION, ("not part of this version",))
    chosen = select(call)
    if chosen is not cpu and not refused[cpu.NAME] and (reason := slow(call)):
        refused[cpu.NAME] = (reason,)
    return Explanation(chosen.NAME, {name: reasons for name, reasons in refused.items() if reasons})
