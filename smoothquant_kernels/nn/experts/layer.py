"""`W8A8Experts`: the experts of a mixture with int8 weights and int8 activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smoothquant_kernels import ops, reference
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.experts.gates import Gate
from smoothquant_kernels.nn.experts.inputs import Input
from smoothquant_kernels.nn.experts.represented import represented
from smoothquant_kernels.nn.experts.source import FloatExperts, choices_of
from smoothquant_kernels.nn.float_types import check_float_type, float_type, keep_types
from smoothquant_kernels.nn.lazy_weight import dequantized_weight
from smoothquant_kernels.nn.operands import (
    ROW_ALIGNMENT,
    check_rotation,
    inverse_factors,
    packed_rows,
    wants_aligned_rows,
)
from smoothquant_kernels.nn.rounding import int8_weight
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES

if TYPE_CHECKING:
    from typing_extensions import Self

#: The entry of the state dict that keeps the float type. Its value has no meaning.
MARKER = "float_type"


class W8A8Experts(nn.Module):
    """Experts on int8: both products of all experts are one `ops.grouped_gemm_s8` each, which no call waits for.

    It replaces a module of transformers' experts and takes the same arguments. Rows are sorted by expert, which the
    device does alone; each token is quantized once for all of its experts.

    Args:
        num_experts, hidden, inner: E, the channels of the input and of the output, and those between the two products.
        gate: the activation between the products. A gated one has 2 * inner channels in the first product.
        bias: whether both products add a bias.
        routed: as in `FloatExperts`.
        schemes, rotations: of the first and of the second product (`Input`).
        smooth: whether the inputs of the first product and of the second are divided by factors at run time.
        device, dtype: as in `W8A8Linear`.

    Buffers: for each of the products `up` (N = inner, or 2 * inner with the rows of gate first; K = hidden) and `down`
    (N = hidden, K = inner): `*_q` [E, N, K] int8, `*_scale` [E, N], `*_bias` [E, N] or None, `*_x_scale` [1] or None
    (static); `up_inv_smooth` [hidden] or None and `down_inv_smooth` [E, inner] or None. All but `*_q` are float32.

    Equivalent to:
        for token t, choices c: y[t] = sum(top_k_weights[t, c] * down(gate(up(x[t]))) of expert top_k_index[t, c])
        with W8A8Linear for up and down of each expert

    Source: SmoothQuant (Xiao et al., 2022), section 4; MegaBlocks (Gale et al., 2022), section 3.
    """

    up_q: Tensor
    down_q: Tensor
    up_scale: Tensor
    down_scale: Tensor

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        inner: int,
        gate: Gate,
        *,
        bias: bool = False,
        routed: bool = True,
        schemes: tuple[str, str] = ("per_token", "per_token"),
        rotations: tuple[int, int] = (0, 0),
        smooth: tuple[bool, bool] = (False, False),
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_float_type(dtype, "dtype")
        for scheme in schemes:
            if scheme not in ACTIVATION_SCHEMES:
                raise SmoothQuantError(
                    f"a scheme must be one of {', '.join(ACTIVATION_SCHEMES)}; got {scheme!r}."
                )
        if not 1 <= num_experts <= reference.MAX_EXPERTS or not all(
            1 <= k <= reference.MAX_K for k in (hidden, inner)
        ):
            raise SmoothQuantError(
                f"num_experts must be in [1, {reference.MAX_EXPERTS}], and hidden and inner in "
                f"[1, {reference.MAX_K}]; got {num_experts}, {hidden} and {inner}."
            )
        check_rotation(rotations[0], hidden)
        check_rotation(rotations[1], inner)
        self.num_experts, self.hidden, self.inner = num_experts, hidden, inner
        self.gate, self.routed, self.dtype = gate, routed, dtype
        self.schemes, self.rotations = tuple(schemes), tuple(rotations)
        n = 2 * inner if gate.is_gated else inner
        for name, rows, k in (("up", n, hidden), ("down", hidden, inner)):
            weight = torch.zeros(num_experts * rows, k, dtype=torch.int8, device=device)
            self.register_buffer(f"{name}_q", packed_rows(weight).unflatten(0, (num_experts, rows)))
            self.register_buffer(f"{name}_scale", _zeros(device, num_experts, rows))
            self.register_buffer(
                f"{name}_bias", _zeros(device, num_experts, rows) if bias else None
            )
        for name, scheme in zip(("up", "down"), schemes, strict=True):
            value = _zeros(device, 1) if scheme == "static" else None
            self.register_buffer(f"{name}_x_scale", value)
        shapes = ((hidden,), (num_experts, inner))
        for name, asked, shape in zip(("up", "down"), smooth, shapes, strict=True):
            self.register_buffer(f"{name}_inv_smooth", _zeros(device, *shape) if asked else None)

    @classmethod
    def from_experts(
        cls, experts: FloatExperts, first: Input, second: Input, granularity: str = "channel"
    ) -> W8A8Experts:
        """Quantizes float experts, which stay unchanged.

        Factors [E, inner] of the second product go into the first product's rows where the activation is proportional
        to them; elsewhere its input is divided by them at run time.

        Args:
            experts: what `read_experts` returned.
            first, second: how the inputs of the two products are quantized.
            granularity: ``"channel"`` or ``"tensor"``, which gives all channels of an expert one scale.

        Raises:
            SmoothQuantError: a weight has NaN or Inf values, or a factor is not positive and finite.
        """
        if (name := experts.finite_problem()) is not None:
            raise SmoothQuantError(
                f"{name} has NaN or Inf values; repair or reload the checkpoint."
            )
        weight = experts.first
        folds = second.smooth is not None and experts.gate.is_linear
        new = cls(
            experts.count,
            experts.hidden,
            experts.inner,
            experts.gate,
            bias=experts.has_bias,
            routed=experts.routed,
            schemes=(first.scheme, second.scheme),
            rotations=(first.rotation, second.rotation),
            smooth=(first.smooth is not None, second.smooth is not None and not folds),
            device=weight.device,
            dtype=weight.dtype,
        )
        up_smooth = _checked(first.smooth, weight.device)
        down_smooth = _checked(second.smooth, weight.device)
        for e in range(experts.count):
            up, up_bias, own = experts.up(e), experts.up_bias(e), None
            if down_smooth is not None:
                own = down_smooth[e]
            if folds and own is not None:
                # The rows of up, which come last, carry 1 / s; int8 values stay as they are, their scales move.
                factor = torch.cat([torch.ones_like(own), 1.0 / own])
                up = up.float() * factor[:, None]
                up_bias = None if up_bias is None else up_bias.float() * factor
            for name, w, b, smooth, rotation in (
                ("up", up, up_bias, up_smooth, first.rotation),
                ("down", experts.down(e), experts.down_bias(e), own, second.rotation),
            ):
                w_q, w_scale = int8_weight(w, smooth, rotation, granularity)
                getattr(new, f"{name}_q")[e] = w_q
                getattr(new, f"{name}_scale")[e] = w_scale
                if b is not None:
                    getattr(new, f"{name}_bias")[e] = b.float()
        if up_smooth is not None:
            new.up_inv_smooth = 1.0 / up_smooth
        if down_smooth is not None and not folds:
            new.down_inv_smooth = 1.0 / down_smooth
        for name, given in (("up", first), ("down", second)):
            if (given.x_scale is not None) != (given.scheme == "static"):
                raise SmoothQuantError(
                    "x_scale must be given for the static scheme, and only for it; calibrate the experts first."
                )
            if given.x_scale is not None:
                getattr(new, f"{name}_x_scale").fill_(given.x_scale)
        return new.train(experts.module.training)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        **others: Tensor,
    ) -> Tensor:
        """The arguments of the float module.

        Args:
            hidden_states: [..., hidden] float16, bfloat16 or float32. Without routing: rows sorted by expert, as many
                for each.
            top_k_index: [T, choices] integers; `router_indices` where the float module calls it so.
            top_k_weights: [T, choices] float; `routing_weights` likewise.

        Returns:
            The shape and type of hidden_states.
        """
        index = others.get("router_indices") if top_k_index is None else top_k_index
        weights = others.get("routing_weights") if top_k_weights is None else top_k_weights
        x = hidden_states
        if x.requires_grad and torch.is_grad_enabled():
            # Straight through: the values of int8, the gradient of the weights that they represent.
            in_float = represented(self, x, index, weights)
            with torch.no_grad():
                step: Tensor = self(x.detach(), index, weights) - in_float
            return in_float + step
        rows = x.reshape(-1, self.hidden)
        x_q, x_scale = self._quantized(rows)
        if not self.routed:
            each = torch.arange(self.num_experts + 1, device=x.device, dtype=torch.int32)
            offsets = each * (len(rows) // self.num_experts)
            return self._products(x_q, x_scale, offsets, None, x.dtype).reshape(x.shape)
        assert index is not None and weights is not None
        index, weights = choices_of(index), choices_of(weights)
        order, position, offsets = reference.sort_by_expert(index, self.num_experts)
        taken = order // index.shape[1]
        if self.schemes[0] != "per_tensor":
            x_scale = x_scale[taken]
        y = self._products(x_q, x_scale, offsets, taken, x.dtype)
        if weights.dtype not in ops.checks.FLOATS:
            weights = weights.float()
        return ops.combine_experts(y, position, weights).reshape(x.shape)

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the first product."""
        inverse = self._buffers["up_inv_smooth"]
        x_q, x_scale = ops.quantize(x, inv_smooth=inverse, **self._quantizer(x, 0))
        return x_q[..., : x.shape[-1]], x_scale

    def _quantizer(self, x: Tensor, product: int) -> dict[str, Any]:
        name = ("up", "down")[product]
        return {
            "scale": self._buffers[f"{name}_x_scale"],
            "granularity": "tensor" if self.schemes[product] == "per_tensor" else "token",
            "k_multiple": ROW_ALIGNMENT if wants_aligned_rows(x) else 1,
            "rotation": self.rotations[product],
        }

    def _products(
        self,
        x_q: Tensor,
        x_scale: Tensor,
        offsets: Tensor,
        rows: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """[S, hidden]: both products for rows that are sorted by expert, or taken in that order."""
        own: dict[str, Any] = self._buffers
        y = ops.grouped_gemm_s8(
            x_q,
            own["up_q"],
            x_scale,
            own["up_scale"],
            offsets,
            rows=rows,
            bias=own["up_bias"],
            out_dtype=dtype,
        )
        inverse = own["down_inv_smooth"]
        if inverse is None:
            v_q, v_scale = self.gate.quantized(y, **self._quantizer(y, 1))
        else:
            v = self.gate(y).float() * inverse[expert_of_rows(offsets, len(y))]
            v_q, v_scale = ops.quantize(v, **self._quantizer(y, 1))
        return ops.grouped_gemm_s8(
            v_q[..., : self.inner],
            own["down_q"],
            v_scale,
            own["down_scale"],
            offsets,
            bias=own["down_bias"],
            out_dtype=dtype,
        )

    def dequantized(self, name: str, e: int) -> Tensor:
        """[N, K] float32: the weight ``"up"`` or ``"down"`` that expert e represents, without rotation and factors."""
        inverse = self._buffers[f"{name}_inv_smooth"]
        if inverse is not None and inverse.dim() == 2:
            inverse = inverse[e]
        w_q, w_scale = self._buffers[f"{name}_q"], self._buffers[f"{name}_scale"]
        assert w_q is not None and w_scale is not None
        rotation = self.rotations[0 if name == "up" else 1]
        return dequantized_weight(w_q[e], w_scale[e], inverse, rotation)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the buffers like any module, but never rounds the float32 ones to another type."""
        self.dtype = float_type(fn(self.up_scale.new_empty(0, dtype=self.dtype)), self.dtype)
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_types(self, before)
        self._align()
        return self

    def _align(self) -> None:
        """Brings the weights into the form that the kernels of their device load: moving a view makes it dense."""
        for name in ("up_q", "down_q"):
            w: Any = self._buffers[name]
            self._buffers[name] = packed_rows(w.flatten(0, 1)).unflatten(0, w.shape[:2])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.up_scale.is_meta:  # a meta layer's state dict only shows what to load
            destination[prefix + MARKER] = self.up_scale.new_zeros(1, dtype=self.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        marker = state_dict.pop(prefix + MARKER, None)
        if isinstance(marker, Tensor):
            self.dtype = float_type(marker, self.dtype)
        wrong = [n for n in ("gate_up_proj", "up_proj", "down_proj") if prefix + n in state_dict]
        if wrong:
            rest[-1].append(
                f"{prefix}{wrong[0]} is a float weight and these experts are quantized: load it into the float model "
                "and quantize that."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._align()  # assign=True replaces the buffer with the given tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._align()  # a copy may be made under inference_mode

    def extra_repr(self) -> str:
        schemes = " then ".join(dict.fromkeys(self.schemes))
        return (
            f"{self.num_experts} experts, hidden={self.hidden}, inner={self.inner}, gate={self.gate.kind}, "
            f"activation_scheme={schemes}, rotations={self.rotations}"
        )


def expert_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """[rows] int64, the expert of each row that is sorted by expert; of no expert's rows, the last or the first one."""
    every = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), every, right=True).clamp(
        max=len(offsets) - 2
    )


def _zeros(device: torch.device | str | None, *shape: int) -> Tensor:
    return torch.zeros(shape, device=device, dtype=torch.float32)


def _checked(smooth: Tensor | None, device: torch.device) -> Tensor | None:
    if smooth is None:
        return None
    s = smooth.detach().to(device, torch.float32)
    inverse_factors(s)  # raises its error
    return s
