"""The parts of a model: linears to quantize, layers that stay in float, shared parameters. Also replaces modules."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.foreign import check_float_model
from smoothquant_kernels.modeling.record import Reason
from smoothquant_kernels.nn.attached import keeps_float
from smoothquant_kernels.nn.experts.source import FloatExperts, read_experts
from smoothquant_kernels.nn.float_linear import is_conv1d, is_float_linear, weight_of
from smoothquant_kernels.nn.kinds import count_quantized
from smoothquant_kernels.reference import MAX_K


@dataclass(frozen=True)
class ModelView:
    """What one operation knows about a model. Each part is computed on first use and kept.

    Attributes:
        skip: patterns for the names of layers that stay in float; or a function that returns the pattern of a name, or
            None (`SmoothQuantConfig.float_pattern`).
        quantize_head: whether output heads are among the linears to quantize.

    Raises:
        SmoothQuantError: by `linears` and `skipped`, if there is no linear layer to quantize, or if another tool has
            quantized the model.
    """

    model: nn.Module
    skip: tuple[str, ...] | Callable[[str], str | None] = ()
    quantize_head: bool = False

    @property
    def linears(self) -> Mapping[str, nn.Module]:
        """The float linears to quantize."""
        return self._parts[0]

    @property
    def skipped(self) -> Mapping[str, str]:
        """The layers left in float, each with its reason."""
        return self._parts[1]

    @property
    def experts(self) -> Mapping[str, FloatExperts]:
        """The float experts to quantize, whose weights are matrices in one 3-D parameter."""
        return self._parts[2]

    @cached_property
    def heads(self) -> set[str]:
        """Names of the modules that turn hidden states into logits: `get_output_embeddings`, or named lm_head.

        They stay in float, as in the paper, without `quantize_head`. A classifier (`score`) is a linear like others.
        """
        getter: Any = getattr(self.model, "get_output_embeddings", None)
        head = None if getter is None else getter()
        modules = list(self.model.named_modules())
        names = {name for name, module in modules if head is not None and module is head}
        return names | {name for name, _ in modules if name.rsplit(".", 1)[-1] == "lm_head"}

    @cached_property
    def int8_heads(self) -> frozenset[str]:
        """The heads among the linears to quantize."""
        return frozenset(self.heads & self.linears.keys()) if self.quantize_head else frozenset()

    @cached_property
    def shared(self) -> dict[str, list[str]]:
        """Names of parameters that are one tensor: each name -> its other names."""
        names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[parameter.data_ptr() if not parameter.is_meta else id(parameter)].append(name)
        several = [group for group in names.values() if len(group) > 1]
        return {n: [other for other in group if other != n] for group in several for n in group}

    @cached_property
    def _parts(self) -> tuple[dict[str, nn.Module], dict[str, str], dict[str, FloatExperts]]:
        return _partition(self)


def _partition(
    view: ModelView,
) -> tuple[dict[str, nn.Module], dict[str, str], dict[str, FloatExperts]]:
    """The linears, the skipped layers and the experts of a view."""
    model = view.model
    check_float_model(model)
    if is_float_linear(model):
        raise SmoothQuantError(
            f"the model is itself a {type(model).__name__}, so there is no place where its int8 layer could be put: "
            "pass a module around it, such as nn.Sequential(layer), or use W8A8Linear.from_linear(layer)."
        )
    check_whole(model)
    heads = view.heads
    chosen: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    experts: dict[str, FloatExperts] = {}
    for name, module in model.named_modules():
        if not is_float_linear(module):
            if holds_matrices(module):
                pattern = _pattern_of(view.skip, name)
                if pattern is not None:
                    skipped[name] = Reason.SKIP_PATTERN(pattern)
                elif name and (found := read_experts(module)) is not None:
                    experts[name] = found
                else:
                    is_named = "expert" in f"{name}.{type(module).__name__}".lower()
                    skipped[name] = Reason.MATRICES("expert weights" if is_named else "weights")
            elif getattr(module, "original_name", "") == "Linear":  # a torch.jit.ScriptModule
                skipped[name] = Reason.TORCHSCRIPT()
            continue
        pattern = _pattern_of(view.skip, name)
        if pattern is not None:
            skipped[name] = Reason.SKIP_PATTERN(pattern)
        elif name in heads and not view.quantize_head:
            skipped[name] = Reason.OUTPUT_HEAD()
        elif (attached := keeps_float(module)) is not None:
            skipped[name] = Reason.ATTACHED(attached)
        elif not weight_of(module).numel():
            skipped[name] = Reason.EMPTY()
        elif weight_of(module).shape[1] > MAX_K:
            skipped[name] = Reason.OVERFLOW(MAX_K)
        elif not weight_of(module).is_floating_point():
            skipped[name] = Reason.NOT_FLOAT(weight_of(module).dtype)
        elif is_read_by_others(module):
            skipped[name] = Reason.ATTENTION()
        elif not computes_linear(module):
            skipped[name] = Reason.NOT_LINEAR(type(module).__name__)
        else:
            chosen[name] = module
    if not chosen and not experts:
        if quantized := count_quantized(model):
            raise SmoothQuantError(f"the model is quantized already ({quantized}).")
        raise SmoothQuantError(
            f"no linear layer to quantize in {type(model).__name__}: expected nn.Linear or Conv1D modules"
            + (f"; {len(skipped)} were skipped." if skipped else ".")
        )
    return chosen, skipped, experts


def _pattern_of(skip: tuple[str, ...] | Callable[[str], str | None], name: str) -> str | None:
    if callable(skip):
        return skip(name)
    return next((p for p in skip if fnmatch.fnmatchcase(name, p)), None)


def holds_matrices(module: nn.Module) -> bool:
    """Whether a module keeps several matrices in one 3-D parameter, as `transformers` 5 does for experts."""
    return not isinstance(module, _ConvNd) and any(
        p.dim() == 3 and min(p.shape) > 1 and p.is_floating_point()
        for p in module.parameters(recurse=False)
    )


def is_read_by_others(module: nn.Module) -> bool:
    """Whether another module reads this linear's weight but never calls it (out_proj of `nn.MultiheadAttention`)."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def computes_linear(module: nn.Module) -> bool:
    """Whether a linear still computes x @ W.T + b, tested on random input.

    A subclass may override forward. Falcon's still computes a linear, but a router also returns scores.
    """
    if type(module).forward is nn.Linear.forward or is_conv1d(module):
        return True
    weight = weight_of(module)
    if weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    try:
        with torch.no_grad():
            got = module(x)
    except Exception:  # a forward with other arguments may raise anything
        return False
    expected = F.linear(x, weight, getattr(module, "bias", None))
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    # Covers a different order of K additions and the rounding to a narrow type.
    bound = 8 * torch.finfo(x.dtype).eps * (x.float().abs() @ weight.detach().float().abs().t() + 1)
    return bool(((got - expected).float().abs() <= bound).all())


def is_channelwise(module: nn.Module) -> bool:
    """Whether a module may be a norm: it has only vectors of one length, whatever their names, and no children."""
    parameters = list(module.parameters(recurse=False))
    return (
        bool(parameters)
        and len({tuple(p.shape) for p in parameters}) == 1
        and parameters[0].dim() == 1
        and not any(True for _ in module.children())
    )


def check_present(model: nn.Module, prefix: str = "") -> None:
    """Raises SmoothQuantError if a parameter has no data (on the meta device, or offloaded by accelerate)."""
    name = next((n for n, p in model.named_parameters(prefix) if p.is_meta), None)
    if name is not None:
        raise SmoothQuantError(
            f"{name} has no data (meta device; accelerate puts offloaded weights there): load the model without "
            "offloading, or use smoothquant_kernels.quantize_streamed, which reads one block at a time."
        )


def check_whole(model: nn.Module) -> None:
    """Raises SmoothQuantError if a parameter is a DTensor, of which each process holds only a part."""
    for name, parameter in model.named_parameters():
        if any(t.__module__.startswith("torch.distributed.") for t in type(parameter).__mro__):
            raise SmoothQuantError(
                f"{name} is a {type(parameter).__name__}, spread over processes (fully_shard, tensor parallelism): "
                "smooth and quantize the model first, and spread the result."
            )
