"""A block that is fused whole, for tests of what waits and what is merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels import quantize_model
from smoothquant_kernels.fusion.optimize import optimize_for_inference

K, HIDDEN = 32, 48


class Block(nn.Module):
    """Norm, gate and up, product, down, residual; `extra` may read any value in between."""

    def __init__(self, act: nn.Module | Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(K, eps=1e-5)
        self.gate = nn.Linear(K, HIDDEN)
        self.up = nn.Linear(K, HIDDEN, bias=False)
        self.act: Any = nn.SiLU() if act is None else act
        self.down = nn.Linear(HIDDEN, K)
        self.extra: Callable[[Any, Any, Any], Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        a = self.act(self.gate(h)) * self.up(h)
        y = self.down(a)
        if self.extra is not None:
            return self.extra(h, a, y)
        return x + F.dropout(y, 0.1, self.training)


def sample(rows: int = 3) -> Tensor:
    return torch.randn(2, rows, K, generator=torch.Generator().manual_seed(1))


def optimized(**options: Any) -> tuple[Block, Block]:
    """A quantized block, and the same optimized."""
    plain = quantize_model(Block(**options).eval())
    fused = quantize_model(Block(**options).eval())
    optimize_for_inference(fused, {"x": sample()})
    assert isinstance(plain, Block) and isinstance(fused, Block)
    return plain, fused


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to int8 values that round the other way, a few of K: each is a step of 1/127 of a row's largest."""
    return bool((a - b).abs().max() <= 0.03 * b.abs().max())
