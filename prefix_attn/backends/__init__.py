"""Backends: one module per way of computing a ``Call``.

Each has

* ``NAME``: what ``backend=`` selects;
* ``PACKED``: whether it takes packed sequences (``cu_seqlens_q``); the others are given them padded;
* ``refuse(call)``: yields every reason why this backend cannot run the call; nothing means that it can;
* ``forward(call) -> (out, lse)``: out (B, Hq, S, Dv) in the query's dtype, lse (B, Hq, S) natural logarithm, float32
  (float64 for float64 queries);
* ``backward(call, out, lse, grad_out, grad_lse, needs) -> list[Tensor | None]``: a gradient for each of the call's
  first ``DIFFERENTIABLE`` tensors where ``needs`` is true. ``eager`` has none: autograd differentiates it.

Backends know no other backend and hold no state. ``visibility`` states once which keys a query sees.
"""
