"""Mixtures of experts: rows sorted by expert, one GEMM for each expert, and the weighted sums of their results."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from smoothquant_kernels.reference.gemm import fma, gemm_s8

#: The most experts that one call of `grouped_gemm_s8` takes.
MAX_EXPERTS = 1024


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order in which the choices of all tokens are grouped by expert. It runs on any device and waits for nothing.

    Args:
        top_k_index: [T, choices] integers, the experts of each token. Others than 0 to E - 1 belong to no expert of
            this process (expert parallelism) and come last.
        num_experts: E.

    Returns:
        order: [T * choices] int32, the choices (as positions in `top_k_index.flatten()`) by expert, of equal ones in
            the order of the tokens.
        position: [T, choices] int32, where each choice stands in `order`.
        offsets: [E + 1] int32. Expert e has `order[offsets[e]:offsets[e + 1]]`.
    """
    chosen = top_k_index.flatten()
    ours = (chosen >= 0) & (chosen < num_experts)
    chosen = torch.where(ours, chosen, num_experts)
    ordered, order = torch.sort(chosen, stable=True)
    every = torch.arange(num_experts + 1, device=chosen.device, dtype=chosen.dtype)
    offsets = torch.searchsorted(ordered, every, out_int32=True)
    # All ranks differ, so no element is written twice.
    ranks = torch.arange(len(order), device=order.device, dtype=torch.int32)
    position = torch.empty_like(ranks).scatter(0, order, ranks)
    return order.int(), position.view(top_k_index.shape), offsets


def grouped_gemm_s8(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """`gemm_s8` of the rows of each expert by its weight. Rows of no expert are zeros. See `ops.grouped_gemm_s8`."""
    if rows is not None:
        x_q = x_q[rows.long()]
    x_scale = x_scale.expand(len(x_q)) if len(x_scale) == 1 else x_scale
    y = x_q.new_zeros(len(x_q), w_q.shape[1], dtype=out_dtype)
    bounds = offsets.tolist()
    for e, (first, last) in enumerate(itertools.pairwise(bounds)):
        own = slice(first, last)
        b = None if bias is None else bias[e]
        y[own] = gemm_s8(x_q[own], w_q[e], x_scale[own], w_scale[e], b, out_dtype=out_dtype)
    return y


def combine_experts(y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    """The sum of each token's results by its weights: one `fma` for each choice, in their order; rounded once."""
    total = torch.full((len(position), y.shape[1]), -0.0, device=y.device)  # x + -0 is x
    for choice in range(position.shape[1]):
        weight = weights[:, choice, None].float()
        total = fma(weight, y[position[:, choice].long()].float(), total)
    return total.to(y.dtype)
