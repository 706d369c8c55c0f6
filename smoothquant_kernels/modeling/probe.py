"""Groups of linears that read one tensor, and the search for a linear whose output that tensor is, channel by channel.

`groups.py` says what for. A producer may also be narrower than the input of its group: under grouped-query attention
each head of v_proj serves several query heads, so that o_proj reads each of its channels several times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.record import Reason
from smoothquant_kernels.modeling.run import Batch, run_changed

_CANDIDATES = 4  # earlier linears tried as the producer of a group: q, k, v and one more


@dataclass(frozen=True)
class Repeats:
    """How the channels of a group's input repeat those of its producer: each run of `span` channels, `times` times."""

    times: int = 1
    span: int = 1

    def spread(self, values: Tensor) -> Tensor:
        """[K] of the group's channels, from [K / times] of the producer's."""
        return values.reshape(-1, self.span).repeat_interleave(self.times, 0).reshape(-1)

    def by_copy(self, values: Tensor) -> Tensor:
        """[K / times, times]: the values [K] of the group's channels, those of one producer's channel in a row."""
        copies = values.reshape(-1, self.times, self.span)
        return copies.transpose(1, 2).reshape(-1, self.times)


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor, and the module that can absorb 1 / s, if any.

    `repeats` relates the producer's channels to the group's. Factors are then equal over the copies of a channel.
    """

    linears: tuple[str, ...]
    producer: str | None = None
    reason: str = ""
    repeats: Repeats = Repeats()

    def without_producer(self, reason: str) -> Group:
        return Group(self.linears, reason=reason)


@dataclass
class Trace:
    """What one forward pass showed. It keeps the tensors alive, so that no address is used twice."""

    inputs: dict[str, list[Tensor]]
    norm_outputs: dict[str, list[Tensor]]
    called: set[str]
    outputs: list[Tensor]


def same(a: Tensor, b: Tensor, *, by_channel: bool = False) -> bool:
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


def powers_of_two(size: int, like: Tensor, seed: int) -> Tensor:
    """[size] factors that multiply exactly: only 1 and 2, so that products stay far from float16's limits."""
    generator = torch.Generator().manual_seed(seed)
    return (2.0 ** torch.randint(0, 2, (size,), generator=generator)).to(like.device, like.dtype)


def block_of(name: str) -> str:
    """The name through its first number, such as `model.layers.3`; the empty string without a number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ""


def _out_features(module: nn.Module) -> int:
    return int(getattr(module, "out_features", getattr(module, "nf", 0)))


def _candidates(model: nn.Module, trace: Trace, group: Group, narrower: bool) -> list[str]:
    """Linears of the same repeated block that ran once, before the group; nearest first.

    They have K output features, or with `narrower` a part of K.
    """
    order = list(trace.inputs)
    first = min(order.index(n) for n in group.linears)
    k = trace.inputs[group.linears[0]][0].shape[-1]
    block = block_of(group.linears[0])

    def fits(n: int) -> bool:
        return n == k or (narrower and 0 < n < k and k % n == 0)

    return [
        name
        for name in reversed(order[:first])
        if block_of(name) == block
        and fits(_out_features(model.get_submodule(name)))
        and len(trace.inputs[name]) == 1
    ][:_CANDIDATES]


def find_linear_producers(
    model: nn.Module, batch: Batch, trace: Trace, groups: list[Group], *, narrower: bool
) -> list[Group]:
    """Looks for a linear producer for each group that has none."""
    # A block runs one trial at a time, because a scaled query changes the attention output that a trial of v compares.
    waiting: dict[str, list[tuple[int, int, str]]] = {}
    for i, group in enumerate(groups):
        if group.producer is None and not group.reason:
            for rank, name in enumerate(_candidates(model, trace, group, narrower)):
                waiting.setdefault(block_of(name), []).append((rank, i, name))
    for trials in waiting.values():
        trials.sort(reverse=True)
    found: dict[int, tuple[str, Repeats]] = {}
    while any(waiting.values()):
        now = {name: i for _, i, name in (trials.pop() for trials in waiting.values() if trials)}
        with Hooks(model) as hooks:
            for name, inputs in trace.inputs.items():
                # The recorded input ends the effect of a trial at the next linear.
                if len(inputs) == 1 and not any(name in groups[i].linears for i in now.values()):
                    hooks.on_input(name, functools.partial(_replay, inputs[0]))
            for producer, i in now.items():

                def on_match(repeats: Repeats, i: int = i, producer: str = producer) -> None:
                    found[i] = (producer, repeats)

                width = _out_features(model.get_submodule(producer))
                _add_trial(hooks, producer, width, groups[i], trace, on_match)
            run_changed(model, batch)
        waiting = {b: [t for t in trials if t[1] not in found] for b, trials in waiting.items()}
    taken: set[str] = set()
    result = []
    for i, group in enumerate(groups):
        match, repeats = found.get(i, (None, Repeats()))
        if match is not None and match not in taken:
            taken.add(match)
            group = replace(group, producer=match, repeats=repeats)
        elif group.producer is None and not group.reason:
            group = group.without_producer(Reason.NO_PRODUCER())
        result.append(group)
    return result


def _replay(original: Tensor, x: Tensor) -> Tensor:
    """The recorded input, or `x` if the trial has routed a different number of tokens to an expert."""
    return original if x.shape == original.shape else x


def _add_trial(
    hooks: Hooks,
    producer: str,
    width: int,
    group: Group,
    trace: Trace,
    on_match: Callable[[Repeats], None],
) -> None:
    original = trace.inputs[group.linears[0]][0]
    times = original.shape[-1] // width
    # Without copies, every span means the same.
    spans = [1] if times == 1 else [span for span in range(1, width + 1) if width % span == 0]
    ways = [Repeats(times, span) for span in spans]
    seed = len(producer)
    factors = powers_of_two(width, original, seed)
    while len({tuple(way.spread(factors).tolist()) for way in ways}) < len(ways):
        seed += 1  # with few channels, two ways may give the same factors
        factors = powers_of_two(width, original, seed)

    def compare(x: Tensor) -> Tensor:
        if bool(original.any()):
            for way in ways:
                if same(x, original * way.spread(factors), by_channel=True):
                    on_match(way)
        return _replay(original, x)

    hooks.on_output(producer, lambda y: y * factors)
    for name in group.linears:
        hooks.on_input(name, compare)
