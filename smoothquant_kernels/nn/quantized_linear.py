"""What all quantized linears share: an int8 input, float32 factors, and what stands for the float weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from smoothquant_kernels import ops, reference
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.float_linear import pending_smooth, weight_of
from smoothquant_kernels.nn.float_types import check_float_type, float_type, keep_types
from smoothquant_kernels.nn.lazy_weight import LazyWeight
from smoothquant_kernels.nn.operands import (
    ROW_ALIGNMENT,
    QuantizedActivation,
    check_rotation,
    inverse_factors,
    wants_aligned_rows,
)
from smoothquant_kernels.nn.own_weight import OwnWeight
from smoothquant_kernels.ops.rotate import rotated_weight
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES

if TYPE_CHECKING:
    from typing_extensions import Self

#: The entry of a quantized layer's state dict with the name of a float layer's weight, but another shape.
MARKER = "weight"


class QuantizedLinear(OwnWeight):
    """Base of layers that replace an `nn.Linear` and quantize their input to int8. The weight is the subclass's.

    Args:
        in_features, out_features, bias, activation_scheme, smooth, rotation, device, dtype: as in `W8A8Linear`.

    Buffers: w_scale [N] or [1], which the subclass adds; bias [N] or None; inv_smooth [K] or None; x_scale [1] or None.
    They are float32 and stay so under `.half()`, `.bfloat16()`, `.double()` and `.to(dtype)`.

    The state dict has one more entry, `weight` [1] of type `dtype`, whose value has no meaning. It keeps the type. It
    also makes `load_state_dict` of a float linear fail, even with strict=False, instead of leaving random weights.
    """

    w_scale: Tensor
    bias: Tensor | None
    inv_smooth: Tensor | None
    x_scale: Tensor | None
    #: Which part of a whole layer a rank of tensor parallelism holds, in words; empty for a whole layer.
    part: str = ""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        activation_scheme: str,
        smooth: bool,
        rotation: int,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        check_float_type(dtype, "dtype")
        if activation_scheme not in ACTIVATION_SCHEMES:
            raise SmoothQuantError(
                f"activation_scheme must be one of {', '.join(ACTIVATION_SCHEMES)}; got {activation_scheme!r}."
            )
        if in_features < 1 or out_features < 1 or in_features > reference.MAX_K:
            raise SmoothQuantError(
                f"in_features must be in [1, {reference.MAX_K}] and out_features >= 1; "
                f"got {in_features} and {out_features}."
            )
        check_rotation(rotation, in_features)
        self.in_features = in_features
        self.out_features = out_features
        self.activation_scheme = activation_scheme
        self.rotation = rotation
        self.dtype = dtype
        for name, size in (
            ("bias", out_features if bias else None),
            ("inv_smooth", in_features if smooth else None),
            ("x_scale", 1 if activation_scheme == "static" else None),
        ):
            value = None if size is None else torch.zeros(size, device=device)
            self.register_buffer(name, None if value is None else value.float())

    @abstractmethod
    def dequantized_weight(self) -> Tensor:
        """[N, K] float32: the weight that the layer represents, without rotation and smoothing factors."""

    def _align(self) -> None:
        """Brings the weight into the form that the kernels of its device load."""

    def _set_source(self, source: FloatSource, x_scale: Tensor | float | None) -> None:
        """Takes everything but the weight from a float layer. Raises SmoothQuantError for a wrong x_scale."""
        self.inv_smooth = source.inverse
        if source.bias is not None:
            self.bias = source.bias.detach().float().clone()
        if (x_scale is not None) != (self.activation_scheme == "static"):
            raise SmoothQuantError(
                "x_scale must be given for the static scheme, and only for it; calibrate the layer first."
            )
        if x_scale is not None:
            device = source.weight.device
            value = torch.as_tensor(x_scale, dtype=torch.float32, device=device).reshape(1)
            if not bool((value >= reference.MIN_SCALE) & value.isfinite()):
                raise SmoothQuantError(f"x_scale must be positive and finite, got {value.item()}.")
            self.x_scale = value.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the buffers like any module, but never rounds the float32 buffers to another type."""
        self.dtype = float_type(fn(self.w_scale.new_empty(0, dtype=self.dtype)), self.dtype)
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_types(self, before)
        self._align()  # moving a view makes it dense
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.w_scale.is_meta:  # a meta layer's state dict only shows what to load
            destination[prefix + MARKER] = self.w_scale.new_zeros(1, dtype=self.dtype)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        marker = state_dict.pop(prefix + MARKER, None)
        if isinstance(marker, Tensor) and marker.shape == (1,):
            self.dtype = float_type(marker, self.dtype)
        elif marker is not None:
            error_msgs.append(
                f"{prefix}{MARKER} is a float weight and this layer is quantized: load it into the float model and "
                "quantize that."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._align()  # assign=True replaces the buffer with the given tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._align()  # a copy may be made under inference_mode

    def quantize_input(self, x: Tensor) -> QuantizedActivation:
        """Smooths, rotates and quantizes x [..., K] for this layer and all layers that share its input."""
        x_q, x_scale = ops.quantize(
            x,
            inv_smooth=self.inv_smooth,
            scale=self.x_scale,
            granularity=self._granularity,
            k_multiple=ROW_ALIGNMENT if wants_aligned_rows(x) else 1,
            rotation=self.rotation,
        )
        if x_q.shape[-1] != self.in_features:
            x_q = x_q[..., : self.in_features]
        return QuantizedActivation(x_q, x_scale, x.dtype)

    @property
    def weight(self) -> Tensor:
        """[N, K] `dtype`, read-only: `dequantized_weight()`, which each operation that reads it computes again.

        It serves code that asks a linear for its weight's type, device or shape (T5's feed-forward, SigLIP's
        embedding) or multiplies by the weight itself (Mamba's dt_proj).
        """
        dtype = self.dtype

        def values() -> Tensor:
            return self.dequantized_weight().to(dtype)

        if torch.compiler.is_compiling():
            return values()  # the compiler drops it from the graph if nothing reads it
        scale: Any = self._buffers["w_scale"]
        shape = torch.Size((self.out_features, self.in_features))
        return LazyWeight(values, shape, dtype, scale.device)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # functional_call assigns the entry of the state dict, then restores the old value
        if isinstance(value, LazyWeight) or value.shape == (1,):
            return
        raise SmoothQuantError(
            f"the weight of a {type(self).__name__} is int8 and cannot be replaced: change the float model and "
            "quantize it again, or skip this layer when quantizing."
        )

    @property
    def _granularity(self) -> str:
        return "tensor" if self.activation_scheme == "per_tensor" else "token"

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation_scheme={self.activation_scheme}{self._repr_of_weight()}"
        )
        text += ", smooth=True" if self.inv_smooth is not None else ""
        text += f", {self.part}" if self.part else ""
        return text + (f", rotation={self.rotation}" if self.rotation else "")

    def _repr_of_weight(self) -> str:
        """What `extra_repr` says of the weight, after a comma; or empty."""
        return ""


class FloatSource(NamedTuple):
    """A float layer that is to be quantized, checked.

    Attributes:
        weight: [N, K].
        bias: [N] or None.
        smooth, inverse: [K] float32 factors, of the layer's pending ones and those given, and 1 / smooth; or None.
    """

    weight: Tensor
    bias: Tensor | None
    smooth: Tensor | None
    inverse: Tensor | None


def read_linear(linear: nn.Module, smooth: Tensor | None) -> FloatSource:
    """Reads a float layer: an `nn.Linear` or GPT-2's `Conv1D` (weight [K, N]).

    Args:
        linear: left unchanged. Its pending smoothing factors (`pending_smooth`) are applied.
        smooth: [K] float32 factors to apply besides; None for none.

    Raises:
        SmoothQuantError: the weight is float64, float8 or another type, has NaN or Inf, or a factor is not positive.
    """
    weight = weight_of(linear).detach()
    check_float_type(weight.dtype, "the weight")
    pending = pending_smooth(linear)
    if pending is not None:
        smooth = pending if smooth is None else pending.to(smooth.device) * smooth
    if not bool(weight.isfinite().all()):
        raise SmoothQuantError("the weight has NaN or Inf values; repair or reload the checkpoint.")
    bias = getattr(linear, "bias", None)
    if smooth is None:
        return FloatSource(weight, bias, None, None)
    s = smooth.detach().to(weight.device, torch.float32)
    k = weight.shape[1]
    if s.shape != (k,):
        raise SmoothQuantError(f"smooth must have shape [{k}], got {tuple(s.shape)}.")
    return FloatSource(weight, bias, s, inverse_factors(s))


def rounded_input(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """[..., K] float32: x as the integer GEMM of a layer reads it, without rotation and smoothing factors."""
    x_q, scale, _ = QuantizedLinear.quantize_input(layer, x)
    z = x_q.float() * (scale if scale.numel() == 1 else scale.reshape(*x.shape[:-1], 1))
    z = rotated_weight(z, layer.rotation)  # undoes the rotation
    return z if layer.inv_smooth is None else z / layer.inv_smooth
