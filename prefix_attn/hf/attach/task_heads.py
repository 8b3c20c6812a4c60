"""Heads that are trained and saved with a prefix: copies that take the place of the base model's while it runs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


def find_heads(base: PreTrainedModel) -> tuple[str, ...]:
    """What ``base`` has on top of its stacks and embeddings, by name."""
    embeddings = base.get_input_embeddings()
    return tuple(
        name
        for name, child in base.named_children()
        if not isinstance(child, PreTrainedModel) and child is not embeddings and any(True for _ in child.parameters())
    )


def copy_heads(base: PreTrainedModel, names: Iterable[str]) -> nn.ModuleDict:
    """Copies of these children of ``base``."""
    return nn.ModuleDict({name: copy.deepcopy(base.get_submodule(name)) for name in names})


@contextmanager
def heads_in_place(base: PreTrainedModel, heads: nn.ModuleDict) -> Iterator[None]:
    """Within the context, ``base`` has these children."""
    own = {name: base.get_submodule(name) for name in heads}
    try:
        for name, head in heads.items():
            setattr(base, name, head)
        yield
    finally:
        for name, head in own.items():
            setattr(base, name, head)


def task_of(base: PreTrainedModel, has_decoder: bool) -> str:
    """PEFT's name of what ``base`` is for."""
    heads = {
        "SequenceClassification": "SEQ_CLS",
        "TokenClassification": "TOKEN_CLS",
        "QuestionAnswering": "QUESTION_ANS",
    }
    for ending, task in heads.items():
        if type(base).__name__.endswith(ending):
            return task
    if not base.can_generate():
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if has_decoder else "CAUSAL_LM"
