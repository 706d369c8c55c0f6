"""Putting smoothing factors into a float model: folded into the producer, or divided at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoothquant_kernels.modeling.changes import Changes, widened
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.nn.float_linear import FOLDED, is_float_linear, weight_of

#: Per channel, of a folded norm's output: some tens of float32 roundings. A wrong formula is off by far more.
_NORM_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Smoothing:
    """The factors of one group: s [K] float32."""

    group: Group
    smooth: Tensor


def round_to_power_of_two(smooth: Tensor) -> Tensor:
    """The nearest power of two, in the logarithm; multiplying by it is exact in every floating-point type."""
    return torch.exp2(torch.log2(smooth.double()).round()).float()


def scale_norm(
    module: nn.Module, factor: Tensor, offsets: Mapping[str, float], changes: Changes
) -> None:
    """Scales every vector of a norm by `factor` [channels]; `offsets`: name -> 1.0 for a weight used as 1 + weight."""
    for name, parameter in module.named_parameters(recurse=False):
        if offset := offsets.get(name, 0.0):
            changes.write(parameter, (widened(parameter.data) + offset) * factor - offset)
        else:
            changes.scale(parameter, factor)


def scale_rows(linear: nn.Module, factor: Tensor, changes: Changes) -> None:
    """Makes a linear put out `factor` [N] times what it did."""
    changes.scale(weight_of(linear), factor[:, None])  # a view: writes through
    bias: Tensor | None = getattr(linear, "bias", None)
    if bias is not None:
        changes.scale(bias, factor)


def norm_offsets(module: nn.Module, factor: Tensor, tolerance: float) -> dict[str, float] | None:
    """How a norm must be folded: {} for weight * y, {"weight": 1.0} for (1 + weight) * y (Gemma's), None if no way is.

    Tried on random input: the folded norm must put out `factor` times what it did. So the parameters may have any
    names; a bias is scaled like a weight. The module is left as it was.
    """
    parameters = dict(module.named_parameters(recurse=False))
    first = next(iter(parameters.values()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, first.shape[0], generator=generator).to(first.device, first.dtype)
    choices: list[dict[str, float]] = [{}, *({name: 1.0} for name in parameters)]
    with Changes() as trial, torch.no_grad():
        try:
            expected = widened(module(x)) * factor
            for offsets in choices:
                scale_norm(module, factor, offsets, trial)
                error = (widened(module(x)) - expected).abs().amax(0)
                trial.back_to(0)
                # by channel: what (1 + w) / s - 1 loses counts in that channel, which the readers multiply by s again
                if bool((error <= tolerance * expected.abs().amax(0)).all()):
                    return offsets
        except Exception:  # it wants other arguments, and says so in its own way
            trial.back_to(0)
    return None


def fold(model: nn.Module, smoothing: Smoothing, changes: Changes) -> bool:
    """Folds 1 / s into the producer and s into the readers; False (and nothing changed) if the producer refuses."""
    assert smoothing.group.producer is not None
    producer = model.get_submodule(smoothing.group.producer)
    factor = 1.0 / smoothing.smooth
    if is_float_linear(producer):
        scale_rows(producer, factor, changes)
    else:
        offsets = norm_offsets(producer, factor, _NORM_TOLERANCE)
        if offsets is None:
            return False
        scale_norm(producer, factor, offsets, changes)
    for name in smoothing.group.linears:
        linear = model.get_submodule(name)
        changes.scale(weight_of(linear), smoothing.smooth)
        changes.set_attribute(linear, FOLDED, True)
    return True


def fold_verified(
    model: nn.Module,
    smoothings: Sequence[Smoothing],
    same_output: Callable[[], bool],
    changes: Changes,
) -> tuple[list[Smoothing], list[Smoothing]]:
    """Folds the factors and checks the model's output; takes back, by bisection, those that change it.

    Args:
        same_output: whether the model still computes what it did.

    Returns:
        What is folded, and what was refused (its parameters are as they were).
    """
    before = changes.mark()
    done: list[Smoothing] = []
    refused: list[Smoothing] = []
    for smoothing in smoothings:
        (done if fold(model, smoothing, changes) else refused).append(smoothing)
    if not done or same_output():
        return done, refused
    changes.back_to(before)
    if len(smoothings) == 1:
        return [], done
    half = len(smoothings) // 2
    parts = [
        fold_verified(model, part, same_output, changes)
        for part in (smoothings[:half], smoothings[half:])
    ]
    return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]


def divide_at_run_time(model: nn.Module, smoothing: Smoothing, changes: Changes) -> None:
    """Leaves the division to the quantizers of the group's linears; the float model stays as it is."""
    for name in smoothing.group.linears:
        changes.attach_smooth(model.get_submodule(name), smoothing.smooth)
