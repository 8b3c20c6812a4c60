"""Models whose weights are spread over processes, as DTensors: tensor parallelism and FSDP2.

Under tensor parallelism each process runs some heads of every layer. It holds the whole prefix all the same, takes its
heads of the keys and values, and gets the gradients of all heads: so parameters, gradients, optimizers and files are
those of one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, which all its processes have to ask for; any other tensor is itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyrefly: ignore[not-callable]


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2's ``fully_shard`` was called on ``module``: it has to run itself for its weights to be there."""
    return hasattr(module, "set_reshard_after_forward")


def gathering(base: nn.Module) -> list[Any]:
    """The modules of ``base`` that ``fully_shard`` was called on: they gather their weights when they run."""
    return [module for module in base.modules() if is_fully_sharded(module)]


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the context FSDP2's own weights of ``module`` are whole, so that what it holds can run without it."""
    if not is_fully_sharded(module):
        yield
        return
    sharded: Any = module
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()


@contextmanager
def outputs(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """What those of ``modules`` that are called within the context return, or the first tensor of it."""
    made: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, out: Any) -> None:
        made[module] = out if isinstance(out, Tensor) else out[0]

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        yield made


class Behind(torch.autograd.Function):
    """A tensor from within a module, whose gradient comes behind that of the module's output, which is 0 at least.

    FSDP2 gathers a module's weights for its backward when the gradient of its output comes.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, out: Tensor) -> Tensor:
        """``tensor``."""
        ctx.save_for_backward(out.new_zeros(()).expand(out.shape))
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Its gradient, and zeros."""
        return grad, ctx.saved_tensors[0]


def heads_mesh(attention: nn.Module) -> Any:
    """The processes, a DeviceMesh of one dimension, over which an attention module's heads are spread; else None."""
    for parameter in attention.parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        names = getattr(mesh, "mesh_dim_names", None) or ()
        for dim, placement in enumerate(getattr(parameter, "placements", ())):
            if placement.is_shard() and (mesh.ndim == 1 or names[dim : dim + 1] == ("tp",)):
                return mesh if mesh.ndim == 1 else mesh["tp"]
    return None


def of_this_process(tensor: Tensor, dim: int, mesh: Any) -> Tensor:
    """This process's part of a tensor that all have; its gradient is that of all parts."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    spread = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return spread.redistribute(placements=[Shard(dim % tensor.dim())]).to_local().contiguous()


def of_all_processes(tensor: Tensor, dim: int, mesh: Any) -> Tensor:
    """The parts of all processes, in their order; the gradient is that of this process's part."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(tensor, mesh, [Shard(dim % tensor.dim())], run_check=False).full_tensor()


def draw_alike(attentions: Iterable[nn.Module]) -> None:
    """Have the processes of a tensor parallel model draw the same random numbers from now on: those of the first."""
    mesh = next((mesh for module in attentions if (mesh := heads_mesh(module)) is not None), None)
    if mesh is not None:
        state = torch.get_rng_state().to(mesh.device_type)
        torch.distributed.broadcast(state, group=mesh.get_group(), group_src=0)
        torch.set_rng_state(state.cpu())


def is_first() -> bool:
    """Whether this process is the first, or the only one: the one that writes files."""
    return not _is_joined() or torch.distributed.get_rank() == 0


def several_processes() -> bool:
    """Whether other processes have joined this one."""
    return _is_joined() and torch.distributed.get_world_size() > 1


def _is_joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
