"""Recognizes norms and activation functions by what they compute, whatever their classes are called."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels import reference
from smoothquant_kernels.modeling.view import is_channelwise
from smoothquant_kernels.ops.checks import FLOATS

#: Magnitudes of the rows that a norm is tried on. The small ones show its eps.
_MAGNITUDES = (1.0, 30.0, 2.0**-4, 2.0**-8, 2.0**-10, 2.0**-12)
#: Roundings to the type between the exact value and a norm's output: of x * rstd, of the product with the weight, of
#: the bias. Each is half an eps, and the values are at most this many times the output's largest.
ROUNDINGS = 4
#: The errors of float32 sums of squares and of rsqrt, which a norm in float32 may add up to.
FLOAT32 = 64 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class NormForm:
    """What a norm computes: `kind` as in `ops.fused_linear_s8`, and the names of its parameters.

    Attributes:
        weight, bias: names of the module's parameters; empty for none.
        one_plus: whether the factor is 1 + weight.
    """

    kind: str
    eps: float
    weight: str = ""
    bias: str = ""
    one_plus: bool = False

    def factors(self, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """The weight (or 1 + weight in float32) and the bias."""
        weight: Tensor | None = module._parameters[self.weight]
        bias = module._parameters[self.bias] if self.bias else None
        if self.one_plus and weight is not None:
            weight = 1.0 + weight.float()
        return weight, bias

    def arguments(self, module: nn.Module) -> dict[str, Any]:
        """The arguments of `ops.fused_linear_s8` that describe the norm."""
        weight, bias = self.factors(module)
        found = {"eps": self.eps, "norm_weight": weight}
        return found if bias is None else found | {"norm_bias": bias}

    def reference(self, module: nn.Module, x: Tensor) -> Tensor:
        """Float32: what the norm makes of x, by the specification."""
        with torch.no_grad():
            weight, bias = self.factors(module)
            if self.kind == "rms_norm":
                assert weight is not None
                return reference.rms_norm(x, weight, self.eps)
            return reference.layer_norm(x, weight, bias, self.eps)


def norm_form(module: nn.Module) -> NormForm | None:
    """What a norm computes, found by calling it on random input; None if it is no RMSNorm or LayerNorm."""
    if not is_channelwise(module):
        return None
    vectors = {name: p for name, p in module.named_parameters(recurse=False)}
    first = next(iter(vectors.values()))
    if first.dtype not in FLOATS or first.is_meta or len(vectors) > 2:
        return None
    x = _rows(first)
    try:
        with torch.no_grad():
            y = module(x)
            # GroupNorm with one group takes other dimensions together than the last.
            stacked = module(x.view(2, -1, x.shape[-1]))
    except Exception:  # a module of any kind may raise anything on this input
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    if not torch.allclose(stacked.view_as(y), y, equal_nan=True):
        return None
    tolerance = ROUNDINGS * torch.finfo(x.dtype).eps + FLOAT32
    bound = tolerance * y.float().abs().amax(-1, keepdim=True)
    for form in _forms(module, vectors, x.dtype):
        if bool(((form.reference(module, x) - y.float()).abs() <= bound).all()):
            return form
    return None


def _rows(like: Tensor) -> Tensor:
    """Random rows of several magnitudes, and each again with a mean, which only LayerNorm removes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(_MAGNITUDES), like.shape[0], generator=generator)
    x = x * torch.tensor(_MAGNITUDES)[:, None]
    x = torch.cat([x, x + 2 * x.abs().mean(-1, keepdim=True)])
    return x.to(like.device, like.dtype)


def _forms(
    module: nn.Module, vectors: dict[str, nn.Parameter], dtype: torch.dtype
) -> Iterator[NormForm]:
    values = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 0.5]
    # torch takes that of a type where none is given; which type has changed with its releases.
    defaults = [torch.finfo(t).eps for t in (dtype, torch.float32)]
    epsilons = dict.fromkeys([*values, *defaults])
    names = [*vectors]
    orders = [names] if len(names) == 1 else [names, names[::-1]]
    for eps, order, kind in itertools.product(epsilons, orders, ("rms_norm", "layer_norm")):
        weight, bias = (*order, "")[:2]
        if kind == "rms_norm" and bias:
            continue
        for one_plus in (False, True):
            yield NormForm(kind, eps, weight, bias, one_plus)


def activation_kind(module: nn.Module) -> str | None:
    """Which activation function of `act_quantize` a module without parameters computes; None for no such function."""
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        return None
    # Large values, too: some functions are clipped there.
    large = torch.logspace(1, 4.5, 40)
    x = torch.cat([torch.linspace(-9, 9, 1801), large, -large])
    device: Any = next((b.device for b in module.buffers()), None)
    try:
        with torch.no_grad():
            read = x.to(device, copy=True)
            y = module(read)
    except Exception:
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    if not torch.equal(read.cpu(), x):
        return None  # it works in place, and others may read that
    # Float32 formulas of GELU err by some eps of the largest intermediate value. The two forms differ by 4e-4.
    bound = 32 * torch.finfo(torch.float32).eps * x.abs().clamp(min=1.0)
    for kind in reference.ACTIVATIONS:
        if bool(((reference.activation(x, kind) - y.cpu()).abs() <= bound).all()):
            return kind
    return None
