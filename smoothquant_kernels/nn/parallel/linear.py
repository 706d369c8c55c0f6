"""Int8 layers whose weight is spread over the processes of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.nn.operands import QuantizedActivation
from smoothquant_kernels.nn.parallel.collectives import Gather, Group, Spread, Total, gather, total
from smoothquant_kernels.nn.parallel.shards import (
    check_colwise,
    check_rowwise,
    extent,
    shard_colwise,
    shard_rowwise,
)

#: How a row-wise layer scales activations: as one process does, or each rank its own channels.
SCALES = ("agreed", "own")


class ShardedLinear(W8A8Linear):
    """A `W8A8Linear` that one rank holds a part of. `in_features` and `out_features` are those of the part.

    A whole layer becomes one in place (`become_colwise`, `become_rowwise`), so that it keeps its hooks and its names.

    Attributes:
        group: the ranks.
        input_sizes: the input features that each rank receives; None if every rank receives all of them.
        output_sizes: the output features that each rank computes; None if every rank computes a term of a sum.
        whole_output: whether every rank returns all output features.
    """

    group: Group
    input_sizes: list[int] | None
    output_sizes: list[int] | None
    whole_output: bool

    def quantize_input(self, x: Tensor) -> QuantizedActivation:
        """As the base class. Every rank of the group must call it, where the layer gathers its input."""
        return super().quantize_input(self._input(x))

    def forward(self, input: Tensor | QuantizedActivation) -> Tensor:
        """As the base class. Every rank of the group must call it with its input."""
        x = input
        y = super().forward(x if isinstance(x, QuantizedActivation) else self._input(x))
        if self.output_sizes is None:
            return _total(y, self.group)
        return _gather(y, self.output_sizes, self.group) if self.whole_output else y

    def _input(self, x: Tensor) -> Tensor:
        """What the part reads of x, which is the whole input or this rank's features of it."""
        sizes = self.input_sizes
        features = self.in_features if sizes is None else sizes[self.group.rank]
        if sizes is None and self.output_sizes is None:
            features *= self.group.world
        if x.dim() < 1 or x.shape[-1] != features:
            raise SmoothQuantError(
                f"a layer that is {self.part} reads [..., {features}], got {tuple(x.shape)}: shard the layer before it "
                "as its plan says."
            )
        if self.output_sizes is None and sizes is not None:
            return x
        x = _spread(x if sizes is None else _gather(x, sizes, self.group), self.group)
        if self.output_sizes is None:
            return x[..., self.group.rank * self.in_features :][..., : self.in_features]
        return x


class ColwiseW8A8Linear(ShardedLinear):
    """Holds some rows of w_q and computes their outputs from the whole input."""


class RowwiseW8A8Linear(ShardedLinear):
    """Follows a column-wise layer: receives some input features and returns all output features."""


def _graph(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _gather(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    if _graph(x):
        x = Gather.apply(x, sizes, group)  # type: ignore[no-untyped-call]
        return x
    return gather(x, sizes, group)


def _total(x: Tensor, group: Group) -> Tensor:
    if _graph(x):
        x = Total.apply(x, group)  # type: ignore[no-untyped-call]
        return x
    return total(x, group)


def _spread(x: Tensor, group: Group) -> Tensor:
    if _graph(x):
        x = Spread.apply(x, group)  # type: ignore[no-untyped-call]
    return x


def _sizes(features: int, world: int) -> list[int]:
    return [extent(features, rank, world)[1] for rank in range(world)]


def check_become_colwise(layer: W8A8Linear, world: int, name: str, *, gather_output: bool) -> None:
    """Raises the error of `become_colwise`, without a change."""
    check_colwise(layer, world, name=name, even=not gather_output)


def check_become_rowwise(
    layer: W8A8Linear, world: int, name: str, *, scales: str, split_input: bool
) -> None:
    """Raises the error of `become_rowwise`, without a change."""
    if scales not in SCALES:
        raise SmoothQuantError(f"scales must be one of {', '.join(SCALES)}; got {scales!r}.")
    if scales == "own":
        check_rowwise(layer, world, name=name)
        return
    check_colwise(layer, world, name=name, even=False)
    if not split_input and layer.in_features % world:
        raise SmoothQuantError(
            f"{name} has {layer.in_features} input features, which {world} ranks cannot share evenly: use a number of "
            "ranks that divides it."
        )


def become_colwise(
    layer: W8A8Linear, group: Group, *, name: str = "the layer", gather_output: bool = False
) -> None:
    """Makes a whole layer this rank's part of a column-wise one.

    Args:
        layer: changed in place to a `ColwiseW8A8Linear`.
        group: the ranks. Each must call this with the same layer.
        name: the layer's name, for messages.
        gather_output: whether every rank returns all output features, or only its own.
    """
    check_become_colwise(layer, group.world, name, gather_output=gather_output)
    part = shard_colwise(layer, group.rank, group.world)
    output_sizes = _sizes(layer.out_features, group.world)
    _become(ColwiseW8A8Linear, layer, part, group, None, output_sizes, gather_output)


def become_rowwise(
    layer: W8A8Linear,
    group: Group,
    *,
    name: str = "the layer",
    scales: str = "agreed",
    split_input: bool = False,
) -> None:
    """Makes a whole layer this rank's part of a row-wise one: it reads parts of the input and returns whole outputs.

    Args:
        layer: changed in place to a `RowwiseW8A8Linear`.
        group: the ranks. Each must call this with the same layer.
        name: the layer's name, for messages.
        scales: ``"agreed"`` or ``"own"``, as in `parallelize_model`.
        split_input: whether the layer receives all input features, or only its part.
    """
    check_become_rowwise(layer, group.world, name, scales=scales, split_input=split_input)
    input_sizes = None if split_input else _sizes(layer.in_features, group.world)
    if scales == "own":
        part, output_sizes = shard_rowwise(layer, group.rank, group.world), None
    else:
        # Rows of w_q here, too: a rank that reads whole tokens has their scales, and one GEMM has the exact sums.
        part = shard_colwise(layer, group.rank, group.world)
        output_sizes = _sizes(layer.out_features, group.world)
    _become(RowwiseW8A8Linear, layer, part, group, input_sizes, output_sizes, True)


def _become(
    cls: type[ShardedLinear],
    layer: W8A8Linear,
    part: W8A8Linear,
    group: Group,
    input_sizes: list[int] | None,
    output_sizes: list[int] | None,
    whole_output: bool,
) -> None:
    layer._buffers.update(part._buffers)
    way = "column-wise" if cls is ColwiseW8A8Linear else "row-wise"
    values = {
        "in_features": part.in_features,
        "out_features": part.out_features,
        "part": f"part {group.rank + 1} of {group.world}, {way}",
        "group": group,
        "input_sizes": input_sizes,
        "output_sizes": output_sizes,
        "whole_output": whole_output,
    }
    layer.__dict__.update(values)
    # Not a new module: torch's `parallelize_module` drops the module that a style returns.
    layer.__class__ = cls
