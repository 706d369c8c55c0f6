"""How much an error in a layer's output costs at the model's output, measured by gradients.

To second order, an error d in a layer's output raises the KL divergence of the model's predictions from the original's
by half of d' F d. F is the Fisher information of that output: the mean of g g' over labels that the model itself
predicts, where g is the gradient of a label's log-likelihood. Rounding errors of different elements are nearly
independent, so the diagonal of F nearly suffices, and the cost is half the sum of g^2 d^2. On SmolLM2-135M, the costs
of all layers, each measured alone, add up to within about ten percent of the KL divergence of the whole quantized model
(docs/guides/search.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.run import Batch, evaluating, output_tensor, run, unpadded_rows
from smoothquant_kernels.nn.float_linear import weight_of
from smoothquant_kernels.smoothing.factors import runs_within
from smoothquant_kernels.smoothing.padding import OUTPUT, Padding


@dataclass
class Recording:
    """The inputs of layers, and how sensitive the model is to their outputs; without padding.

    Attributes:
        x: name of a group's first linear -> [M, K] its input.
        gradient: name of a linear -> [M, N] the gradient of the sampled labels' log-likelihood by its output.
        rows: name of a group's first linear -> the number of rows of x from each call.
        predictions: the number of sampled labels.
    """

    x: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    predictions: int = 0

    def forget(self, group: Group) -> None:
        """Frees the recorded input and gradients of a group."""
        self.x.pop(group.linears[0], None)
        for name in group.linears:
            self.gradient.pop(name, None)

    def cost(self, name: str, error: Tensor) -> float:
        """The cost of an error [M, N] in a linear's output at the model's output, in nats per prediction."""
        g = self.gradient[name].float()
        # Only the sum needs float64, because some squares are 1e6 times as large as others.
        return (
            0.5
            * float((error.detach().float() * g).square().sum(dtype=torch.float64))
            / self.predictions
        )


def _predictions(output: Any, padding: Padding | None) -> Tensor:
    """The output's main tensor as [M, last dimension] float32, without predictions at padding."""
    values = output_tensor(output).float()
    return unpadded_rows(values, None if padding is None else padding.keep(OUTPUT, values))


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def likelihood(
    output: Any, padding: Padding | None, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Returns the log-likelihood, up to a constant, of outcomes drawn from the model's predictions, and their number.

    Each row of logits predicts a label. Any other output (embeddings, hidden states) counts as the mean of a normal
    distribution whose width is the output's root mean square. So an error costs half of its square over the output's
    square.
    """
    values = _predictions(output, padding)
    if getattr(output, "logits", None) is not None:
        log_p = torch.log_softmax(values, -1)
        p = log_p.detach().exp().cpu()
        labels = torch.multinomial(p, 1, generator=generator).to(log_p.device)
        return log_p.gather(-1, labels).sum(), len(labels)
    noise = torch.randn(values.shape, generator=generator).to(values.device)
    width = values.detach().square().mean().sqrt().clamp_min(1e-30) * values.shape[-1] ** 0.5
    return (values * noise).sum() / width, len(values)


def divergence(expected: Any, output: Any, padding: Padding | None = None) -> Tensor:
    """KL(expected || output) of each row under the distributions of `likelihood`, [M] float64 on the CPU.

    `Padding.start` must have seen the batch. Without `padding`, all rows are compared.
    """
    a, b = _predictions(expected, padding), _predictions(output, padding)
    if getattr(expected, "logits", None) is not None:
        log_a, log_b = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
        return (log_a.exp() * (log_a - log_b)).sum(-1).double().cpu()
    return 0.5 * (((a - b).square().sum(-1)) / a.square().sum(-1).mean()).double().cpu()


def record(
    model: nn.Module, groups: Sequence[Group], batches: Iterable[Batch], *, seed: int = 0
) -> Recording:
    """Runs the batches forward and backward and records the inputs and gradients of these groups' linears.

    Memory: the result takes rows * (K of each group + N of each linear) elements of the model's type. One batch's
    backward pass is also alive.
    """
    xs: dict[str, list[Tensor]] = defaultdict(list)
    gradients: dict[str, list[Tensor]] = defaultdict(list)
    outputs: list[tuple[str, Tensor]] = []
    predictions = 0
    names = [name for group in groups for name in group.linears]
    padding = Padding(model, {name: model.get_submodule(name) for name in names})

    def keep_input(name: str, x: Tensor) -> None:
        xs[name].append(unpadded_rows(x.detach(), padding.keep(name, x)).clone())

    def keep_output(name: str, y: Tensor) -> Tensor:
        y = y if y.requires_grad else y.detach().requires_grad_()
        outputs.append((name, y))
        return y.clone()  # later operations may work in place

    with evaluating(model), torch.enable_grad(), _without_parameter_gradients(model):
        for index, batch in enumerate(batches):
            padding.start(batch, lambda b: run(model, b))
            generator = torch.Generator().manual_seed(seed + index)
            with Hooks(model) as hooks:
                for group in groups:
                    hooks.on_input(group.linears[0], partial(keep_input, group.linears[0]))
                    for name in group.linears:
                        hooks.on_output(name, partial(keep_output, name))
                loss, count = likelihood(run(model, batch), padding, generator)
            predictions += count
            if not outputs:  # this batch reached none of these experts
                continue
            found = torch.autograd.grad(loss, [y for _, y in outputs], allow_unused=True)
            for (name, y), g in zip(outputs, found, strict=True):
                g = torch.zeros_like(y) if g is None else g
                gradients[name].append(unpadded_rows(g.detach(), padding.keep(name, g)))
            outputs.clear()
    rows = {n: [len(part) for part in v] for n, v in xs.items()}
    return Recording(
        {n: _joined(v) for n, v in xs.items()},
        {n: _joined(v) for n, v in gradients.items()},
        rows,
        predictions,
    )


def recordings(
    model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch], max_bytes: int
) -> Iterator[tuple[list[Group], Recording]]:
    """Yields a part of the groups with its recording, as many times as `max_bytes` requires.

    Groups that the batches do not reach are left out. The limit excludes one batch's backward pass.
    """
    rows = count_rows(model, [g.linears[0] for g in groups], batches)

    def recorded_bytes(group: Group) -> int:
        weights = [weight_of(model.get_submodule(n)) for n in group.linears]
        elements = weights[0].shape[1] + sum(w.shape[0] for w in weights)
        return rows[group.linears[0]] * elements * weights[0].element_size()

    called = [g for g in groups if rows.get(g.linears[0])]
    for part in runs_within(called, recorded_bytes, max_bytes):
        yield part, record(model, part, batches)


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenates the parts and frees each one once it is copied, so two complete copies never exist at once."""
    whole = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[-1])
    at = 0
    while parts:
        part = parts.pop(0)
        whole[at : at + len(part)] = part
        at += len(part)
    return whole


def count_rows(model: nn.Module, names: Iterable[str], batches: Iterable[Batch]) -> dict[str, int]:
    """Returns the number of rows that each linear reads, padding included. Linears that are never called are absent."""
    rows: dict[str, int] = {}

    def count(name: str, y: Tensor) -> None:
        rows[name] = rows.get(name, 0) + y.numel() // y.shape[-1]

    with Hooks(model) as hooks, evaluating(model):
        for name in names:
            hooks.on_output(name, partial(count, name))
        for batch in batches:
            run(model, batch, logits=False)
    return rows
