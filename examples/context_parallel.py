"""Context parallelism: keys and values spread over processes, the parts merged by their log-sum-exp.

``python examples/context_parallel.py`` runs two processes; ``torchrun --nproc-per-node 4 examples/context_parallel.py``
runs as many as you say. Each has all queries and its share of the sequence's keys and values. It attends to these, and
the first process to the prefix too: so the prefix is counted once. The parts need to tell only their outputs and the
logarithms of their softmax's denominators (lse), through both of which gradients flow:

    lse = log(sum_r exp(lse_r))        out = sum_r out_r * exp(lse_r - lse)
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from prefix_attn import prefix_attention


def context_parallel_attention(query: Tensor, key: Tensor, value: Tensor, *prefix: Tensor) -> Tensor:
    """Full attention (B, Hq, S, D) to the prefix and to the keys of all processes, of which ``key`` is one's share."""
    here = prefix if dist.get_rank() == 0 else (None, None)
    out, lse = prefix_attention(query, key, value, *here, is_causal=False, return_lse=True)
    lses = torch.stack(gathered(lse))
    return (torch.stack(gathered(out)) * (lses - lses.logsumexp(0)).exp()[..., None]).sum(0)


def gathered(part: Tensor) -> list[Tensor]:
    """The parts of all processes. Gradients flow into this process's own, as they do everywhere."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.detach().contiguous())
    parts[dist.get_rank()] = part
    return parts


def main() -> dict[str, float]:
    """The relative errors of the output and of every gradient, against one process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same tensors everywhere: those of the whole sequence
    shapes = (2, 4, 6, 16), (2, 2, 8 * ranks, 16), (2, 2, 8 * ranks, 16), (2, 5, 16), (2, 5, 16)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expected = prefix_attention(*tensors, is_causal=False)
    weight = torch.randn(expected.shape)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)

    query, key, value, *prefix = given = [tensor.detach().requires_grad_() for tensor in tensors]
    share = slice(8 * rank, 8 * (rank + 1))
    out = context_parallel_attention(query, key[:, :, share], value[:, :, share], *prefix)
    (out * weight).sum().backward()
    found = [out.detach()]
    for tensor in given:  # a gradient is the sum over the processes; keys and values have theirs in one place
        found.append(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
        dist.all_reduce(found[-1])
    names = ("out", "query", "key", "value", "prefix_key", "prefix_value")
    due = (expected.detach(), *wanted)
    return {name: ((got - one).norm() / one.norm()).item() for name, got, one in zip(names, found, due)}


def run(rank: int, store: str | None = None) -> None:
    """What each process does; ``store`` is where they meet if torchrun did not start them."""
    place = {"init_method": store, "rank": rank, "world_size": 2} if store else {}
    dist.init_process_group("gloo", **place)
    errors = main()
    if rank == 0:
        print("\n".join(f"{name:13} differs from one process by {error:.0e}" for name, error in errors.items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(run, (f"file://{Path(folder) / 'store'}",), nprocs=2)
