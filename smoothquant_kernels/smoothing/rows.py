"""Some tokens of a layer's input, kept during calibration: the range of a rotated input comes from them.

The factors are known only when calibration ends, and a rotation mixes channels, so the maxima of channels do not tell
the range. The first tokens show what is usual. The others are those whose largest rotated value is the largest under
provisional factors, the square roots of the channels' maxima so far. Final factors move these maxima of tokens alike.
Another group size does not: the tokens are chosen for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels import ops, reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
#: How many tokens of either kind are kept.
KEPT = 32


def rotated_maxima(x: Tensor, inv_smooth: Tensor | None, rotation: int) -> Tensor:
    """The largest |value| of each token of x [M, K], smoothed and rotated as the quantizer does: [M] float32."""
    quantize = (
        ops.quantize if x.is_cpu else reference.quantize
    )  # a GPU without the CUDA library has no ops
    _, scale = quantize(x, inv_smooth=inv_smooth, rotation=rotation)
    return scale * reference.QMAX


@dataclass(frozen=True)
class Rows:
    """Tokens [at most `KEPT`, K] of one layer's input, in its type: the `first` ones, and the `largest` later ones."""

    first: Tensor
    largest: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Rows:
        """No tokens yet, of as many channels as `like` [M, K]."""
        dtype = like.dtype if like.dtype in FLOATS else torch.float32
        return cls(*like.new_empty(2, 0, like.shape[1], dtype=dtype))

    @classmethod
    def of(cls, both: Tensor, first: int) -> Rows:
        """The inverse of `both`; `first` is the number of first tokens."""
        return cls(both[:first], both[first:])

    def both(self) -> Tensor:
        """All tokens, [at most 2 `KEPT`, K]."""
        return torch.cat([self.first, self.largest])

    def shape(self) -> dict[str, Any]:
        """What another process must know to receive `both`."""
        rows, dtype = len(self.first) + len(self.largest), str(self.first.dtype)
        return {"first": len(self.first), "rows": rows, "dtype": dtype.removeprefix("torch.")}

    def fits(self, k: int) -> bool:
        """Whether these are tokens of K channels."""
        return all(
            t.dim() == 2 and t.shape[1] == k and t.dtype in FLOATS
            for t in (self.first, self.largest)
        )

    def with_more(self, x: Tensor, absmax: Tensor, rotation: int) -> Rows:
        """Takes what is worth keeping of further tokens x [M, K]. `absmax` [K] includes theirs."""
        x = x.to(self.first.dtype)
        missing = KEPT - len(self.first)
        later = torch.cat([self.largest, x[missing:]])
        return Rows(torch.cat([self.first, x[:missing]]), _largest(later, absmax, rotation))

    @classmethod
    def merged(cls, parts: Sequence[Rows], absmax: Tensor, rotation: int) -> Rows:
        """Chooses from the tokens of several processes, in their order."""
        first = torch.cat([p.first.to(absmax.device) for p in parts])
        later = torch.cat([first[KEPT:], *(p.largest.to(absmax.device) for p in parts)])
        return cls(first[:KEPT].clone(), _largest(later, absmax, rotation))

    def maxima(self, smooth: Tensor | None, rotation: int) -> Tensor:
        """The largest |value| of each token, divided by `smooth` [K] and rotated."""
        return _maxima(self.both(), smooth, rotation)

    def first_maxima(self, smooth: Tensor | None, rotation: int) -> Tensor:
        """The same of the first tokens, which represent all."""
        return _maxima(self.first, smooth, rotation)


def _maxima(x: Tensor, smooth: Tensor | None, rotation: int) -> Tensor:
    if smooth is None:
        return rotated_maxima(x, None, rotation)
    return rotated_maxima(x.to(smooth.device), 1.0 / smooth, rotation)


def _largest(x: Tensor, absmax: Tensor, rotation: int) -> Tensor:
    """The `KEPT` tokens of x [M, K] with the largest rotated values under provisional factors, the largest first."""
    if len(x) <= KEPT:
        return x.clone()
    inverse = torch.where(absmax > 0, absmax.rsqrt(), 0.0)
    maxima = rotated_maxima(x, inverse, rotation)
    return x[maxima.sort(descending=True, stable=True).indices[:KEPT]]
