"""How close a GPU's result must be to the simulator's: the same bits, or what the PTX ISA promises.

The bounds are those of the PTX ISA 9.0, section 9.7.3, "Floating Point Instructions". They are against
the exact value; the simulator returns that value rounded, which adds half a unit in the last place.
Floating-point mma has no bound there: order and rounding of its sum are unspecified. The tests give it
small integers, whose sums are exact in float32 in any order, so that its bits must be the same too.
"""

import re

import numpy as np


def _lg2(exact):
    # "maximum absolute error is 2^-22 when the input operand is in the range (0.5, 2)", where the
    # result is in (-1, 1); "outside of this interval, maximum relative error is 2^-22".
    return 2.0**-22 * np.maximum(np.abs(exact), 1)


def ulp(exact):
    """The distance of float32 values from their neighbors."""
    return np.spacing(np.abs(exact.astype(np.float32))).astype(np.float64)


#: Instruction -> largest error as a function of the exact value.
BOUNDS = {
    "rcp.approx.f32": ulp,  # "maximum ulp error is 1"
    "sqrt.approx.f32": lambda exact: 2.0**-23 * np.abs(exact),  # "maximum relative error"
    "rsqrt.approx.f32": lambda exact: 2.0**-22.9 * np.abs(exact),  # "maximum relative error"
    "lg2.approx.f32": _lg2,
    "ex2.approx.ftz.f32": lambda exact: 2 * ulp(exact),  # "2 ulp from correctly rounded result"
    "tanh.approx.f32": lambda exact: 2.0**-11 * np.abs(exact),  # "maximum relative error"
    # "maximum absolute error" over -100 pi .. 100 pi; the tests stay in it.
    "sin.approx.f32": lambda exact: np.full(exact.shape, 2.0**-14.7),
}
_APPROXIMATE = re.compile(r"\b\w+\.approx(?:\.\w+)*")
_DIVISION = re.compile(r"(?:div|rem)\.[su]\d+ ")


def bound(instruction):
    """The bound of an instruction, or None where the bits must be the same."""
    found = _APPROXIMATE.findall(instruction)
    if not found:
        return None
    if len(found) > 1 or found[0] not in BOUNDS:
        raise KeyError(f"exactness.py has no bound for {instruction}")
    return BOUNDS[found[0]]


def specified(instruction, inputs, count):
    """Which of the elements have a result that the PTX ISA specifies."""
    if _DIVISION.match(instruction):
        return inputs[1] != 0  # "Division by zero yields an unspecified, machine-specific value"
    return np.ones(count, bool)


def within(expected, got, largest):
    """Which elements are the same value, or finite and within the bound of each other."""
    wide, other = expected.astype(np.float64), got.astype(np.float64)
    same = (expected == got) | (np.isnan(expected) & np.isnan(got))
    with np.errstate(invalid="ignore"):
        near = np.abs(other - wide) <= largest(wide) + ulp(expected) / 2
    return same | (np.isfinite(wide) & np.isfinite(other) & near)
