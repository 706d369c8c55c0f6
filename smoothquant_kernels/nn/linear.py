"""`W8A8Linear`: a drop-in for `nn.Linear` with int8 weights and int8 activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from smoothquant_kernels import ops, reference
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.float_linear import pending_smooth, weight_of
from smoothquant_kernels.nn.float_types import check_float_type, float_type
from smoothquant_kernels.nn.gradient import through
from smoothquant_kernels.nn.kinds import Kind, Settings, register
from smoothquant_kernels.nn.lazy_weight import LazyWeight, dequantized_weight
from smoothquant_kernels.nn.operands import (
    ROW_ALIGNMENT,
    QuantizedActivation,
    check_rotation,
    packed_rows,
    wants_aligned_rows,
)
from smoothquant_kernels.nn.own_weight import OwnWeight
from smoothquant_kernels.nn.rounding import int8_weight
from smoothquant_kernels.ops.checks import FLOATS, fits_rotation, type_name
from smoothquant_kernels.ops.rotate import rotated_weight
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES, WEIGHT_GRANULARITIES

if TYPE_CHECKING:
    from typing_extensions import Self

#: The entry of a quantized layer's state dict with the name of a float layer's weight, but another shape.
MARKER = "weight"


class W8A8Linear(OwnWeight):
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
        bias: bool = True,
        *,
        activation_scheme: str = "per_token",
        weight_granularity: str = "channel",
        smooth: bool = False,
        rotation: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_float_type(dtype, "dtype")
        if activation_scheme not in ACTIVATION_SCHEMES:
            raise SmoothQuantError(
                f"activation_scheme must be one of {', '.join(ACTIVATION_SCHEMES)}; got {activation_scheme!r}."
            )
        if weight_granularity not in WEIGHT_GRANULARITIES:
            raise SmoothQuantError(
                f"weight_granularity must be channel or tensor; got {weight_granularity!r}."
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
        self.weight_granularity = weight_granularity
        self.rotation = rotation
        self.dtype = dtype

        def buffer(name: str, size: int | None) -> None:
            value = None
            if size is not None:
                value = torch.zeros(size, dtype=torch.float32, device=device)
            self.register_buffer(name, value)

        w_q = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("w_q", packed_rows(w_q))
        buffer("w_scale", out_features if weight_granularity == "channel" else 1)
        buffer("bias", out_features if bias else None)
        buffer("inv_smooth", in_features if smooth else None)
        buffer("x_scale", 1 if activation_scheme == "static" else None)

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
        weight = weight_of(linear).detach()
        check_float_type(weight.dtype, "the weight")
        pending = pending_smooth(linear)
        if pending is not None:
            smooth = pending if smooth is None else pending.to(smooth.device) * smooth
        if not bool(weight.isfinite().all()):
            raise SmoothQuantError(
                "the weight has NaN or Inf values; repair or reload the checkpoint."
            )
        n, k = weight.shape
        bias = getattr(linear, "bias", None)
        new = cls(
            k,
            n,
            bias is not None,
            activation_scheme=activation_scheme,
            weight_granularity=weight_granularity,
            smooth=smooth is not None,
            rotation=rotation,
            device=weight.device,
            dtype=weight.dtype,
        )
        s = None
        if smooth is not None:
            s = smooth.detach().to(weight.device, torch.float32)
            if s.shape != (k,):
                raise SmoothQuantError(f"smooth must have shape [{k}], got {tuple(s.shape)}.")
            inverse = 1.0 / s
            usable = (s > 0) & s.isfinite() & inverse.isfinite()
            if not bool(usable.all()):
                raise SmoothQuantError(
                    "smooth must be positive and finite, and so must be its reciprocals; "
                    f"got {s[~usable][0].item()}."
                )
            new.inv_smooth = inverse

        w_q, new.w_scale = int8_weight(weight, s, rotation, weight_granularity, moments)
        new.w_q = packed_rows(w_q)
        if bias is not None:
            new.bias = bias.detach().float().clone()
        if (x_scale is not None) != (activation_scheme == "static"):
            raise SmoothQuantError(
                "x_scale must be given for the static scheme, and only for it; calibrate the layer first."
            )
        if x_scale is not None:
            value = torch.as_tensor(x_scale, dtype=torch.float32, device=weight.device).reshape(1)
            if not bool((value >= reference.MIN_SCALE) & value.isfinite()):
                raise SmoothQuantError(f"x_scale must be positive and finite, got {value.item()}.")
            new.x_scale = value.clone()
        return new.train(linear.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the buffers like any module, but never rounds the float32 buffers to another type."""
        self.dtype = float_type(fn(self.w_scale.new_empty(0, dtype=self.dtype)), self.dtype)
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.w_q = packed_rows(self.w_q)  # moving a view makes it dense
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.w_q.is_meta:  # a meta layer's state dict only shows what to load
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
        self.w_q = packed_rows(self.w_q)  # assign=True replaces the buffer with the given tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.w_q = packed_rows(self.w_q)  # a copy may be made under inference_mode

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
        w_q: Any = self._buffers["w_q"]
        return LazyWeight(values, w_q.shape, dtype, w_q.device)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # functional_call assigns the entry of the state dict, then restores the old value
        if isinstance(value, LazyWeight) or value.shape == (1,):
            return
        raise SmoothQuantError(
            "the weight of a W8A8Linear is int8 and cannot be replaced: change the float model and quantize it again, "
            "or skip this layer when quantizing."
        )

    @property
    def _granularity(self) -> str:
        return "tensor" if self.activation_scheme == "per_tensor" else "token"

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

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation_scheme={self.activation_scheme}, weight_granularity={self.weight_granularity}"
        )
        text += ", smooth=True" if self.inv_smooth is not None else ""
        text += f", {self.part}" if self.part else ""
        return text + (f", rotation={self.rotation}" if self.rotation else "")


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
        return W8A8Linear.from_linear(linear, **vars(settings))

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
        dtype = next((t for t in FLOATS if type_name(t) == arguments["dtype"]), None)
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
        x_q, scale, _ = layer.quantize_input(x)
        z = x_q.float() * (scale if scale.numel() == 1 else scale.reshape(*x.shape[:-1], 1))
        z = rotated_weight(z, layer.rotation)  # undoes the rotation
        return z if layer.inv_smooth is None else z / layer.inv_smooth


register(_W8A8(), fallback=True)
