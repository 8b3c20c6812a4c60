"""FSDP2 through transformers' Trainer. accelerate turns it on for accelerators alone, so here it is made to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from prefix_attn import PrefixModel
from tests.distributed.together import IDS, RANKS, alone, attached, base, loads_alone, whole

FSDP = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


@contextmanager
def fsdp_on_a_cpu() -> Iterator[None]:
    plain = AcceleratorState.__init__

    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **options)
        self.fsdp_plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
        self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = __init__
    try:
        yield
    finally:
        AcceleratorState.__init__ = plain
        AcceleratorState._reset_state()


def trained(folder: Path, resume: Path | None = None) -> tuple[PrefixModel, list[float]]:
    """Four steps of two rows in each process; the model, and the losses of the steps."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.1, "logging_steps": 1}
    saved = {"save_strategy": "steps", "save_steps": 2, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), use_cpu=True, fsdp=True, fsdp_config=FSDP, **settings, **saved, seed=0)
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    trainer = Trainer(attached(base(), "gate"), arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert trainer.accelerator.is_fsdp2
    trainer.save_model(str(folder / "saved"))
    return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def through_a_trainer(folder: Path) -> None:
    """What it saved is loaded by one process, and a resumed training has the losses of one without a break."""
    # accelerate asks for them, and does not use them: the processes have joined.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "LOCAL_WORLD_SIZE": str(RANKS)}
    with fsdp_on_a_cpu():
        model, losses = trained(folder / "straight")
        assert hasattr(next(model.parameters()), "full_tensor")
        assert losses[3] < losses[0]
        one = alone("gate")
        one.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
        loads_alone(folder / "straight" / "saved", one)
        dist.barrier()
        _, again = trained(folder / "again", folder / "straight" / "checkpoint-2")
    assert again == losses
    assert torch.isfinite(torch.tensor(losses)).all()


CHECKS = {"fsdp, through a Trainer": through_a_trainer}
