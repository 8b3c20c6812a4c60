"""Context parallelism: keys and values spread over processes, the parts merged by their log-sum-exp.

    torchrun --nproc-per-node 2 examples/context_parallel.py

Each process has all queries and its share of the sequence's keys and values. It attends to these, and one process to
the prefix too, so that the prefix is counted once. An output and the logarithm of its softmax's denominator (lse) are
all that a part has to tell:

    lse = logaddexp(lse_0, lse_1, ...)        out = sum_r out_r * exp(lse_r - lse)

Both are differentiable, the lse too. Gradients of keys and values come out where they lie; those of what all processes
have, the queries and the prefix, are sums over the processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather, all_reduce

from prefix_attn import prefix_attention


def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor
) -> Tensor:
    """(B, Hq, S, D) like ``query``: full attention to the prefix and to the keys of all processes.

    ``query`` and the prefix are those of all processes, ``key`` and ``value`` (B, Hkv, T / processes, D) are of this
    one. A prefix of length 0 in all processes but the first is how it is counted once.
    """
    P = prefix_key.shape[1] if dist.get_rank() == 0 else 0
    out, lse = prefix_attention(
        query, key, value, prefix_key[:, :P], prefix_value[:, :P], is_causal=False, return_lse=True
    )
    total = torch.stack(all_gather(lse)).logsumexp(0)
    return all_reduce(out * (lse - total).exp()[..., None])


def main() -> dict[str, float]:
    """Compare with one process: relative errors of the output and of every gradient."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same tensors everywhere: those of the whole sequence
    shapes = (2, 4, 6, 16), (2, 2, 8 * ranks, 16), (2, 2, 8 * ranks, 16), (2, 5, 16), (2, 5, 16)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expected = prefix_attention(*tensors, is_causal=False)
    weight = torch.randn(expected.shape)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)

    query, key, value, *prefix = (tensor.detach().requires_grad_() for tensor in tensors)
    here = slice(8 * rank, 8 * (rank + 1))
    out = context_parallel_attention(query, key[:, :, here], value[:, :, here], *prefix)
    # All processes have the same loss, and the gradient of all_reduce is the sum of theirs: each takes its part.
    ((out * weight).sum() / ranks).backward()
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    errors = {"out": relative(out.detach(), expected.detach())}
    for name, tensor, due in zip(names, (query, key, value, *prefix), wanted):
        assert tensor.grad is not None
        dist.all_reduce(tensor.grad)  # keys and values are 0 where they are not this process's
        errors[name] = relative(tensor.grad, due)
    return errors


def relative(got: Tensor, expected: Tensor) -> float:
    """The error in norm."""
    return ((got - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = main()
    if dist.get_rank() == 0:
        for name, error in found.items():
            print(f"{name:13} differs from one process by {error:.0e}")
    dist.destroy_process_group()
