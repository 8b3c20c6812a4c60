"""What transformers' Trainer saves of a model of ours, and that it resumes the training that it left.

Of a model that is neither transformers' nor PEFT's, ``Trainer._save`` writes the state_dict alone, and asks nobody. So
it is wrapped: behind its own files it writes those of ``save_pretrained``, which other programs can load. The Trainer
resumes from its own files as before.

TRL's trainers that take a reference model read the base a second time for models that are not PEFT's. For ours the
frozen model is there already.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
_COMPLETE: list[type] = []  # the trainers that know our models


def complete_folders(kind: type[Any]) -> None:
    """From now on let every Trainer save models of ``kind`` whole. Nothing is imported: there may be no Trainer."""
    module = sys.modules.get("transformers.trainer")
    trainer = getattr(module, "Trainer", None)  # None while it is imported
    if trainer is None or trainer in _COMPLETE:
        return
    theirs = trainer._save
    _COMPLETE.append(trainer)

    @functools.wraps(theirs)
    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        theirs(self, output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, kind) and model.is_made_together:  # only this process is here
            _log.warning("%s: has the state alone; save_pretrained, called by all processes, writes more", output_dir)
        elif isinstance(model, kind):
            folder = self.args.output_dir if output_dir is None else output_dir
            model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)

    trainer._save = _save
    resume = trainer._load_from_checkpoint

    @functools.wraps(resume)
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        ours = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(ours, kind):
            ours.check_resumable(Path(resume_from_checkpoint))
        resume(self, resume_from_checkpoint, model)

    trainer._load_from_checkpoint = _load_from_checkpoint


def give_references(kind: type[Any]) -> None:
    """From now on DPOTrainer and KTOTrainer take the model without its prefix as the reference, unless given one."""
    for method in ("dpo", "kto"):
        module = sys.modules.get(f"trl.trainer.{method}_trainer")
        trainer = getattr(module, f"{method.upper()}Trainer", None)
        if trainer is not None and trainer not in _COMPLETE:
            _COMPLETE.append(trainer)
            trainer.__init__ = _with_reference(trainer.__init__, kind)


def _with_reference(theirs: Callable[..., None], kind: type[Any]) -> Callable[..., None]:
    @functools.wraps(theirs)
    def __init__(self: Any, model: Any, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
        if ref_model is None and isinstance(model, kind):
            ref_model = model.base_model
        theirs(self, model, ref_model, *args, **kwargs)

    return __init__
