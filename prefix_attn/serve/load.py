"""What a server serves: a base model with its prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prefix_attn.hf.model import PrefixModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_prefixes(base: PreTrainedModel, folders: Mapping[str, Path]) -> PrefixModel:
    """``base`` with the prefix of each folder, under its name.

    Raises:
        NotImplementedError: ``base`` has an encoder, or its attention takes no prefix.
        ValueError: a prefix does not fit ``base``, or the prefixes cannot share a batch.
    """
    if base.config.is_encoder_decoder:
        raise NotImplementedError(f"{type(base).__name__} has an encoder: only decoders are served")
    model = PrefixModel(base)
    for name, folder in folders.items():
        model.load_prefix(folder, name)
    model.check_together(model.prefix_names)
    return model.eval()
