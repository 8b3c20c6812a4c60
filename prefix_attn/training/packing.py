"""The rows of a batch one behind the other in one row, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from prefix_attn.hf.attach.wrapper import evaluating
from prefix_attn.training.tokens import IGNORED, Batch, Row


def pack(rows: Sequence[Row]) -> Batch:
    """One row of all ``rows``, whose positions start again with each. The loss is that of the padded batch."""
    ids = [row["input_ids"] for row in rows]
    # The first token of a row is predicted by nothing: here the row before it would.
    labels = [[IGNORED, *row["labels"][1:]] for row in rows]
    found = {"input_ids": ids, "labels": labels, "position_ids": [range(len(row)) for row in ids]}
    return {name: torch.tensor([list(chain.from_iterable(parts))]) for name, parts in found.items()}


@torch.no_grad()
def check_packing(model: Any, rows: Sequence[Row]) -> None:
    """Try whether rows that are packed are on their own in this model: another first row must not change the second.

    Raises:
        NotImplementedError: the model does not know packed rows, or lets them see one another.
    """
    if model.config.is_encoder_decoder:
        raise NotImplementedError("packing takes a causal model, not an encoder-decoder: leave out --packing")
    second = {name: list(values[:32]) for name, values in rows[-1].items()}
    first = {name: list(values[:32]) for name, values in rows[0].items()}
    other = first | {
        "input_ids": [(token + 1) % model.config.get_text_config().vocab_size for token in first["input_ids"]]
    }
    kind, found = type(getattr(model, "base_model", model)).__name__, []
    with evaluating(model):
        for before in (first, other):
            batch = pack([before, second])
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
            found.append(model(**inputs, use_cache=False).logits[0, len(first["input_ids"]) :].float())
    rounding = torch.finfo(model.dtype).eps ** 0.5 * found[0].abs().max()
    if (found[0] - found[1]).abs().max() > rounding:
        raise NotImplementedError(f"{kind} lets packed rows see one another: leave out --packing")
