"""The gradient of an int8 layer's input, which training adapters, prompts or inputs around frozen layers needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from smoothquant_kernels import ops
from smoothquant_kernels.nn.lazy_weight import dequantized_weight
from smoothquant_kernels.reference import w4_weight


class StraightThrough(Function):
    """`ops.linear_s8` with the gradient of the float product: rounding counts as the identity.

    Without this class, torch's fallback for operations without a gradient warns and cuts the graph. A residual
    connection around the layer then hides that most of the gradient is missing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_q: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        inv_smooth: Tensor | None,
        scale: Tensor | None,
        granularity: str,
        rotation: int,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Runs `linear_s8`; the arguments are in its order."""
        ctx.save_for_backward(w_q, w_scale, inv_smooth)
        ctx.rotation = rotation
        ctx.residual_type = None if residual is None else residual.dtype
        return ops.linear_s8(
            x,
            w_q,
            w_scale,
            bias=bias,
            residual=residual,
            inv_smooth=inv_smooth,
            scale=scale,
            granularity=granularity,
            rotation=rotation,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dx = dL/dy w; that of the residual is dL/dy."""
        (grad,) = grads
        w_q, w_scale, inv_smooth = ctx.saved_tensors
        w = dequantized_weight(w_q, w_scale, inv_smooth, ctx.rotation)
        of_residual = None if ctx.residual_type is None else grad.to(ctx.residual_type)
        return grad @ w.to(grad.dtype), None, None, None, None, None, None, None, of_residual


class StraightThroughW4(Function):
    """The same for `ops.linear_w4a8`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_q4: Tensor,
        w_group: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        inv_smooth: Tensor | None,
        scale: Tensor | None,
        granularity: str,
        rotation: int,
    ) -> Tensor:
        """Runs `linear_w4a8`; the arguments are in its order."""
        ctx.save_for_backward(w_q4, w_group, w_scale, inv_smooth)
        ctx.rotation, ctx.k = rotation, x.shape[-1]
        return ops.linear_w4a8(
            x,
            w_q4,
            w_group,
            w_scale,
            bias=bias,
            inv_smooth=inv_smooth,
            scale=scale,
            granularity=granularity,
            rotation=rotation,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dx = dL/dy w."""
        (grad,) = grads
        w_q4, w_group, w_scale, inv_smooth = ctx.saved_tensors
        w_q = w4_weight(w_q4, w_group, ctx.k)
        w = dequantized_weight(w_q, w_scale, inv_smooth, ctx.rotation)
        return grad @ w.to(grad.dtype), *(None,) * 8


def through(x: Tensor, *rest: Any) -> Tensor:
    """Applies `StraightThrough` to x and the other arguments."""
    y: Tensor = StraightThrough.apply(x, *rest)  # type: ignore[no-untyped-call]
    return y


def through_w4(x: Tensor, *rest: Any) -> Tensor:
    """Applies `StraightThroughW4` to x and the other arguments."""
    y: Tensor = StraightThroughW4.apply(x, *rest)  # type: ignore[no-untyped-call]
    return y
