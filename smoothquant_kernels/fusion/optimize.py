"""`optimize_for_inference`: whole blocks of a quantized model in fused ops, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.fusion.deferred import Site
from smoothquant_kernels.fusion.forwards import FusedForward, FusedLinear
from smoothquant_kernels.fusion.merged import LinearGroup, can_merge
from smoothquant_kernels.fusion.record import (
    FusedLayer,
    attach_fusion,
    detach_fusion,
    fused_forwards,
    fusion_info,
)
from smoothquant_kernels.fusion.trial import WAITS, Trial, fresh, own_forward
from smoothquant_kernels.fusion.values import ActivatedValue, LinearValue
from smoothquant_kernels.modeling.run import Batch, evaluating, output_tensors, run
from smoothquant_kernels.modeling.sample_inputs import runnable_batch
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.nn.quantized_linear import QuantizedLinear

#: The largest relative change of the outputs that roundings explain. A fused op rounds less
#: often than the ops that it replaces, so a few int8 values differ by one step.
MOST_CHANGE = 0.1


def optimize_for_inference(
    model: nn.Module, sample: Batch | Tensor | None = None, *, gated: bool = False
) -> nn.Module:
    """Makes a quantized model compute whole blocks in fused ops. The model is changed in place.

    * A norm or an activation function (also gated: gate and up) is computed inside the quantizer of the linears that
      read it, with smoothing and rotation, in one op with the GEMM.
    * Linears that read one value (q, k and v; gate and up) become one GEMM. Their weights become views of one tensor.
    * A linear whose output is added to the residual adds it in the GEMM's epilogue.
    * Under the static scheme, a ReLU between two linears is computed and quantized in the first one's epilogue, so that
      values stay int8 (the paper's O3). So is the product of gate and up, with `gated`.

    What belongs together is found by running the model on a sample: no list of architectures is needed. Whatever does
    not fit keeps its forward; `fusion_info(model)` says why. The state dict and what is saved do not change.
    `undo_optimization` makes everything as it was.

    Args:
        model: a model with `W8A8Linear` layers, from `quantize_model`, `smooth_and_quantize` or `load_quantized`.
        sample: a batch for the model (keyword arguments, or token ids [B, T]); None makes one. Values do not matter.
        gated: let the GEMM of gate and up multiply and quantize (`ops.gemm_s8_gated`) where their reader is static and
            not rotated. It saves a pass over [M, 2 I] values, and holds these weights twice, in another order.

    Returns:
        The model.

    Raises:
        SmoothQuantError: the model has no `W8A8Linear`, or no sample can be made for it, or its outputs on the sample
            change by more than roundings explain. The model then is as before, without an earlier optimization.

    Equivalent to:
        The model before, up to roundings: a fused norm, activation or residual sum is rounded once, in float32, where
        the model rounds each step to its type.

    Source: SmoothQuant (Xiao et al., 2022), section 4.
    """
    if fusion_info(model):
        undo_optimization(model)
    linears, left = _linears(model)
    if not linears and not left:
        raise SmoothQuantError(
            f"{type(model).__name__} has no W8A8Linear to optimize: quantize it first (quantize_model, "
            "smooth_and_quantize) or load a quantized checkpoint (load_quantized)."
        )
    with evaluating(model):
        batch = _batch(model, sample)
        before = [t.clone() for t in output_tensors(run(model, fresh(batch)))]
        trial = Trial(model, linears)
        trial.examine(batch)
        try:
            layers = _fuse(model, trial, before, batch, gated=gated, merge=True)
        except RuntimeError:
            # The outputs of merged linears are not contiguous, which some code asks for.
            layers = _fuse(model, trial, before, batch, gated=gated, merge=False)
        for forward in fused_forwards(model).values():
            forward.site.spills.clear()
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    attach_fusion(model, tuple(sorted(layers + left, key=lambda layer: order[layer.name])))
    return model


def _fuse(
    model: nn.Module, trial: Trial, before: list[Tensor], batch: Batch, *, gated: bool, merge: bool
) -> list[FusedLayer]:
    """Applies what the trial found, and compares the outputs. Undoes it after any exception."""
    groups: list[LinearGroup] = []
    try:
        layers = _apply(trial, groups, gated=gated, merge=merge)
        change = relative_change(before, output_tensors(run(model, fresh(batch))))
        if not change <= MOST_CHANGE:
            raise SmoothQuantError(
                f"optimize_for_inference would change the outputs of {type(model).__name__} by {change:.2%}, and "
                f"roundings explain {MOST_CHANGE:.0%}; the model is unchanged. Please report this model."
            )
    except BaseException:
        undo_optimization(model)
        for group in groups:  # some may have no forward yet that refers to them
            group.separate()
        raise
    return layers


def undo_optimization(model: nn.Module) -> nn.Module:
    """Gives a model the forwards and separate weights that it had before `optimize_for_inference`.

    Returns:
        The model, changed in place.
    """
    groups: dict[int, LinearGroup] = {}
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, FusedForward):
            del module.__dict__["forward"]
            if isinstance(forward, FusedLinear):
                groups[id(forward.group)] = forward.group
    for group in groups.values():
        group.separate()
    detach_fusion(model)
    return model


def _linears(model: nn.Module) -> tuple[dict[str, W8A8Linear], list[FusedLayer]]:
    """The linears that can be fused, and the others with the reason."""
    linears, left = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        reason = own_forward(module)
        if module.part:
            reason = f"it holds {module.part} of a layer"
        elif type(module) is not W8A8Linear:
            reason = f"it is a {type(module).__name__}"
        if reason is None and isinstance(module, W8A8Linear):
            linears[name] = module
        else:
            left.append(FusedLayer(name, reason=reason or ""))
    return linears, left


def _batch(model: nn.Module, sample: Batch | Tensor | None) -> Batch:
    if isinstance(sample, Tensor):
        return {"input_ids": sample}
    batch = runnable_batch(model) if sample is None else sample
    if not isinstance(batch, Mapping):
        raise SmoothQuantError(
            f"no input was found that {type(model).__name__} accepts: pass `sample`, a dict of its arguments, to "
            "optimize_for_inference (load or quantize without optimize=True)."
        )
    return batch


def _apply(trial: Trial, made: list[LinearGroup], *, gated: bool, merge: bool) -> list[FusedLayer]:
    """Gives the modules their forwards, and returns what was done to each linear. Adds the merged groups to `made`."""
    for fused in (*trial.norms.values(), *trial.activations.values()):
        fused.module.__dict__["forward"] = fused
    groups: dict[str, LinearGroup] = {}
    names: dict[str, tuple[str, ...]] = {}
    chains = int8_chains(trial)
    for readers in trial.readers_of_one() if merge else ():
        for part in _mergeable(readers, trial.linears):
            pairs = [c for c in chains.values() if gated and sorted(c) == sorted(part)]
            indices = (part.index(pairs[0][0]), part.index(pairs[0][1])) if pairs else None
            group = LinearGroup([trial.linears[n] for n in part], indices)
            made.append(group)
            groups.update(dict.fromkeys(part, group))
            names.update(dict.fromkeys(part, tuple(part)))
    in_int8 = {
        source: reader
        for reader, sources in chains.items()
        for source in sources
        if (groups[source].gated_indices if source in groups else len(sources) == 1)
    }
    done = []
    for name, layer in trial.linears.items():
        producer, kind = trial.producer_of(name)
        uses = trial.waiting.get(name, set())
        waits = bool(uses & WAITS) or name in in_int8
        entry = FusedLayer(name, producer, kind or "quantize", names.get(name, ()))
        stays = name in in_int8.values()
        entry = replace(entry, residual=bool(uses & {"residual", "sum"}), int8=stays)
        done.append(entry if producer else replace(entry, reason=trial.why_not(name)))
        if producer or name in groups or waits:
            index = names[name].index(name) if name in names else 0
            group = groups.get(name) or LinearGroup([layer])
            layer.__dict__["forward"] = FusedLinear(layer, Site(name), group, index, waits)
    return done


def int8_chains(trial: Trial) -> dict[str, list[str]]:
    """Linears whose reader quantizes an activation of their output by a static scale, without rotation.

    Returns:
        reader -> [fc1] for a ReLU between two linears, [gate, up] for a gated activation.
    """
    chains = {}
    for name, layer in trial.linears.items():
        values = [read.source for read in trial.reads[name]]
        if layer.activation_scheme != "static" or layer.rotation or not values:
            continue
        if not all(
            isinstance(v, ActivatedValue) and isinstance(v.gate, LinearValue) for v in values
        ):
            continue
        gates = {v.gate.site.name for v in values}
        ups = {v.up.site.name if isinstance(v.up, LinearValue) else v.up for v in values}
        if len(gates) != 1 or len(ups) != 1:
            continue
        (gate,), (up,) = gates, ups
        if isinstance(up, str):
            chains[name] = [gate, up]
        elif up is None and values[0].kind == "relu" and layer.inv_smooth is None:
            chains[name] = [gate]
    return chains


def _mergeable(names: list[str], linears: dict[str, W8A8Linear]) -> list[list[str]]:
    """Parts of a group whose layers quantize their input alike."""
    parts: list[list[str]] = []
    for name in names:
        for part in parts:
            if can_merge(linears[part[0]], linears[name]):
                part.append(name)
                break
        else:
            parts.append([name])
    return [part for part in parts if len(part) > 1]


def relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest relative change of an output, by the norm of the whole: one int8 value moves a few numbers far."""
    changes = [0.0]
    for a, b in zip(before, after, strict=True):
        size = a.double().norm().clamp(min=torch.finfo(torch.float32).tiny)
        changes.append(float(((a.double() - b.double()).norm() / size).nan_to_num(torch.inf)))
    return max(changes)
