"""Linears that read one value, as one GEMM: their weights lie in one tensor, of which each layer's own are views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels import ops
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.fusion.values import NormValue
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.nn.operands import packed_rows

_STATE = ("w_q", "w_scale", "bias", "inv_smooth", "x_scale")


class LinearGroup:
    """One GEMM for one or several `W8A8Linear` that read one value with the same factors, scale, scheme and rotation.

    The state of the layers does not change. With several, `w_q`, `w_scale` and `bias` become views of the merged
    tensors, so that nothing is held twice and a checkpoint holds what it held before. If the layers' tensors were
    replaced since (moved to a GPU, for example), they are merged again.
    """

    def __init__(self, layers: Sequence[W8A8Linear]) -> None:
        self.layers = tuple(layers)
        self.is_single = len(self.layers) == 1
        self._sizes = [layer.out_features for layer in layers]
        # The last float tensor that a layer has read, its version, all outputs, and which of them are still to be taken.
        self._last: tuple[Tensor, int, tuple[Tensor, ...], set[int]] | None = None
        self._merge()
        self._loaded: set[int] = set()
        # Untyped in torch.
        watch: Any = [m.register_load_state_dict_post_hook for m in self.layers]
        self._hooks = [] if self.is_single else [add(self._check_loaded) for add in watch]

    def _merge(self) -> None:
        own = [layer._buffers for layer in self.layers]
        w_q, w_scale, bias = self._merged(own)
        start = 0
        for buffers, n in zip(own, self._sizes, strict=True):
            if self.is_single:
                break
            end = start + n
            buffers["w_q"], buffers["w_scale"] = w_q[start:end], w_scale[start:end]
            if buffers["bias"] is not None:
                assert bias is not None
                buffers["bias"] = bias[start:end]
            start = end
        first = self.layers[0]
        options: dict[str, Any] = {
            "bias": bias,
            "inv_smooth": own[0]["inv_smooth"],
            "scale": own[0]["x_scale"],
            "granularity": first._granularity,
            "rotation": first.rotation,
        }
        defaults = (None, "token", 0)
        self._operands = (w_q, w_scale)
        self._options = {k: v for k, v in options.items() if not any(v is d for d in defaults)}
        self._seen = tuple((b, name, b[name]) for b in own for name in _STATE)

    def _merged(self, own: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor, Tensor | None]:
        """w_q [N, K], w_scale [N] and bias [N] of all layers."""
        if self.is_single:
            return own[0]["w_q"], own[0]["w_scale"], own[0]["bias"]
        with torch.no_grad(), torch.inference_mode(False):
            w_q = packed_rows(torch.cat([b["w_q"] for b in own]))
            w_scale = torch.cat([b["w_scale"] for b in own])
            bias = None
            if any(b["bias"] is not None for b in own):
                # A layer without a bias adds +0. It changes no value but the sign of a zero.
                parts = [(b["bias"], n) for b, n in zip(own, self._sizes, strict=True)]
                bias = torch.cat([w_scale.new_zeros(n) if b is None else b for b, n in parts])
            for t in (w_q, w_scale, bias):
                if t is not None and t.is_cuda:
                    # Else the CUDA graphs of torch.compile would copy it before every replay.
                    torch._dynamo.mark_static_address(t, guard=False)
        return w_q, w_scale, bias

    def _check_loaded(self, layer: Any, _: Any) -> None:
        """Called after the state of a layer was loaded. Only when all layers have theirs can they be compared."""
        self._loaded.add(self.layers.index(layer))
        if len(self._loaded) < len(self.layers):
            return
        self._loaded.clear()
        if not all(can_merge(self.layers[0], other) for other in self.layers[1:]):
            raise SmoothQuantError(
                "the loaded state has different smoothing factors or scales for layers that optimize_for_inference "
                "made one GEMM: call undo_optimization(model), load again, and optimize again."
            )

    def separate(self) -> None:
        """Gives each layer tensors of its own again."""
        for hook in self._hooks:
            hook.remove()
        for buffers in () if self.is_single else (layer._buffers for layer in self.layers):
            with torch.no_grad(), torch.inference_mode(False):
                for name in ("w_q", "w_scale", "bias"):
                    value = buffers[name]
                    if value is not None:
                        buffers[name] = (
                            packed_rows(value.clone()) if name == "w_q" else value.clone()
                        )

    def multiply(self, x: Any, residual: Tensor | None = None) -> Tensor:
        """[..., N] of all layers, for a tensor or a value that is not computed yet."""
        for buffers, name, seen in self._seen:
            if buffers[name] is not seen:
                self._merge()
                break
        w_q, w_scale = self._operands
        options = self._options
        if residual is not None:
            options = {**options, "residual": residual}
        if type(x) is Tensor:
            return ops.linear_s8(x, w_q, w_scale, **options)
        y: Tensor = x.linear(w_q, w_scale, **options)
        return y

    def _outputs(self, x: Any) -> tuple[Tensor, ...]:
        y = self.multiply(x)
        return (y,) if self.is_single else torch.split_with_sizes(y, self._sizes, -1)

    def of_norm(self, value: NormValue) -> tuple[Tensor, ...]:
        """The outputs of all layers for what a norm makes, which the value keeps for the other layers."""
        outputs = value.outputs[self] = self._outputs(value)
        return outputs

    def of_tensor(self, x: Tensor, index: int) -> Tensor:
        """The output of one layer for a float tensor. The outputs are dropped once every layer has read x."""
        version = -1 if torch.compiler.is_compiling() or x.is_inference() else x._version
        last = self._last
        if last is None or last[0] is not x or last[1] != version or index not in last[3]:
            last = self._last = (x, version, self._outputs(x), set(range(len(self.layers))))
        last[3].discard(index)
        if not last[3]:
            self._last = None
        return last[2][index]


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
