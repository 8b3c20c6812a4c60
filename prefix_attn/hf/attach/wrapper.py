"""Wrapper base class: parameter counts, attribute forwarding, upload to the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prefix_attn.hf.attach.trained import leave_out_frozen


class Wrapper(nn.Module):
    """A module with a frozen ``base_model`` and trained parameters. Attributes it lacks are looked up on the model."""

    base_model: PreTrainedModel
    prefix_in_state: str  # where this module is in the state that is being loaded

    def __init__(self) -> None:
        """Without a model yet."""
        super().__init__()
        leave_out_frozen(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters, as PEFT counts them."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print them in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")  # noqa: T201

    def save_pretrained(self, path: str | Path) -> None:
        """Write what is trained, in PEFT's format."""
        raise NotImplementedError

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload what ``save_pretrained`` writes; ``kwargs`` are those of ``huggingface_hub.upload_folder``."""
        from tempfile import TemporaryDirectory

        from huggingface_hub import create_repo, upload_folder

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            create_repo(repo_id, exist_ok=True)
            return upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Look up on the base model what this module does not have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def device_of(module: nn.Module) -> torch.device:
    """The device that ``module`` runs on. Between runs, accelerate keeps the weights of an offloaded one elsewhere."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts ``model`` in eval mode within the context, and each of its modules back in its mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
