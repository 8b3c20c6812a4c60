"""Task heads, such as classifiers, that are trained and saved with a prefix.

Each prefix has copies of its own, which replace the base model's heads while the prefix runs. Heads without the word
"task" are attention heads, except in ``PrefixModel.heads``, whose name checkpoints hold.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


def find_task_heads(base: PreTrainedModel) -> tuple[str, ...]:
    """The names of the children of ``base`` that have parameters and are neither stacks nor input embeddings."""
    embeddings = base.get_input_embeddings()
    return tuple(
        name
        for name, child in base.named_children()
        if not isinstance(child, PreTrainedModel) and child is not embeddings and any(True for _ in child.parameters())
    )


def default_task_heads(base: PreTrainedModel) -> tuple[str, ...]:
    """Those that are trained unless the configuration names others: what a model for a task adds to a pretrained one.

    Such a model has a pretrained one as a child, takes labels, and predicts no tokens: the heads of language models are
    pretrained too.
    """
    forwards = [vars(kind)["forward"] for kind in type(base).__mro__ if "forward" in vars(kind)]
    arguments = {name for forward in forwards for name in inspect.signature(forward).parameters}
    is_language_model = base.can_generate() or base.get_output_embeddings() is not None
    if is_language_model or not arguments & {"labels", "start_positions"}:
        return ()
    return find_task_heads(base) if any(isinstance(child, PreTrainedModel) for child in base.children()) else ()


def copy_task_heads(base: PreTrainedModel, names: Iterable[str]) -> nn.ModuleDict:
    """Copies of these children of ``base``."""
    return nn.ModuleDict({name: copy.deepcopy(base.get_submodule(name)) for name in names})


def train_copies(base: PreTrainedModel, names: Iterable[str], *, trainable: bool) -> None:
    """Freeze these children of ``base``, whose copies run in their place. What others share with them stays.

    Parameters outside of all children, such as weights of layers, cannot be replaced: they are trained as the copies.
    """
    replaced = set(names)
    others = {p for name, child in base.named_children() if name not in replaced for p in child.parameters()}
    for name in replaced:
        for parameter in set(base.get_submodule(name).parameters()) - others:
            parameter.requires_grad_(False)
    for parameter in base.parameters(recurse=False) if replaced else ():
        parameter.requires_grad_(trainable)


@contextmanager
def task_heads_in_place(base: PreTrainedModel, task_heads: nn.ModuleDict) -> Iterator[None]:
    """Within the context, ``task_heads`` replace the children of ``base`` that have their names."""
    own = {name: base.get_submodule(name) for name in task_heads}
    try:
        for name, head in task_heads.items():
            setattr(base, name, head)
        yield
    finally:
        for name, head in own.items():
            setattr(base, name, head)


def task_of(base: PreTrainedModel, has_decoder: bool) -> str:
    """PEFT's name of the task of ``base``."""
    tasks = {
        "SequenceClassification": "SEQ_CLS",
        "TokenClassification": "TOKEN_CLS",
        "QuestionAnswering": "QUESTION_ANS",
    }
    for ending, task in tasks.items():
        if type(base).__name__.endswith(ending):
            return task
    if not base.can_generate():
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if has_decoder else "CAUSAL_LM"
