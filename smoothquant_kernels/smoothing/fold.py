"""Applying smoothing factors to a float model: folding into the producer, or division at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoothquant_kernels.modeling.changes import Changes, widened
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.nn.float_linear import FOLDED, is_float_linear, weight_of

#: Relative error allowed per channel of a folded norm: some tens of float32 roundings. A wrong formula far exceeds it.
_NORM_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Smoothing:
    """The factors of one group: s [K] float32."""

    group: Group
    smooth: Tensor


def round_to_power_of_two(smooth: Tensor) -> Tensor:
    """Rounds to the power of two nearest in the logarithm. It multiplies normal numbers exactly."""
    return torch.exp2(torch.log2(smooth.double()).round()).float()


def scale_norm(
    module: nn.Module, factor: Tensor, offsets: Mapping[str, float], changes: Changes
) -> None:
    """Scales every vector of a norm by `factor` [channels]. `offsets` maps a weight used as 1 + weight to 1.0."""
    for name, parameter in module.named_parameters(recurse=False):
        if offset := offsets.get(name, 0.0):
            changes.write(parameter, (widened(parameter.data) + offset) * factor - offset)
        else:
            changes.scale(parameter, factor)


def scale_rows(linear: nn.Module, factor: Tensor, changes: Changes) -> None:
    """Scales the output of a linear by `factor` [N]."""
    changes.scale(weight_of(linear), factor[:, None])  # a view, so it writes to the module
    bias: Tensor | None = getattr(linear, "bias", None)
    if bias is not None:
        changes.scale(bias, factor)


def norm_offsets(module: nn.Module, factor: Tensor, tolerance: float) -> dict[str, float] | None:
    """Returns how to fold a norm: {} for weight * y, {"weight": 1.0} for (1 + weight) * y (Gemma's), else None.

    Each way is tested on random input: the folded norm must return `factor` times its original output. So the
    parameters may have any names. A bias is scaled like a weight. The module is left unchanged.
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
                # Per channel, because the readers multiply a channel's rounding error of (1 + w) / s - 1 by s again.
                if bool((error <= tolerance * expected.abs().amax(0)).all()):
                    return offsets
        except Exception:  # a norm that needs other arguments may raise anything
            trial.back_to(0)
    return None


def fold(model: nn.Module, smoothing: Smoothing, changes: Changes) -> bool:
    """Folds 1 / s into the producer and s into the readers. Returns False and changes nothing if no fold fits."""
    assert smoothing.group.producer is not None
    producer = model.get_submodule(smoothing.group.producer)
    factor = smoothing.group.repeats.by_copy(1.0 / smoothing.smooth)[:, 0]  # copies are equal
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
    """Folds the factors and checks the model's output. Bisection finds the folds that change it and undoes them.

    Args:
        same_output: returns whether the model's output is still the same.

    Returns:
        The folded smoothings, and the refused ones, whose parameters are unchanged.
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
    """Leaves the division to the quantizers of the group's linears. The float model computes the same as before."""
    for name in smoothing.group.linears:
        changes.attach_smooth(model.get_submodule(name), smoothing.smooth)
