"""Putting smoothing factors into a float model: folded into the producer, or divided at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoothquant_kernels.groups import Group
from smoothquant_kernels.linear import is_float_linear, set_pending_smooth, weight_of


@dataclass(frozen=True)
class Smoothing:
    """The factors of one group: s [K] float32."""

    group: Group
    smooth: Tensor


def round_to_power_of_two(smooth: Tensor) -> Tensor:
    """The nearest power of two, in the logarithm; multiplying by it is exact in every floating-point type."""
    return torch.exp2(torch.log2(smooth.double()).round()).float()


def _scale_parameter(parameter: Tensor | None, factor: Tensor, offset: float = 0.0) -> None:
    """parameter := (parameter + offset) * factor - offset, in float32."""
    if parameter is not None:
        parameter.data.copy_((parameter.data.float() + offset) * factor - offset)


def scale_norm(module: nn.Module, factor: Tensor, offsets: Mapping[str, float]) -> None:
    """Scales every vector of a norm by `factor` [channels]; `offsets`: name -> 1.0 for a weight used as 1 + weight."""
    for name, parameter in module.named_parameters(recurse=False):
        _scale_parameter(parameter, factor, offsets.get(name, 0.0))


def scale_rows(linear: nn.Module, factor: Tensor) -> None:
    """Makes a linear put out `factor` [N] times what it did."""
    rows = weight_of(linear)  # a view: writes through
    rows.data.copy_(rows.data.float() * factor[:, None])
    _scale_parameter(getattr(linear, "bias", None), factor)


def norm_offsets(module: nn.Module, factor: Tensor, tolerance: float) -> dict[str, float] | None:
    """How a norm must be folded: {} for weight * y, {"weight": 1.0} for (1 + weight) * y (Gemma's), None if no way is.

    Tried on random input: the folded norm must put out `factor` times what it did. So the parameters may have any
    names; a bias is scaled like a weight. The module is left as it was.
    """
    saved = {n: p.data.clone() for n, p in module.named_parameters(recurse=False)}
    first = next(iter(saved.values()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, first.shape[0], generator=generator).to(first.device, first.dtype)
    choices: list[dict[str, float]] = [{}, *({name: 1.0} for name in saved)]
    try:
        with torch.no_grad():
            expected = module(x).float() * factor
            for offsets in choices:
                scale_norm(module, factor, offsets)
                error = (module(x).float() - expected).abs().amax(0)
                _restore(module, saved)
                # by channel: what (1 + w) / s - 1 loses counts in that channel, which the readers multiply by s again
                if bool((error <= tolerance * expected.abs().amax(0)).all()):
                    return offsets
    except Exception:  # it wants other arguments, and says so in its own way
        _restore(module, saved)
    return None


def _restore(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        parameter.data.copy_(saved[name])


def fold(model: nn.Module, smoothing: Smoothing, tolerance: float) -> bool:
    """Folds 1 / s into the producer and s into the readers; False (and nothing changed) if the producer refuses."""
    producer = model.get_submodule(_producer(smoothing.group))
    factor = 1.0 / smoothing.smooth
    if is_float_linear(producer):
        scale_rows(producer, factor)
    else:
        offsets = norm_offsets(producer, factor, tolerance)
        if offsets is None:
            return False
        scale_norm(producer, factor, offsets)
    for name in smoothing.group.linears:
        weight = weight_of(model.get_submodule(name))
        weight.data.copy_(weight.data.float() * smoothing.smooth)
    return True


def _producer(group: Group) -> str:
    assert group.producer is not None
    return group.producer


def fold_verified(
    model: nn.Module,
    groups: Sequence[Group],
    factors: Callable[[Group], Tensor],
    same_output: Callable[[], bool],
    tolerance: float,
) -> tuple[list[Smoothing], list[Smoothing]]:
    """Folds the groups and checks the model's output; takes back, by bisection, those that change it.

    Args:
        factors: s of a group, from the model as it is when the group's turn comes.
        same_output: whether the model still computes what it did.

    Returns:
        What is folded, and what was refused (its parameters are as they were).
    """
    saved = {
        parameter: parameter.data.clone()
        for group in groups
        for name in (_producer(group), *group.linears)
        for parameter in model.get_submodule(name).parameters(recurse=False)
    }
    done: list[Smoothing] = []
    refused: list[Smoothing] = []
    for group in groups:
        smoothing = Smoothing(group, factors(group))
        (done if fold(model, smoothing, tolerance) else refused).append(smoothing)
    if not done or same_output():
        return done, refused
    for parameter, value in saved.items():
        parameter.data.copy_(value)
    if len(groups) == 1:
        return [], done
    half = len(groups) // 2
    parts = [
        fold_verified(model, part, factors, same_output, tolerance)
        for part in (groups[:half], groups[half:])
    ]
    return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]


def divide_at_run_time(model: nn.Module, smoothing: Smoothing) -> None:
    """Leaves the division to the quantizers of the group's linears; the float model stays as it is."""
    for name in smoothing.group.linears:
        set_pending_smooth(model.get_submodule(name), smoothing.smooth)
