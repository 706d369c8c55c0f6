"""`W8A8Linear`: a drop-in for `nn.Linear` with int8 weights and int8 activations."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smoothquant_kernels import ops
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.gradient import through
from smoothquant_kernels.nn.kinds import Kind, Settings, register
from smoothquant_kernels.nn.lazy_weight import dequantized_weight
from smoothquant_kernels.nn.operands import QuantizedActivation, packed_rows
from smoothquant_kernels.nn.quantized_linear import (
    MARKER,
    QuantizedLinear,
    read_linear,
    rounded_input,
)
from smoothquant_kernels.nn.rounding import int8_weight
from smoothquant_kernels.ops.checks import fits_rotation, float_named, type_name
from smoothquant_kernels.schemes import WEIGHT_GRANULARITIES


class W8A8Linear(QuantizedLinear):
    """Linear layer on int8: `y = gemm_s8(quantize(rotate(x / s)), w_q) + bias`, returned in x's type.

    Args:
        in_features, out_features: K and N, both >= 1.
        bias: whether there is a bias.
        activation_scheme: ``"per_token"`` (paper O1), ``"per_tensor"`` (dynamic, O2) or ``"static"`` (calibrated, O3).
        weight_granularity: ``"channel"`` or ``"tensor"``.
        smooth: whether the input is divided by smoothing factors at run time (inside the quantizer).
        rotation: the size of the groups of channels that the quantizer rotates, as in `ops.quantize`; 0 for none.
        device: where the buffers live; ``"meta"`` to load a checkpoint without allocating twice.
        dtype: the type that `weight` shows to outside code, which is that of the float layer: float16, bfloat16 or
            float32. It follows `.half()`, `.to(dtype)` and the like.

    Buffers, with their final type and shape from the start so that `load_state_dict` works on a fresh layer:
        w_q [N, K] int8; w_scale [N] or [1]; bias [N] or None; inv_smooth [K] or None; x_scale [1] or None (static).
        All but w_q are float32 and stay so under `.half()`, `.bfloat16()`, `.double()` and `.to(dtype)`.
        On a GPU the rows of w_q start at multiples of 16 bytes, so for other K it is a view of a wider tensor.

    The state dict has one more entry, `weight` [1] of type `dtype`, whose value has no meaning. It keeps the type. It
    also makes `load_state_dict` of a float linear fail, even with strict=False, instead of leaving random weights.

    Equivalent to:
        torch.nn.functional.linear(x / s, w * s, bias), up to the quantization error.

    Source: SmoothQuant (Xiao et al., 2022), section 4.
    """

    w_q: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation_scheme: str = "per_token",
        weight_granularity: str = "channel",
        smooth: bool = False,
        rotation: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, activation_scheme, smooth, rotation, device, dtype
        )
        self.weight_granularity = weight_granularity
        add_int8_weight(self, weight_granularity, device)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        activation_scheme: str = "per_token",
        weight_granularity: str = "channel",
        smooth: Tensor | None = None,
        rotation: int = 0,
        x_scale: Tensor | float | None = None,
        moments: Tensor | None = None,
    ) -> W8A8Linear:
        """Quantizes a float layer.

        Args:
            linear: an `nn.Linear` or GPT-2's `Conv1D` (weight [K, N]); left unchanged. Its pending smoothing factors
                (`pending_smooth`) are applied.
            activation_scheme, weight_granularity: as in the constructor.
            smooth: [K] float32 smoothing factors s, positive. The weight is multiplied by s here, and the input is
                divided by s at run time. None if the weights already contain the smoothing, or for no smoothing.
            rotation: as in the constructor. The weight is rotated here, after smoothing.
            x_scale: the static scale of the (smoothed and rotated) input, > 0; required for the scheme ``"static"``,
                else None.
            moments: X^T X [K, K] float32 of the (smoothed and rotated) input, to round the weight by GPTQ
                (`nn.rounding.round_weight`). None rounds to the nearest values.

        Raises:
            SmoothQuantError: the weight is float64, float8 or another type, has NaN or Inf, a factor is not positive,
                or x_scale is missing or not wanted.
        """
        source = read_linear(linear, smooth)
        n, k = source.weight.shape
        new = cls(
            k,
            n,
            source.bias is not None,
            activation_scheme=activation_scheme,
            weight_granularity=weight_granularity,
            smooth=source.smooth is not None,
            rotation=rotation,
            device=source.weight.device,
            dtype=source.weight.dtype,
        )
        new._set_source(source, x_scale)
        w_q, new.w_scale = int8_weight(
            source.weight, source.smooth, rotation, weight_granularity, moments
        )
        new.w_q = packed_rows(w_q)
        return new.train(linear.training)

    def _align(self) -> None:
        self.w_q = packed_rows(self.w_q)

    # The parameter has the name that nn.Linear gives it, because some models call proj(input=x).
    def forward(self, input: Tensor | QuantizedActivation) -> Tensor:
        """input [..., K] float16, bfloat16, float32 or already quantized -> [..., N]."""
        x = input
        # Not self.w_q: nn.Module searches elsewhere before it finds a buffer, which takes a microsecond each.
        own: dict[str, Any] = self._buffers
        if isinstance(x, QuantizedActivation):
            return ops.gemm_s8(
                x.x_q, own["w_q"], x.x_scale, own["w_scale"], bias=own["bias"], out_dtype=x.dtype
            )
        if x.requires_grad and torch.is_grad_enabled():
            rest = (own["inv_smooth"], own["x_scale"], self._granularity, self.rotation)
            return through(x, own["w_q"], own["w_scale"], own["bias"], *rest)
        return ops.linear_s8(
            x,
            own["w_q"],
            own["w_scale"],
            bias=own["bias"],
            inv_smooth=own["inv_smooth"],
            scale=own["x_scale"],
            granularity=self._granularity,
            rotation=self.rotation,
        )

    def dequantized_weight(self) -> Tensor:
        """[N, K] float32: the weight that the layer represents, without rotation and smoothing factors."""
        return dequantized_weight(self.w_q, self.w_scale, self.inv_smooth, self.rotation)

    def _repr_of_weight(self) -> str:
        return f", weight_granularity={self.weight_granularity}"


def add_int8_weight(
    layer: QuantizedLinear, granularity: str, device: torch.device | str | None
) -> None:
    """Gives a new layer the buffers w_q [N, K] int8 and w_scale [N] or [1] float32.

    Raises:
        SmoothQuantError: the granularity is unknown.
    """
    if granularity not in WEIGHT_GRANULARITIES:
        raise SmoothQuantError(
            f"weight_granularity must be channel or tensor; got {granularity!r}."
        )
    n, k = layer.out_features, layer.in_features
    layer.register_buffer("w_q", packed_rows(torch.zeros(n, k, dtype=torch.int8, device=device)))
    scales = n if granularity == "channel" else 1
    layer.register_buffer("w_scale", torch.zeros(scales, device=device).float())


class _W8A8(Kind[W8A8Linear]):
    """Takes every layer that no other kind takes."""

    layer = W8A8Linear
    scales = ("w_scale", "x_scale", "inv_smooth")
    weight_scales = ("w_scale",)
    markers = (MARKER,)
    defaults: ClassVar = {
        "dtype": "float32",
        "rotation": 0,
    }  # absent from checkpoints of earlier releases

    def takes(self, name: str, linear: nn.Module, config: SmoothQuantConfig) -> bool:
        return True

    def from_linear(self, linear: nn.Module, settings: Settings) -> W8A8Linear:
        return W8A8Linear.from_linear(
            linear, weight_granularity=settings.weight_granularity, **settings.common
        )

    def arguments(self, layer: W8A8Linear) -> dict[str, Any]:
        return {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
            "activation_scheme": layer.activation_scheme,
            "weight_granularity": layer.weight_granularity,
            "smooth": layer.inv_smooth is not None,
            "rotation": layer.rotation,
            "dtype": type_name(layer.dtype),
        }

    def part(self, layer: W8A8Linear) -> str:
        return layer.part

    def make(self, arguments: dict[str, Any]) -> W8A8Linear | None:
        dtype = float_named(arguments["dtype"])
        k = arguments["in_features"]
        if dtype is None or not fits_rotation(arguments["rotation"], k):
            return None
        return W8A8Linear(**{**arguments, "dtype": dtype}, device="meta")

    def smallest(self) -> W8A8Linear:
        return W8A8Linear(1, 1, device="meta")

    def nbytes(self, n: int, k: int) -> int:
        return n * k + 4 * (n + k)  # assumes factors and a scale per channel

    def rounded_weight(self, layer: W8A8Linear) -> Tensor:
        return layer.dequantized_weight()

    def rounded_input(self, layer: W8A8Linear, x: Tensor) -> Tensor:
        return rounded_input(layer, x)


register(_W8A8(), fallback=True)
