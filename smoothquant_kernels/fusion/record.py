"""What `optimize_for_inference` did to each quantized linear, and why not more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from smoothquant_kernels.fusion.forwards import FusedForward

_INFO = "smoothquant_fusion"


@dataclass(frozen=True)
class FusedLayer:
    """One quantized linear of an optimized model.

    Attributes:
        name: the layer.
        producer: the norm or activation that it computes with its quantization; empty for none.
        kind: what that computes, as in `ops.fused_linear_s8`; ``"quantize"`` for none.
        merged: all layers of its GEMM, with itself; empty if it has a GEMM of its own.
        residual: whether its GEMM adds the residual.
        int8: whether its input is made and quantized in the epilogue of the GEMM before it.
        reason: why it has no producer; empty if it has one.
    """

    name: str
    producer: str = ""
    kind: str = "quantize"
    merged: tuple[str, ...] = ()
    residual: bool = False
    int8: bool = False
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return asdict(self) | {"merged": list(self.merged)}


def fusion_info(model: nn.Module) -> tuple[FusedLayer, ...]:
    """What `optimize_for_inference` did to each quantized linear of a model; empty if it was not called."""
    layers: tuple[FusedLayer, ...] = model.__dict__.get(_INFO, ())
    return layers


def attach_fusion(model: nn.Module, layers: tuple[FusedLayer, ...]) -> None:
    """Makes this the record of a model."""
    model.__dict__[_INFO] = layers


def detach_fusion(model: nn.Module) -> None:
    """Removes the record of a model."""
    model.__dict__.pop(_INFO, None)


def fused_forwards(model: nn.Module) -> dict[str, FusedForward]:
    """The forwards that `optimize_for_inference` gave to modules, by the modules' names."""
    found = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    return {name: f for name, f in found.items() if isinstance(f, FusedForward)}


def fusion_spills(model: nn.Module) -> Mapping[str, Mapping[str, int]]:
    """Where an optimized model has computed a float tensor after all, since it was optimized.

    Returns:
        name of the norm, activation or linear -> what read its output -> how often. Such a read is right, but costs
        what the fusion saves. Calls under `torch.compile` are not counted.
    """
    sites = {name: forward.site.spills for name, forward in fused_forwards(model).items()}
    return {name: dict(spills) for name, spills in sites.items() if spills}
