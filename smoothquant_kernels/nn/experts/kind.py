"""How experts are described in a manifest, made and checked."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.experts.gates import Gate
from smoothquant_kernels.nn.experts.inputs import Input
from smoothquant_kernels.nn.experts.layer import MARKER, W8A8Experts
from smoothquant_kernels.nn.experts.represented import write_float
from smoothquant_kernels.nn.experts.source import FloatExperts, read_experts
from smoothquant_kernels.nn.kinds import Kind, Settings, register
from smoothquant_kernels.ops.checks import fits_rotation, float_named, type_name


class _Experts(Kind[W8A8Experts]):
    """Takes no linear: modules of experts become this kind (`W8A8Experts.from_experts`)."""

    layer = W8A8Experts
    is_linear = False
    scales = (
        "up_scale", "down_scale", "up_x_scale", "down_x_scale", "up_inv_smooth", "down_inv_smooth",
    )  # fmt: skip
    weight_scales = ("up_scale", "down_scale")
    markers = (MARKER,)

    def takes(self, name: str, linear: nn.Module, config: SmoothQuantConfig) -> bool:
        return False

    def from_linear(self, linear: nn.Module, settings: Settings) -> W8A8Experts:
        raise SmoothQuantError(f"a {type(linear).__name__} is not a module of experts.")

    def arguments(self, layer: W8A8Experts) -> dict[str, Any]:
        return {
            "num_experts": layer.num_experts,
            "hidden": layer.hidden,
            "inner": layer.inner,
            "gate": layer.gate.arguments(),
            "bias": layer.up_bias is not None,
            "routed": layer.routed,
            "schemes": list(layer.schemes),
            "rotations": list(layer.rotations),
            "smooth": [layer.up_inv_smooth is not None, layer.down_inv_smooth is not None],
            "dtype": type_name(layer.dtype),
        }

    def make(self, arguments: dict[str, Any]) -> W8A8Experts | None:
        pairs = {name: tuple(arguments[name]) for name in ("schemes", "rotations", "smooth")}
        types = {"schemes": str, "rotations": int, "smooth": bool}
        if not all(
            len(pair) == 2 and all(type(value) is types[name] for value in pair)
            for name, pair in pairs.items()
        ):
            return None
        sizes = (arguments["hidden"], arguments["inner"])
        given = arguments["gate"]
        if {n: type(v) for n, v in given.items()} != {"kind": str, "alpha": float, "limit": float}:
            return None
        dtype, gate = float_named(arguments["dtype"]), Gate.made(given)
        fits = all(fits_rotation(r, k) for r, k in zip(pairs["rotations"], sizes, strict=True))
        if dtype is None or gate is None or not fits:
            return None
        values = {**arguments, **pairs, "gate": gate, "dtype": dtype}
        try:
            return W8A8Experts(**values, device="meta")
        except SmoothQuantError:
            return None

    def smallest(self) -> W8A8Experts:
        return W8A8Experts(1, 1, 1, Gate("silu_mul"), device="meta")

    def nbytes(self, n: int, k: int) -> int:
        raise SmoothQuantError(
            "the size of experts does not come from one matrix: use experts_bytes."
        )

    def mismatch(self, layer: W8A8Experts, old: nn.Module) -> str | None:
        if isinstance(old, W8A8Experts):
            found = (old.num_experts, old.hidden, old.inner, old.gate, old.routed)
            has_bias = old.up_bias is not None
        else:
            experts = read_experts(old)
            if experts is None:
                return f"is a {type(old).__name__}"
            found = (experts.count, experts.hidden, experts.inner, experts.gate, experts.routed)
            has_bias = experts.has_bias
        wanted = (layer.num_experts, layer.hidden, layer.inner, layer.gate, layer.routed)
        if found != wanted:
            return f"holds other experts, {found} and not {wanted}"
        if has_bias != (layer.up_bias is not None):
            return f"has {'a' if has_bias else 'no'} bias"
        return None

    def as_float(self, layer: W8A8Experts, plain: nn.Module) -> nn.Module | None:
        experts = read_experts(plain)
        return None if experts is None else write_float(layer, experts)

    def rounded_weight(self, layer: W8A8Experts) -> Tensor:
        raise SmoothQuantError("experts have several weights: use W8A8Experts.dequantized.")

    def rounded_input(self, layer: W8A8Experts, x: Tensor) -> Tensor:
        raise SmoothQuantError("experts read several inputs.")


def quantized_experts(
    experts: FloatExperts, first: Input, second: Input, granularity: str
) -> W8A8Experts:
    """Quantizes float experts: `W8A8Experts.from_experts`."""
    return W8A8Experts.from_experts(experts, first, second, granularity)


def experts_bytes(experts: FloatExperts) -> int:
    """The approximate bytes of the int8 experts that float ones become."""
    rows = experts.up_rows + experts.hidden
    weights = experts.up_rows * experts.hidden + experts.hidden * experts.inner
    return experts.count * (weights + 8 * rows + 4 * experts.inner) + 4 * experts.hidden


register(_Experts())
