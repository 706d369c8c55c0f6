"""Linears that read one value, as one GEMM: their weights lie in one tensor, of which each layer's own are views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.fusion.deferred import Deferred
from smoothquant_kernels.fusion.values import NormValue
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.nn.operands import ROW_ALIGNMENT, packed_rows, wants_aligned_rows

_STATE = ("w_q", "w_scale", "bias", "inv_smooth", "x_scale")


class LinearGroup:
    """One GEMM for one or several `W8A8Linear` that read one value with the same factors, scale, scheme and rotation.

    The state of the layers does not change. With several, `w_q`, `w_scale` and `bias` become views of the merged
    tensors, so that nothing is held twice and a checkpoint holds what it held before. If the layers' tensors were
    replaced since (moved to a GPU, for example), they are merged again.
    """

    def __init__(
        self, layers: Sequence[W8A8Linear], gated_indices: tuple[int, int] | None = None
    ) -> None:
        """`gated_indices`: which layers are gate and up, if the epilogue may multiply them (`ops.gemm_s8_gated`)."""
        self.layers = tuple(layers)
        self.gated_indices = gated_indices
        self.is_single = len(self.layers) == 1
        self._sizes = [layer.out_features for layer in layers]
        # The last float tensor that a layer has read, its version, and the outputs that are still to be taken.
        self._last: tuple[Tensor, int, list[Tensor | None]] | None = None
        self._merge()
        self._loaded = False
        # Untyped in torch.
        watch: Any = [m.register_load_state_dict_post_hook for m in self.layers]
        self._hooks = [] if self.is_single else [add(self._note_load) for add in watch]

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
        self._gated = self._interleaved() if self.gated_indices is not None else ()
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

    def _note_load(self, *_: Any) -> None:
        """Called after the state of a layer was loaded. Only when all layers have theirs can they be compared."""
        self._loaded = True

    def _check_loaded(self) -> None:
        self._loaded = False
        if not all(can_merge(self.layers[0], other) for other in self.layers[1:]):
            self._loaded = True  # until other state is loaded
            raise SmoothQuantError(
                "the loaded state has different smoothing factors or scales for layers that optimize_for_inference "
                "made one GEMM: call undo_optimization(model), load again, and optimize again."
            )
        self._merge()

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

    def _interleaved(self) -> tuple[Tensor | None, ...]:
        """w_q, w_scale and bias of gate and up in the order of `ops.gemm_s8_gated`."""
        assert self.gated_indices is not None
        bias = self._options.get("bias")
        with torch.no_grad(), torch.inference_mode(False):
            made = []
            for t in (*self._operands, bias):
                parts = None if t is None else t.split(self._sizes)
                gate_up = None if parts is None else [parts[i] for i in self.gated_indices]
                made.append(None if gate_up is None else reference.interleave_gate_up(*gate_up))
        w_q, w_scale, bias = made
        assert w_q is not None
        return packed_rows(w_q), w_scale, bias

    def _refresh(self) -> None:
        """Merges again if a tensor of a layer was replaced, or state was loaded."""
        if self._loaded:
            self._check_loaded()
        for buffers, name, seen in self._seen:
            if buffers[name] is not seen:
                self._merge()
                break

    def _quantized(self, x: Any) -> tuple[Tensor, Tensor]:
        """(x_q, x_scale) of what the layers read."""
        first = self.layers[0]
        if not isinstance(x, NormValue):
            x_q, x_scale, _ = first.quantize_input(x)
            return x_q, x_scale
        options = {k: v for k, v in self._options.items() if k != "bias"}
        if wants_aligned_rows(x.x):
            options["k_multiple"] = ROW_ALIGNMENT
        x_q, x_scale = x.quantized(**options)
        return (
            x_q if x_q.shape[-1] == first.in_features else x_q[..., : first.in_features]
        ), x_scale

    def relu_quantized(self, x: Any, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(y_q, y_scale): the ReLU of the output, quantized in the epilogue by a static scale."""
        self._refresh()
        w_q, w_scale = self._operands
        x_q, x_scale = self._quantized(_read(x))
        bias = self._options.get("bias")
        y_q = ops.gemm_s8_requant(x_q, w_q, x_scale, w_scale, scale, bias=bias, relu=True)
        # NaN for a token that has one, else the scale itself.
        return y_q, torch.add(scale, x_scale, alpha=0)

    def gated_quantized(
        self, x: Any, kind: str, scale: Tensor, inv_smooth: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(y_q, y_scale): act(gate) * up, smoothed and quantized in the epilogue by a static scale."""
        self._refresh()
        x = _read(x)
        x_q, x_scale = self._quantized(x)
        w_q, w_scale, bias = self._gated
        assert w_q is not None and w_scale is not None
        kind, options = f"{kind}_mul", {"bias": bias, "inv_smooth": inv_smooth, "dtype": x.dtype}
        return ops.gemm_s8_gated(x_q, w_q, x_scale, w_scale, scale, kind=kind, **options)

    def multiply(self, x: Any, residual: Tensor | None = None) -> Tensor:
        """[..., N] of all layers, for a tensor or a value that is not computed yet."""
        self._refresh()
        w_q, w_scale = self._operands
        options = self._options
        if residual is not None:
            options = {**options, "residual": residual}
        if type(x) is Tensor:
            return ops.linear_s8(x, w_q, w_scale, **options)
        y: Tensor = x.linear(w_q, w_scale, **options)
        return y

    def _outputs(self, x: Any) -> list[Tensor | None]:
        y = self.multiply(x)
        return [y] if self.is_single else [*torch.split_with_sizes(y, self._sizes, -1)]

    def of_norm(self, value: NormValue, index: int) -> Tensor:
        """The output of one layer for what a norm makes. The value keeps the others for their layers.

        Each is handed out once, because a caller may change it in place.
        """
        outputs = value.outputs.get(self)
        y = None if outputs is None else outputs[index]
        if outputs is None or y is None:
            outputs = value.outputs[self] = self._outputs(value)
            y = outputs[index]
            assert y is not None
        outputs[index] = None
        return y

    def of_tensor(self, x: Tensor, index: int) -> Tensor:
        """The output of one layer for a float tensor, handed out once. The layer that reads first computes all."""
        version = -1 if torch.compiler.is_compiling() or x.is_inference() else x._version
        last = self._last
        # Inference tensors have no version. So the first layer never takes outputs of an earlier call.
        if index == 0 or last is None or last[0] is not x or last[1] != version:
            last = None
        y = None if last is None else last[2][index]
        if last is None or y is None:
            last = self._last = (x, version, self._outputs(x))
            y = last[2][index]
            assert y is not None
        last[2][index] = None
        if all(t is None for t in last[2]):
            self._last = None
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


def _read(x: Any) -> Any:
    """What a GEMM can quantize: a tensor, or what a norm makes."""
    return x.tensor() if isinstance(x, Deferred) and not isinstance(x, NormValue) else x


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
