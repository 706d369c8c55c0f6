"""An attention in float that has the errors of an int8 cache: for whole windows, and for what has no kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.kv_cache.calibration import KVCalibration
from smoothquant_kernels.reference import quantize, rotate, round_to_int8

NAME = "benchmark_fake_kv"


@dataclass(frozen=True)
class Errors:
    """Which errors the attention has.

    Attributes:
        cache: ``"float"``, ``"float16"``, ``"per_token"`` or ``"static"``.
        alpha: smooths the keys per channel; None does not.
        rotation: rotates keys, values and queries within a head; 0 does not.
        query: queries are int8, per token and head.
        steps: how many steps the weights of the values (P) have; 0 leaves them in float.
    """

    cache: str = "float"
    alpha: float | None = None
    rotation: int = 0
    query: bool = False
    steps: int = 0


def dequantized(x: Tensor, rotation: int = 0) -> Tensor:
    """int8 per token and head, and back."""
    x_q, scale = quantize(x, rotation=rotation)
    y = x_q.float() * scale.view(*x.shape[:-1], 1)
    return rotate(y, rotation) / max(rotation, 1)


def static(x: Tensor, scale: Tensor, rotation: int) -> Tensor:
    """int8 with a scale [H, 1, D] per head and channel, and back."""
    y = round_to_int8(rotate(x, rotation) / scale).float() * scale
    return rotate(y, rotation) / max(rotation, 1)


class FakeAttention:
    """The errors, and the calibrations that they need: without rotation, and of rotated queries, keys and values."""

    def __init__(self, plain: KVCalibration, rotated: KVCalibration) -> None:
        self.errors, self.plain, self.rotated = Errors(), plain, rotated

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        e, (q, k, v) = self.errors, (query.float(), key.float(), value.float())
        group = q.shape[1] // k.shape[1]
        if e.cache == "float16":
            k, v = k.half().float(), v.half().float()
        if e.cache == "static":
            found = (self.rotated if e.rotation else self.plain).factors(module.layer_idx, "static")
            k_scale, v_scale = (t[:, None] for t in found if t is not None)
            k, v = static(k, k_scale, e.rotation), static(v, v_scale, e.rotation)
            if e.query:  # the query takes over the scales
                scales = k_scale.repeat_interleave(group, 0)
                q = rotate(dequantized(rotate(q, e.rotation) * scales) / scales, e.rotation)
                q = q / max(e.rotation, 1)
        else:
            s, _ = self.plain.factors(module.layer_idx, "per_token", e.alpha)
            smooth = torch.ones(k.shape[1], 1, k.shape[-1]) if s is None else s[:, None]
            if e.cache == "per_token":
                k, v = dequantized(k / smooth, e.rotation) * smooth, dequantized(v, e.rotation)
            if e.query:
                wide = smooth.repeat_interleave(group, 0)
                q = dequantized(q * wide, e.rotation) / wide
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        length = scores.shape[-1]
        causal = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
        weights = (scores - scores.amax(-1, keepdim=True)).masked_fill(~causal, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if e.steps:  # the scale of a token's values belongs to its weight
            own = v.abs().amax(-1)[..., None, :].clamp(min=1e-30)
            own = own if e.cache == "per_token" else torch.ones_like(own)
            scaled = weights * own
            step = scaled.amax(-1, keepdim=True) / e.steps
            weights = torch.round(scaled / step) * step / own
        y = weights @ v / total
        return y.to(query.dtype).transpose(1, 2).contiguous(), None

    @contextmanager
    def of(self, model: Any, errors: Errors) -> Iterator[nn.Module]:
        """The model with these errors within the block."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(NAME, self)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        before, self.errors = model.config._attn_implementation, errors
        model.set_attn_implementation(NAME)
        try:
            yield model
        finally:
            model.set_attn_implementation(before)
            self.errors = Errors()
            del (
                AttentionInterface._global_mapping[NAME],
                AttentionMaskInterface._global_mapping[NAME],
            )
