"""The operands of int8 layers: aligned weights, activations quantized once, rotated groups, outlier columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smoothquant_kernels import reference
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.ops.checks import fits_rotation

#: Rows of int8 operands start at multiples of this many bytes, for the CUDA kernels' 16-byte loads.
ROW_ALIGNMENT = 16


def wants_aligned_rows(t: Tensor) -> bool:
    """Whether the kernels of this tensor's device load 16 bytes at a time."""
    return t.is_cuda


def packed_rows(w_q: Tensor) -> Tensor:
    """w_q [N, K] int8 as the kernels of its device load it: on a GPU, its rows start at multiples of 16 bytes.

    Returns an aligned tensor itself. `gemm_s8` also takes any other weight, but copies it at every call.
    On a CPU, returns a normal tensor: inference tensors have no version counter, so packed copies could not be cached.
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


def packed_words(t: Tensor) -> Tensor:
    """The tensors of a 4-bit weight as kernels load them: dense, on a GPU at a multiple of 16 bytes.

    On a CPU, returns a normal tensor, as `packed_rows` does.
    """
    if t.is_meta:
        return t
    if t.is_inference() and not wants_aligned_rows(t):
        with torch.inference_mode(False):
            return t.clone(memory_format=torch.contiguous_format)
    if wants_aligned_rows(t) and t.storage_offset() * t.element_size() % ROW_ALIGNMENT:
        return t.clone(memory_format=torch.contiguous_format)
    return t.contiguous()


def check_rotation(rotation: int, k: int) -> None:
    """Raises SmoothQuantError unless K input channels can be rotated in groups of this size."""
    if type(rotation) is not int or not fits_rotation(rotation, k):
        raise SmoothQuantError(
            f"rotation must be 0 or a power of two from 2 to {reference.MAX_ROTATION} that divides in_features = {k}; "
            f"got {rotation!r}."
        )


def inverse_factors(smooth: Tensor) -> Tensor:
    """1 / smooth. Raises SmoothQuantError unless all factors are positive and finite, and so are the results."""
    inverse = 1.0 / smooth
    usable = (smooth > 0) & smooth.isfinite() & inverse.isfinite()
    if not bool(usable.all()):
        raise SmoothQuantError(
            f"smooth must be positive and finite, and so must be its reciprocals; got {smooth[~usable][0].item()}."
        )
    return inverse


class QuantizedActivation(NamedTuple):
    """An activation quantized once for several linears that read it (q, k and v; gate and up).

    `x_q` is [..., K] int8, `x_scale` is [M] or [1] float32, and `dtype` is the float type that the linears return.
    Smoothing is already applied, so a linear that receives one does not apply its own `inv_smooth`.
    """

    x_q: Tensor
    x_scale: Tensor
    dtype: torch.dtype


#: The tensors of a layer with outlier columns that could be wrong without a wrong shape.
COLUMN_TENSORS = ("columns", "inv_smooth", "w_columns")


def ascending_columns(columns: Tensor | Sequence[int], k: int) -> Tensor:
    """[C] int64, ascending. Raises SmoothQuantError unless all are different and channels of K."""
    given = torch.as_tensor(columns, dtype=None if len(columns) else torch.int64)
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise SmoothQuantError(
            f"columns must be whole numbers in one dimension; got {given.dtype} {list(given.shape)}."
        )
    found = given.long().sort().values
    if wrong := column_problem({"columns": found}, k, "static"):
        raise SmoothQuantError(f"{wrong}.")
    return found


def column_problem(tensors: Mapping[str, Tensor], k: int, outliers: str) -> str | None:
    """What is wrong with a layer's tensors `COLUMN_TENSORS`, as far as they are given; None if nothing is."""
    columns, inverse, floats = (tensors.get(name) for name in COLUMN_TENSORS)
    if floats is not None and not bool(floats.isfinite().all()):
        return "w_columns has a value that is NaN or infinite"
    if columns is not None:
        if not bool(((columns >= 0) & (columns < k)).all()):
            return f"columns has a channel outside [0, {k - 1}]"
        if not bool((columns.diff() > 0).all()):
            return "columns has channels that are repeated or not in ascending order"
    if inverse is None:
        return None
    if not bool(((inverse >= 0) & inverse.isfinite()).all()):
        return "inv_smooth has a value that is NaN, infinite or negative"
    if outliers == "dynamic":
        columns = torch.empty(0, dtype=torch.int64, device=inverse.device)
    if columns is not None:
        zero = torch.zeros_like(inverse, dtype=torch.bool).index_fill(0, columns, True)
        if not torch.equal(inverse == 0, zero):
            return "inv_smooth must be 0 at the outlier columns and positive elsewhere, and is not"
    return None
