"""Comparisons that report where and by how much two tensors differ."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

#: How many op results this process compared with the reference, for the reports of the simulator and the GPU.
compared = 0

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_bits(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous().view(_BITS[t.element_size()])


def _describe(t: Tensor) -> str:
    bits = int(_as_bits(t.reshape(1))[0]) & ((1 << 8 * t.element_size()) - 1)
    return f"{t.item()!r} (bits 0x{bits:0{2 * t.element_size()}x})"


def assert_bitwise_equal(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Compares every bit, so -0 differs from 0. Any two NaNs are equal, whatever their signs and payloads."""
    prefix = f"{what}: " if what else ""
    assert actual.dtype == expected.dtype, f"{prefix}dtype {actual.dtype} != {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"{prefix}shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    )
    wrong = _as_bits(actual) != _as_bits(expected)
    if actual.dtype.is_floating_point:
        wrong &= ~(actual.isnan().cpu() & expected.isnan().cpu())
    if bool(wrong.any()):
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{prefix}{int(wrong.sum())} of {wrong.numel()} elements differ, first at {where}: "
            f"{_describe(actual[where])} != {_describe(expected[where])}"
        )


def count_result() -> None:
    global compared
    compared += 1


def assert_all_bitwise_equal(actual: object, expected: object, what: str = "") -> None:
    """`assert_bitwise_equal` for a tensor or a tuple of tensors."""
    if isinstance(actual, Tensor):
        assert isinstance(expected, Tensor)
        assert_bitwise_equal(actual, expected, what)
        return
    assert isinstance(actual, (tuple, list)) and isinstance(expected, (tuple, list))
    assert len(actual) == len(expected), f"{what}: {len(actual)} results, not {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_bitwise_equal(a, e, f"{what}[{i}]")


def assert_same_buffers(found: nn.Module, expected: nn.Module) -> None:
    """Both modules have the same buffers, with the same bits or both None."""
    assert found._buffers.keys() == expected._buffers.keys()
    for name, buffer in expected._buffers.items():
        other = found._buffers[name]
        assert (other is None) == (buffer is None), name
        if buffer is not None and other is not None:
            assert_bitwise_equal(other, buffer, name)


def _libm_fmaf() -> Callable[[float, float, float], float]:
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("this system has no C library with fmaf")
    function = ctypes.CDLL(name).fmaf
    function.restype = ctypes.c_float
    function.argtypes = [ctypes.c_float] * 3
    return function  # type: ignore[no-any-return]


def libm_fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The C library's float32 fused multiply-add, one element at a time."""
    fmaf = _libm_fmaf()
    a, b, c = torch.broadcast_tensors(a, b, c)
    columns = (t.reshape(-1).tolist() for t in (a, b, c))
    values = [fmaf(*triple) for triple in zip(*columns, strict=True)]
    return torch.tensor(values, dtype=torch.float32).reshape(a.shape)
