"""Linears that read one value, as one GEMM: their weights lie in one tensor, of which each layer's own are views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels import ops
from smoothquant_kernels.fusion.values import NormValue
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.nn.operands import packed_rows


class MergedLinears:
    """One GEMM for several `W8A8Linear` that read one value with the same factors, scale, scheme and rotation.

    The state of each layer does not change: `w_q`, `w_scale` and `bias` become views of the merged tensors, so that
    nothing is held twice and a checkpoint holds what it held before. If the layers' weights were replaced since (moved
    to a GPU, for example), they are merged again.
    """

    def __init__(self, layers: Sequence[W8A8Linear]) -> None:
        self.layers = tuple(layers)
        self.sizes = [layer.out_features for layer in layers]
        #: The last float tensor that a member has read, and the outputs that other members have not taken yet.
        self._last: tuple[Tensor, int, tuple[Tensor, ...], set[int]] | None = None
        self._merge()

    def _merge(self) -> None:
        own = [layer._buffers for layer in self.layers]
        with torch.no_grad(), torch.inference_mode(False):
            self.w_q = packed_rows(torch.cat([_whole(b["w_q"]) for b in own]))
            self.w_scale = torch.cat([_whole(b["w_scale"]) for b in own])
            biases = [b["bias"] for b in own]
            self.bias = None
            if any(b is not None for b in biases):
                zeros = [self.w_scale.new_zeros(n) for n in self.sizes]
                self.bias = torch.cat(
                    [z if b is None else _whole(b) for z, b in zip(zeros, biases, strict=True)]
                )
            if self.w_q.is_cuda:
                # CUDA graphs of torch.compile would else copy the weight before every replay.
                for t in (self.w_q, self.w_scale, self.bias):
                    if t is not None:
                        torch._dynamo.mark_static_address(t, guard=False)
        start = 0
        for layer, n in zip(self.layers, self.sizes, strict=True):
            end = start + n
            layer._buffers["w_q"] = self.w_q[start:end]
            layer._buffers["w_scale"] = self.w_scale[start:end]
            if layer._buffers["bias"] is not None:
                assert self.bias is not None
                layer._buffers["bias"] = self.bias[start:end]
            start = end
        self._seen = tuple(layer._buffers["w_q"] for layer in self.layers)

    def separate(self) -> None:
        """Gives each layer tensors of its own again."""
        for layer in self.layers:
            own = layer._buffers
            with torch.no_grad(), torch.inference_mode(False):
                for name in ("w_q", "w_scale", "bias"):
                    value = own[name]
                    if value is not None:
                        own[name] = packed_rows(value.clone()) if name == "w_q" else value.clone()

    def _run(self, x: Any, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        for layer, seen in zip(self.layers, self._seen, strict=True):
            if layer._buffers["w_q"] is not seen:
                self._merge()
                break
        first = self.layers[0]
        own: dict[str, Any] = first._buffers
        rest = {
            "bias": self.bias,
            "inv_smooth": own["inv_smooth"],
            "scale": own["x_scale"],
            "granularity": first._granularity,
            "rotation": first.rotation,
        }
        if type(x) is Tensor:
            y = ops.linear_s8(x, self.w_q, self.w_scale, **rest)
        else:
            y = x.linear(self.w_q, self.w_scale, **rest)
        return y.split(self.sizes, dim=-1)

    def of_norm(self, value: NormValue, index: int) -> Tensor:
        """The output of one member for what a norm makes. The first reader computes those of all."""
        outputs = value.outputs.get(self)
        if outputs is None:
            outputs = value.outputs[self] = self._run(value)
        return outputs[index]

    def of_tensor(self, x: Tensor, index: int) -> Tensor:
        """The output of one member for a float tensor. The outputs are dropped once every member has read x."""
        version = -1 if torch.compiler.is_compiling() or x.is_inference() else x._version
        last = self._last
        if last is None or last[0] is not x or last[1] != version or index not in last[3]:
            last = self._last = (x, version, self._run(x), set(range(len(self.layers))))
        last[3].discard(index)
        if not last[3]:
            self._last = None
        return last[2][index]


def _whole(t: Tensor | None) -> Tensor:
    assert t is not None
    return t


def can_merge(a: W8A8Linear, b: W8A8Linear) -> bool:
    """Whether two layers quantize the same input to the same int8 values, and their scales can lie in one tensor."""
    same = (
        a.in_features == b.in_features
        and a.activation_scheme == b.activation_scheme
        and a.rotation == b.rotation
        and a.weight_granularity == b.weight_granularity == "channel"
        and a.w_q.device == b.w_q.device
    )
    return same and all(
        _equal(a._buffers[name], b._buffers[name]) for name in ("inv_smooth", "x_scale")
    )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)
