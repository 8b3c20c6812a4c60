"""Run checks in two processes: ``python -m tests.distributed.together FOLDER`` prints {name: what was wrong, or ""}.

All checks share the processes, which are forked after the imports: these are most of the time.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from tests.hf.models import tiny
from tests.numerics import GRADIENT, MODEL, close

RANKS = 2
Check = Callable[[Path], None]
IDS = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(7))
FORMS: dict[str, dict[str, Any]] = {
    "gate": {"gate": "zero", "num_frozen_tokens": 1},
    "mlp": {"prefix_projection": True, "encoder_hidden_size": 8},
    "embedding": {"mode": "embedding"},
}


def attached(base: Any, form: str) -> PrefixModel:
    """``base`` with a prefix of this form: the same in every process and alone, however the first one was seeded."""
    torch.manual_seed(5 + 100 * dist.get_rank())
    fields = {"num_virtual_tokens": 4, "init": "text", "init_token_ids": [9, 8, 7, 6]}
    model = get_prefix_model(base, PrefixConfig(**fields | FORMS[form]))
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            nn.init.constant_(parameter, 0.3)
    return model.train()


def alone(form: str) -> PrefixModel:
    """What one process has."""
    torch.manual_seed(5)
    rank, dist.get_rank = dist.get_rank, lambda *_: 0
    try:
        return attached(base(), form)
    finally:
        dist.get_rank = rank


def base() -> Any:
    return tiny("llama", num_hidden_layers=2, vocab_size=98)


def mine(tensor: Tensor) -> Tensor:
    """This process's rows."""
    return tensor.chunk(RANKS)[dist.get_rank()]


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        assert wanted.abs().max() > 0, name
        close(got[name], wanted, GRADIENT)


def loads_alone(folder: Path, expected: PrefixModel) -> None:
    """The file of ``folder`` is what one process would have saved."""
    dist.barrier()
    again = PrefixModel.from_pretrained(base(), folder).eval()
    close(again(IDS).logits, expected.eval()(IDS).logits, MODEL)


def run(checks: Mapping[str, Check], rank: int, folder: Path) -> dict[str, str]:
    """The verdicts of all processes on all checks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}  # as torchrun does
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    found = {}
    for name, check in checks.items():
        wrong = ""
        try:
            place = folder / name.replace(" ", "-").replace(",", "")
            check(place)
        except Exception:
            wrong = f"rank {rank}: {traceback.format_exc()}"
            sys.stderr.write(f"{name}: {wrong}\n")  # at once: the other process may wait for this one
        verdicts: list[Any] = [None] * RANKS
        dist.all_gather_object(verdicts, wrong)
        found[name] = "".join(verdicts)
    dist.destroy_process_group()
    return found


def main() -> None:
    from tests.distributed import ddp, fsdp, spread, trainer

    folder = Path(sys.argv[1])
    checks = {**ddp.CHECKS, **fsdp.CHECKS, **spread.CHECKS, **trainer.CHECKS}
    first = os.fork()
    found = run(checks, 0 if first else 1, folder)
    if not first:
        os._exit(0)
    os.waitpid(first, 0)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
