"""The activations of experts, by name: what stands between their two products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels import ops, reference

#: Kinds that no op computes, one of gate and up [S, 2 I] and one of [S, I], by the names that a manifest holds.
_CLAMPED, _SQUARED = "clamped_swiglu", "relu_squared"


@dataclass(frozen=True)
class Gate:
    """An activation of experts.

    Attributes:
        kind: a kind of `ops.act_quantize`, ``"relu_squared"``, or ``"clamped_swiglu"``, gpt-oss's
            `(up + 1) * gate * sigmoid(alpha * gate)` with gate at most `limit` and up within it.
        alpha, limit: of ``"clamped_swiglu"``, else 0.
    """

    kind: str
    alpha: float = 0.0
    limit: float = 0.0

    @property
    def is_gated(self) -> bool:
        """Whether the first product gives gate and up, so that it has twice the channels of the result."""
        return self.kind in reference.FUSED_KINDS or self.kind == _CLAMPED

    @property
    def is_linear(self) -> bool:
        """Whether the result is proportional to the second half of the input, which can then take the factors."""
        return self.kind in reference.FUSED_KINDS

    @property
    def is_fused(self) -> bool:
        """Whether `ops.act_quantize` computes it."""
        return self.kind in reference.FUSED_KINDS or self.kind in reference.ACTIVATIONS

    def __call__(self, y: Tensor) -> Tensor:
        """The activation of y, gate first, in y's type."""
        if self.kind == _CLAMPED:
            gate, up = y.chunk(2, dim=-1)
            gate = gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
            return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))
        if self.kind == _SQUARED:
            return torch.relu(y).square()
        if self.kind in reference.FUSED_KINDS:
            gate, up = y.chunk(2, dim=-1)
            return reference.ACTIVATIONS[reference.FUSED_KINDS[self.kind]](gate) * up
        return reference.ACTIVATIONS[self.kind](y)

    def quantized(self, y: Tensor, **quantizer: Any) -> tuple[Tensor, Tensor]:
        """The activation of y, quantized as by `ops.quantize`."""
        if self.is_fused:
            return ops.act_quantize(y, self.kind, **quantizer)
        return ops.quantize(self(y), **quantizer)

    def arguments(self) -> dict[str, Any]:
        """JSON values for `made`."""
        return asdict(self)

    @classmethod
    def made(cls, values: dict[str, Any]) -> Gate | None:
        """The gate that `arguments` described; None for values that it never returns."""
        kinds = (*reference.FUSED_KINDS, *reference.ACTIVATIONS, _SQUARED, _CLAMPED)
        wrong = values["kind"] not in kinds
        wrong |= values["kind"] == _CLAMPED and not (0 < values["limit"] < float("inf"))
        return None if wrong else cls(**values)


def find_gate(
    own: Callable[[Tensor], Tensor], *, gated: bool, alpha: Any, limit: Any
) -> Gate | None:
    """The gate that a module's own function computes, found on random values; None if it is none of ours.

    Args:
        own: takes [S, 2 I] with gate first if `gated`, else [S, I].
        alpha, limit: numbers of the module that `clamped_swiglu` may need, or None.
    """
    kinds = reference.FUSED_KINDS if gated else (*reference.ACTIVATIONS, _SQUARED)
    candidates = [Gate(kind) for kind in kinds]
    if gated and isinstance(alpha, (int, float)) and isinstance(limit, (int, float)):
        candidates.append(Gate(_CLAMPED, float(alpha), float(limit)))
    # Wide enough for a clamp to show, and dense enough to tell GELU from its approximation. transformers makes models
    # with the meta device as the default.
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(64, 64, generator=generator, device="cpu")
    y = y * torch.logspace(-1, 1, 64, device="cpu")[:, None]
    try:
        with torch.no_grad(), torch.device("cpu"):
            found = own(y)
    except Exception:  # a function of another kind may raise anything
        return None
    if not isinstance(found, Tensor):
        return None
    for candidate in candidates:
        expected = candidate(y)
        # float32 roundings of a few operations; the kinds differ by far more.
        if found.shape == expected.shape and bool(
            ((found - expected).abs() <= 1e-5 + 1e-5 * expected.abs()).all()
        ):
            return candidate
    return None
