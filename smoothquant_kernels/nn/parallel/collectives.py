"""The collective operations of sharded layers, with their gradients.

Each is its own function of the group, so that inference pays for no autograd function.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from smoothquant_kernels.errors import SmoothQuantError


class Group:
    """A process group, this process's rank in it and its size.

    Copies of a model share it, and it cannot be pickled: a file outlives the processes.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> Any:
        raise SmoothQuantError(
            "a sharded model belongs to running processes and cannot be pickled: save it before sharding."
        )


def gather(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """Concatenates the last dimension [..., sizes[rank]] of all ranks' x."""
    most = max(sizes)
    padded = x if x.shape[-1] == most else torch.nn.functional.pad(x, (0, most - x.shape[-1]))
    parts = [torch.empty_like(padded, memory_format=torch.contiguous_format) for _ in sizes]
    dist.all_gather(parts, padded.contiguous(), group=group.group)
    return torch.cat([p[..., :size] for p, size in zip(parts, sizes, strict=True)], -1)


def total(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' x, in x's type. It may overwrite x."""
    x = x.contiguous()
    dist.all_reduce(x, group=group.group)
    return x


class Gather(Function):
    """`gather`, whose gradient is each rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.place = (sum(sizes[: group.rank]), sizes[group.rank])
        return gather(x, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The part of dL/dy that comes from this rank."""
        first, count = ctx.place
        return grads[0][..., first : first + count], None, None


class Total(Function):
    """`total`, whose gradient every rank has already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return total(x.clone(), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dy."""
        return grads[0], None


class Spread(Function):
    """The identity where every rank reads x and uses it for other outputs: the gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The sum of all ranks' dL/dx."""
        return total(grads[0].clone(), ctx.group), None
