"""A decoder layer of transformers, unfused and fused, for host_time.py: its calls, and what torch launches in them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lib.blocks import GPU_SHAPES, Shape
from benchmarks.lib.stacks import random_llama
from smoothquant_kernels import quantize_model
from smoothquant_kernels.fusion.optimize import optimize_for_inference

#: "small": torch's own operations, which do run, take no time beside their dispatch. The others are only counted.
SHAPES = {"small": Shape("small", 256, 512, 4, 4, head_dim=64)}
SHAPES |= {shape.model: shape for shape in GPU_SHAPES if shape.gated and not shape.qkv_bias}
#: Operations that launch nothing on a GPU, beside views.
_FREE = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "_unsafe_view",
    "detach",
    "lift_fresh",
)


def make_layers(shape: Shape, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The only layer of a random LLaMA in W8A8: as `quantize_model` leaves it, and fused.

    The kernels must compute: what is fused is found by running the model.
    """
    torch.manual_seed(0)
    int8 = quantize_model(random_llama(shape, 1, dtype, torch.device("cpu"), 64))
    fused: Any = optimize_for_inference(copy.deepcopy(int8), torch.arange(8)[None])
    unfused: Any = int8
    return {"unfused": unfused.model.layers[0], "fused": fused.model.layers[0]}


def call_of(layer: nn.Module, shape: Shape, m: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A token of each of m sequences. Without a cache, whose update costs every layer the same."""
    x = torch.randn(m, 1, shape.hidden).to(dtype)
    angles = torch.ones(2, 1, 1, shape.head_dim, dtype=dtype).unbind()
    options = {"attention_mask": None, "position_embeddings": angles, "position_ids": None}
    return lambda: layer(x, **options)


class _Launches(TorchDispatchMode):
    """Counts torch's operations that are a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in _FREE:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def torch_launches(call: Callable[[], object]) -> dict[str, int]:
    """How many kernels a call launches that are torch's own, by operation."""
    with _Launches() as launches:
        call()
    return dict(launches.found)
