"""`W4A8Linear`: a drop-in for `nn.Linear` with 4-bit weights, which unpack to int8, and int8 activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smoothquant_kernels import ops, reference
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.gradient import through_w4
from smoothquant_kernels.nn.kinds import Kind, Settings, register
from smoothquant_kernels.nn.lazy_weight import dequantized_weight
from smoothquant_kernels.nn.operands import QuantizedActivation, packed_words
from smoothquant_kernels.nn.quantized_linear import (
    MARKER,
    QuantizedLinear,
    read_linear,
    rounded_input,
)
from smoothquant_kernels.nn.rounding_w4 import int4_weight
from smoothquant_kernels.ops.checks import fits_rotation, float_named, type_name


class W4A8Linear(QuantizedLinear):
    """Linear layer with a weight of 4 bits: `y = gemm_w4a8(quantize(rotate(x / s)), w_q4, w_group) + bias`.

    The weight has a float32 scale per output channel, and an integer step and offset for each group of 128 input
    channels. It takes 4.125 bits per value where K is a multiple of 128.

    Args:
        in_features, out_features, bias, activation_scheme, smooth, rotation, device, dtype: as in `W8A8Linear`.

    Buffers, with their final type and shape from the start so that `load_state_dict` works on a fresh layer:
        w_q4 [N, 64 G] uint8 for G = ceil(K / 128) groups (`reference.pack_w4`); w_group [G, N, 2] int8, the step and
        the offset of each group; w_scale [N]; bias [N] or None; inv_smooth [K] or None; x_scale [1] or None (static).
        The last four are float32 and stay so under `.half()`, `.bfloat16()`, `.double()` and `.to(dtype)`.

    The state dict has one more entry, `weight`, as that of `W8A8Linear`.

    Equivalent to:
        w_q = reference.w4_weight(w_q4, w_group, K)  # int8: q * step + offset
        W8A8Linear with this w_q and the same other buffers, bit for bit

    Source: SmoothQuant (Xiao et al., 2022), section 4; QServe (Lin et al., 2024), section 4.1.
    """

    w_q4: Tensor
    w_group: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation_scheme: str = "per_token",
        smooth: bool = False,
        rotation: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, activation_scheme, smooth, rotation, device, dtype
        )
        groups = reference.w4_groups(in_features)
        width = groups * reference.W4_GROUP // 2
        w_q4 = torch.zeros(out_features, width, dtype=torch.uint8, device=device)
        w_group = torch.zeros(groups, out_features, 2, dtype=torch.int8, device=device)
        self.register_buffer("w_q4", packed_words(w_q4))
        self.register_buffer("w_group", packed_words(w_group))
        self.register_buffer("w_scale", torch.zeros(out_features, device=device).float())

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        activation_scheme: str = "per_token",
        smooth: Tensor | None = None,
        rotation: int = 0,
        x_scale: Tensor | float | None = None,
        moments: Tensor | None = None,
    ) -> W4A8Linear:
        """Quantizes a float layer.

        Args:
            linear, activation_scheme, smooth, rotation, x_scale: as in `W8A8Linear.from_linear`.
            moments: X^T X [K, K] float32 of the (smoothed and rotated) input, to round the weight by GPTQ
                (`nn.rounding_w4.round_w4`). A vector [K] of its channels' mean squares rounds to the nearest values,
                with the steps and offsets of least squared error of the output. None counts all channels alike.

        Raises:
            SmoothQuantError: the weight is float64, float8 or another type, has NaN or Inf, a factor is not positive,
                x_scale is missing or not wanted, or moments have another shape.
        """
        source = read_linear(linear, smooth)
        n, k = source.weight.shape
        new = cls(
            k,
            n,
            source.bias is not None,
            activation_scheme=activation_scheme,
            smooth=source.smooth is not None,
            rotation=rotation,
            device=source.weight.device,
            dtype=source.weight.dtype,
        )
        new._set_source(source, x_scale)
        made = int4_weight(source.weight, source.smooth, rotation, moments)
        new.w_q4, new.w_group = packed_words(made.w_q4), packed_words(made.w_group)
        new.w_scale = made.w_scale
        return new.train(linear.training)

    def _align(self) -> None:
        self.w_q4, self.w_group = packed_words(self.w_q4), packed_words(self.w_group)

    # The parameter has the name that nn.Linear gives it, because some models call proj(input=x).
    def forward(self, input: Tensor | QuantizedActivation) -> Tensor:
        """input [..., K] float16, bfloat16, float32 or already quantized -> [..., N]."""
        x = input
        # Not self.w_q4: nn.Module searches elsewhere before it finds a buffer, which takes a microsecond each.
        own: dict[str, Any] = self._buffers
        weight = (own["w_q4"], own["w_group"])
        if isinstance(x, QuantizedActivation):
            rest = {"bias": own["bias"], "out_dtype": x.dtype}
            return ops.gemm_w4a8(x.x_q, *weight, x.x_scale, own["w_scale"], **rest)
        if x.requires_grad and torch.is_grad_enabled():
            options = (own["inv_smooth"], own["x_scale"], self._granularity, self.rotation)
            return through_w4(x, *weight, own["w_scale"], own["bias"], *options)
        return ops.linear_w4a8(
            x,
            *weight,
            own["w_scale"],
            bias=own["bias"],
            inv_smooth=own["inv_smooth"],
            scale=own["x_scale"],
            granularity=self._granularity,
            rotation=self.rotation,
        )

    def dequantized_weight(self) -> Tensor:
        """[N, K] float32: the weight that the layer represents, without rotation and smoothing factors."""
        w_q = reference.w4_weight(self.w_q4, self.w_group, self.in_features)
        return dequantized_weight(w_q, self.w_scale, self.inv_smooth, self.rotation)


class _W4A8(Kind[W4A8Linear]):
    """Takes the layers to which the configuration gives the format ``"w4a8"``."""

    layer = W4A8Linear
    scales = ("w_scale", "x_scale", "inv_smooth")
    weight_scales = ("w_scale",)
    markers = (MARKER,)
    defaults: ClassVar = {}

    def takes(self, name: str, linear: nn.Module, config: SmoothQuantConfig) -> bool:
        return config.format_of(name) == "w4a8"

    def from_linear(self, linear: nn.Module, settings: Settings) -> W4A8Linear:
        if settings.weight_granularity != "channel":
            raise SmoothQuantError(
                "W4A8 layers have a scale per channel and a step per group of 128 channels: pass "
                f"weight_granularity='channel', not {settings.weight_granularity!r}."
            )
        return W4A8Linear.from_linear(linear, **settings.common)

    def arguments(self, layer: W4A8Linear) -> dict[str, Any]:
        return {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
            "activation_scheme": layer.activation_scheme,
            "smooth": layer.inv_smooth is not None,
            "rotation": layer.rotation,
            "dtype": type_name(layer.dtype),
        }

    def label(self, layer: W4A8Linear) -> str:
        return "w4a8"

    def part(self, layer: W4A8Linear) -> str:
        return layer.part

    def make(self, arguments: dict[str, Any]) -> W4A8Linear | None:
        dtype = float_named(arguments["dtype"])
        if dtype is None or not fits_rotation(arguments["rotation"], arguments["in_features"]):
            return None
        return W4A8Linear(**{**arguments, "dtype": dtype}, device="meta")

    def smallest(self) -> W4A8Linear:
        return W4A8Linear(1, 1, device="meta")

    def nbytes(self, n: int, k: int) -> int:
        groups = reference.w4_groups(k)
        return groups * n * (reference.W4_GROUP // 2 + 2) + 4 * (n + k)  # assumes factors

    def problem(self, tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> str | None:
        if (w_group := tensors.get("w_group")) is None:
            return None
        step, offset = w_group.int().unbind(-1)
        if not bool(((step >= 0) & (step <= reference.W4_MAX)).all()):
            return f"w_group has a step outside [0, {reference.W4_MAX}]"
        if not bool((offset + reference.W4_MAX * step < 128).all()):
            return "w_group has an offset with which a weight is no int8"
        return None

    def rounded_weight(self, layer: W4A8Linear) -> Tensor:
        return layer.dequantized_weight()

    def rounded_input(self, layer: W4A8Linear, x: Tensor) -> Tensor:
        return rounded_input(layer, x)


register(_W4A8())
