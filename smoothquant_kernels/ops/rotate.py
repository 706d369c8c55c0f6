"""Rotation as `reference.rotate` defines it, in an order of memory accesses that suits large tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant_kernels import reference

_CHUNK = 1 << 18  # float32 elements: two such buffers fit in the cache of a core


def rotated(v: Tensor, group: int) -> Tensor:
    """The bits of `reference.rotate` for v [..., K] float32, on any device; v itself if `group` is 0."""
    if not group or not v.numel():
        return v
    if torch.compiler.is_compiling():
        # The compiler chooses the memory accesses, and refuses `out=`.
        return reference.rotate(v, group)
    rows = v.reshape(-1, group)
    result = torch.empty(rows.shape, dtype=v.dtype, device=v.device)
    step = max(1, _CHUNK // group) if v.is_cpu else len(rows)
    for start in range(0, len(rows), step):
        result[start : start + step] = _groups(rows[start : start + step])
    return result.view(v.shape)


def rotated_weight(w: Tensor, group: int) -> Tensor:
    """The bits of `reference.rotate_weight` for w [N, K] float32."""
    return rotated(w, group) / group if group else w


def _groups(rows: Tensor) -> Tensor:
    """Rotates each row. The positions in a row come first, so that every pass has long loops."""
    count, group = rows.shape
    shape = (group, count)
    w, other = (torch.empty(shape, dtype=rows.dtype, device=rows.device) for _ in range(2))
    w.copy_(rows.t())
    h = 1
    while h < group:
        (a, b), (total, difference) = (
            t.view(group // (2 * h), 2, h * count).unbind(1) for t in (w, other)
        )
        torch.add(a, b, out=total)
        torch.sub(a, b, out=difference)
        w, other = other, w
        h *= 2
    return w.t()
