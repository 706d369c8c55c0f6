"""The kinds of quantized layers. Each says how its layer is made from a float one, saved, loaded and measured.

A kind lives in one file: the layer, a `Kind` for it, and a call of `register`. Everything else asks this registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from smoothquant_kernels.config import SmoothQuantConfig

Layer = TypeVar("Layer", bound=nn.Module)
#: What tables and `smoothquant_info` show of every quantized layer, whatever its kind.
_SHOWN = ("activation_scheme", "in_features", "out_features")


@dataclass(frozen=True)
class Settings:
    """What the configuration and the calibration say of one float layer.

    Attributes:
        activation_scheme, weight_granularity: as in `SmoothQuantConfig`.
        x_scale: the scale of the smoothed input, exactly when the scheme is ``"static"``.
        smooth: [K] factors to apply beside those that wait at the layer (`pending_smooth`).
    """

    activation_scheme: str
    weight_granularity: str
    x_scale: float | None = None
    smooth: Tensor | None = None


class Kind(ABC, Generic[Layer]):
    """One kind of quantized layer, which replaces a float linear.

    Attributes:
        layer: the class. It is no `nn.Linear`, has the attribute `bias` (None without one), and keeps all of its data
            in its state dict.
        scales: entries of its state that a checkpoint refuses unless every value is positive and finite.
        markers: entries that its state dict adds to the layer's tensors, which a checkpoint leaves out. A layer on the
            meta device adds none.
        defaults: arguments that manifests of earlier releases lack.
    """

    layer: type[Layer]
    scales: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def takes(self, name: str, linear: nn.Module, config: SmoothQuantConfig) -> bool:
        """Whether the layer `name` of a model becomes one of this kind."""

    @abstractmethod
    def from_linear(self, linear: nn.Module, settings: Settings) -> Layer:
        """Quantizes a float layer, which is left unchanged; raises SmoothQuantError for weights it cannot take."""

    @abstractmethod
    def arguments(self, layer: Layer) -> dict[str, Any]:
        """JSON values for the manifest, which `make` takes.

        Tables show three of them, so every kind has `activation_scheme`, `in_features` and `out_features`.
        """

    @abstractmethod
    def make(self, arguments: dict[str, Any]) -> Layer | None:
        """The layer on the meta device, for arguments with the names and types of those that `arguments` gives.

        Their values come from a file: None for one that `arguments` never gives.
        """

    @abstractmethod
    def smallest(self) -> Layer:
        """A layer on the meta device, to see which attributes and arguments the kind uses."""

    @abstractmethod
    def nbytes(self, n: int, k: int) -> int:
        """About the size of a layer's state for a weight [N, K], without the bias."""

    @abstractmethod
    def rounded_weight(self, layer: Layer) -> Tensor:
        """[N, K] float32: the weight that the layer stands for, without smoothing factors."""

    @abstractmethod
    def rounded_input(self, layer: Layer, x: Tensor) -> Tensor:
        """[..., K] float32: x as the layer reads it, rounded and without smoothing factors."""


#: All kinds. `choose` asks the last one first.
KINDS: list[Kind[Any]] = []


def register(kind: Kind[Any], *, fallback: bool = False) -> None:
    """Adds a kind. It is asked before those that are registered already; a fallback is asked after all others."""
    KINDS.insert(0 if fallback else len(KINDS), kind)


def choose(name: str, linear: nn.Module, config: SmoothQuantConfig) -> Kind[Any]:
    """The kind of layer that the float layer `name` becomes."""
    return next(kind for kind in reversed(KINDS) if kind.takes(name, linear, config))


def kind_of(module: nn.Module | None) -> Kind[Any] | None:
    """The kind of a quantized layer; None for any other module."""
    return next((kind for kind in KINDS if isinstance(module, kind.layer)), None)


def is_quantized(module: nn.Module | None) -> bool:
    """Whether this is a quantized layer of any kind."""
    return kind_of(module) is not None


def count_quantized(model: nn.Module) -> str:
    """The quantized layers of a model in words, ``"14 W8A8Linear"``; empty if there are none."""
    found = Counter(kind.layer.__name__ for m in model.modules() if (kind := kind_of(m)))
    return ", ".join(f"{count} {name}" for name, count in found.items())


def describe(layer: nn.Module) -> dict[str, Any]:
    """The class and the constructor's arguments of a quantized layer, as JSON values for `make`."""
    kind = kind_of(layer)
    assert kind is not None
    return {"class": type(layer).__name__, **kind.arguments(layer)}


def shown(layer: nn.Module) -> dict[str, Any]:
    """`activation_scheme`, `in_features` and `out_features` of a quantized layer, for tables."""
    arguments = describe(layer)
    return {key: arguments[key] for key in _SHOWN}


def make(arguments: Mapping[str, Any]) -> nn.Module | None:
    """The layer that `describe` described, on the meta device; None if no kind understands the arguments."""
    if (kind := named(arguments.get("class"))) is None:
        return None
    types = {name: type(value) for name, value in describe(kind.smallest()).items()}
    values = {**kind.defaults, **arguments}
    if {name: type(value) for name, value in values.items()} != types:
        return None
    del values["class"]
    made: nn.Module | None = kind.make(values)
    return made


def named(name: object) -> Kind[Any] | None:
    """The kind whose class has this name."""
    return next((kind for kind in KINDS if kind.layer.__name__ == name), None)
