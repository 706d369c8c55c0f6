"""Which linears read the same tensor, and which producer could absorb their smoothing factors: found, not listed.

Smoothing divides a linear's input by s. Where another module produces that input channel by channel (a norm's weight;
the rows of `v_proj` behind attention, of `up_proj` behind the gate, of `fc1` behind a ReLU), 1 / s can be folded into
it. Whether it can is not looked up by architecture but tried on the model itself:

1. *trace*: one forward pass; linears that are given the very same tensor form a group, and a norm whose output that
   tensor is becomes the candidate;
2. *probe*: for a group without one, earlier linears of K output features are candidates. Their output is multiplied by
   random powers of two, channel by channel. If the group's input is multiplied by just these, the producer is found;
3. *prove*: all producers' outputs are multiplied and all groups' inputs divided again. Powers of two are exact in
   floating point, so the model's outputs keep every bit (but for products so small that they are subnormal), unless
   something else reads a producer too (a residual branch, a hidden consumer). Such groups are found by bisection and
   keep the run-time division, which needs no producer;
4. *follow*: a reader whose effect the outputs do not show on this sample is still an operation: two more passes, one of
   them over longer input, look at every operation that reads a producer's output, without hooks (`_readers.py`).

What a sample does not run cannot be seen: an uncalled linear of the producer's layer that is as wide refuses it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.modeling.changes import writable
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.readers import UNWATCHED, Readers, readable, watched
from smoothquant_kernels.modeling.record import Reason
from smoothquant_kernels.modeling.run import Batch, evaluating, output_tensors, run, run_changed
from smoothquant_kernels.modeling.sample_inputs import repeated
from smoothquant_kernels.modeling.view import ModelView, is_channelwise, is_read_by_others
from smoothquant_kernels.nn.float_linear import is_float_linear, weight_of

_CANDIDATES = 4  # earlier linears that are tried as producer of a group: q, k, v and one more


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor, with the module that can absorb 1 / s, if any."""

    linears: tuple[str, ...]
    producer: str | None = None
    reason: str = ""

    def without_producer(self, reason: str) -> Group:
        return replace(self, producer=None, reason=reason)


@dataclass
class _Trace:
    """What one forward pass showed; tensors are kept so that no address is used twice."""

    inputs: dict[str, list[Tensor]]
    norm_outputs: dict[str, list[Tensor]]
    called: set[str]
    outputs: list[Tensor]


def _trace(model: nn.Module, batch: Batch, linears: Iterable[str]) -> _Trace:
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
    return _Trace(inputs, norms, called, outputs)


def _identity(t: Tensor) -> tuple[int, int, int]:
    """Equal for a tensor and its reshapes; tells apart views of parts."""
    return (t.data_ptr(), t.numel(), t.shape[-1])


def _group_by_input(trace: _Trace) -> list[Group]:
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


def _same(a: Tensor, b: Tensor, *, by_channel: bool = False) -> bool:
    """Equal but for what subnormal products lose under a factor of two; anything structural is far larger.

    `by_channel` compares each of the last dimension's channels on its own scale, so that no channel hides another.
    """
    if a.shape != b.shape:
        return False
    if not b.numel():
        return True
    scale = b.abs().reshape(-1, b.shape[-1]).amax(0) if by_channel else b.abs().amax()
    info = torch.finfo(b.dtype)
    return bool(((a - b).abs() <= 8 * info.eps * (scale + info.tiny)).all())


def _powers_of_two(size: int, like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # 1 and 2 only: exact in float16 too, and far from its limits
    return (2.0 ** torch.randint(0, 2, (size,), generator=generator)).to(like.device, like.dtype)


def _candidates(model: nn.Module, trace: _Trace, group: Group) -> list[str]:
    """Linears with K output features that ran before the group, nearest first, within its repeated block."""
    order = list(trace.inputs)
    first = min(order.index(n) for n in group.linears)
    k = trace.inputs[group.linears[0]][0].shape[-1]
    block = _block(group.linears[0])
    return [
        name
        for name in reversed(order[:first])
        if _block(name) == block
        and _out_features(model.get_submodule(name)) == k
        and len(trace.inputs[name]) == 1
    ][:_CANDIDATES]


def _block(name: str) -> str:
    """The name up to and with its first number: `model.layers.3`; the empty string without one."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ""


def _out_features(module: nn.Module) -> int:
    return int(getattr(module, "out_features", getattr(module, "nf", 0)))


def _probe(model: nn.Module, batch: Batch, trace: _Trace, groups: list[Group]) -> list[Group]:
    """Looks for a linear producer of each group that has none (step 2)."""
    # one trial at a time in a block: a query that is scaled changes what its block's values come to
    waiting: dict[str, list[tuple[int, int, str]]] = {}
    for i, group in enumerate(groups):
        if group.producer is None and not group.reason:
            for rank, name in enumerate(_candidates(model, trace, group)):
                waiting.setdefault(_block(name), []).append((rank, i, name))
    for trials in waiting.values():
        trials.sort(reverse=True)
    found: dict[int, str] = {}
    while any(waiting.values()):
        now = {name: i for _, i, name in (trials.pop() for trials in waiting.values() if trials)}
        with Hooks(model) as hooks:
            for name, inputs in trace.inputs.items():
                # no trial reaches beyond the next linear
                if len(inputs) == 1 and not any(name in groups[i].linears for i in now.values()):
                    hooks.on_input(name, functools.partial(_replay, inputs[0]))
            for producer, i in now.items():
                on_match = functools.partial(found.__setitem__, i, producer)
                _add_probe(hooks, producer, groups[i], trace, on_match)
            run_changed(model, batch)
        waiting = {b: [t for t in trials if t[1] not in found] for b, trials in waiting.items()}
    taken: set[str] = set()
    result = []
    for i, group in enumerate(groups):
        match = found.get(i)
        if match is not None and match not in taken:
            taken.add(match)
            group = replace(group, producer=match)
        elif group.producer is None and not group.reason:
            group = group.without_producer(Reason.NO_PRODUCER())
        result.append(group)
    return result


def _replay(original: Tensor, x: Tensor) -> Tensor:
    """What a module was given without the trial; not where the trial has sent an expert other tokens."""
    return original if x.shape == original.shape else x


def _add_probe(
    hooks: Hooks, producer: str, group: Group, trace: _Trace, on_match: Callable[[], None]
) -> None:
    original = trace.inputs[group.linears[0]][0]
    factors = _powers_of_two(original.shape[-1], original, seed=len(producer))

    def compare(x: Tensor) -> Tensor:
        if bool(original.any()) and _same(x, original * factors, by_channel=True):
            on_match()
        return _replay(original, x)

    hooks.on_output(producer, lambda y: y * factors)
    for name in group.linears:
        hooks.on_input(name, compare)


def _preserves_output(model: nn.Module, batch: Batch, trace: _Trace, groups: list[Group]) -> bool:
    """Multiplies the producers' outputs, divides the groups' inputs; whether the model's output keeps every bit."""
    with Hooks(model) as hooks:
        for seed, group in enumerate(groups):
            assert group.producer is not None
            x = trace.inputs[group.linears[0]][0]
            factors = _powers_of_two(x.shape[-1], x, seed)
            hooks.on_output(group.producer, lambda y, f=factors: y * f)  # type: ignore[misc]
            for name in group.linears:
                hooks.on_input(name, lambda y, f=factors: y / f)  # type: ignore[misc]
        changed = run_changed(model, batch)
    outputs = [] if changed is None else output_tensors(changed)
    return len(outputs) == len(trace.outputs) and all(map(_same, outputs, trace.outputs))


def _unsound(model: nn.Module, batch: Batch, trace: _Trace, groups: list[Group]) -> list[Group]:
    """The groups whose producer is read by something else, by bisection (step 3)."""
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
    """Producers that more than their group reads, with what reads them (step 4); `all_run`: the batch calls all."""
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


def _refuse_uncalled(model: nn.Module, trace: _Trace, groups: list[Group]) -> list[Group]:
    """A linear that the sample did not reach may read the producer too."""
    silent = [
        (name, weight_of(module).shape[1])
        for name, module in model.named_modules()
        if is_float_linear(module) and not is_read_by_others(module) and name not in trace.called
    ]

    def refuse(group: Group) -> Group:
        if group.producer is not None:
            k = trace.inputs[group.linears[0]][0].shape[-1]
            for name, width in silent:
                if width == k and _within(_block(name), _block(group.producer)):
                    return group.without_producer(Reason.MAY_BE_READ(name, group.producer))
        return group

    return [refuse(group) for group in groups]


def _within(inner: str, outer: str) -> bool:
    """Whether a block is the other or a part of it; everything is a part of the model, whose name is empty."""
    return not outer or inner == outer or inner.startswith(f"{outer}.")


def _role(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def find_groups(
    view: ModelView, linears: Iterable[str], batch: Batch, *, folding: str = "auto"
) -> list[Group]:
    """Groups of linears in calling order, with a proved producer where there is one.

    Args:
        linears: names of the linears to be smoothed.
        batch: a small batch; a few dozen real tokens are enough.
        folding: ``"never"`` looks for no producers.

    Raises:
        Nothing of its own: a producer that cannot be proved is left out, with the reason in the group.
    """
    model, linears = view.model, list(linears)
    with evaluating(model):
        trace = _trace(model, batch, linears)
        groups = _group_by_input(trace)
        silent = [n for n in linears if n not in trace.inputs]
        alone = [Group((n,), reason=Reason.NOT_ON_SAMPLE()) for n in silent]
        if folding == "never":
            return [g.without_producer(Reason.FOLDING_OFF()) for g in groups + alone]
        groups = _probe(model, batch, trace, groups)
        groups = [_refuse_watched(model, _refuse_shared(view, g)) for g in groups]
        groups = _refuse_common_producers(groups)
        groups = _refuse_uncalled(model, trace, groups)
        candidates = [g for g in groups if g.producer is not None]
        # alike groups side by side, so that a structural fault is bisected in few runs
        candidates.sort(key=lambda g: _role(g.linears[0]))
        readers = _hidden_readers(model, batch, candidates) if candidates else {}
        longer = repeated(model, batch) if candidates else None
        with contextlib.suppress(Exception):  # longer than the model goes
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
    """Scaling a parameter that has two names would scale two places; one that cannot be written is not scaled."""
    if group.producer is None:
        return group
    for module in (group.producer, *group.linears):
        for parameter, value in view.model.get_submodule(module).named_parameters(recurse=False):
            # a linear's bias is not scaled: sharing it is harmless, but for the producer
            if module != group.producer and parameter != "weight":
                continue
            if others := view.shared.get(f"{module}.{parameter}", []):
                return group.without_producer(Reason.PARAMETER_SHARED(module, parameter, others[0]))
            if not writable(value):
                return group.without_producer(Reason.READ_ONLY(parameter, module))
    return group


def _refuse_watched(model: nn.Module, group: Group) -> Group:
    """A hook of the user's on what a fold scales would be given other numbers than before."""
    for name in (group.producer, *group.linears) if group.producer is not None else ():
        module = model.get_submodule(name)
        inputs = name in group.linears and module._forward_pre_hooks
        if inputs or module._forward_hooks:
            return group.without_producer(Reason.HOOKED(name))
    return group


def _refuse_common_producers(groups: list[Group]) -> list[Group]:
    """A producer whose output reaches two groups (as different tensors) can absorb the factors of neither."""
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
