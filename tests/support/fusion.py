"""Quantized models of every family, the calls of an optimized model, and the table of what is fused where.

`python -m tests.support.fusion --write` rewrites tests/fusion/data/families.txt.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    W8A8Linear,
    ops,
    quantize_model,
    smooth_and_quantize,
)
from smoothquant_kernels.fusion import merged, values
from smoothquant_kernels.fusion.optimize import optimize_for_inference
from smoothquant_kernels.fusion.record import fusion_info
from smoothquant_kernels.modeling.run import evaluating, output_tensors
from tests.support.families import FAMILIES, Batch
from tests.support.family_table import role

TABLE = Path(__file__).resolve().parents[1] / "fusion" / "data" / "families.txt"

#: How a model was prepared: neither smoothed nor rotated; smoothed; smoothed (partly at run time) and rotated.
TREATMENTS = ("naive", "smoothed", "rotated")
SCHEMES = ("per_token", "per_tensor", "static")


def quantized(family: str, treatment: str = "naive", scheme: str = "per_token") -> nn.Module:
    """A quantized random model of a family."""
    model = FAMILIES[family].make()
    config = SmoothQuantConfig(
        activation_scheme=scheme,
        rotation=8 if treatment == "rotated" else "none",
        smooth=treatment != "naive",
        only_where_better=False,
    )
    if scheme != "static" and treatment == "naive":
        return quantize_model(model, config=config)
    data = [FAMILIES[family].inputs(seed) for seed in (3, 4)]
    return smooth_and_quantize(model, data, config, progress=False)


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """All float tensors that a model returns when users call it: with a cache, if it has one."""
    with evaluating(model):
        return [t.clone() for t in output_tensors(model(**batch))]


@dataclass
class Call:
    """A call of `ops.linear_s8` or `ops.fused_linear_s8` by an optimized model, and its result."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    y: Tensor


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Every call of the two ops by fused modules in the block."""
    calls: list[Call] = []

    def recording(name: str) -> Any:
        original = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            y: Tensor = original(*args, **kwargs)
            calls.append(Call(name, args, kwargs, y.clone()))
            return y

        return call

    stand_in = mock.Mock(wraps=ops)
    stand_in.linear_s8 = recording("linear_s8")
    stand_in.fused_linear_s8 = recording("fused_linear_s8")
    with mock.patch.object(values, "ops", stand_in), mock.patch.object(merged, "ops", stand_in):
        yield calls


def layers_of(model: nn.Module) -> dict[str, W8A8Linear]:
    """The quantized layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, W8A8Linear)}


@functools.cache
def optimized(family: str) -> nn.Module:
    """An optimized model of a family, not to be changed."""
    return optimize_for_inference(quantized(family), FAMILIES[family].inputs(1))


def rows(family: str) -> list[str]:
    """What is fused in a family, layers taken together: `q + k + v: rms_norm of input_layernorm, ...`."""
    found: dict[str, None] = {}
    for layer in fusion_info(optimized(family)):
        names = " + ".join(".".join(role(n).split(".")[-2:]) for n in layer.merged or (layer.name,))
        what = f"{layer.kind} of {role(layer.producer)}" if layer.producer else "quantize"
        more = ", in int8" if layer.int8 else ""
        more += ", adds the residual" if layer.residual else ""
        more += f" ({' '.join(map(role, layer.reason.split(' ')))})" if layer.reason else ""
        found[f"  {names}: {what}{more}"] = None
    return sorted(found)


def table() -> str:
    """What is fused in every family."""
    return "".join(
        f"{family}\n" + "".join(f"{row}\n" for row in rows(family)) for family in FAMILIES
    )


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same state, bit for bit."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        TABLE.write_text(table(), encoding="utf-8")
    else:
        print(table())
