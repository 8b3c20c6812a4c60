"""Which backend runs a call: the first, in order of preference, that refuses nothing."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from prefix_attn.backends import composed, cpu, cuda, eager, triton
from prefix_attn.backends.triton import interpreter
from prefix_attn.call import Call

# The fastest first; eager, the last, refuses nothing.
ORDER: tuple[ModuleType, ...] = (cpu, composed, triton, cuda, eager)
# Triton's interpreter is for testing the kernels: it runs when it is named, never because nothing else can.
# cuda runs when it is named until a device has shown where it wins.
AUTO = tuple(b for b in ORDER if b is not cuda and not (b is triton and interpreter.ACTIVE))
BY_NAME: dict[str, ModuleType] = {backend.NAME: backend for backend in ORDER}


class Explanation(NamedTuple):
    """What ``backend="auto"`` does with a call."""

    backend: str
    refused: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        """One line per backend."""
        lines = [f"auto -> {self.backend}"]
        lines += [f"{name}: {'; '.join(reasons)}" for name, reasons in self.refused.items()]
        return "\n".join(lines)


def _auto(call: Call) -> tuple[ModuleType, ...]:
    """``AUTO``, but where ``cpu`` is slow it comes after torch's own kernels, and ``composed`` is for CPUs.

    On a GPU that waits for the device, to read ids and lengths, which no graph captures: it runs there by its name.
    """
    if call.query.device.type != "cpu":
        return tuple(backend for backend in AUTO if backend is not composed)
    return (composed, cpu, *AUTO[2:]) if cpu.slow() else AUTO


def select(call: Call, backend: str = "auto") -> ModuleType:
    """The backend for ``call``. A named one is used or the call raises: there is no silent fallback."""
    if backend == "auto":
        return next(b for b in _auto(call) if not list(b.refuse(call)))
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
    refused = {b.NAME: tuple(b.refuse(call)) for b in ORDER if b is not cuda}
    refused[cuda.NAME] = tuple(cuda.lacks(call)) or (cuda.by_name_only(),)  # and builds nothing
    chosen = select(call)
    if chosen is not cpu and not refused[cpu.NAME] and (reason := cpu.slow()):
        refused[cpu.NAME] = (reason,)
    return Explanation(chosen.NAME, {name: reasons for name, reasons in refused.items() if reasons})
