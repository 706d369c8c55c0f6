"""One frozen description of everything that smoothing and quantisation do."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.linear import ACTIVATION_SCHEMES, WEIGHT_GRANULARITIES

ROUNDINGS = ("power_of_two", "none")
FOLDINGS = ("auto", "never")


@dataclass(frozen=True)
class SmoothQuantConfig:
    """How a model is smoothed and quantised. Round-trips through JSON; unknown or wrong values are refused.

    Attributes:
        alpha: migration strength in [0, 1]: 0 leaves the activations as they are, 1 moves all difficulty into the
            weights (paper, section 3.2, eq. 4). docs/accuracy.md has the measurements behind the default.
        activation_scheme: ``"per_token"`` (O1), ``"per_tensor"`` (dynamic, O2), ``"static"`` (calibrated, O3).
        weight_granularity: ``"channel"`` or ``"tensor"``.
        w_bit, a_bit: bits of weights and activations; 8 is what there is.
        smooth_rounding: ``"power_of_two"`` rounds every factor to the nearest power of two, so that folding changes no
            bit of the float model in any dtype; ``"none"`` uses the formula's value.
        folding: ``"auto"`` folds factors into the producer where that is proved to preserve the function and divides
            at run time elsewhere; ``"never"`` divides at run time everywhere.
        verify_tolerance: largest relative change of the float model's logits that a fold may cause.
        skip: shell-style patterns of module names that stay in float, beside the output head.
        calibration_tokens: calibration stops after this many tokens.
        calibration_window: strings are cut into windows of this many tokens.
    """

    alpha: float = 0.8
    activation_scheme: str = "per_token"
    weight_granularity: str = "channel"
    w_bit: int = 8
    a_bit: int = 8
    smooth_rounding: str = "power_of_two"
    folding: str = "auto"
    verify_tolerance: float = 1e-5
    skip: tuple[str, ...] = ()
    calibration_tokens: int = 16384
    calibration_window: int = 512

    def __post_init__(self) -> None:
        def fail(name: str, allowed: str) -> None:
            raise SmoothQuantError(f"{name} must be {allowed}; got {getattr(self, name)!r}.")

        if not _is_number(self.alpha) or not 0.0 <= self.alpha <= 1.0:
            fail("alpha", "a number in [0, 1]")
        for name, allowed in (
            ("activation_scheme", ACTIVATION_SCHEMES),
            ("weight_granularity", WEIGHT_GRANULARITIES),
            ("smooth_rounding", ROUNDINGS),
            ("folding", FOLDINGS),
        ):
            if getattr(self, name) not in allowed:
                fail(name, f"one of {', '.join(allowed)}")
        for name in ("w_bit", "a_bit"):
            if getattr(self, name) != 8:
                fail(name, "8 (int8 weights and activations; other widths are not supported yet)")
        if not _is_number(self.verify_tolerance) or not 0.0 <= self.verify_tolerance < 1.0:
            fail("verify_tolerance", "a number in [0, 1)")
        if isinstance(self.skip, str) or not all(isinstance(p, str) for p in self.skip):
            fail("skip", "a sequence of module-name patterns")
        object.__setattr__(self, "skip", tuple(self.skip))
        for name in ("calibration_tokens", "calibration_window"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                fail(name, "a whole number >= 1")

    def replace(self, **changes: Any) -> SmoothQuantConfig:
        """A copy with some values changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {**dataclasses.asdict(self), "skip": list(self.skip)}

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
