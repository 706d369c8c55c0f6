"""Finds what can be fused by trying: every norm, activation and quantized linear returns values that are not computed.

One forward pass shows who reads each value. A quantized linear is a reader that the value was made for. Any other
reader makes the value a tensor (a spill), so the module that made it keeps its own forward, and the model runs again.
No class name and no list of architectures is involved.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from smoothquant_kernels.fusion.deferred import Deferred, Site
from smoothquant_kernels.fusion.forwards import (
    FusedActivation,
    FusedForward,
    FusedLinear,
    FusedNorm,
)
from smoothquant_kernels.fusion.merged import LinearGroup
from smoothquant_kernels.fusion.norms import activation_kind, norm_form
from smoothquant_kernels.fusion.values import ActivatedValue, NormValue
from smoothquant_kernels.modeling.changes import Changes
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.run import Batch, leaves_in, model_device, run
from smoothquant_kernels.nn.linear import W8A8Linear

_MOST_RUNS = 12
#: Uses of a linear's output for which it must wait.
WAITS = {"residual", "sum", "function"}
#: Uses for which it may wait, if the GEMM can then quantize by the scale of the next linear.
_MAY_WAIT = WAITS | {"activation", "gated"}


@dataclass
class Read:
    """What a linear has read in one call: a value, or a tensor and its version."""

    source: Any
    version: int
    order: int

    @property
    def key(self) -> tuple[int, int]:
        return (id(self.source), self.version)


class _Listening(FusedLinear):
    """A linear that also notes what it reads."""

    def __init__(
        self, layer: W8A8Linear, site: Site, reads: list[Read], order: list[int], waits: bool
    ) -> None:
        super().__init__(layer, site, LinearGroup([layer]), waits=waits)
        self.reads = reads
        self.order = order  # how many reads there were, one counter for all

    def __call__(self, input: Any) -> Any:
        version = 0
        if isinstance(input, Tensor) and not input.is_inference():
            version = input._version
        self.order[0] += 1
        self.reads.append(Read(input, version, self.order[0]))
        return super().__call__(input)


@dataclass
class Trial:
    """What the passes over the sample have shown.

    Attributes:
        norms, activations: the modules whose values only quantized linears read.
        waiting: linears whose output waits, because a residual is added to it or a function is applied to it.
        reads: linear -> what it read, call by call. The tensors are alive, so that no address is used twice.
        made_by: id of a tensor -> the norm-like module that made it.
        refused: module -> why its values are tensors.
    """

    model: nn.Module
    linears: dict[str, W8A8Linear]
    norms: dict[str, FusedNorm] = field(default_factory=dict)
    activations: dict[str, FusedActivation] = field(default_factory=dict)
    waiting: dict[str, set[str]] = field(default_factory=dict)
    reads: dict[str, list[Read]] = field(default_factory=dict)
    made_by: dict[int, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def examine(self, batch: Batch) -> None:
        """Runs the model until every value that is left is read by quantized linears only. Changes nothing."""
        self._candidates()
        self.waiting = {name: set() for name in self.linears}
        for _ in range(_MOST_RUNS):
            sites = self._pass(batch)
            if not self._refuse(sites):
                return
        self.norms, self.activations, self.waiting = {}, {}, {}

    def _candidates(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, W8A8Linear) or any(True for _ in module.children()):
                continue
            site = Site(name)
            made: FusedForward
            if (form := norm_form(module)) is not None:
                made = self.norms[name] = FusedNorm(module, site, form)
            elif (kind := activation_kind(module)) is not None:
                made = self.activations[name] = FusedActivation(module, site, kind)
            else:
                continue
            if (reason := own_forward(made.module)) is not None:
                self.norms.pop(name, None)
                self.activations.pop(name, None)
                self.refused[name] = reason

    def _pass(self, batch: Batch) -> dict[str, Site]:
        """One pass over the sample; returns the sites with what has read their values."""
        self.reads = defaultdict(list)
        self.made_by = {}
        kept: list[Tensor] = []
        sites = {name: Site(name) for name in self.linears}
        order = [0]
        device = model_device(self.model)
        inputs = {name: t.to(device) for name, t in fresh(batch).items()}
        with Changes() as changes, Hooks(self.model) as hooks:
            start = changes.mark()
            for name, layer in self.linears.items():
                waits = name in self.waiting
                forward = _Listening(layer, sites[name], self.reads[name], order, waits)
                changes.set_attribute(layer, "forward", forward)
            for name, fused in (*self.norms.items(), *self.activations.items()):
                fused.site = sites[name] = Site(name)
                changes.set_attribute(fused.module, "forward", fused)
            for name in self.refused:

                def note(y: Tensor, name: str = name) -> None:
                    self.made_by[id(y)] = name
                    kept.append(y)

                hooks.on_output(name, note)
            for site in sites.values():
                site.uses = set()
            # Once more as users call it: with a cache, some models read other values.
            for output in (run(self.model, fresh(batch)), self.model(**inputs)):
                for leaf in leaves_in(output, Deferred):
                    leaf.site.spills["the model's output"] += 1
            changes.back_to(start)
        self._kept = kept
        unread = []
        for site in sites.values():
            site.uses, uses = None, site.uses
            if uses is not None and site.name in self.waiting:
                self.waiting[site.name] = uses
            elif not uses and not site.spills and site.name not in self.linears:
                unread.append(site)
        # A norm that was given another one's value has made none itself. The next pass shows who reads its own.
        if not any(site.spills for site in sites.values()):
            for site in unread:
                site.spills["no quantized linear"] += 1
        return sites

    def _refuse(self, sites: dict[str, Site]) -> bool:
        """Gives the modules whose values spilled their own forward again. Returns whether there were any."""
        changed = False
        for name, site in sites.items():
            reader = next(iter(site.spills), None)
            if name in self.linears:
                waits = name in self.waiting
                if waits and (reader is not None or not self.waiting[name] & _MAY_WAIT):
                    del self.waiting[name]
                    changed = True
            elif reader is not None:
                self.norms.pop(name, None)
                self.activations.pop(name, None)
                self.refused[name] = f"{name}: {reader} reads it"
                changed = True
        return changed

    def producer_of(self, name: str) -> tuple[str, str]:
        """The norm or activation that a linear computes, and its kind; two empty strings for none."""
        sources = [read.source for read in self.reads[name]]
        if sources and all(isinstance(s, (NormValue, ActivatedValue)) for s in sources):
            first = sources[0]
            if isinstance(first, NormValue):
                return first.site.name, first.norm.kind
            return first.site.name, first.kind
        return "", ""

    def why_not(self, name: str) -> str:
        """Why a linear has no producer."""
        if not self.reads[name]:
            return "not called on the sample"
        made_by = self.made_by.get(id(self.reads[name][0].source), "")
        if made_by:
            return self.refused[made_by]
        return "no norm or activation function makes its input"

    def readers_of_one(self) -> list[list[str]]:
        """Linears that read the same values in every call, the one that reads first before the others."""
        groups: dict[tuple[tuple[int, int], ...], list[str]] = defaultdict(list)
        for name in self.linears:
            if keys := tuple(read.key for read in self.reads[name]):
                groups[keys].append(name)
        for names in groups.values():
            names.sort(key=lambda name: self.reads[name][0].order)
        return [names for names in groups.values() if len(names) > 1]


def fresh(batch: Batch) -> Batch:
    """A copy of a batch, because a model may change its inputs in place."""
    return {name: copy.deepcopy(value) for name, value in batch.items()}


def own_forward(module: nn.Module) -> str | None:
    """Why a module's forward cannot be replaced; None if it can."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    return None
