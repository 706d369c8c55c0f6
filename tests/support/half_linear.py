"""A toy kind of quantized layer in one file: a linear with a float16 weight, for the layers named o_proj."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels import SmoothQuantConfig
from smoothquant_kernels.nn.float_linear import weight_of
from smoothquant_kernels.nn.kinds import Kind, Settings


class HalfLinear(nn.Module):
    """y = x @ (half * peak).T + bias. The weight never contains smoothing factors, so x needs no division."""

    half_weight: Tensor
    peak: Tensor
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, *, device: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features)
        self.register_buffer("half_weight", torch.zeros(shape, dtype=torch.float16, device=device))
        self.register_buffer("peak", torch.ones(1, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)

    def rounded(self) -> Tensor:
        return self.half_weight.float() * self.peak

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.rounded(), self.bias).to(input.dtype)


class HalfKind(Kind[HalfLinear]):
    layer = HalfLinear
    scales = ("peak",)

    def takes(self, name: str, linear: nn.Module, config: SmoothQuantConfig) -> bool:
        return name.endswith("o_proj")

    def from_linear(self, linear: nn.Module, settings: Settings) -> HalfLinear:
        weight = weight_of(linear).detach().float()
        bias = getattr(linear, "bias", None)
        new = HalfLinear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device)
        new.peak = weight.abs().max().reshape(1)
        new.half_weight = (weight / new.peak).half()
        new.bias = None if bias is None else bias.detach().float().clone()
        return new.train(linear.training)

    def arguments(self, layer: HalfLinear) -> dict[str, Any]:
        return {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
            "activation_scheme": "none",
        }

    def make(self, arguments: dict[str, Any]) -> HalfLinear | None:
        if arguments.pop("activation_scheme") != "none":
            return None
        return HalfLinear(**arguments, device="meta")

    def smallest(self) -> HalfLinear:
        return HalfLinear(1, 1, True, device="meta")

    def nbytes(self, n: int, k: int) -> int:
        return 2 * n * k + 4

    def rounded_weight(self, layer: HalfLinear) -> Tensor:
        return layer.rounded()

    def rounded_input(self, layer: HalfLinear, x: Tensor) -> Tensor:
        return x.float()
