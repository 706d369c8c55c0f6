"""`OutlierLinear`: an int8 linear whose outlier input channels are multiplied in floating point, as LLM.int8() does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels import ops
from smoothquant_kernels.config import OUTLIERS, SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.gradient import through
from smoothquant_kernels.nn.kinds import Kind, Settings, register
from smoothquant_kernels.nn.lazy_weight import dequantized_weight
from smoothquant_kernels.nn.linear import add_int8_weight
from smoothquant_kernels.nn.operands import (
    COLUMN_TENSORS,
    QuantizedActivation,
    ascending_columns,
    column_problem,
    packed_rows,
)
from smoothquant_kernels.nn.quantized_linear import (
    MARKER,
    QuantizedLinear,
    read_linear,
    rounded_input,
)
from smoothquant_kernels.nn.rounding import int8_weight
from smoothquant_kernels.ops.checks import FLOATS, float_named, type_name
from smoothquant_kernels.ops.rotate import rotated

if TYPE_CHECKING:
    from typing_extensions import Self

#: How the columns are chosen.
MODES = tuple(mode for mode in OUTLIERS if mode != "none")


class OutlierLinear(QuantizedLinear):
    """Linear layer on int8, but for the outlier channels of its input, the columns, which are multiplied in float.

    `y = gemm_s8(quantize(rotate(x' / s)), w_q) + bias + x[..., columns] @ w_columns.T`, where x' is x with zeros in the
    columns. The float product is rounded to x's type. The sum is rounded once, in the epilogue of the int8 GEMM.

    ``"static"``: calibration has chosen the columns. Their weights are stored in float, and no shape depends on data,
    so the layer can be captured in a CUDA graph, compiled and exported. ``"dynamic"``: each call takes the columns in
    which any token reaches `threshold` after smoothing. Their weights are the dequantized int8 ones, since no others
    are stored. The number of columns depends on the data, so this synchronizes a GPU with the host, cannot be captured,
    and breaks a compiled graph.

    Args:
        in_features, out_features, bias, activation_scheme, weight_granularity, rotation, device: as in `W8A8Linear`.
        outliers: ``"static"`` or ``"dynamic"``.
        columns: the number of columns, for ``"static"`` only.
        threshold: what an outlier is, > 0. For ``"static"`` it only says how the columns were chosen.
        smooth: as in `W8A8Linear`. A static layer has `inv_smooth` in any case.
        dtype: as in `W8A8Linear`, and the type of `w_columns`.

    Buffers: those of `W8A8Linear`; for ``"static"`` also columns [C] int64, ascending, and w_columns [N, C] of type
        `dtype`, which the input is multiplied by as it arrives, before smoothing. `inv_smooth` is 0 there, so neither
        the scale of a token nor w_q and w_scale depend on the columns.

    A NaN or Inf in a token makes all outputs of the token non-finite, in a column too: the quantizer multiplies it by
    0, which is NaN and marks the token, as everywhere (`reference.quantize`); and the float product is not finite.

    Equivalent to:
        torch.nn.functional.linear(x, w, bias), up to the quantization error of the other channels.

    Source: LLM.int8() (Dettmers et al., 2022), section 3.2; SmoothQuant (Xiao et al., 2022), section 4.
    """

    w_q: Tensor
    columns: Tensor | None
    w_columns: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        outliers: str = "static",
        columns: int = 0,
        threshold: float = 6.0,
        activation_scheme: str = "per_token",
        weight_granularity: str = "channel",
        smooth: bool = False,
        rotation: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if outliers not in MODES:
            raise SmoothQuantError(f"outliers must be {' or '.join(MODES)}; got {outliers!r}.")
        static = outliers == "static"
        rest = (activation_scheme, smooth or static, rotation, device, dtype)
        super().__init__(in_features, out_features, bias, *rest)
        if not 0 <= columns <= (in_features if static else 0):
            allowed = f"in [0, {in_features}]" if static else "0 for dynamic outliers"
            raise SmoothQuantError(f"columns must be {allowed}; got {columns}.")
        if not (math.isfinite(threshold) and threshold > 0):
            raise SmoothQuantError(f"threshold must be positive and finite; got {threshold}.")
        self.outliers = outliers
        self.threshold = float(threshold)
        self.weight_granularity = weight_granularity
        add_int8_weight(self, weight_granularity, device)
        self.register_buffer("columns", torch.arange(columns, device=device) if static else None)
        floats = torch.zeros(out_features, columns, dtype=dtype, device=device)
        self.register_buffer("w_columns", floats if static else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        outliers: str = "static",
        columns: Tensor | Sequence[int] | None = None,
        threshold: float = 6.0,
        activation_scheme: str = "per_token",
        weight_granularity: str = "channel",
        smooth: Tensor | None = None,
        rotation: int = 0,
        x_scale: Tensor | float | None = None,
        moments: Tensor | None = None,
    ) -> OutlierLinear:
        """Quantizes a float layer.

        Args:
            linear, activation_scheme, weight_granularity, smooth, rotation: as in `W8A8Linear.from_linear`.
            outliers, threshold: as in the constructor.
            columns: the input channels to multiply in float, in any order; for ``"static"`` only.
            x_scale, moments: as in `W8A8Linear.from_linear`; for ``"static"``, those of the input with zeros in the
                columns.

        Raises:
            SmoothQuantError: as in `W8A8Linear.from_linear`; or columns are missing, not wanted, repeated or not
                channels of the input.
        """
        if (columns is not None) != (outliers == "static"):
            raise SmoothQuantError(
                "columns must be given for static outliers, and only for them: calibrate the layer first, or choose "
                "dynamic."
            )
        source = read_linear(linear, smooth)
        n, k = source.weight.shape
        chosen = None if columns is None else ascending_columns(columns, k).to(source.weight.device)
        new = cls(
            k,
            n,
            source.bias is not None,
            outliers=outliers,
            columns=0 if chosen is None else len(chosen),
            threshold=threshold,
            activation_scheme=activation_scheme,
            weight_granularity=weight_granularity,
            smooth=source.smooth is not None,
            rotation=rotation,
            device=source.weight.device,
            dtype=source.weight.dtype,
        )
        new._set_source(source, x_scale)
        factors = source.smooth
        if chosen is not None:
            kept = torch.ones(k, device=source.weight.device).index_fill(0, chosen, 0.0)
            factors = kept if factors is None else factors * kept
            new.inv_smooth = kept if source.inverse is None else source.inverse * kept
            new.columns = chosen
            new.w_columns = source.weight[:, chosen].contiguous()
        # A factor of 0 removes the columns from the weight, before its rotation and its scales.
        w_q, new.w_scale = int8_weight(
            source.weight, factors, rotation, weight_granularity, moments
        )
        new.w_q = packed_rows(w_q)
        return new.train(linear.training)

    # The parameter has the name that nn.Linear gives it, because some models call proj(input=x).
    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] float16, bfloat16 or float32 -> [..., N]. Raises SmoothQuantError for a quantized one."""
        x = input
        if isinstance(x, QuantizedActivation):
            self._refuse_quantized()
        own: dict[str, Any] = self._buffers
        columns = own["columns"]
        if columns is None:
            columns = self.find_columns(x)
            if not len(columns):
                return self._int8(x, None)
            weight = self._dequantized_columns(columns)
            return self._int8(x.index_fill(-1, columns, 0.0), _product(x, columns, weight))
        weight = own["w_columns"]
        return self._int8(x, _product(x, columns, weight) if weight.shape[1] else None)

    def _int8(self, x: Tensor, residual: Tensor | None) -> Tensor:
        own: dict[str, Any] = self._buffers
        if torch.is_grad_enabled() and (
            x.requires_grad or (residual is not None and residual.requires_grad)
        ):
            rest = (own["inv_smooth"], own["x_scale"], self._granularity, self.rotation, residual)
            return through(x, own["w_q"], own["w_scale"], own["bias"], *rest)
        return ops.linear_s8(
            x,
            own["w_q"],
            own["w_scale"],
            bias=own["bias"],
            residual=residual,
            inv_smooth=own["inv_smooth"],
            scale=own["x_scale"],
            granularity=self._granularity,
            rotation=self.rotation,
        )

    def find_columns(self, x: Tensor) -> Tensor:
        """[C] int64: the columns of a static layer; else those that a call with x [..., K] takes.

        The latter are the channels in which the smoothed magnitude of any token reaches the threshold. NaN does not.
        """
        if self.columns is not None:
            return self.columns
        v = x.detach().float()
        v = v if self.inv_smooth is None else v * self.inv_smooth
        found = (v.abs() >= self.threshold).reshape(-1, self.in_features).any(0)
        return found.nonzero().squeeze(1)

    def _dequantized_columns(self, columns: Tensor) -> Tensor:
        """[N, C] float32: columns of `dequantized_weight()`, from the groups of the rotation that hold them."""
        scale = self.w_scale[:, None]
        if self.rotation:
            groups, place = (columns // self.rotation).unique(return_inverse=True)
            part = self.w_q.unflatten(1, (-1, self.rotation))[:, groups].float() * scale[:, None]
            w = rotated(part, self.rotation)[:, place, columns % self.rotation]
        else:
            w = self.w_q[:, columns].float() * scale
        return w if self.inv_smooth is None else w * self.inv_smooth[columns]

    def quantize_input(self, x: Tensor) -> NoReturn:
        """Raises SmoothQuantError, because the columns are multiplied in float."""
        self._refuse_quantized()

    def _refuse_quantized(self) -> NoReturn:
        raise SmoothQuantError(
            "an OutlierLinear multiplies some channels in float, so it cannot share an activation that is quantized "
            "already: call it with the float tensor."
        )

    def dequantized_weight(self) -> Tensor:
        """[N, K] float32: the weight that the layer represents, without rotation and smoothing factors."""
        w = dequantized_weight(self.w_q, self.w_scale, self.inv_smooth, self.rotation)
        if self.columns is None or self.w_columns is None:
            return w
        return w.index_copy(1, self.columns, self.w_columns.float())

    def _align(self) -> None:
        self.w_q = packed_rows(self.w_q)

    def _columns_follow(self) -> None:
        """Gives the float columns the type of the layer. The base class has kept the bits that they had."""
        if self.w_columns is not None and self.w_columns.dtype != self.dtype:
            self.w_columns = self.w_columns.to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._columns_follow()
        return self

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
        given = state_dict.get(f"{prefix}w_columns")
        if self.w_columns is not None and isinstance(given, Tensor) and given.dtype in FLOATS:
            self.w_columns = self.w_columns.to(given.dtype)  # no copy rounds, then
        own = {name: state_dict.get(prefix + name) for name in COLUMN_TENSORS}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._columns_follow()
        found = {name: t for name, t in own.items() if isinstance(t, Tensor) and not t.is_meta}
        if wrong := column_problem(found, self.in_features, self.outliers):
            error_msgs.append(f"{prefix}{wrong}.")

    def _repr_of_weight(self) -> str:
        of = self.threshold if self.columns is None else len(self.columns)
        return f", weight_granularity={self.weight_granularity}, outliers={self.outliers}({of})"


def _product(x: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """x[..., columns] @ weight.T in x's type, or in that of autocast."""
    return F.linear(x.index_select(-1, columns), weight.to(x.dtype))


class _Outlier(Kind[OutlierLinear]):
    """Takes the layers for which the configuration wants outlier columns."""

    layer = OutlierLinear
    scales = ("w_scale", "x_scale")
    weight_scales = ("w_scale",)
    markers = (MARKER,)
    floats = ("w_columns",)

    def takes(self, name: str, linear: nn.Module, config: SmoothQuantConfig) -> bool:
        return config.outliers_of(name) != "none"

    def from_linear(self, linear: nn.Module, settings: Settings) -> OutlierLinear:
        return OutlierLinear.from_linear(
            linear,
            outliers="dynamic" if settings.columns is None else "static",
            columns=settings.columns,
            threshold=settings.threshold,
            weight_granularity=settings.weight_granularity,
            **settings.common,
        )

    def arguments(self, layer: OutlierLinear) -> dict[str, Any]:
        return {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
            "outliers": layer.outliers,
            "columns": 0 if layer.columns is None else len(layer.columns),
            "threshold": layer.threshold,
            "activation_scheme": layer.activation_scheme,
            "weight_granularity": layer.weight_granularity,
            "smooth": layer.inv_smooth is not None,
            "rotation": layer.rotation,
            "dtype": type_name(layer.dtype),
        }

    def label(self, layer: OutlierLinear) -> str:
        return f"w8a8, {layer.outliers} outliers"

    def make(self, arguments: dict[str, Any]) -> OutlierLinear | None:
        dtype = float_named(arguments["dtype"])
        if dtype is None or (arguments["outliers"] == "static" and not arguments["smooth"]):
            return None
        try:
            return OutlierLinear(**{**arguments, "dtype": dtype}, device="meta")
        except SmoothQuantError:
            return None

    def smallest(self) -> OutlierLinear:
        return OutlierLinear(1, 1, device="meta")

    def nbytes(self, n: int, k: int) -> int:
        return n * k + 4 * (n + k)  # the number of columns is known only after calibration

    def problem(self, tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> str | None:
        return column_problem(tensors, arguments["in_features"], arguments["outliers"])

    def rounded_weight(self, layer: OutlierLinear) -> Tensor:
        return layer.dequantized_weight()

    def rounded_input(self, layer: OutlierLinear, x: Tensor) -> Tensor:
        columns = layer.find_columns(x)
        z = rounded_input(layer, x.index_fill(-1, columns, 0.0))
        exact = x.index_select(-1, columns).float()
        if layer.columns is None:  # a rotation spreads rounding errors to the columns, too
            return z.index_add(-1, columns, exact)
        return z.index_copy(-1, columns, exact)  # there the int8 weight is only such errors


register(_Outlier())
