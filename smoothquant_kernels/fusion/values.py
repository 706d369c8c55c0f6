"""What norms, linears and activation functions of an optimized model return: see `deferred.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels import ops
from smoothquant_kernels.fusion.deferred import Deferred, Site, differentiable


class NormValue(Deferred):
    """What a norm makes of x.

    Attributes:
        outputs: a group of merged linears -> what they make of this value, computed by the first that reads it.
            None for what was handed out.
    """

    def __init__(self, norm: Any, x: Tensor) -> None:
        self.norm = norm
        self.x = x
        self.outputs: dict[Any, list[Tensor | None]] = {}
        self.watch_sources(x)

    @property
    def site(self) -> Site:
        site: Site = self.norm.site
        return site

    @property
    def source(self) -> Any:
        return self.x

    def compute(self) -> Tensor:
        y: Tensor = self.norm.original(self.x)
        return y

    def with_rows(self, shape: tuple[int, ...]) -> Deferred | None:
        self.site.use("norm")
        return NormValue(self.norm, self.x.reshape(shape))

    def linear(self, w_q: Tensor, w_scale: Tensor, **rest: Any) -> Tensor:
        norm = self.norm
        norm.site.use("linear")
        self.check_sources()
        return ops.fused_linear_s8(self.x, norm.kind, w_q, w_scale, **norm.parameters(), **rest)

    def quantized(self, **rest: Any) -> tuple[Tensor, Tensor]:
        """(x_q, x_scale) of the value; `rest` are further arguments of `ops.quantize`."""
        norm = self.norm
        norm.site.use("linear")
        self.check_sources()
        rest |= norm.parameters()
        weight, bias, eps = rest.pop("norm_weight"), rest.pop("norm_bias", None), rest.pop("eps")
        if norm.kind == "rms_norm":
            x_q, x_scale = ops.rms_norm_quantize(self.x, weight, eps, **rest)
        else:
            x_q, x_scale = ops.layer_norm_quantize(self.x, weight, bias, eps, **rest)
        return x_q, x_scale


class LinearValue(Deferred):
    """What a quantized linear makes of its input: it waits for the residual to add, or an activation to come."""

    def __init__(self, fused: Any, x: Any) -> None:
        self.fused = fused
        self.x = x
        self.watch_sources(x)

    @property
    def site(self) -> Site:
        site: Site = self.fused.site
        return site

    @property
    def source(self) -> Any:
        return self.x

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-1], self.fused.layer.out_features))

    def compute(self) -> Tensor:
        y: Tensor = self.fused.run(self.x)
        return y

    def with_rows(self, shape: tuple[int, ...]) -> Deferred | None:
        rows = (*shape[:-1], self.x.shape[-1])
        if isinstance(self.x, Deferred) or self._computed is not None:
            return None
        return LinearValue(self.fused, self.x.reshape(rows))

    def linear(self, w_q: Tensor, w_scale: Tensor, **rest: Any) -> Tensor:
        return ops.linear_s8(self.spill("linear"), w_q, w_scale, **rest)

    def plus(self, other: Any) -> Any:
        if isinstance(other, LinearValue):
            other.site.use("sum")
            other = other.tensor()
        elif isinstance(other, Deferred):
            other = other.spill("add")
        x, n = self.x, self.fused.layer.out_features
        # The shape as a tuple, because to make a torch.Size takes longer.
        fits = (
            isinstance(other, Tensor)
            and other.dtype == x.dtype
            and other.shape == (*x.shape[:-1], n)
            and self._computed is None
        )
        if not fits:
            return self.spill("add") + other
        if other.requires_grad and torch.is_grad_enabled():
            return self.tensor() + other
        self.fused.site.use("residual")
        self.check_sources()
        return self.fused.run(x, other)

    def times(self, other: Any) -> Any:
        if isinstance(other, ActivatedValue):
            return other.times(self)
        return self.spill("mul") * other

    def activated(self, kind: str, original: Callable[[Tensor], Tensor]) -> Any:
        self.site.use("function")
        return ActivatedValue(self.site, kind, self, original)


class ActivatedValue(Deferred):
    """An activation function of a linear's output, or its product with another one (gate and up)."""

    def __init__(
        self,
        site: Site,
        kind: str,
        source: Any,
        original: Callable[[Tensor], Tensor],
        up: Any = None,
    ) -> None:
        self._site = site
        self.kind = kind
        self.gate = source
        self.original = original
        self.up = up
        self.watch_sources(source, up)

    @property
    def site(self) -> Site:
        return self._site

    @property
    def source(self) -> Any:
        return self.gate

    def compute(self) -> Tensor:
        y = self.original(_tensor(self.gate))
        return y if self.up is None else y * _tensor(self.up)

    def with_rows(self, shape: tuple[int, ...]) -> Deferred | None:
        parts = [t if t is None else _tensor(t).reshape(shape) for t in (self.gate, self.up)]
        return ActivatedValue(self._site, self.kind, parts[0], self.original, parts[1])

    def times(self, other: Any) -> Any:
        fits = (
            isinstance(other, (Tensor, LinearValue))
            and self.up is None
            and other.shape == self.shape
            and other.dtype == self.dtype
            and self._computed is None
        )
        if not fits:
            return self.spill("mul") * other
        if differentiable(other):
            return self.tensor() * other
        if isinstance(other, LinearValue):
            other.site.use("gated")
        self.check_sources()
        return ActivatedValue(self._site, self.kind, self.gate, self.original, other)

    def linear(self, w_q: Tensor, w_scale: Tensor, **rest: Any) -> Tensor:
        self._site.use("linear")
        self.check_sources()
        if type(self.gate) is LinearValue and "scale" in rest:
            y = self._in_int8(w_q, w_scale, rest)
            if y is not None:
                return y
        gate = _tensor(self.gate)
        if self.up is None:
            return ops.fused_linear_s8(gate, self.kind, w_q, w_scale, **rest)
        return ops.fused_linear_s8(_tensor(self.up), self.kind, w_q, w_scale, gate=gate, **rest)

    def _in_int8(self, w_q: Tensor, w_scale: Tensor, rest: dict[str, Any]) -> Tensor | None:
        """`linear` where the GEMM before can quantize the value by this one's static scale; None where it cannot."""
        gate, group = self.gate, self.gate.fused.group
        if gate._computed is not None or "rotation" in rest:
            return None
        rest = dict(rest)
        scale, inv_smooth = rest.pop("scale"), rest.pop("inv_smooth", None)
        rest.pop("granularity", None)
        if self.up is None and self.kind == "relu" and inv_smooth is None and group.is_single:
            quantized = group.relu_quantized(gate.x, scale)
        elif type(self.up) is LinearValue and self.up.x is gate.x and self.up._computed is None:
            if group.gated_indices != (gate.fused.index, self.up.fused.index):
                return None
            quantized = group.gated_quantized(gate.x, self.kind, scale, inv_smooth)
        else:
            return None
        y_q, y_scale = quantized
        return ops.gemm_s8(y_q, w_q, y_scale, w_scale, **rest, out_dtype=self.dtype)


def _tensor(value: Any) -> Tensor:
    """The value of an operand that a fused op reads as a tensor. Not a spill."""
    t: Tensor = value.tensor() if isinstance(value, Deferred) else value
    return t
