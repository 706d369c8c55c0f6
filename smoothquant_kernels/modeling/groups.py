"""Finds linears that read the same tensor, and the producer that can absorb their smoothing factors.

Smoothing divides a linear's input by s. If another module produces that input channel by channel, 1 / s can be folded
into that producer: the weight of a norm, or the rows of `v_proj` (through attention), of `up_proj` (through the gate)
or of `fc1` (through a ReLU). No list of architectures says where this works. The model itself is tested:

1. *trace*: One forward pass. Linears that receive the very same tensor form a group. If that tensor is the output of a
   norm, the norm is the candidate.
2. *probe*: For a group without a candidate, earlier linears with K output features become candidates. Their output is
   multiplied by random powers of two, channel by channel. If this multiplies the group's input by exactly the same
   factors, the producer is found.
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

_CANDIDATES = 4  # earlier linears tried as the producer of a group: q, k, v and one more


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor, and the module that can absorb 1 / s, if any."""

    linears: tuple[str, ...]
    producer: str | None = None
    reason: str = ""

    def without_producer(self, reason: str) -> Group:
        return replace(self, producer=None, reason=reason)


@dataclass
class _Trace:
    """What one forward pass showed. It keeps the tensors alive, so that no address is used twice."""

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
    """A key that is equal for a tensor and its reshapes, and differs for views of its parts."""
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
    """Whether `a` equals `b`, except for what subnormal products lose under a factor of two.

    Any structural difference is far larger. `by_channel` compares each channel of the last dimension on its own scale,
    so that no channel hides another.
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
    # Only 1 and 2: products stay exact in float16 too, and far from its limits.
    return (2.0 ** torch.randint(0, 2, (size,), generator=generator)).to(like.device, like.dtype)


def _candidates(model: nn.Module, trace: _Trace, group: Group) -> list[str]:
    """Linears of the same repeated block with K output features that ran once, before the group; nearest first."""
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
    """The name through its first number, such as `model.layers.3`; the empty string without a number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ""


def _out_features(module: nn.Module) -> int:
    return int(getattr(module, "out_features", getattr(module, "nf", 0)))


def _probe(model: nn.Module, batch: Batch, trace: _Trace, groups: list[Group]) -> list[Group]:
    """Looks for a linear producer for each group that has none (step 2)."""
    # A block runs one trial at a time, because a scaled query changes the attention output that a trial of v compares.
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
                # The recorded input ends the effect of a trial at the next linear.
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
    """The recorded input, or `x` if the trial has routed a different number of tokens to an expert."""
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
    """Whether the model's outputs stay the same when producers' outputs are multiplied and groups' inputs divided."""
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


def _refuse_uncalled(model: nn.Module, trace: _Trace, groups: list[Group]) -> list[Group]:
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
                if width == k and _within(_block(name), _block(group.producer)):
                    return group.without_producer(Reason.MAY_BE_READ(name, group.producer))
        return group

    return [refuse(group) for group in groups]


def _within(inner: str, outer: str) -> bool:
    """Whether a block is the other block or a part of it. The empty name is the model, which contains all blocks."""
    return not outer or inner == outer or inner.startswith(f"{outer}.")


def _role(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def find_groups(
    view: ModelView, linears: Iterable[str], batch: Batch, *, folding: str = "auto"
) -> list[Group]:
    """Returns groups of linears in the order of their calls, each with a proved producer if there is one.

    Args:
        linears: names of the linears to smooth.
        batch: a small batch. A few dozen real tokens are enough.
        folding: ``"never"`` looks for no producers.

    Raises:
        Nothing of its own. A group whose producer cannot be proved has no producer, but a reason.
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
