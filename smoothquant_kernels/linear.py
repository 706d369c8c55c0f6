"""`W8A8Linear`: a drop-in for `nn.Linear` with int8 weights and int8 activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from smoothquant_kernels import ops, reference
from smoothquant_kernels.errors import SmoothQuantError

if TYPE_CHECKING:
    from typing_extensions import Self

ACTIVATION_SCHEMES = ("per_token", "per_tensor", "static")
WEIGHT_GRANULARITIES = ("channel", "tensor")
#: Bytes that the rows of int8 operands start at multiples of, for the CUDA kernels' 16-byte loads.
ROW_ALIGNMENT = 16


def wants_aligned_rows(t: Tensor) -> bool:
    """Whether kernels that load 16 bytes at a time will read this tensor's device."""
    return t.is_cuda


def packed_rows(w_q: Tensor) -> Tensor:
    """w_q [N, K] int8 as the kernels of its device load it: on a GPU its rows start at multiples of 16 bytes.

    The tensor itself where they do already. `gemm_s8` takes any other weight too, by a copy at every call.
    Never an inference tensor for a CPU: it has no version, so that no packed form of it can be kept.
    """
    if w_q.is_meta:
        return w_q
    if w_q.is_inference() and not wants_aligned_rows(w_q):
        with torch.inference_mode(False):
            w_q = w_q.clone()
    n, k = w_q.shape
    k_padded = reference.padded_k(k, ROW_ALIGNMENT)
    aligned = w_q.stride() == (k_padded, 1) and w_q.storage_offset() % ROW_ALIGNMENT == 0
    if not wants_aligned_rows(w_q) or aligned:
        return w_q
    padded = w_q.new_zeros(n, k_padded)
    padded[:, :k] = w_q
    return padded[:, :k]


class QuantizedActivation(NamedTuple):
    """An activation quantised once for several linears that read it (q, k and v; gate and up).

    `x_q` [..., K] int8, `x_scale` [M] or [1] float32, `dtype` the float type that the linears shall return. Smoothing
    has been applied: a linear that is given one does not apply its own `inv_smooth`.
    """

    x_q: Tensor
    x_scale: Tensor
    dtype: torch.dtype


class KeepsBufferTypes(nn.Module):
    """A module whose buffers keep their type under `.half()`, `.to(dtype)` and the like; parameters follow."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the buffers like any module, but never rounds the float32 ones to another type."""
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class W8A8Linear(KeepsBufferTypes):
    """Linear layer on int8: `y = gemm_s8(quantize(x / s), w_q) + bias`, returned in x's type.

    Args:
        in_features, out_features: K and N, both >= 1.
        bias: whether there is a bias.
        activation_scheme: ``"per_token"`` (paper O1), ``"per_tensor"`` (dynamic, O2) or ``"static"`` (calibrated, O3).
        weight_granularity: ``"channel"`` or ``"tensor"``.
        smooth: whether the input is divided by smoothing factors at run time (inside the quantiser).
        device: where the buffers live; ``"meta"`` to load a checkpoint without allocating twice.

    Buffers, of final type and shape from the start, so that `load_state_dict` works on a fresh layer:
        w_q [N, K] int8; w_scale [N] or [1]; bias [N] or None; inv_smooth [K] or None; x_scale [1] or None (static).
        All but w_q are float32 and stay so under `.half()`, `.bfloat16()`, `.double()` and `.to(dtype)`.
        On a GPU the rows of w_q start at multiples of 16 bytes, so for other K it is a view of a wider tensor.

    Equivalent to:
        torch.nn.functional.linear(x / s, w * s, bias), up to the quantisation error.

    Source: SmoothQuant (Xiao et al., 2022), section 4.
    """

    w_q: Tensor
    w_scale: Tensor
    bias: Tensor | None
    inv_smooth: Tensor | None
    x_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation_scheme: str = "per_token",
        weight_granularity: str = "channel",
        smooth: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if activation_scheme not in ACTIVATION_SCHEMES:
            raise SmoothQuantError(
                f"activation_scheme must be one of {', '.join(ACTIVATION_SCHEMES)}; got {activation_scheme!r}."
            )
        if weight_granularity not in WEIGHT_GRANULARITIES:
            raise SmoothQuantError(
                f"weight_granularity must be channel or tensor; got {weight_granularity!r}."
            )
        if in_features < 1 or out_features < 1 or in_features > reference.MAX_K:
            raise SmoothQuantError(
                f"in_features must be in [1, {reference.MAX_K}] and out_features >= 1; "
                f"got {in_features} and {out_features}."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.activation_scheme = activation_scheme
        self.weight_granularity = weight_granularity

        def buffer(name: str, size: int | None) -> None:
            value = None
            if size is not None:
                value = torch.zeros(size, dtype=torch.float32, device=device)
            self.register_buffer(name, value)

        w_q = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("w_q", packed_rows(w_q))
        buffer("w_scale", out_features if weight_granularity == "channel" else 1)
        buffer("bias", out_features if bias else None)
        buffer("inv_smooth", in_features if smooth else None)
        buffer("x_scale", 1 if activation_scheme == "static" else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        activation_scheme: str = "per_token",
        weight_granularity: str = "channel",
        smooth: Tensor | None = None,
        x_scale: Tensor | float | None = None,
    ) -> W8A8Linear:
        """Quantises a float layer.

        Args:
            linear: an `nn.Linear` or GPT-2's `Conv1D` (weight [K, N]); left unchanged. Factors that smoothing has left
                to the quantizer (`pending_smooth`) are applied.
            activation_scheme, weight_granularity: as in the constructor.
            smooth: [K] float32 smoothing factors s, positive: the weight is multiplied by s here, the input divided by
                s at run time. None where smoothing is folded into the weights already, or not wanted.
            x_scale: the static scale of the (smoothed) input, > 0; exactly when the scheme is ``"static"``.

        Raises:
            SmoothQuantError: the weight has NaN or Inf, a factor is not positive, or x_scale is missing or not wanted.
        """
        weight = weight_of(linear)
        pending = pending_smooth(linear)
        if pending is not None:
            smooth = pending if smooth is None else pending.to(smooth.device) * smooth
        if not bool(weight.isfinite().all()):
            raise SmoothQuantError(
                "the weight has NaN or Inf values; repair or reload the checkpoint."
            )
        n, k = weight.shape
        bias = getattr(linear, "bias", None)
        new = cls(
            k,
            n,
            bias is not None,
            activation_scheme=activation_scheme,
            weight_granularity=weight_granularity,
            smooth=smooth is not None,
            device=weight.device,
        )
        w = weight.detach().float()
        if smooth is not None:
            s = smooth.detach().to(w.device, torch.float32)
            if s.shape != (k,):
                raise SmoothQuantError(f"smooth must have shape [{k}], got {tuple(s.shape)}.")
            inverse = 1.0 / s
            usable = (s > 0) & s.isfinite() & inverse.isfinite()
            if not bool(usable.all()):
                raise SmoothQuantError(
                    "smooth must be positive and finite, and so must be its reciprocals; "
                    f"got {s[~usable][0].item()}."
                )
            w, new.inv_smooth = w * s, inverse
        if not bool(w.isfinite().all()):
            raise SmoothQuantError("the weight (times smooth) is too large for float32.")
        w_q, new.w_scale = reference.quantize_weight(w, weight_granularity)
        new.w_q = packed_rows(w_q)
        if bias is not None:
            new.bias = bias.detach().float().clone()
        if (x_scale is not None) != (activation_scheme == "static"):
            raise SmoothQuantError(
                "x_scale must be given for the static scheme, and only for it; calibrate the layer first."
            )
        if x_scale is not None:
            value = torch.as_tensor(x_scale, dtype=torch.float32, device=w.device).reshape(1)
            if not bool((value >= reference.MIN_SCALE) & value.isfinite()):
                raise SmoothQuantError(f"x_scale must be positive and finite, got {value.item()}.")
            new.x_scale = value.clone()
        return new.train(linear.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.w_q = packed_rows(self.w_q)  # moving a view makes it dense
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.w_q = packed_rows(self.w_q)  # assign=True puts the given tensor in its place

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.w_q = packed_rows(self.w_q)  # a copy made under inference_mode

    def quantize_input(self, x: Tensor) -> QuantizedActivation:
        """Smooths and quantises x [..., K] as this layer wants it, for all layers that share its input."""
        x_q, x_scale = ops.quantize(
            x,
            inv_smooth=self.inv_smooth,
            scale=self.x_scale,
            granularity=self._granularity,
            k_multiple=ROW_ALIGNMENT if wants_aligned_rows(x) else 1,
        )
        if x_q.shape[-1] != self.in_features:
            x_q = x_q[..., : self.in_features]
        return QuantizedActivation(x_q, x_scale, x.dtype)

    @property
    def weight(self) -> Tensor:
        """`w_q`: what code that looks at a linear's dtype before it calls it finds (T5's feed-forward), int8."""
        return self.w_q

    @property
    def _granularity(self) -> str:
        return "tensor" if self.activation_scheme == "per_tensor" else "token"

    def forward(self, x: Tensor | QuantizedActivation) -> Tensor:
        """x [..., K] float16, bfloat16, float32 or already quantised -> [..., N]."""
        # Not self.w_q: nn.Module finds a buffer after a search elsewhere, which takes a microsecond for each.
        own: dict[str, Any] = self._buffers
        if isinstance(x, QuantizedActivation):
            return ops.gemm_s8(
                x.x_q, own["w_q"], x.x_scale, own["w_scale"], bias=own["bias"], out_dtype=x.dtype
            )
        return ops.linear_s8(
            x,
            own["w_q"],
            own["w_scale"],
            bias=own["bias"],
            inv_smooth=own["inv_smooth"],
            scale=own["x_scale"],
            granularity=self._granularity,
        )

    def dequantized_weight(self) -> Tensor:
        """[N, K] float32: the weight that the layer stands for, without the smoothing factors."""
        w = self.w_q.float() * (
            self.w_scale[:, None] if self.w_scale.shape[0] > 1 else self.w_scale
        )
        return w if self.inv_smooth is None else w * self.inv_smooth

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation_scheme={self.activation_scheme}, weight_granularity={self.weight_granularity}"
        )
        return text + (", smooth=True" if self.inv_smooth is not None else "")


#: A plain attribute: a buffer would be written into checkpoints, and rounded by `.half()`.
_PENDING = "_smoothquant_pending"


def pending_smooth(module: nn.Module) -> Tensor | None:
    """s [K] float32 of a float linear that is smoothed at run time: `W8A8Linear.from_linear` will divide by it.

    The float layer itself needs no division, since `(x / s) @ (s * w)` is `x @ w`: it keeps every bit of its weight and
    of its output, whoever reads, saves or hooks it.
    """
    found: Tensor | None = module.__dict__.get(_PENDING)
    return None if found is None else found.to(weight_of(module).device)


def set_pending_smooth(module: nn.Module, smooth: Tensor | None) -> None:
    """Leaves the factors s [K] to the quantizer; None takes them back."""
    if smooth is None:
        module.__dict__.pop(_PENDING, None)
    else:
        module.__dict__[_PENDING] = smooth


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's `Conv1D`: a linear whose weight is stored [K, N]. By shape, without an import."""
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and getattr(module, "weight", torch.empty(0)).dim() == 2
    )


def is_float_linear(module: nn.Module) -> bool:
    """Whether `from_linear` takes this module."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def weight_of(module: nn.Module) -> Tensor:
    """The weight as [N, K], a view for `Conv1D`: writing to it writes to the module."""
    if not is_float_linear(module):
        raise SmoothQuantError(
            f"expected nn.Linear or Conv1D, got {type(module).__name__}; only these can be quantised."
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_conv1d(module) else weight
