"""Parts of int8 layers for tensor parallelism: rows or columns of the weight, with their scales and factors.

Torch names the two ways after the transposed weight, and so does this package: column-wise splits the output features
(rows of w_q), row-wise the input features (columns of w_q).
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.nn.operands import packed_rows


def extent(size: int, rank: int, world: int) -> tuple[int, int]:
    """The first of `size` features that a rank holds, and how many: as equal as possible, larger parts first."""
    least, more = divmod(size, world)
    return rank * least + min(rank, more), least + (rank < more)


def check_colwise(
    layer: W8A8Linear, world: int, *, name: str = "the layer", even: bool = True
) -> None:
    """Raises SmoothQuantError unless `shard_colwise` can split the layer.

    Args:
        layer: the layer.
        world: the number of parts.
        name: the layer's name, for the message.
        even: whether all parts must have the same size, because the next layer reads its part as it is.
    """
    _check_whole(layer, name)
    n = layer.out_features
    if n < world or (even and n % world):
        raise SmoothQuantError(
            f"{name} has {n} output features, which {world} ranks cannot share"
            f"{' evenly' if n >= world else ''}: use a number of ranks that divides it, or leave the layer out of the "
            "plan together with the layers that read its output."
        )


def check_rowwise(layer: W8A8Linear, world: int, *, name: str = "the layer") -> None:
    """Raises SmoothQuantError unless `shard_rowwise` can split the layer.

    A rank rotates only its own channels, so no group of the rotation may lie on two ranks.
    """
    _check_whole(layer, name)
    k, group = layer.in_features, layer.rotation
    if k % world:
        raise SmoothQuantError(
            f"{name} has {k} input features, which {world} ranks cannot share evenly: use a number of ranks that "
            "divides it."
        )
    if group and (k // world) % group:
        raise SmoothQuantError(
            f"{name} rotates its {k} input features in groups of {group}, and the {k // world} of each of {world} "
            'ranks would cut a group: use scales="agreed", fewer ranks, or quantize with a smaller rotation.'
        )


def _check_whole(layer: W8A8Linear, name: str) -> None:
    if layer.part:
        raise SmoothQuantError(
            f"{name} is sharded already ({layer.part}): shard a whole layer, once."
        )


def shard_colwise(layer: W8A8Linear, rank: int, world: int) -> W8A8Linear:
    """The rows of the weight that one rank holds, with their scales and bias. It reads the whole input.

    The outputs of all ranks, concatenated, are the bits of the whole layer's output.

    Args:
        layer: the whole layer; not changed.
        rank, world: which of how many parts. `extent` says which features that is.

    Raises:
        SmoothQuantError: the layer has fewer output features than there are ranks.

    Equivalent to:
        y[..., first : first + count]  # y = layer(x)

    Source: Megatron-LM (Shoeybi et al., 2019), section 3.
    """
    check_colwise(layer, world, even=False)
    first, count = extent(layer.out_features, rank, world)
    rows = slice(first, first + count)
    return _part(
        layer,
        w_q=layer.w_q[rows],
        w_scale=layer.w_scale[rows] if layer.weight_granularity == "channel" else layer.w_scale,
        bias=None if layer.bias is None else layer.bias[rows],
        inv_smooth=layer.inv_smooth,
    )


def shard_rowwise(layer: W8A8Linear, rank: int, world: int) -> W8A8Linear:
    """The columns of the weight that one rank holds, with their smoothing factors. It reads its part of the input.

    The outputs of all ranks add up to the whole layer's output, up to the quantization error: a dynamic scale covers
    only the channels that the rank holds. Rank 0 has the bias.

    Args:
        layer: the whole layer; not changed.
        rank, world: which of how many parts.

    Raises:
        SmoothQuantError: the parts would not be equal, or would cut a group of the rotation.

    Equivalent to:
        columns = slice(rank * K // world, (rank + 1) * K // world)
        torch.nn.functional.linear(x[..., columns], w[:, columns], bias if rank == 0 else None)

    Source: Megatron-LM (Shoeybi et al., 2019), section 3.
    """
    check_rowwise(layer, world)
    first, count = extent(layer.in_features, rank, world)
    columns = slice(first, first + count)
    return _part(
        layer,
        w_q=layer.w_q[:, columns],
        w_scale=layer.w_scale,
        bias=layer.bias if rank == 0 else None,
        inv_smooth=None if layer.inv_smooth is None else layer.inv_smooth[columns],
    )


def _part(
    layer: W8A8Linear,
    *,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    inv_smooth: Tensor | None,
) -> W8A8Linear:
    n, k = w_q.shape
    part = W8A8Linear(
        k,
        n,
        bias is not None,
        activation_scheme=layer.activation_scheme,
        weight_granularity=layer.weight_granularity,
        smooth=inv_smooth is not None,
        rotation=layer.rotation,
        device="meta",
        dtype=layer.dtype,
    )
    # Copies, so that the memory of the whole layer can be freed.
    part.w_q = packed_rows(w_q.clone(memory_format=torch.contiguous_format))
    part.w_scale = w_scale.clone()
    part.bias = None if bias is None else bias.clone()
    part.inv_smooth = None if inv_smooth is None else inv_smooth.clone()
    part.x_scale = None if layer.x_scale is None else layer.x_scale.clone()
    return part.train(layer.training)
