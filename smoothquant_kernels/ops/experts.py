"""Mixtures of experts: the int8 GEMMs of all experts in one call, and the weighted sums of their results."""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant_kernels.ops import expert_checks as checks
from smoothquant_kernels.ops.registry import op, result


@op(shortcut=True)
def grouped_gemm_s8(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """One INT8 GEMM for each expert, whose rows of the result are adjacent. No call waits for the device.

    Args:
        x_q: [R, K] int8, 1 <= K <= 131,071.
        w_q: [E, N, K] int8, the weights of 1 to 1,024 experts.
        x_scale: [S] (for each row of the result) or [1] float32.
        w_scale: [E, N] float32.
        offsets: [E + 1] int32, ascending from at least 0 to at most S: expert e computes the rows offsets[e] to
            offsets[e + 1] (`reference.sort_by_expert`).
        rows: [S] int32, the row of x_q that each row of the result reads, so that x_q need not be sorted or repeated.
            None reads row i for row i, and S is R.
        bias: [E, N] float.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        [S, N] `out_dtype`: the bits of `gemm_s8` for each expert; zeros in rows of no expert.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or device does not fit. On a CPU also for values of offsets or rows that are out of range,
            as RuntimeError from the compiled kernels; on a GPU they give undefined results.

    Equivalent to:
        for e in range(E):
            mine = slice(offsets[e], offsets[e + 1])
            y[mine] = gemm_s8(x_q[rows[mine]], w_q[e], x_scale[mine], w_scale[e], bias=bias[e], out_dtype=out_dtype)

    Source: MegaBlocks (Gale et al., 2022), section 3; SmoothQuant (Xiao et al., 2022), section 4.
    """
    s = checks.grouped(x_q, w_q, x_scale, w_scale, offsets, rows, bias, out_dtype)
    return result(x_q, (s, w_q.shape[1]), out_dtype)


@op(shortcut=True)
def combine_experts(y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's results, always in the same order.

    Args:
        y: [S, N] float16, bfloat16 or float32, the results of all choices.
        position: [T, choices] int32, the row of y for each choice of each token (`reference.sort_by_expert`).
        weights: [T, choices] float16, bfloat16 or float32.

    Returns:
        [T, N] of y's dtype: float32 sums, one fused multiply-add for each choice, rounded once.

    Raises:
        TypeError, ValueError: as in `grouped_gemm_s8`.

    Equivalent to:
        (y[position].float() * weights[..., None].float()).sum(1).to(y.dtype), in the order of the choices

    Source: Shazeer et al. (2017), Outrageously Large Neural Networks, eq. 1.
    """
    checks.combine(y, position, weights)
    return result(y, (position.shape[0], y.shape[1]), y.dtype)
