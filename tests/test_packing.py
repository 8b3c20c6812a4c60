"""Packed sequences whose lengths nobody can check."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefix_attn import prefix_attention_varlen


@pytest.mark.parametrize("gate", [None, torch.ones(4)], ids=["plain", "gate"])
@pytest.mark.parametrize("backend", ["cpu", "composed", "eager"])
@pytest.mark.parametrize(
    ("cu", "longest"), [([0, 4, 8], 4), ([0, 6, 10], 4), ([0, 6, 14], 8), ([0, 8, 4], 8), ([-2, 4, 10], 6)]
)
def test_packed_lengths_that_cannot_be_checked(
    cu: list[int], longest: int, backend: str, gate: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, and while compiling, nobody reads them: nothing out of bounds is read, and what is right stays so."""
    query, prefix = torch.randn(10, 4, 16), torch.randn(4, 3, 16)

    def call(query: Tensor, cu: list[int]) -> tuple[Tensor, Tensor]:
        lengths = {name: torch.tensor(cu) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        return prefix_attention_varlen(
            query, query, query, prefix, prefix, **lengths, max_seqlen_q=longest, max_seqlen_k=longest,
            prefix_gate=gate, backend=backend, return_lse=True,
        )  # fmt: skip

    first = call(query[:4], [0, 4]) if cu[:2] == [0, 4] else None
    expected = call(query[:8], [0, 8])[0] if cu == [0, 8, 4] else None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    out, lse = call(query, cu)
    assert out.shape == query.shape
    assert out.isfinite().all()
    if expected is not None:  # the second sequence is empty, and tokens 8 and 9 belong to none
        torch.testing.assert_close(out[:8], expected)
    if first is not None:
        torch.testing.assert_close((out[:4], lse[:, :4]), first)
        assert (out[8:] == 0).all()
        assert (lse[:, 8:] == -torch.inf).all()
