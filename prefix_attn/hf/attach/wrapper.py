"""Wrapper base class: the base model's name, arguments and attributes, parameter counts, upload to the Hub."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from prefix_attn.hf import hub
from prefix_attn.hf.attach.outside import Reached
from prefix_attn.hf.attach.trained import leave_out_frozen
from prefix_attn.hf.attach.trainers import complete_folders, give_references


class Wrapper(Reached):
    """A module with a frozen ``base_model`` and trained parameters, which answers as the base model does.

    Trainers, pipelines and collators ask a model for the name of its class and for the arguments of ``forward``: both
    are the base model's. Attributes that only the base model has are read, set and deleted there. New ones stay here,
    and so do private ones which the base model's class does not know: they are what a library notes on one module.
    """

    is_made_together = False  # whether what is saved takes all processes to make
    prefix_in_state: str  # where this module is in the state that is being loaded
    _arguments: ClassVar[tuple[str, ...]]  # the names of its positional arguments
    _written: ClassVar[type[Wrapper]]  # the class without the base model's name

    def __init__(self) -> None:
        """Without a model yet."""
        super().__init__()
        leave_out_frozen(self)
        complete_folders(Wrapper)
        give_references(Wrapper)

    def _wrap(self, base: PreTrainedModel) -> None:
        """Take ``base``. This is the last thing that ``__init__`` does: what is set later may be an attribute of it."""
        self.register_module("base_model", base)
        # All processes compute or read them alike: DistributedDataParallel need not send them in every forward.
        counting = {name for name, module in base.named_modules() if hasattr(module, "track_running_stats")}
        names = [name for name, _ in base.named_buffers() if name.rpartition(".")[0] not in counting]
        self._ddp_params_and_buffers_to_ignore = [f"base_model.{name}" for name in names]
        self._take_name()

    def _take_name(self) -> None:
        written: type[Any] = getattr(type(self), "_written", type(self))
        inner = next(m for m in self._base().modules() if isinstance(m, PreTrainedModel))  # torch.compile wraps it
        self.__class__ = _named_after(written, type(inner))

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a forward by their names."""
        return dict(zip(self._arguments, args)) | kwargs

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters, as PEFT counts them."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print them in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")  # noqa: T201

    def save_pretrained(self, path: str | Path, **options: Any) -> None:
        """Write what is trained, in PEFT's format."""
        raise NotImplementedError

    def check_resumable(self, folder: Path) -> None:
        """Raise a ValueError if ``folder``, which a Trainer left, was not left by this training."""
        raise NotImplementedError

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload what ``save_pretrained`` writes; a model card that the repository has keeps its text.

        Args:
            repo_id: the repository, made if it is not there.
            options: private, token, revision, create_pr and tags, as in transformers; and those of
                ``huggingface_hub.upload_folder``, such as commit_message.

        Raises:
            TypeError or ValueError: wrong arguments. Nothing was requested from the Hub then.
        """
        return hub.push(self.save_pretrained, repo_id, **options)

    def train(self, mode: bool = True) -> Wrapper:
        """As of any module."""
        complete_folders(Wrapper)  # a Trainer may have been imported since
        return super().train(mode)

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Whether there is something to train on a quantised model: a Trainer refuses it otherwise."""
        quantizer = getattr(self._base(), "hf_quantizer", None)
        return quantizer is None or quantizer.is_trainable

    def _replicate_for_data_parallel(self) -> Any:
        refuse_data_parallel(type(self).__qualname__)

    def _is_there(self, name: str) -> bool:
        """Whether the attribute ``name`` is the base model's."""
        base = vars(self).get("_modules", {}).get("base_model")
        if base is None:  # not yet
            return False
        return hasattr(type(base) if name.startswith("_") else base, name)

    def _is_here(self, name: str) -> bool:
        places = vars(self), self._parameters, self._buffers, self._modules
        return hasattr(type(self), name) or any(name in place for place in places)

    def __getattr__(self, name: str) -> Any:
        """Look up on the base model what this module does not have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or (name.startswith("_") and not self._is_there(name)):
                raise
            return self._of_base(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set on the base model what it alone has. A forward in place of the class's own runs with the prefix too."""
        if name == "forward":
            self._replace_forward(value)
        elif self._is_here(name) or not self._is_there(name):
            super().__setattr__(name, value)
        else:
            setattr(self._base(), name, value)

    def __delattr__(self, name: str) -> None:
        """Delete on the base model what it alone has."""
        if self._is_here(name) or not self._is_there(name):
            super().__delattr__(name)
        else:
            delattr(self._base(), name)

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles, which find no class of the base model's name."""
        return object.__new__, (self._written,), vars(self)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """The reverse."""
        super().__setstate__(dict(state))
        self._take_name()


@functools.cache
def _named_after(own: type[Any], base: type[PreTrainedModel]) -> type[Any]:
    """A subclass of ``own`` with the name of ``base``, and whose forward has the arguments of both."""

    def forward(self: Wrapper, *args: Any, **kwargs: Any) -> Any:
        return own.forward(self, *args, **kwargs)

    # Without functools.wraps: accelerate unwraps a forward down to the last __wrapped__, which would lose the prefix.
    theirs = list(inspect.signature(base.forward).parameters.values())
    ours = [p for p in inspect.signature(own.forward).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    last = [theirs.pop()] if theirs[-1].kind is Parameter.VAR_KEYWORD else []
    signature = Signature([*theirs, *ours, *last])
    vars(forward).update(__signature__=signature, __doc__=own.forward.__doc__)
    positional = Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD
    names = tuple(p.name for p in theirs[1:] if p.kind in positional)
    fields = {"forward": forward, "_arguments": names, "_written": own, "__doc__": own.__doc__}
    kind = type(base.__name__, (own,), fields)
    kind.__module__, kind.__qualname__ = own.__module__, f"{own.__qualname__}[{base.__name__}]"
    return kind


def refuse_data_parallel(name: str) -> None:
    """What nn.DataParallel gets for a copy of a model, in whose layers nobody would know the prefix."""
    raise NotImplementedError(
        f"{name} does not run under nn.DataParallel, which copies the model in every forward: start one process per "
        "GPU (torchrun, accelerate launch), or show one GPU (CUDA_VISIBLE_DEVICES=0)"
    )


def check_base(base: Any) -> None:
    """Refuse what is not a bare transformers model.

    Raises:
        TypeError: says what to give instead.
    """
    if isinstance(base, PreTrainedModel) or isinstance(getattr(base, "_orig_mod", None), PreTrainedModel):
        return  # the second is torch.compile's
    name = type(base).__qualname__
    if isinstance(base, Wrapper):
        instead = "its base_model; a PrefixModel has add_prefix and load_prefix for more of them"
    elif hasattr(base, "get_base_model"):
        instead = "what get_base_model() or merge_and_unload() returns; accelerate(model) serves PEFT's own prefixes"
    elif isinstance(base, str | Path):
        name, instead = f"{base!r}", "the model that from_pretrained or load_base makes of it"
    else:
        instead = "the model inside, before anything is put around it"
    raise TypeError(f"base must be a transformers PreTrainedModel, got {name}: give {instead}")


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
