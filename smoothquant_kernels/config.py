"""The settings of smoothing and quantization."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES, MAX_ROTATION, WEIGHT_GRANULARITIES

ROUNDINGS = ("auto", "power_of_two", "none")
FORMATS = ("float", "w8a8", "w4a8")
OUTLIERS = ("none", "static", "dynamic")
FOLDINGS = ("auto", "never", "only", "required")
WEIGHT_ROUNDINGS = ("auto", "nearest", "gptq")
NORMS = ("auto", "max", "rms")
MASSIVE_CHOICES = ("per_token", "keep")
#: A layer has massive activations if the largest element of some token is this many times that of the median token. The
#: ratio is 20 to 2,100 for six down_proj of SmolLM2-135M and at most 12 for its other layers (compare Sun et al., 2024,
#: "Massive Activations in Large Language Models").
MASSIVE_PEAK = 16.0
#: The best measured migration strengths of layers that are rotated, and of those that are not
#: (docs/reference/accuracy.md).
ROTATED_ALPHA = {"per_token": 0.5, "per_tensor": 0.5, "static": 0.5}
PLAIN_ALPHA = {"per_token": 0.6, "per_tensor": 0.7, "static": 0.7}
#: What the factors of rotated layers balance: the norms of the channels of activations and of weights. After a rotation
#: the energy of a group of channels counts, not its peak. Only the range of a static scale still depends on the peaks.
ROTATED_NORMS = {
    "per_token": ("rms", "rms"),
    "per_tensor": ("rms", "rms"),
    "static": ("max", "rms"),
}
#: The largest group of channels that ``rotation="auto"`` rotates together, and the smallest that is worth it.
AUTO_ROTATION = 256
LEAST_ROTATION = 8


@dataclass(frozen=True)
class SmoothQuantConfig:
    """How a model is smoothed and quantized. It round-trips through JSON. Unknown names and wrong values are refused.

    Attributes:
        alpha: migration strength in [0, 1]: 0 leaves the activations as they are, 1 moves all difficulty into the
            weights (paper, section 3.2, eq. 4). None takes the best measured value for the activation scheme, see
            `ROTATED_ALPHA`, `PLAIN_ALPHA` and docs/reference/accuracy.md.
        smooth: False only measures the ranges of the activations. The result is naive W8A8, for comparison, unless
            `rotation` gives a group size.
        rotation: the most adjacent channels that the quantizer rotates together, after smoothing, a power of two from
            2 to 512. Each layer takes the largest power of two up to it that divides the number of its input
            channels. ``"auto"`` is `AUTO_ROTATION`, where at least `LEAST_ROTATION` is possible, and none with
            `smooth=False`; ``"none"`` rotates nothing (docs/guides/rotation.md).
        activation_norm, weight_norm: what the factors balance of each channel of the activations and of the weights:
            ``"max"``, the largest magnitude (the paper's), or ``"rms"``, the root mean square. ``"auto"`` is ``"max"``
            for layers without rotation, and `ROTATED_NORMS` of the activation scheme for others.
        activation_scheme: ``"per_token"`` (O1), ``"per_tensor"`` (dynamic, O2), ``"static"`` (calibrated, O3).
        alphas: layer -> alpha, for the layers that shall differ from `alpha`. Here and below, a layer is given by its
            full name or by a shell-style pattern (``"*.down_proj"``); a full name counts before the first pattern that
            matches. One that matches no layer is refused when the configuration meets a model. Layers that read one
            tensor share their factors, so they must agree.
        rotations: layer -> rotation, for the layers that shall differ from `rotation`. Layers that read one tensor must
            agree here, too.
        schemes: layer -> activation scheme, for the layers that shall differ from `activation_scheme`.
        clips: layer -> ratio in (0, 1]: a static scale covers this part of the calibrated range and the rest saturates.
        massive_activations: what the schemes with one scale for the tensor do with a layer that has massive
            activations (a token many times larger than the others, see `MASSIVE_PEAK`), which no smoothing of channels
            can balance: ``"per_token"`` gives that layer a scale per token, ``"keep"`` leaves it in the scheme.
        weight_granularity: ``"channel"`` or ``"tensor"``.
        weight_rounding: ``"nearest"``; ``"gptq"``, which rounds the weights so that their errors cancel on the
            calibration data (Frantar et al., 2022); or ``"auto"``, which is GPTQ for W4A8 layers and the nearest values
            for all others. Calibration also keeps [K, K] float32 for each layer that GPTQ rounds.
        w_bit, a_bit: bits of weights and activations: 8 and 8 (W8A8), or 4 and 8 (W4A8, docs/guides/w4a8.md).
        formats: layer -> format, for the layers that shall differ from `w_bit`: ``"w8a8"``, ``"w4a8"``, or ``"float"``,
            which keeps a layer as `skip` does.
        awq: searches the factors of groups of W4A8 layers for the smallest error of the 4-bit weights on the
            calibration sample (Lin et al., 2023). Without effect where no layer is W4A8, and for layers in `alphas`.
        outliers: what W8A8 layers do with outlier columns of their input: ``"none"``; ``"static"`` multiplies the
            columns that calibration found beyond `outlier_threshold`, after smoothing, in the layer's float type;
            ``"dynamic"`` finds them in each call, as LLM.int8() does (docs/guides/outliers.md).
        outlier_threshold: see `outliers`; the paper's is 6.0.
        outlier_layers: layer -> value of `outliers`, for the layers that shall differ.
        smooth_rounding: ``"power_of_two"`` rounds every factor to the nearest power of two, so that folding changes no
            bit of the float model in any dtype; ``"none"`` uses the formula's value, which balances a little better
            and costs float roundings; ``"auto"`` is ``"none"`` for float32 models and ``"power_of_two"`` for others.
        folding: ``"auto"`` folds factors into the producer where that is proved to preserve the function and divides
            at run time elsewhere; ``"never"`` divides at run time everywhere; ``"only"`` divides nowhere, for formats
            that cannot: layers whose factors cannot be folded stay unsmoothed, and under grouped-query attention
            o_proj takes equal factors for the query heads that share a head of v_proj, which absorbs them;
            ``"required"`` is the same, but refuses a model of which a layer would stay unsmoothed so.
        only_where_better: leaves a group of layers unsmoothed whose outputs are nearer to float's so, in int8 on the
            calibration sample. False smooths every group. Layers with an entry in `alphas` are always smoothed.
        verify_tolerance: largest relative change of the float model's logits that folding may cause; None derives it
            from the model: what one more rounding of every folded layer's input changes, times `smooth.ROUNDINGS`.
        skip: shell-style patterns of module names that stay in float, beside the output head.
        quantize_head: makes the output head int8 too, with the settings of `for_head`. A head that `skip` matches
            stays in float, and a model without a head is refused (docs/guides/head.md).
        calibration_tokens: calibration stops after this many tokens.
        calibration_window: strings are cut into windows of this many tokens.
    """

    alpha: float | None = None
    smooth: bool = True
    rotation: str | int = "auto"
    activation_norm: str = "auto"
    weight_norm: str = "auto"
    activation_scheme: str = "per_token"
    alphas: Mapping[str, float] = field(default_factory=dict)
    rotations: Mapping[str, str | int] = field(default_factory=dict)
    schemes: Mapping[str, str] = field(default_factory=dict)
    clips: Mapping[str, float] = field(default_factory=dict)
    massive_activations: str = "per_token"
    weight_granularity: str = "channel"
    weight_rounding: str = "auto"
    w_bit: int = 8
    a_bit: int = 8
    formats: Mapping[str, str] = field(default_factory=dict)
    awq: bool = True
    outliers: str = "none"
    outlier_threshold: float = 6.0
    outlier_layers: Mapping[str, str] = field(default_factory=dict)
    smooth_rounding: str = "auto"
    folding: str = "auto"
    only_where_better: bool = True
    verify_tolerance: float | None = None
    skip: tuple[str, ...] = ()
    quantize_head: bool = False
    calibration_tokens: int = 16384
    calibration_window: int = 512

    def __post_init__(self) -> None:
        def fail(name: str, allowed: str) -> None:
            raise SmoothQuantError(f"{name} must be {allowed}; got {getattr(self, name)!r}.")

        if self.alpha is not None and not (_is_number(self.alpha) and 0.0 <= self.alpha <= 1.0):
            fail("alpha", "a number in [0, 1]")
        for name, allowed in (
            ("activation_scheme", ACTIVATION_SCHEMES),
            ("massive_activations", MASSIVE_CHOICES),
            ("weight_granularity", WEIGHT_GRANULARITIES),
            ("weight_rounding", WEIGHT_ROUNDINGS),
            ("smooth_rounding", ROUNDINGS),
            ("activation_norm", NORMS),
            ("weight_norm", NORMS),
            ("folding", FOLDINGS),
            ("outliers", OUTLIERS),
        ):
            if getattr(self, name) not in allowed:
                fail(name, f"one of {', '.join(allowed)}")
        for name in ("smooth", "only_where_better", "quantize_head", "awq"):
            if not isinstance(getattr(self, name), bool):
                fail(name, "true or false")
        if type(self.w_bit) is not int or self.w_bit not in (4, 8):
            fail("w_bit", "4 or 8")
        if type(self.a_bit) is not int or self.a_bit != 8:
            fail("a_bit", "8 (activations are int8; no other width is supported)")
        threshold = self.outlier_threshold
        if not (_is_number(threshold) and 0.0 < threshold < math.inf):
            fail("outlier_threshold", "a number above 0")
        if not _is_rotation(self.rotation):
            fail("rotation", ROTATIONS)
        tolerance = self.verify_tolerance
        if tolerance is not None and not (_is_number(tolerance) and 0.0 <= tolerance < 1.0):
            fail("verify_tolerance", "a number in [0, 1), or none")
        if not isinstance(self.skip, (list, tuple)) or not all(
            isinstance(pattern, str) for pattern in self.skip
        ):
            fail("skip", "a list or tuple of module-name patterns")
        object.__setattr__(self, "skip", tuple(self.skip))
        for name, fine, wanted in _MAPS:
            values = getattr(self, name)
            if not isinstance(values, Mapping) or not all(
                isinstance(layer, str) and fine(value) for layer, value in values.items()
            ):
                fail(name, f"a mapping of layer names or patterns to {wanted}")
            object.__setattr__(self, name, dict(values))
        for name in ("calibration_tokens", "calibration_window"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                fail(name, "a whole number >= 1")

    def __hash__(self) -> int:
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return hash(tuple(frozenset(v.items()) if isinstance(v, dict) else v for v in values))

    @property
    def divides(self) -> bool:
        """Whether factors that cannot be folded divide at run time."""
        return self.folding in ("auto", "never")

    def format_of(self, name: str) -> str:
        """The layer's entry in `formats`, or the format of `w_bit`."""
        own: str | None = first_match(self.formats, name)
        return own or ("w4a8" if self.w_bit == 4 else "w8a8")

    def rounding_of(self, name: str) -> str:
        """How the layer's weight is rounded: ``"nearest"`` or ``"gptq"``."""
        if self.weight_rounding != "auto":
            return self.weight_rounding
        return "gptq" if self.format_of(name) == "w4a8" else "nearest"

    @property
    def rounds_by_gptq(self) -> bool:
        """Whether `rounding_of` may be ``"gptq"`` for some layer."""
        if self.weight_rounding != "auto":
            return self.weight_rounding == "gptq"
        return self.w_bit == 4 or "w4a8" in self.formats.values()

    def float_pattern(self, name: str) -> str | None:
        """The name or pattern in `skip` or `formats` that keeps a layer in float; None for a quantized layer."""
        patterns = list(self.skip)
        if self.format_of(name) == "float":
            patterns += [name] if name in self.formats else self.formats
        return next((p for p in patterns if p == name or fnmatch.fnmatchcase(name, p)), None)

    def outliers_of(self, name: str) -> str:
        """The layer's entry in `outlier_layers`, or `outliers`; ``"none"`` for a layer that is not W8A8."""
        if self.format_of(name) != "w8a8":
            return "none"
        own: str | None = first_match(self.outlier_layers, name)
        return own or self.outliers

    def scheme_of(self, x_peak: float | None, name: str = "") -> str:
        """The activation scheme of a layer whose largest token is `x_peak` times its median one."""
        own: str | None = first_match(self.schemes, name)
        if own is not None:
            return own
        massive = x_peak is not None and x_peak >= MASSIVE_PEAK
        if massive and self.smooth and self.massive_activations == "per_token":
            return "per_token"
        return self.activation_scheme

    def alpha_of(self, x_peak: float | None, name: str = "", *, rotated: bool = True) -> float:
        """The layer's entry in `alphas`, or `alpha`, or the default of the layer's activation scheme."""
        own: float | None = first_match(self.alphas, name)
        if own is None:
            own = self.alpha
        if own is not None:
            return own
        return (ROTATED_ALPHA if rotated else PLAIN_ALPHA)[self.scheme_of(x_peak, name)]

    def norms_of(self, scheme: str, *, rotated: bool) -> tuple[str, str]:
        """The norms of activations and weights, each ``"max"`` or ``"rms"``, for the factors of a layer in a scheme."""
        best = ROTATED_NORMS[scheme] if rotated else ("max", "max")
        asked = (self.activation_norm, self.weight_norm)
        own, other = (b if a == "auto" else a for a, b in zip(asked, best, strict=True))
        return own, other

    def rotation_of(self, k: int, name: str = "") -> int:
        """The group size for a layer with K input channels; 0 for no rotation."""
        own: str | int | None = first_match(self.rotations, name)
        asked = self.rotation if own is None else own
        if asked == "none" or (asked == "auto" and not self.smooth):
            return 0
        least, most = (LEAST_ROTATION, AUTO_ROTATION) if asked == "auto" else (2, int(asked))
        group = min(most, k & -k)  # the largest power of two that divides K
        return group if group >= least else 0

    def for_head(self, name: str) -> SmoothQuantConfig:
        """The settings of an int8 output head: a scale per token and per channel, whatever other layers have.

        A scale for the whole tensor, or 4 bits, would blur the small differences between logits that decide on the
        next token. An entry of the head's own name in `formats` or `outlier_layers` counts.
        """
        return self.replace(
            schemes={**self.schemes, name: "per_token"},
            formats={**self.formats, name: self.formats.get(name, "w8a8")},
            outlier_layers={**self.outlier_layers, name: self.outlier_layers.get(name, "none")},
            weight_granularity="channel",
        )

    def clip_of(self, name: str) -> float:
        """The part of the layer's calibrated range that its static scale covers."""
        own: float | None = first_match(self.clips, name)
        return 1.0 if own is None else own

    def replace(self, **changes: Any) -> SmoothQuantConfig:
        """A copy with some values changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {**dataclasses.asdict(self), "skip": list(self.skip)}  # asdict copies the maps

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SmoothQuantConfig:
        """The inverse of `to_dict`.

        Raises:
            SmoothQuantError: a name is unknown or a value not allowed.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise SmoothQuantError(
                f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}."
            )
        return cls(**values)

    def to_json(self) -> str:
        """JSON text; floats round-trip exactly."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SmoothQuantConfig:
        """The inverse of `to_json`; raises SmoothQuantError for anything that is not one."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise SmoothQuantError(f"the configuration is not valid JSON: {error}.") from None
        if not isinstance(values, dict):
            raise SmoothQuantError(
                f"the configuration must be a JSON object, got {type(values).__name__}."
            )
        return cls.from_dict(values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_rotation(value: object) -> bool:
    if type(value) is not int:
        return value in ("auto", "none")
    return 2 <= value <= MAX_ROTATION and value & (value - 1) == 0


ROTATIONS = f"auto, none or a power of two from 2 to {MAX_ROTATION}"


def first_match(values: Mapping[str, Any], name: str) -> Any:
    """The value of the layer's own name, or of the first pattern that matches it, or None."""
    if name in values:  # search results name every layer: do not try hundreds of patterns for each
        return values[name]
    return next((v for pattern, v in values.items() if fnmatch.fnmatchcase(name, pattern)), None)


_MAPS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("alphas", lambda v: _is_number(v) and 0.0 <= v <= 1.0, "numbers in [0, 1]"),
    ("rotations", _is_rotation, ROTATIONS),
    ("schemes", lambda v: v in ACTIVATION_SCHEMES, f"one of {', '.join(ACTIVATION_SCHEMES)}"),
    ("clips", lambda v: _is_number(v) and 0.0 < v <= 1.0, "numbers in (0, 1]"),
    ("formats", lambda v: v in FORMATS, f"one of {', '.join(FORMATS)}"),
    ("outlier_layers", lambda v: v in OUTLIERS, f"one of {', '.join(OUTLIERS)}"),
)
#: The settings that give values by layer.
BY_LAYER = tuple(name for name, _, _ in _MAPS)
