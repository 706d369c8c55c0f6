"""Putting smoothing factors into a float model: folded into the producer, or divided at run time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels.groups import Group
from smoothquant_kernels.linear import KeepsBufferTypes, weight_of
from smoothquant_kernels.modules import replace_module


class SmoothedLinear(KeepsBufferTypes, nn.Linear):
    """A float linear whose input is divided by smoothing factors: `F.linear(x * inv_smooth, weight * s, bias)`."""

    inv_smooth: Tensor

    @classmethod
    def from_linear(cls, linear: nn.Module, smooth: Tensor) -> SmoothedLinear:
        """Takes over the parameters of an `nn.Linear` or `Conv1D`, the weight [N, K] multiplied by s [K]."""
        weight = weight_of(linear)
        bias = getattr(linear, "bias", None)
        n, k = weight.shape
        new = cls(k, n, bias is not None, device="meta", dtype=weight.dtype)
        scaled = weight.detach().float() * smooth
        new.weight = nn.Parameter(scaled.to(weight.dtype).contiguous(), weight.requires_grad)
        if bias is not None:
            new.bias = bias
        new.register_buffer("inv_smooth", 1.0 / smooth)
        return new.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear((x.float() * self.inv_smooth).to(x.dtype), self.weight, self.bias)


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


def scale_output(module: nn.Module, factor: Tensor, offset: float = 0.0) -> None:
    """Makes a norm or linear put out `factor` [channels] times what it did. `offset` is 1 for (1 + weight) norms."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dim() == 1:
        _scale_parameter(weight, factor, offset)
    else:
        rows = weight_of(module)  # a view: writes through
        rows.data.copy_(rows.data.float() * factor[:, None])
    _scale_parameter(getattr(module, "bias", None), factor)


def norm_offset(module: nn.Module, factor: Tensor, tolerance: float) -> float | None:
    """How a norm must be folded: 0 for weight * y, 1 for (1 + weight) * y (Gemma's), None if neither is right.

    Tried on random input: the folded norm must put out `factor` times what it did. The module is left as it was.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    saved = {n: p.data.clone() for n, p in module.named_parameters(recurse=False)}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, weight.shape[0], generator=generator).to(weight.device, weight.dtype)
    try:
        with torch.no_grad():
            expected = module(x).float() * factor
            for offset in (0.0, 1.0):
                scale_output(module, factor, offset)
                error = (module(x).float() - expected).abs().max()
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.data.copy_(saved[name])
                if bool(error <= tolerance * expected.abs().max()):
                    return offset
    except (TypeError, RuntimeError):  # a norm that wants other arguments
        pass
    return None


def fold(model: nn.Module, smoothing: Smoothing, tolerance: float) -> bool:
    """Folds 1 / s into the producer and s into the readers; False (and nothing changed) if the producer refuses."""
    producer = model.get_submodule(_producer(smoothing.group))
    factor = 1.0 / smoothing.smooth
    offset: float | None = 0.0
    if has_norm_producer(model, smoothing.group):
        offset = norm_offset(producer, factor, tolerance)
    if offset is None:
        return False
    scale_output(producer, factor, offset)
    for name in smoothing.group.linears:
        weight = weight_of(model.get_submodule(name))
        weight.data.copy_(weight.data.float() * smoothing.smooth)
    return True


def _producer(group: Group) -> str:
    assert group.producer is not None
    return group.producer


def has_norm_producer(model: nn.Module, group: Group) -> bool:
    """Whether the group's producer is a norm (its weight is a vector) rather than a linear."""
    weight = model.get_submodule(_producer(group)).weight
    return isinstance(weight, Tensor) and weight.dim() == 1


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
    """Replaces the group's linears by ones that divide their own input."""
    for name in smoothing.group.linears:
        linear = model.get_submodule(name)
        replace_module(model, name, SmoothedLinear.from_linear(linear, smoothing.smooth))
