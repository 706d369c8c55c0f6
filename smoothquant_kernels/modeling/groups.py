"""Finds linears that read the same tensor, and the producer that can absorb their smoothing factors.

Smoothing divides a linear's input by s. If another module produces that input channel by channel, 1 / s can be folded
into that producer: the weight of a norm, or the rows of `v_proj` (through attention), of `up_proj` (through the gate)
or of `fc1` (through a ReLU). No list of architectures says where this works. The model itself is tested:

1. *trace*: One forward pass. Linears that receive the very same tensor form a group. If that tensor is the output of a
   norm, the norm is the candidate.
2. *probe*: For a group without a candidate, earlier linears with K output features become candidates. Their output is
   multiplied by random powers of two, channel by channel. If this multiplies the group's input by exactly the same
   factors, the producer is found (`probe.py`).
3. *prove*: All producers' outputs are multiplied, and all groups' inputs are divided again. Powers of two are exact in
   floating point, so the model's outputs keep every bit (except for subnormal products), unless something else also
   reads a producer (a residual branch, a hidden consumer). Bisection finds such groups. They keep the run-time
   division, which needs no producer.
4. *follow*: On this sample, a reader may have no effect on the outputs, but it is still an operation. Two more passes,
   one over longer input, watch every operation that reads a producer's output, without hooks (`readers.py`).

No pass sees what the sample does not run. So an uncalled linear of the same width in the producer's block refuses the
producer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from smoothquant_kernels.modeling.changes import writable
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.probe import (
    Group,
    Trace,
    block_of,
    find_linear_producers,
    powers_of_two,
    same,
)
from smoothquant_kernels.modeling.readers import UNWATCHED, Readers, readable, watched
from smoothquant_kernels.modeling.record import Reason
from smoothquant_kernels.modeling.run import Batch, evaluating, output_tensors, run, run_changed
from smoothquant_kernels.modeling.sample_inputs import repeated
from smoothquant_kernels.modeling.view import ModelView, is_channelwise, is_read_by_others
from smoothquant_kernels.nn.float_linear import is_float_linear, weight_of

__all__ = ["Group", "find_groups"]


def _trace(model: nn.Module, batch: Batch, linears: Iterable[str]) -> Trace:
    inputs: dict[str, list[Tensor]] = {}
    norms: dict[str, list[Tensor]] = {}
    called: set[str] = set()
    with Hooks(model) as hooks:
        for name in linears:
            hooks.on_input(name, lambda x, n=name: inputs.setdefault(n, []).append(x))  # type: ignore[misc]
        for name, module in model.named_modules():
            if is_float_linear(module):
                hooks.on_input(name, lambda _, n=name: called.add(n))  # type: ignore[misc]
            elif is_channelwise(module):
                hooks.on_output(name, lambda y, n=name: norms.setdefault(n, []).append(y))  # type: ignore[misc]
        outputs = [t.clone() for t in output_tensors(run(model, batch))]
    return Trace(inputs, norms, called, outputs)


def _identity(t: Tensor) -> tuple[int, int, int]:
    """A key that is equal for a tensor and its reshapes, and differs for views of its parts."""
    return (t.data_ptr(), t.numel(), t.shape[-1])


def _group_by_input(trace: Trace) -> list[Group]:
    norm_of: dict[tuple[int, int, int], str] = {}
    for name, outputs in trace.norm_outputs.items():
        for output in outputs:
            norm_of[_identity(output)] = name
    members: dict[tuple[tuple[int, int, int], ...], list[str]] = {}
    for name, inputs in trace.inputs.items():
        members.setdefault(tuple(_identity(x) for x in inputs), []).append(name)
    groups = []
    for key, names in members.items():
        group = Group(tuple(names))
        norm = norm_of.get(key[0])
        if len(key) > 1:
            group = group.without_producer(Reason.CALLED_AGAIN())
        elif norm is not None and len(trace.norm_outputs[norm]) == 1:
            group = replace(group, producer=norm)
        groups.append(group)
    return groups


def _preserves_output(model: nn.Module, batch: Batch, trace: Trace, groups: list[Group]) -> bool:
    """Whether the model's outputs stay the same when producers' outputs are multiplied and groups' inputs divided."""
    with Hooks(model) as hooks:
        for seed, group in enumerate(groups):
            assert group.producer is not None
            x = trace.inputs[group.linears[0]][0]
            factors = powers_of_two(x.shape[-1] // group.repeats.times, x, seed)
            hooks.on_output(group.producer, lambda y, f=factors: y * f)  # type: ignore[misc]
            factors = group.repeats.spread(factors)
            for name in group.linears:
                hooks.on_input(name, lambda y, f=factors: y / f)  # type: ignore[misc]
        changed = run_changed(model, batch)
    outputs = [] if changed is None else output_tensors(changed)
    return len(outputs) == len(trace.outputs) and all(map(same, outputs, trace.outputs))


def _unsound(model: nn.Module, batch: Batch, trace: Trace, groups: list[Group]) -> list[Group]:
    """The groups whose producer something else also reads, found by bisection (step 3)."""
    if not groups or _preserves_output(model, batch, trace, groups):
        return []
    if len(groups) == 1:
        return groups
    half = len(groups) // 2
    return _unsound(model, batch, trace, groups[:half]) + _unsound(
        model, batch, trace, groups[half:]
    )


def _hidden_readers(
    model: nn.Module, batch: Batch, groups: list[Group], *, all_run: bool = True
) -> dict[str, str]:
    """Producers that something outside their group reads, each with its reader (step 4).

    With `all_run`, also refuses a producer if the pass misses one of the watched modules or cannot be watched at all.
    """
    found = [(g.producer, g.linears) for g in groups if g.producer is not None]
    marks = {producer: 1 << i for i, (producer, _) in enumerate(found)}
    takes_off: dict[str, int] = {}
    masks: dict[str, int] = {}
    for producer, linears in found:
        for name in (producer, *linears):
            masks[name] = masks.get(name, 0) | marks[producer]
        takes_off.update(dict.fromkeys(linears, marks[producer]))
    modules = {name: model.get_submodule(name) for name in masks}
    readers = Readers({modules[name]: mask for name, mask in masks.items()})
    silent = set(masks)

    def enter(name: str) -> None:
        silent.discard(name)
        readers.running, readers.inside = modules[name], takes_off.get(name, 0)

    def leave(name: str, y: Any) -> None:
        readers.running, readers.inside = None, 0
        if name in marks and isinstance(y, Tensor):
            readers.mark(y, marks[name])

    try:
        with watched(modules, enter, leave), readers:
            output = run(model, batch)
        readers.refuse_output(output)
    except UNWATCHED as error:
        if not all_run:
            raise
        return dict.fromkeys(marks, f"cannot be followed: {readable(error)}")
    for name in silent if all_run else ():
        readers.refuse(masks[name], f"{name} runs another way where it has no hooks")
    return {name: readers.refused[mark] for name, mark in marks.items() if mark in readers.refused}


def _refuse_uncalled(model: nn.Module, trace: Trace, groups: list[Group]) -> list[Group]:
    """Refuses producers that may also be read by a linear that the sample did not reach."""
    silent = [
        (name, weight_of(module).shape[1])
        for name, module in model.named_modules()
        if is_float_linear(module) and not is_read_by_others(module) and name not in trace.called
    ]

    def refuse(group: Group) -> Group:
        if group.producer is not None:
            k = trace.inputs[group.linears[0]][0].shape[-1]
            for name, width in silent:
                if width in (k, k // group.repeats.times) and _within(
                    block_of(name), block_of(group.producer)
                ):
                    return group.without_producer(Reason.MAY_BE_READ(name, group.producer))
        return group

    return [refuse(group) for group in groups]


def _within(inner: str, outer: str) -> bool:
    """Whether a block is the other block or a part of it. The empty name is the model, which contains all blocks."""
    return not outer or inner == outer or inner.startswith(f"{outer}.")


def _role(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def find_groups(
    view: ModelView,
    linears: Iterable[str],
    batch: Batch,
    *,
    fold: bool = True,
    narrower: bool = False,
) -> list[Group]:
    """Returns groups of linears in the order of their calls, each with a proved producer if there is one.

    Args:
        linears: names of the linears to smooth.
        batch: a small batch. A few dozen real tokens are enough.
        fold: False looks for no producers.
        narrower: look also for producers that are narrower than the input of their group (v_proj under grouped-query
            attention).

    Raises:
        Nothing of its own. A group whose producer cannot be proved has no producer, but a reason.
    """
    model, linears = view.model, list(linears)
    with evaluating(model):
        trace = _trace(model, batch, linears)
        groups = _group_by_input(trace)
        silent = [n for n in linears if n not in trace.inputs]
        alone = [Group((n,), reason=Reason.NOT_ON_SAMPLE()) for n in silent]
        if not fold:
            return [g.without_producer(Reason.FOLDING_OFF()) for g in groups + alone]
        groups = find_linear_producers(model, batch, trace, groups, narrower=narrower)
        groups = [_refuse_watched(model, _refuse_shared(view, g)) for g in groups]
        groups = _refuse_common_producers(groups)
        groups = _refuse_uncalled(model, trace, groups)
        candidates = [g for g in groups if g.producer is not None]
        # Groups with the same role are neighbors, so that bisection isolates a structural fault in few runs.
        candidates.sort(key=lambda g: _role(g.linears[0]))
        readers = _hidden_readers(model, batch, candidates) if candidates else {}
        longer = repeated(model, batch) if candidates else None
        with contextlib.suppress(Exception):  # the model may refuse an input of this length
            if longer is not None:
                readers = _hidden_readers(model, longer, candidates, all_run=False) | readers
        candidates = [g for g in candidates if g.producer not in readers]
        bad = {g.linears for g in _unsound(model, batch, trace, candidates)}
        return [_judge(g, readers, bad) for g in groups] + alone


def _judge(group: Group, readers: Mapping[str, str], bad: set[tuple[str, ...]]) -> Group:
    reader = readers.get(group.producer or "")
    if reader is None and group.linears not in bad:
        return group
    detail = "" if reader is None else f" ({reader})"
    return group.without_producer(Reason.IS_READ(group.producer, detail))


def _refuse_shared(view: ModelView, group: Group) -> Group:
    """Refuses a producer if a parameter to scale is read-only, or shared, so that scaling would change two places."""
    if group.producer is None:
        return group
    for module in (group.producer, *group.linears):
        for parameter, value in view.model.get_submodule(module).named_parameters(recurse=False):
            # Of the group's linears, the fold scales only the weights, so their biases may be shared.
            if module != group.producer and parameter != "weight":
                continue
            if others := view.shared.get(f"{module}.{parameter}", []):
                return group.without_producer(Reason.PARAMETER_SHARED(module, parameter, others[0]))
            if not writable(value):
                return group.without_producer(Reason.READ_ONLY(parameter, module))
    return group


def _refuse_watched(model: nn.Module, group: Group) -> Group:
    """Refuses a producer if a user's hook sees a tensor that the fold would scale."""
    for name in (group.producer, *group.linears) if group.producer is not None else ():
        module = model.get_submodule(name)
        inputs = name in group.linears and module._forward_pre_hooks
        if inputs or module._forward_hooks:
            return group.without_producer(Reason.HOOKED(name))
    return group


def _refuse_common_producers(groups: list[Group]) -> list[Group]:
    """Refuses a producer whose output reaches two groups (as different tensors), as it can fold for neither."""
    counts: dict[str, int] = {}
    for group in groups:
        if group.producer is not None:
            counts[group.producer] = counts.get(group.producer, 0) + 1
    return [
        g.without_producer(Reason.FEEDS_SEVERAL(g.producer))
        if g.producer is not None and counts[g.producer] > 1
        else g
        for g in groups
    ]
