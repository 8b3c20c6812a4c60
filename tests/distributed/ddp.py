"""DistributedDataParallel, and what every kind of process group shares."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from prefix_attn import PrefixConfig
from prefix_attn.training.evaluate import validation_loss
from tests.distributed.together import FORMS, IDS, alone, gradients, loads_alone, mine, same_gradients
from tests.numerics import FLOAT, close


def gradients_and_bytes(form: str, folder: Path) -> None:
    """Those of one process with the whole batch. Of several prefixes the active one is sent, and nothing frozen."""
    model, one, sent = alone(form), alone(form), [0]
    model.add_adapter("other", PrefixConfig(num_virtual_tokens=3))  # "default" stays active

    def count(_, bucket):  # torch reads annotations, and does not know those of today
        sent[0] += bucket.buffer().nbytes
        return allreduce_hook(dist.group.WORLD, bucket)

    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, count)
    for _ in range(2):  # the second would wait for what the first did not use
        model.zero_grad()
        sent[0] = 0
        parallel(mine(IDS), labels=mine(IDS)).loss.backward()
    one(IDS, labels=IDS).loss.backward()
    same_gradients(gradients(model), gradients(one))
    assert sent[0] == sum(p.nbytes for p in model.parameters() if p.requires_grad) > 0
    computed = [name for name, _ in model.named_buffers() if "inv_freq" in name]
    assert computed
    assert parallel.modules_buffers == []  # which would be sent in every forward
    model.save_pretrained(folder)
    loads_alone(folder, one)


def one_process_writes(folder: Path) -> None:
    model = alone("gate")
    own = folder / str(dist.get_rank())
    model.save_pretrained(own, training_state=True)
    assert own.is_dir() == (dist.get_rank() == 0)


def validation_is_shared(_: Path) -> None:
    """Three batches, of which one process has two. Rows count by their targets, as alone."""
    labels = IDS.clone()
    labels[:3, :5] = -100
    batches = [{"input_ids": IDS[rows], "labels": labels[rows]} for rows in (slice(2), slice(2, 3), slice(3, 4))]
    model = alone("gate")
    initialized, dist.is_initialized = dist.is_initialized, lambda: False
    expected = validation_loss(model, batches)
    dist.is_initialized = initialized
    got = validation_loss(model, batches)
    close(torch.tensor(got), torch.tensor(expected), FLOAT)
    several = [None, None]
    dist.all_gather_object(several, got)
    assert several[0] == several[1]


CHECKS = {f"ddp, {form}": lambda folder, form=form: gradients_and_bytes(form, folder) for form in FORMS}
CHECKS |= {"one process writes": one_process_writes, "validation is shared": validation_is_shared}
