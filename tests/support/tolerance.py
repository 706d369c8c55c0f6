"""Bounds on how far a kernel's norms and activations may be from the reference, and what they imply for int8.

`quantize` alone is exact. The kernels compute norms and activations in float32, the reference computes them in float64.
So v, the value before quantization, may differ by a bound that is derived here from the number of roundings (u = 2^-24
is half a unit in the last place of 1). An int8 result may then differ by one step, and only where v lies within that
bound of a rounding boundary: `assert_quantized` checks this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant_kernels import reference
from tests.support.compare import assert_bitwise_equal, count_result

U = 2.0**-24
#: Products below float32's normal range lose bits, and 1 / (1 + exp(88)) = 2^-127 is flushed to 0.
UNDERFLOW = 2.0**-119


@dataclass(frozen=True)
class Expected:
    """The reference's float32 values v [M, K], already smoothed, and the bound on |v' - v|."""

    v: Tensor
    bound: Tensor


def _smoothed(y: Tensor, bound: Tensor, inv_smooth: Tensor | None) -> Expected:
    """Applies one more product: it scales the bound and adds one rounding on each side."""
    if inv_smooth is None:
        return Expected(y, bound)
    factor = inv_smooth.double()
    return Expected(y * inv_smooth, bound * factor.abs() + 2 * U * (y.double() * factor).abs())


def chain(k: int) -> int:
    """The longest chain of additions: elements per thread (32, or K / 512 beyond 512 threads), then two trees of 5."""
    return max(32, -(-k // 512) + 8) + 10


def rms_norm(x: Tensor, weight: Tensor, eps: float, inv_smooth: Tensor | None) -> Expected:
    """rstd has half the sum's relative error, and 5 roundings of division, sum, root and reciprocal; 2 products follow.

    The reference itself rounds 3 times: rstd and two products.
    """
    y = reference.rms_norm(x, weight, eps)
    roundings = chain(x.shape[-1]) / 2 + 5 + 2 + 3
    return _smoothed(y, roundings * U * y.double().abs() + 2.0**-140, inv_smooth)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    inv_smooth: Tensor | None,
) -> Expected:
    """As `rms_norm`, and the mean has the error of its own sum, which is an absolute error of x - mean."""
    y = reference.layer_norm(x, weight, bias, eps)
    x64 = x.double()
    mean = x64.mean(-1, keepdim=True)
    distance = (x64 - mean).abs()
    rstd = torch.rsqrt(distance.square().mean(-1, keepdim=True) + eps)
    length = chain(x.shape[-1])
    mean_error = (length + 2) * U * x64.abs().mean(-1, keepdim=True) + U * mean.abs()
    relative = (length / 2 + 5 + 4 + 3) * U + (mean_error * rstd).square() / 2
    bound = rstd * (mean_error + distance * relative)
    if weight is not None:
        bound = bound * weight.double().abs()
    product = y.double() - (0 if bias is None else bias.double())
    bound = bound + 3 * U * (product.abs() + y.double().abs()) + 2.0**-140
    return _smoothed(y, bound, inv_smooth)


def activation(x: Tensor, kind: str, gate: Tensor | None, inv_smooth: Tensor | None) -> Expected:
    """|act' - act| <= 8 u |t|, and the gating adds its product.

    x sigma(x) is flat enough that an error in exp's argument contributes at most 2 u |t|. exp (2), the sum (1), the
    reciprocal (2) and the product (1) contribute the rest; erf has 2 + 1 + 1.
    """
    y = reference.activation(x, kind, gate)
    if kind in reference.FUSED_KINDS:
        gate, x = x.chunk(2, dim=-1)
    t, up = (x, torch.ones_like(x)) if gate is None else (gate, x)
    scale = up.double().abs()
    bound = (8 * U * t.double().abs() + UNDERFLOW) * scale + 2 * U * y.double().abs() + UNDERFLOW
    return _smoothed(y, bound, inv_smooth)


def rotated(expected: Expected, group: int) -> Expected:
    """Rotates v. A sum of `group` terms has the sum of their bounds.

    Both sides then round log2(group) times, each time by u of a partial sum, which the terms' magnitudes bound; 1.001
    covers the growth (1 + u)^9 and the rounding of this bound itself.
    """
    v = expected.v.double().abs()
    v, bound = (t.unflatten(-1, (-1, group)).sum(-1, keepdim=True) for t in (v, expected.bound))
    roundings = 2 * (group.bit_length() - 1) * U
    total = 1.001 * (bound + roundings * (v + bound))
    return Expected(
        reference.rotate(expected.v, group), total.expand(*total.shape[:-1], group).flatten(-2)
    )


def assert_quantized(
    found: tuple[Tensor, ...],
    expected: Expected,
    scale: Tensor | None,
    granularity: str,
    what: str = "",
) -> int:
    """Checks that x_q and x_scale result from quantizing some v' within the bound of v.

    Returns how many x_q differ from the reference's.
    """
    x_q, x_scale = (t.cpu() for t in found[:2])
    v, bound = expected.v.double(), expected.bound
    count_result()
    m, k = v.shape
    exact_q, exact_scale = reference.quantize(expected.v, scale=scale, granularity=granularity)
    assert x_q.dtype == torch.int8 and x_scale.dtype == torch.float32
    x_q = x_q.reshape(m, k)
    assert x_scale.shape == exact_scale.shape, what
    sound = exact_scale.isfinite()
    assert torch.equal(x_scale.isfinite(), sound), f"{what}: {x_scale} for {exact_scale}"
    if scale is not None:
        assert_bitwise_equal(x_scale, exact_scale, what)
    elif m:
        low, high = (v.abs() - bound).amax(-1), (v.abs() + bound).amax(-1)
        if granularity == "tensor":
            low, high = low.amax(0, keepdim=True), high.amax(0, keepdim=True)
        # A scale below the smallest normal number is flushed to 0.
        floor = reference.MIN_SCALE
        low = torch.where(low / 127 < floor * (1 + 4 * U), 0.0, low / 127 * (1 - 2 * U))
        high = (high / 127 * (1 + 2 * U)).clamp_min(0)
        inside = (x_scale >= low) & (x_scale <= high) | ~sound
        assert bool(inside.all()), f"{what}: scales {x_scale[~inside]} not in {low[~inside]}..."
    inverse = reference.inverse_scale(scale if scale is not None else x_scale)
    per_row = inverse.double().expand(m)[:, None]
    # With a dynamic scale, a row that is not finite has an inverse of 0. With a static scale, its finite values are
    # quantized as usual, infinities saturate and a NaN becomes 0: all three exactly.

    target = (v * per_row).nan_to_num(nan=0.0).clamp(-127, 127)
    slack = 0.5 + (bound * per_row).nan_to_num(nan=0.0, posinf=0.0) + 127 * 2 * U
    wrong = (x_q.double() - target).abs() > slack
    if bool(wrong.any()):
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} int8 values are not within the bound, first at "
            f"{where}: {x_q[where].item()} for {target[where].item()!r} +- {slack[where].item() - 0.5:.3g}"
        )
    return int((x_q != exact_q).sum())
