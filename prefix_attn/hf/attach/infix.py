"""Infix tuning: [x ; INFIX ; y], where only y attends to what is trained (Li and Liang 2021, section 7.3).

The infix has positions of its own, which start at 0, and the tokens keep theirs. So one stored key serves rows of any
length, and where y starts decides only which tokens see the infix. y starts with the last token of the prompt (in the
original code a separator), because its logits predict the first target. If it did not see the infix, no training could
reach that target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prefix_attn.hf.attach.positions import is_packed, past

IGNORED = -100  # label of a token that has no loss


def start_of_targets(start: Tensor | None, given: Mapping[str, Any]) -> Tensor:
    """(B,) int64: the first column of each row of a forward that sees the infix; padding and the cache count.

    Args:
        start: these columns, if the caller gives them. Default: the column before the first target in ``labels``. Rows
            without a target do not see the infix.
        given: the arguments of the forward.

    Raises:
        ValueError: neither start nor labels, or not one for each row.
        NotImplementedError: packed sequences.
    """
    labels = given.get("labels")
    if is_packed(given):
        raise NotImplementedError("mode='infix': packed sequences have more than one start; give each a row of its own")
    if start is not None:
        tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        return _checked(start, tokens)
    if labels is None:
        raise ValueError("mode='infix' needs infix_start (B,), the first column of each row that sees it, or labels")
    targets = labels != IGNORED
    first = torch.where(targets.any(-1), (targets.int().argmax(-1) - 1).clamp(min=0), labels.shape[1])
    return first + past(given)


def end_of_prompt(start: Tensor | None, *prompts: Tensor | None) -> Tensor:
    """(B,) int64: the first column that sees the infix in generate: ``start``, or the last column of the prompt.

    Raises:
        ValueError: not one for each row.
    """
    prompt = next((prompt for prompt in prompts if prompt is not None), None)
    if prompt is None:  # generate begins with a start token
        return torch.zeros(1, dtype=torch.int64)
    if start is not None:
        return _checked(start, prompt)
    return torch.full((prompt.shape[0],), prompt.shape[1] - 1, device=prompt.device)


def _checked(start: Tensor, tokens: Tensor) -> Tensor:
    rows = tokens.shape[0]
    if not isinstance(start, Tensor) or start.dtype not in (torch.int32, torch.int64) or start.shape != (rows,):
        got = f"{start.dtype} {tuple(start.shape)}" if isinstance(start, Tensor) else repr(start)
        raise ValueError(f"infix_start must be ({rows},) integers, a column for each row, got {got}")
    return start.long().to(tokens.device)
