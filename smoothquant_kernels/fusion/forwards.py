"""The forwards that `optimize_for_inference` gives to norms, activation functions and quantized linears.

Each is an object in the module's `__dict__`, so the module keeps its class, parameters and state dict. Copies of the
model and pickles work, because the object only refers to modules of the same model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels import ops
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.fusion.merged import MergedLinears
from smoothquant_kernels.fusion.norms import NormForm
from smoothquant_kernels.fusion.values import (
    ActivatedValue,
    Deferred,
    LinearValue,
    NormValue,
    Site,
    differentiable,
)
from smoothquant_kernels.nn.linear import W8A8Linear


class FusedForward:
    """The forward of a module that is part of a fused block."""

    def __init__(self, module: nn.Module, site: Site) -> None:
        self.module = module
        self.site = site

    def refuse_training(self) -> None:
        """Raises SmoothQuantError if the module is in training mode."""
        if self.module.training:
            raise SmoothQuantError(
                f"{self.site.name} is fused for inference and was called in training mode: call model.eval(), or "
                "undo_optimization(model) before training."
            )


class FusedNorm(FusedForward):
    """A norm that leaves its computation to the quantized linears that read it."""

    def __init__(self, module: nn.Module, site: Site, form: NormForm) -> None:
        super().__init__(module, site)
        self.form = form
        self.kind = form.kind
        self.eps = form.eps
        self._one_plus: tuple[Tensor, int, Tensor] | None = None

    def original(self, x: Tensor) -> Tensor:
        """The norm of x by the module's own code."""
        y: Tensor = type(self.module).forward(self.module, x)
        return y

    def parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """The norm's factors and bias. 1 + weight is kept until the weight changes."""
        if not self.form.one_plus or torch.compiler.is_compiling():
            return self.form.factors(self.module)
        weight: Any = self.module._parameters[self.form.weight]
        bias = self.module._parameters[self.form.bias] if self.form.bias else None
        version = -1 if weight.is_inference() else weight._version
        kept = self._one_plus
        if kept is None or kept[0] is not weight or kept[1] != version:
            with torch.no_grad():
                factors, _ = self.form.factors(self.module)
            assert factors is not None
            kept = self._one_plus = (weight, version, factors)
        return kept[2], bias

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        weight: Any = self.module._parameters[self.form.weight]
        plain = type(x) is Tensor and not args and not kwargs
        if not plain or x.dtype != weight.dtype or x.shape[-1] != weight.shape[0]:
            x = x.spill("norm") if isinstance(x, Deferred) else x
            return type(self.module).forward(self.module, x, *args, **kwargs)
        self.refuse_training()
        if differentiable(x, weight):
            return self.original(x)
        return NormValue(self, x)


class FusedActivation(FusedForward):
    """An activation function that leaves its computation to the quantized linear that reads it."""

    def __init__(self, module: nn.Module, site: Site, kind: str) -> None:
        super().__init__(module, site)
        self.kind = kind

    def original(self, x: Tensor) -> Tensor:
        """The function of x by the module's own code."""
        y: Tensor = type(self.module).forward(self.module, x)
        return y

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, LinearValue):
            x.site.use("activation")
        elif type(x) is not Tensor or args or kwargs or differentiable(x):
            x = x.spill("activation") if isinstance(x, Deferred) else x
            return type(self.module).forward(self.module, x, *args, **kwargs)
        self.refuse_training()
        return ActivatedValue(self.site, self.kind, x, self.original)


class FusedLinear(FusedForward):
    """A quantized linear that computes its producer, too, and waits for the residual that is added to it.

    Attributes:
        merged, index: the GEMM that the layer is a part of, and which one; None and 0 for a layer of its own.
        waits: whether the output waits for a residual or an activation.
    """

    def __init__(
        self,
        layer: W8A8Linear,
        site: Site,
        merged: MergedLinears | None = None,
        index: int = 0,
        waits: bool = False,
    ) -> None:
        super().__init__(layer, site)
        self.layer = layer
        self.merged = merged
        self.index = index
        self.waits = waits

    def __call__(self, input: Any) -> Any:
        # The parameter has the name that nn.Linear gives it, because some models call proj(input=x).
        x = input
        if type(x) is Tensor:
            if x.requires_grad and torch.is_grad_enabled():
                return W8A8Linear.forward(self.layer, x)
        elif not isinstance(x, Deferred):
            return W8A8Linear.forward(self.layer, x)
        self.refuse_training()
        return LinearValue(self, x) if self.waits else self.run(x)

    def _part(self, x: Any) -> Tensor:
        """The layer's part of the merged output."""
        assert self.merged is not None
        if type(x) is Tensor:
            return self.merged.of_tensor(x, self.index)
        if type(x) is NormValue:
            return self.merged.of_norm(x, self.index)
        return self.merged.of_tensor(x.tensor(), self.index)

    def run(self, x: Any, residual: Tensor | None = None) -> Tensor:
        """The layer's output for a tensor or a value that is not computed yet, plus a residual."""
        if self.merged is not None and residual is None:
            return self._part(x)
        layer = self.layer
        # Not layer.w_q: nn.Module searches elsewhere before it finds a buffer, which takes a microsecond each.
        own: dict[str, Any] = layer._buffers
        rest = {
            "bias": own["bias"],
            "residual": residual,
            "inv_smooth": own["inv_smooth"],
            "scale": own["x_scale"],
            "granularity": layer._granularity,
            "rotation": layer.rotation,
        }
        if type(x) is Tensor:
            return ops.linear_s8(x, own["w_q"], own["w_scale"], **rest)
        y: Tensor = x.linear(own["w_q"], own["w_scale"], **rest)
        return y
