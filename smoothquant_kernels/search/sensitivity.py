"""How much an error in a layer's output costs at the model's output, measured by gradients.

To second order, an error d in the output of a layer raises the KL divergence of the model's predictions from the
original's by half of d' F d, F being the Fisher information of that output: the mean of g g' over labels that the model
itself predicts, g the gradient of a label's log-likelihood. Rounding errors of different elements are nearly
independent, so the diagonal of F says nearly all: the cost is half the sum of g^2 d^2. On SmolLM2-135M the costs of all
layers, each measured alone, add up to within some ten per cent of the KL divergence of the whole quantized model
(docs/search.md).
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
from smoothquant_kernels.smoothing.padding import OUTPUT, Padding


@dataclass
class Recording:
    """What one layer reads and how sensitive the model is to what it writes; padding left out.

    Attributes:
        x: name of a group's first linear -> [M, K] its input.
        gradient: name of a linear -> [M, N] the gradient of the sampled labels' log-likelihood by its output.
        rows: name of a group's first linear -> how many of the rows of x each call had.
        predictions: how many labels were sampled.
    """

    x: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    predictions: int = 0

    def forget(self, group: Group) -> None:
        """Frees what is kept for a group."""
        self.x.pop(group.linears[0], None)
        for name in group.linears:
            self.gradient.pop(name, None)

    def cost(self, name: str, error: Tensor) -> float:
        """Nats per prediction that an error [M, N] in a linear's output costs at the model's output."""
        g = self.gradient[name].float()
        # float64 for the sum only: some squares are 1e6 times as large as others
        return (
            0.5
            * float((error.detach().float() * g).square().sum(dtype=torch.float64))
            / self.predictions
        )


def _predictions(output: Any, padding: Padding | None) -> Tensor:
    """[M, last dimension] float32: what stands for the output, without what is predicted at padding."""
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
    """The log-likelihood of outcomes drawn from the model's own predictions, up to a constant; and their number.

    Logits predict a label each. Any other output (embeddings, hidden states) is taken for the mean of a normal
    distribution whose width is the output's root mean square, so that the cost of an error is half of its square
    relative to the output's.
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
    """What `likelihood` makes of two outputs: KL(expected || output) of each row [M], float64 on the CPU.

    `padding` has been told of the batch (`Padding.start`); None compares all rows.
    """
    a, b = _predictions(expected, padding), _predictions(output, padding)
    if getattr(expected, "logits", None) is not None:
        log_a, log_b = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
        return (log_a.exp() * (log_a - log_b)).sum(-1).double().cpu()
    return 0.5 * (((a - b).square().sum(-1)) / a.square().sum(-1).mean()).double().cpu()


def record(
    model: nn.Module, groups: Sequence[Group], batches: Iterable[Batch], *, seed: int = 0
) -> Recording:
    """Runs the batches forwards and backwards and keeps inputs and gradients of these groups' linears.

    The result takes rows * (K of each group + N of each linear) elements of the model's type; beside it, one batch's
    backward pass is alive.
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
        return y.clone()  # what follows may work in place

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
            if not outputs:  # experts that this batch did not reach
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


def _joined(parts: list[Tensor]) -> Tensor:
    """One tensor of all; each part is freed as soon as it is copied, so that not all are there twice."""
    whole = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[-1])
    at = 0
    while parts:
        part = parts.pop(0)
        whole[at : at + len(part)] = part
        at += len(part)
    return whole


def count_rows(model: nn.Module, names: Iterable[str], batches: Iterable[Batch]) -> dict[str, int]:
    """How many rows each linear reads, padding included; those that are not called are absent."""
    rows: dict[str, int] = {}

    def count(name: str, y: Tensor) -> None:
        rows[name] = rows.get(name, 0) + y.numel() // y.shape[-1]

    with Hooks(model) as hooks, evaluating(model):
        for name in names:
            hooks.on_output(name, partial(count, name))
        for batch in batches:
            run(model, batch, logits=False)
    return rows
