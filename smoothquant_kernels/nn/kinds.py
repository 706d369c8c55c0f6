"""The kinds of quantized layers. Each defines how to make its layer from a float one, save, load and measure it.

A kind lives in one file: the layer, its `Kind`, and a call of `register`. All other code asks this registry.
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
#: What tables and `smoothquant_info` show of every quantized layer of any kind.
_SHOWN = ("activation_scheme", "in_features", "out_features")


@dataclass(frozen=True)
class Settings:
    """The settings of one float layer, from the configuration and the calibration.

    Attributes:
        activation_scheme, weight_granularity: as in `SmoothQuantConfig`.
        rotation: the size of the groups of channels that the quantizer rotates; 0 for none.
        x_scale: the scale of the smoothed and rotated input if the scheme is ``"static"``, else None.
        smooth: [K] factors to apply in addition to the layer's own pending ones (`pending_smooth`).
        moments: [K, K] of the smoothed and rotated input, to round the weight by GPTQ; None for the nearest values.
        columns: [C] int64 outlier channels that calibration found and that are multiplied in float. `x_scale` and
            `moments` are then those of the input without them. None where nothing was asked for or each call finds its
            own.
        threshold: the smoothed magnitude at which a channel is an outlier.
    """

    activation_scheme: str
    weight_granularity: str
    rotation: int = 0
    x_scale: float | None = None
    smooth: Tensor | None = None
    moments: Tensor | None = None
    columns: Tensor | None = None
    threshold: float = 6.0

    @property
    def common(self) -> dict[str, Any]:
        """The settings that `from_linear` of every layer takes, by name."""
        names = ("activation_scheme", "smooth", "rotation", "x_scale", "moments")
        return {name: getattr(self, name) for name in names}


class Kind(ABC, Generic[Layer]):
    """One kind of quantized layer, which replaces a float linear.

    Attributes:
        layer: the class. It is not an `nn.Linear`, has the attribute `bias` (None without one), and keeps all of its
            data in its state dict.
        scales: entries of the state dict that a checkpoint refuses unless every value is positive and finite.
        weight_scales: those of them that may be 0, for a channel of zeros (padding of a vocabulary, for example).
        markers: entries that the state dict adds to the layer's tensors. Checkpoints omit them, and a layer on the
            meta device adds none.
        floats: entries that have the layer's float type, `dtype`, and that loading converts with it.
        defaults: arguments that manifests of earlier releases lack, with their values.
        is_linear: whether the layer replaces a linear. Others have arguments of their own, and no table shows them as
            linears.
    """

    layer: type[Layer]
    scales: tuple[str, ...] = ()
    weight_scales: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}
    is_linear: bool = True

    @abstractmethod
    def takes(self, name: str, linear: nn.Module, config: SmoothQuantConfig) -> bool:
        """Whether the layer `name` of a model becomes one of this kind."""

    @abstractmethod
    def from_linear(self, linear: nn.Module, settings: Settings) -> Layer:
        """Quantizes a float layer and leaves it unchanged; raises SmoothQuantError for weights it cannot take."""

    @abstractmethod
    def arguments(self, layer: Layer) -> dict[str, Any]:
        """The JSON values for the manifest, which `make` takes.

        Tables show three of them, so every kind has `activation_scheme`, `in_features` and `out_features`.
        """

    def label(self, layer: Layer) -> str:
        """The format in a few words, for tables; empty for W8A8."""
        return ""

    def part(self, layer: Layer) -> str:
        """Which part of a layer this process holds, in words; empty for a whole layer. Checkpoints hold whole ones."""
        return ""

    @abstractmethod
    def make(self, arguments: dict[str, Any]) -> Layer | None:
        """The layer on the meta device, for arguments with the names and types that `arguments` returns.

        The values come from a file. Returns None for a value that `arguments` never returns.
        """

    @abstractmethod
    def smallest(self) -> Layer:
        """A minimal layer on the meta device, which shows the attributes and arguments that the kind uses."""

    @abstractmethod
    def nbytes(self, n: int, k: int) -> int:
        """The approximate bytes of a layer's state for a weight [N, K], without the bias."""

    def mismatch(self, layer: Layer, old: nn.Module) -> str | None:
        """Why a layer cannot replace a module of a model, as a phrase without its subject; None if it can.

        Only for kinds that replace no linear.
        """
        return None

    def as_float(self, layer: Layer, plain: nn.Module) -> nn.Module | None:
        """Gives `plain`, the float module that the layer replaced, the weights that it represents; returns it.

        Only for kinds that replace no linear. None if it is another module.
        """
        return None

    def problem(self, tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> str | None:
        """What else than a scale is wrong with a layer's tensors, as a phrase that starts with the name of one.

        Args:
            tensors: entries of the layer's state dict, possibly not all.
            arguments: those of `arguments`.
        """
        return None

    @abstractmethod
    def rounded_weight(self, layer: Layer) -> Tensor:
        """[N, K] float32: the weight that the layer represents, without smoothing factors."""

    @abstractmethod
    def rounded_input(self, layer: Layer, x: Tensor) -> Tensor:
        """[..., K] float32: x as the layer reads it, rounded and without smoothing factors."""


#: All kinds. `choose` tries the last one first.
KINDS: list[Kind[Any]] = []


def register(kind: Kind[Any], *, fallback: bool = False) -> None:
    """Adds a kind. `choose` tries it before all earlier kinds, and a fallback after all others."""
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


def is_quantized_linear(module: nn.Module | None) -> bool:
    """Whether this is a quantized layer in the place of a linear."""
    kind = kind_of(module)
    return kind is not None and kind.is_linear


def are_quantized_experts(module: nn.Module | None) -> bool:
    """Whether this is a quantized layer in the place of a module of experts."""
    kind = kind_of(module)
    return kind is not None and not kind.is_linear


def count_quantized(model: nn.Module) -> str:
    """The quantized layers of a model in words, for example ``"14 W8A8Linear"``; empty if there are none."""
    found = Counter(kind.layer.__name__ for m in model.modules() if (kind := kind_of(m)))
    return ", ".join(f"{count} {name}" for name, count in found.items())


def describe(layer: nn.Module) -> dict[str, Any]:
    """The class and constructor arguments of a quantized layer, as JSON values for `make`."""
    kind = kind_of(layer)
    assert kind is not None
    return {"class": type(layer).__name__, **kind.arguments(layer)}


def shown(layer: nn.Module) -> dict[str, Any]:
    """The scheme, the sizes, the format and, if the kind has them, the rotation and columns of a layer, for tables."""
    kind = kind_of(layer)
    assert kind is not None
    arguments = kind.arguments(layer)
    own = {
        "rotation": arguments.get("rotation", 0),
        "format": kind.label(layer) or None,
        "outlier_columns": arguments.get("columns"),
    }
    return {key: arguments[key] for key in _SHOWN} | own


def make(arguments: Mapping[str, Any]) -> nn.Module | None:
    """The layer that `describe` described, on the meta device; None if no kind accepts the arguments."""
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
    """The kind whose class has this name; None if there is none."""
    return next((kind for kind in KINDS if kind.layer.__name__ == name), None)
