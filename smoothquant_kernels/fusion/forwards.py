"""The forwards that `optimize_for_inference` gives to norms, activation functions and quantized linears.

Each is an object in the module's `__dict__`, so the module keeps its class, parameters and state dict. Copies of the
model and pickles work, because the object only refers to modules of the same model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.fusion.deferred import Deferred, Site, differentiable
from smoothquant_kernels.fusion.merged import LinearGroup
from smoothquant_kernels.fusion.norms import NormForm
from smoothquant_kernels.fusion.values import ActivatedValue, LinearValue, NormValue
from smoothquant_kernels.nn.linear import W8A8Linear


class FusedForward:
    """The forward of a module that is part of a fused block."""

    def __init__(self, module: nn.Module, site: Site) -> None:
        self.module = module
        self.site = site

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own code computes."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def in_training(self) -> SmoothQuantError:
        """The error for a call in training mode."""
        return SmoothQuantError(
            f"{self.site.name} is fused for inference and was called in training mode: call model.eval(), or "
            "undo_optimization(model) before training."
        )


class FusedNorm(FusedForward):
    """A norm that leaves its computation to the quantized linears that read it."""

    def __init__(self, module: nn.Module, site: Site, form: NormForm) -> None:
        super().__init__(module, site)
        self.form = form
        self.kind = form.kind

    def parameters(self) -> dict[str, Any]:
        """The arguments of `ops.fused_linear_s8` that describe the norm. Made anew: its parameters may change."""
        return self.form.arguments(self.module)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        weight: Any = self.module._parameters[self.form.weight]
        plain = type(x) is Tensor and not args and not kwargs
        if not plain or x.dtype != weight.dtype or x.shape[-1] != weight.shape[0]:
            return self.original(x.spill("norm") if isinstance(x, Deferred) else x, *args, **kwargs)
        if self.module.training:
            raise self.in_training()
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return self.original(x)
        return NormValue(self, x)


class FusedActivation(FusedForward):
    """An activation function that leaves its computation to the quantized linear that reads it."""

    def __init__(self, module: nn.Module, site: Site, kind: str) -> None:
        super().__init__(module, site)
        self.kind = kind

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, LinearValue):
            x.site.use("activation")
        elif type(x) is not Tensor or args or kwargs or differentiable(x):
            x = x.spill("activation") if isinstance(x, Deferred) else x
            return self.original(x, *args, **kwargs)
        if self.module.training:
            raise self.in_training()
        return ActivatedValue(self.site, self.kind, x, self.original)


class FusedLinear(FusedForward):
    """A quantized linear that computes its producer, too, and waits for the residual that is added to it.

    Attributes:
        group, index: the GEMM that computes the layer, and which of its layers it is.
        waits: whether the output waits for a residual or an activation.
    """

    def __init__(
        self, layer: W8A8Linear, site: Site, group: LinearGroup, index: int = 0, waits: bool = False
    ) -> None:
        super().__init__(layer, site)
        self.layer = layer
        self.group = group
        self.index = index
        self.waits = waits

    # The parameter has the name that nn.Linear gives it, because some models call proj(input=x).
    def __call__(self, input: Any) -> Any:
        kind = type(input)
        if kind is NormValue:
            if not self.waits:
                return self.group.of_norm(input, self.index)
        elif kind is Tensor:
            if input.requires_grad and torch.is_grad_enabled():
                return self.original(input)
        elif not isinstance(input, Deferred):
            return self.original(input)
        return LinearValue(self, input) if self.waits else self.run(input)

    def run(self, x: Any, residual: Tensor | None = None) -> Tensor:
        """The layer's output for a tensor or a value that is not computed yet, plus a residual."""
        group = self.group
        if group.is_single:
            return group.multiply(x, residual)
        if type(x) is NormValue:
            y = group.of_norm(x, self.index)
        else:
            y = group.of_tensor(x.tensor() if isinstance(x, Deferred) else x, self.index)
        return y if residual is None else y + residual
