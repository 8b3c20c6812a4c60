"""Makes ``TRITON_INTERPRET=1`` compute bfloat16 right, and faster; without it this module does nothing.

The interpreter keeps bfloat16 as its 16 bits in numpy's uint16, and up to Triton 3.9 multiplies those bits in
``tl.dot`` (triton issue 11584) and cuts, instead of rounds, a float32 that becomes bfloat16. Both are wrong without a
word. The third repair lets numpy 2.4 turn a loop bound into an integer, which it refuses for Triton 3.6's one-element
arrays.

Triton searches its whole language for builtins whenever a kernel calls a function of its own: two fifths of a launch.
Here it does so once per launch and module.
"""

from __future__ import annotations

import os
from typing import Any

ACTIVE = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # as Triton reads it


def repair() -> None:
    """Patch Triton's interpreter once; to be called before the first launch."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "_prefix_attn_repaired", False):
        return

    def widened(x: Any) -> Any:
        bits = x.data.astype(np.uint32) << 16
        return handle(bits.view(np.float32), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def rounded(x: Any) -> Any:
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        nearest_even = bits + 0x7FFF + ((bits >> 16) & 1)
        return (np.where(np.isnan(x), bits | 0x400000, nearest_even) >> 16).astype(np.uint16)

    plain_dot, plain_trunc = builder.create_dot, builder.create_fp_trunc
    plain_patch, plain_lang = interpreter._patch_lang_tensor, interpreter._patch_lang
    patched: set[int] = set()  # globals of functions

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), *rest)

    def create_fp_trunc(self: Any, x: Any, to: Any) -> Any:
        if x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return handle(rounded(x.data), tl.bfloat16)
        return plain_trunc(self, x, to)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    def patch_lang(fn: Any) -> Any:
        """Once for the functions of a module, until the launch ends: all of them find the same language."""
        if id(fn.__globals__) in patched:
            return None
        scope, outermost = plain_lang(fn), not patched
        patched.add(id(fn.__globals__))
        if outermost:
            plain_restore = scope.restore
            scope.restore = lambda: (plain_restore(), patched.clear())
        return scope

    builder.create_dot, builder.create_fp_trunc = create_dot, create_fp_trunc
    interpreter._patch_lang_tensor, interpreter._patch_lang = patch_lang_tensor, patch_lang
    builder._prefix_attn_repaired = True
