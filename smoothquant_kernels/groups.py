"""Which linears read the same tensor, and which producer could absorb their smoothing factors: found, not listed.

Smoothing divides a linear's input by s. Where another module produces that input channel by channel (a norm's weight;
the rows of `v_proj` behind attention, of `up_proj` behind the gate, of `fc1` behind a ReLU), 1 / s can be folded into
it. Whether it can is not looked up by architecture but tried on the model itself:

1. *trace*: one forward pass; linears that are given the very same tensor form a group, and a norm whose output that
   tensor is becomes the candidate;
2. *probe*: for a group without one, earlier linears of K output features are candidates. Their output is multiplied by
   random powers of two, channel by channel. If the group's input is multiplied by just these, the producer is found;
3. *prove*: all producers' outputs are multiplied and all groups' inputs divided again. Powers of two are exact in
   floating point, so the model's output keeps every bit (but for products so small that they are subnormal), unless
   something else reads a producer too (a residual branch, a hidden consumer). Such groups are found by bisection and
   keep the run-time division, which needs no producer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.modules import Batch, evaluating, output_tensor, run, shared_parameters

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
    output: Tensor


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and "norm" in type(module).__name__.lower()
        and not any(True for _ in module.children())
    )


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (value, *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: value}


class _Hooks:
    """Forward hooks that are removed at the end of a `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> _Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def on_input(self, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Calls `change` with the module's input; what it returns, if anything, replaces the input."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = change(_first(args, kwargs))
            return None if new is None else _with_first(args, kwargs, new)

        module = self._model.get_submodule(name)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(self, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Calls `change` with the module's output; what it returns, if anything, replaces the output."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            return change(output) if isinstance(output, Tensor) else None

        self._handles.append(self._model.get_submodule(name).register_forward_hook(hook))


def _trace(model: nn.Module, batch: Batch, linears: Iterable[str]) -> _Trace:
    inputs: dict[str, list[Tensor]] = {}
    norms: dict[str, list[Tensor]] = {}
    with _Hooks(model) as hooks:
        for name in linears:
            hooks.on_input(name, lambda x, n=name: inputs.setdefault(n, []).append(x))  # type: ignore[misc]
        for name, module in model.named_modules():
            if _is_norm(module):
                hooks.on_output(name, lambda y, n=name: norms.setdefault(n, []).append(y))  # type: ignore[misc]
        output = output_tensor(run(model, batch)).clone()
    return _Trace(inputs, norms, output)


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
            group = group.without_producer("called more than once in a forward pass")
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
    candidates = {
        i: _candidates(model, trace, g)
        for i, g in enumerate(groups)
        if g.producer is None and not g.reason
    }
    found: dict[int, str] = {}
    for rank in range(_CANDIDATES):
        trial: dict[str, int] = {}
        for i, names in candidates.items():
            if i not in found and rank < len(names) and names[rank] not in trial:
                trial[names[rank]] = i
        if not trial:
            continue
        with _Hooks(model) as hooks:
            for producer, i in trial.items():
                on_match = functools.partial(found.__setitem__, i, producer)
                _add_probe(hooks, producer, groups[i], trace, on_match)
            run(model, batch)
    taken: set[str] = set()
    result = []
    for i, group in enumerate(groups):
        match = found.get(i)
        if match is not None and match not in taken:
            taken.add(match)
            group = replace(group, producer=match)
        elif group.producer is None and not group.reason:
            group = group.without_producer("no producer scales its channels one by one")
        result.append(group)
    return result


def _add_probe(
    hooks: _Hooks, producer: str, group: Group, trace: _Trace, on_match: Callable[[], None]
) -> None:
    original = trace.inputs[group.linears[0]][0]
    factors = _powers_of_two(original.shape[-1], original, seed=len(producer))

    def compare(x: Tensor) -> Tensor:
        if bool(original.any()) and _same(x, original * factors, by_channel=True):
            on_match()
        return original  # what follows runs on undisturbed numbers, whatever was found here

    hooks.on_output(producer, lambda y: y * factors)
    for name in group.linears:
        hooks.on_input(name, compare)


def _preserves_output(model: nn.Module, batch: Batch, trace: _Trace, groups: list[Group]) -> bool:
    """Multiplies the producers' outputs, divides the groups' inputs; whether the model's output keeps every bit."""
    with _Hooks(model) as hooks:
        for seed, group in enumerate(groups):
            assert group.producer is not None
            x = trace.inputs[group.linears[0]][0]
            factors = _powers_of_two(x.shape[-1], x, seed)
            hooks.on_output(group.producer, lambda y, f=factors: y * f)  # type: ignore[misc]
            for name in group.linears:
                hooks.on_input(name, lambda y, f=factors: y / f)  # type: ignore[misc]
        output = output_tensor(run(model, batch))
    return _same(output, trace.output)


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


def _role(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def find_groups(
    model: nn.Module, linears: Iterable[str], batch: Batch, *, folding: str = "auto"
) -> list[Group]:
    """Groups of linears in calling order, with a proved producer where there is one.

    Args:
        linears: names of the linears to be smoothed.
        batch: a small batch; a few dozen real tokens are enough.
        folding: ``"never"`` looks for no producers.

    Raises:
        Nothing of its own: a producer that cannot be proved is left out, with the reason in the group.
    """
    with evaluating(model):
        trace = _trace(model, batch, linears)
        groups = _group_by_input(trace)
        if folding == "never":
            return [g.without_producer("folding is switched off") for g in groups]
        shared = shared_parameters(model)
        groups = _probe(model, batch, trace, groups)
        groups = [_refuse_shared(g, shared) for g in groups]
        groups = _refuse_common_producers(groups)
        candidates = [g for g in groups if g.producer is not None]
        # alike groups side by side, so that a structural fault is bisected in few runs
        candidates.sort(key=lambda g: _role(g.linears[0]))
        bad = {g.linears for g in _unsound(model, batch, trace, candidates)}
        return [
            g.without_producer(f"{g.producer} is read by something else as well")
            if g.linears in bad
            else g
            for g in groups
        ]


def _refuse_shared(group: Group, shared: Mapping[str, list[str]]) -> Group:
    if group.producer is not None:
        others = [o for p in ("weight", "bias") for o in shared.get(f"{group.producer}.{p}", [])]
        if others:
            return group.without_producer(f"{group.producer} shares its weight with {others[0]}")
    return group


def _refuse_common_producers(groups: list[Group]) -> list[Group]:
    """A producer whose output reaches two groups (as different tensors) can absorb the factors of neither."""
    counts: dict[str, int] = {}
    for group in groups:
        if group.producer is not None:
            counts[group.producer] = counts.get(group.producer, 0) + 1
    return [
        g.without_producer(f"{g.producer} feeds several groups")
        if g.producer is not None and counts[g.producer] > 1
        else g
        for g in groups
    ]
