"""The record of what was done to a model and why, layer by layer; `model.smoothquant_info` holds it as JSON values.

Only this file knows the name of that attribute and its keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

if TYPE_CHECKING:
    from smoothquant_kernels.modeling.changes import Changes

_INFO = "smoothquant_info"

#: How a layer was smoothed: a producer holds its factors, the layer divides by them at run time, or it has none.
How = Literal["folded", "runtime", "none"]
HOWS: tuple[How, ...] = get_args(How)


class Reason(Enum):
    """Why a layer is as it is: a sentence with {} for names and numbers, which a call of the member fills in."""

    # For a layer to quantize.
    FOLDED = "into {}"
    FOLD_REFUSED = "folding into {} would change the model"
    NO_GAIN = "int8 error {:.2%} on the sample, {:.2%} if smoothed"
    WEIGHT_SHARED = "its weight is also {}"
    NEVER_CALLED = "never called during calibration"
    HEAD = "the output head is never folded"
    SMOOTHING_OFF = "smoothing is switched off"
    NOT_SMOOTHED = "not smoothed"
    EXPERTS = (
        "all experts share the factors of their input, and each has its own for its second product"
    )
    NO_FACTORS = "int8 is nearer to float without factors on the tokens that were kept"
    NOT_DIVIDED = "nothing divides at run time, and {}"
    IMPORTED = "from a checkpoint of compressed-tensors"
    # For a layer whose group has no producer.
    CALLED_AGAIN = "called more than once in a forward pass"
    NO_PRODUCER = "no producer scales its channels one by one"
    NOT_ON_SAMPLE = "not called on the sample batch"
    FOLDING_OFF = "folding is switched off"
    MAY_BE_READ = "{}, not called on the sample, may read {} too"
    IS_READ = "{} is read by something else as well{}"
    FEEDS_SEVERAL = "{} feeds several groups"
    PARAMETER_SHARED = "{} shares its {} with {}"
    READ_ONLY = "the {} of {} is read-only"
    HOOKED = "a forward hook on {} may read what a fold scales"
    # For a layer left in float.
    SKIP_PATTERN = "matches the skip pattern {!r}"
    OUTPUT_HEAD = "output head: stays in float"
    MATRICES = "{} in one 3-D parameter: stay in float"
    TORCHSCRIPT = "TorchScript: stays in float"
    EMPTY = "it has no inputs or no outputs: stays in float"
    OVERFLOW = "more than {} input features: an int32 sum could overflow"
    NOT_FLOAT = "weight is {}, not float"
    ATTENTION = "its weight is read by nn.MultiheadAttention: stays in float"
    NOT_LINEAR = "{} computes more than a linear: stays in float"
    # For a layer left in float because of what a run of the model or its source shows.
    READ = "{} reads its parameters from outside: stays in float"
    SELECTS = "{}: it selects, and stays in float"
    ASKS = "{} asks its parameters for their type, and this is its first: stays in float"
    USED = "{}, which an int8 layer does not have: stays in float"
    FLOAT_IN_CHECKPOINT = "in float in the checkpoint: stays in float"
    # Last, because `of` matches it with any other sentence of this ending.
    ATTACHED = "{}: stays in float"

    def __call__(self, *details: object) -> str:
        return str(self.value).format(*details)

    @property
    def found_by_running(self) -> bool:
        """Whether this takes a run of the model on real data to see. The layer alone does not show it."""
        return self in (Reason.READ, Reason.SELECTS, Reason.ASKS, Reason.USED)

    @classmethod
    def of(cls, sentence: str) -> Reason | None:
        """The reason that a sentence states; None if the sentence is from another release."""
        return next((reason for reason in cls if _PATTERNS[reason].fullmatch(sentence)), None)


_PATTERNS = {
    reason: re.compile(".*".join(map(re.escape, re.split(r"{.*?}", reason.value))), re.DOTALL)
    for reason in Reason
}


@dataclass(frozen=True)
class LayerRecord:
    """A linear that is quantized, or would be.

    Attributes:
        reason: a sentence of `Reason`.
        alpha: migration strength; None without smoothing.
        group: the layers that read the same tensor and share its factors. Empty if `smooth_lm` has not seen the layer;
            then nothing was measured.
        norms: the norms of activations and weights that the factors balance, where a search chose others than
            `SmoothQuantConfig.norms_of`; the weights' is then ``"none"``.
        rotation: the size of the groups of channels that the quantizer rotates; 0 for none.
        x_absmax: the largest input seen, after smoothing and rotation. The static scale comes from it.
        x_peak: the largest token divided by the median one, likewise.
        activation_scheme: the scheme of the int8 layer; None in a float model.
        format: the format of the quantized layer (`nn.kinds.Kind.label`); None for W8A8, and in a float model.
        outlier_columns: the number of its input channels that are multiplied in float, 0 if each call finds them; None
            for a layer without outlier columns.
        more: what another release or a user has added.
    """

    name: str
    smoothing: How = "none"
    reason: str = ""
    alpha: float | None = None
    group: tuple[str, ...] = ()
    in_features: int = 0
    out_features: int = 0
    norms: tuple[str, str] | None = None
    rotation: int = 0
    x_absmax: float | None = None
    x_peak: float | None = None
    activation_scheme: str | None = None
    format: str | None = None
    outlier_columns: int | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def producer(self) -> str | None:
        """The module that holds the layer's folded factors; None if nothing was folded."""
        before, _, after = str(Reason.FOLDED.value).partition("{}")
        if self.smoothing != "folded" or Reason.of(self.reason) is not Reason.FOLDED:
            return None
        return self.reason.removeprefix(before).removesuffix(after)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerRecord:
        """The layer that `to_dict` described."""
        known = _arguments(cls, values)
        norms = known.get("norms")
        known |= {"group": tuple(known.get("group") or ()), "norms": norms and tuple(norms)}
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        info: dict[str, Any] = asdict(self) | {"group": list(self.group)}
        more: dict[str, Any] = info.pop("more")
        rotation = info.pop("rotation")
        scheme, columns = info.pop("activation_scheme"), info.pop("outlier_columns")
        norms = info.pop("norms")
        own = {} if scheme is None else {"activation_scheme": scheme}
        kind = info.pop("format")
        own |= {} if kind is None else {"format": kind}
        own |= {} if columns is None else {"outlier_columns": columns}
        if not self.group:
            info = {key: info[key] for key in ("name", "smoothing", "reason")} | own
            info |= {"in_features": self.in_features, "out_features": self.out_features}
        own |= {"rotation": rotation} if rotation else {}
        own |= {"norms": list(norms)} if norms else {}
        return info | own | more


@dataclass(frozen=True)
class ExpertsRecord:
    """Experts of a mixture, in one module, that are quantized, or would be.

    Attributes:
        smoothing, reason: as in `LayerRecord`.
        alphas: the migration strengths of the first and the second product; None without factors, empty if nothing was
            measured.
        num_experts: how many there are.
        hidden, inner: the channels of the input and the output, and those between the two products.
        weights: how many weights the float experts have.
        unseen: the experts that no token of the calibration reached. They share the factors of the input and the static
            scales with all others, and have no factors for the second product.
        schemes, rotations: of both products of the int8 layer; empty in a float model.
        more: what another release or a user has added.
    """

    name: str
    smoothing: How = "none"
    reason: str = ""
    alphas: tuple[float | None, ...] = ()
    num_experts: int = 0
    hidden: int = 0
    inner: int = 0
    weights: int = 0
    unseen: int = 0
    schemes: tuple[str, ...] = ()
    rotations: tuple[int, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExpertsRecord:
        """The experts that `to_dict` described."""
        known = _arguments(cls, values)
        pairs = {name: tuple(known.get(name) or ()) for name in ("alphas", "schemes", "rotations")}
        return cls(**(known | pairs))

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        info: dict[str, Any] = asdict(self)
        more: dict[str, Any] = info.pop("more")
        for name in ("alphas", "schemes", "rotations"):
            values = list(info.pop(name))
            info |= {name: values} if values else {}
        return info | more


@dataclass(frozen=True)
class SkippedLayer:
    """A layer left in float, and the sentence that says why."""

    name: str
    reason: str

    @property
    def found_by_running(self) -> bool:
        """Whether only a run of the model showed that the layer must stay in float."""
        reason = Reason.of(self.reason)
        return reason is not None and reason.found_by_running

    def to_dict(self) -> dict[str, str]:
        """Returns JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Verification:
    """How much smoothing changed the float model's output: the largest change divided by the largest value."""

    relative_change: float
    bit_exact: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, change: float) -> Verification:
        return cls(change, change == 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {"relative_change": self.relative_change, "bit_exact": self.bit_exact, **self.more}


@dataclass(frozen=True)
class ModelRecord:
    """What was done to a whole model.

    Attributes:
        config: `SmoothQuantConfig.to_dict`; empty if nothing was done.
        layers: the quantized layers; for a float model, the layers to quantize.
        skipped: the layers left in float.
        experts: the experts of mixtures, likewise.
        verification, calibration_tokens: None if `smooth_lm` has not seen the model.
        more: what another release or a user has added.
    """

    config: dict[str, Any] = field(default_factory=dict)
    layers: tuple[LayerRecord, ...] = ()
    skipped: tuple[SkippedLayer, ...] = ()
    experts: tuple[ExpertsRecord, ...] = ()
    verification: Verification | None = None
    calibration_tokens: int | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ModelRecord:
        """The record of a model, empty if nothing was done to it."""
        return cls.from_dict(info_of(model))

    @classmethod
    def from_dict(cls, info: Mapping[str, Any]) -> ModelRecord:
        """The record that `to_dict` described."""
        known = _arguments(cls, info)
        check = known.get("verification")
        known |= {
            "layers": tuple(map(LayerRecord.from_dict, known.get("layers", ()))),
            "experts": tuple(map(ExpertsRecord.from_dict, known.get("experts", ()))),
            "skipped": tuple(
                SkippedLayer(entry["name"], entry["reason"]) for entry in known.get("skipped", ())
            ),
            "verification": check and Verification(**_arguments(Verification, check)),
        }
        return cls(**known)

    @property
    def described(self) -> dict[str, LayerRecord]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values: the documented `model.smoothquant_info`."""
        info: dict[str, Any] = {
            "config": self.config,
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": [layer.to_dict() for layer in self.skipped],
        }
        if self.experts:
            info["experts"] = [experts.to_dict() for experts in self.experts]
        if self.verification is not None:
            info["verification"] = self.verification.to_dict()
        if self.calibration_tokens is not None:
            info["calibration_tokens"] = self.calibration_tokens
        return info | self.more

    def attach(self, model: nn.Module, changes: Changes | None = None) -> None:
        """Makes this the record of a model, which `changes` can undo."""
        if changes is None:
            attach_info(model, self.to_dict())
        else:
            changes.set_attribute(model, _INFO, self.to_dict())


def skipped_layers(reasons: Mapping[str, str]) -> tuple[SkippedLayer, ...]:
    """The records of layers left in float, from their names and reasons."""
    return tuple(SkippedLayer(name, reason) for name, reason in reasons.items())


def info_of(model: nn.Module) -> dict[str, Any]:
    """`model.smoothquant_info` unchanged, for a checkpoint; empty if the model has none."""
    info: dict[str, Any] = getattr(model, _INFO, {})
    return info


def attach_info(model: nn.Module, info: dict[str, Any]) -> None:
    """Gives a model the `smoothquant_info` of a checkpoint, unchanged."""
    setattr(model, _INFO, info)


def layers_within(model: nn.Module) -> list[LayerRecord]:
    """The layers in the records of a model and of all its parts."""
    parts = [module for module in model.modules() if _INFO in vars(module)]
    return [layer for part in parts for layer in ModelRecord.of(part).layers]


def rescaled_layers(model: nn.Module) -> dict[str, str]:
    """Layers whose input or output differs from the float model's by folded factors: name -> why, in words."""
    found: dict[str, str] = {}
    for prefix, part in model.named_modules():
        if _INFO not in vars(part):
            continue
        for layer in ModelRecord.of(part).layers:
            if layer.smoothing == "folded":
                name = f"{prefix}.{layer.name}" if prefix else layer.name
                found[name] = f"folded {layer.reason}"
                if layer.producer:
                    other = f"{prefix}.{layer.producer}" if prefix else layer.producer
                    found.setdefault(other, f"it holds the factors of {name}")
    return found


def _arguments(
    record: type[LayerRecord | ExpertsRecord | ModelRecord | Verification],
    values: Mapping[str, Any],
) -> dict[str, Any]:
    """The values for the fields of a record, with all others under `more`."""
    names = {f.name for f in fields(record)}
    known = {key: value for key, value in values.items() if key in names}
    return known | {"more": {k: v for k, v in values.items() if k not in names}}
