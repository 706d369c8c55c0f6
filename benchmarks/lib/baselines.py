"""What `gemm_s8` is compared with: each baseline says why it cannot run, makes its calls, and has its result checked.

All of a case's baselines get the same operands: the INT8 ones x_q, w_q and the scales, the float ones `x_q * x_scale`
and `w_q * w_scale` in their type. What a model would convert once (weights) or what belongs to another kernel
(activations into FP8) is converted before the clock starts. INT8 results must be the specification's; float ones must
be as near to it as their roundings allow, so that nothing is timed that does not compute the product.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib import cases
from benchmarks.lib.cases import OUT_DTYPE, Case, Expected, Operands
from benchmarks.lib.runner import first_line
from smoothquant_kernels import ops, reference

Call = Callable[[], Tensor]
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Baseline:
    """One kernel, or chain of kernels, that computes the same y.

    Attributes:
        what: a line for people.
        refusal: why it cannot run a case on a device; empty where it can.
        calls: for each set of operands one call; all that is chosen, compiled or converted is so when it returns.
        wrong: empty, or why a result is not y.
    """

    name: str
    what: str
    refusal: Callable[[Case, torch.device], str]
    calls: Callable[[Sequence[Operands]], list[Call]]
    wrong: Callable[[Expected, Operands, Tensor], str]
    usual: bool = True  # measured unless others are named


# --- checks -----------------------------------------------------------------------------------------------------------


def not_equal(expected: Expected, _: Operands, y: Tensor) -> str:
    return expected.wrong(y)


def beyond_one_step(expected: Expected, _: Operands, y: Tensor) -> str:
    """The same sums with the scales multiplied in another order: float32 values one or two of its steps apart, which
    round to the same float16 or to neighbors."""
    if y.dtype != OUT_DTYPE or tuple(y.shape) != (expected.case.m, expected.case.n):
        return expected.wrong(y)
    for rows, columns, right in expected.parts:
        actual = _part(expected, y, rows, columns)
        bad = ~((_step(actual) - _step(right)).abs() <= 1) | ~actual.isfinite()
        if bad.any():
            return f"{int(bad.sum())} of {right.numel()} elements are more than one step of float16 off"
    return ""


def beyond_rounding(
    unit: float, accumulate: float = 0.0
) -> Callable[[Expected, Operands, Tensor], str]:
    """Checks a float product of inputs that were rounded with `unit` (half a step, relative).

    With x (1 + d) and w (1 + e), |d|, |e| <= unit and without a common sign, an element's error has at most the
    variance 2 unit^2 sum_k x^2 w^2. Over some rows and columns the squares add up to 2 unit^2 S with
    S = sum_k |x[:, k]|^2 |w[:, k]|^2; the result may be off by twice the root of that, and by the rounding of y,
    which is `unit` or float16's of what it is compared with. An accumulator that drops bits adds `accumulate` of
    the sum of magnitudes' root S and of y for each 32 products.
    """

    def wrong(expected: Expected, a: Operands, y: Tensor) -> str:
        case = expected.case
        if tuple(y.shape) != (case.m, case.n) or not y.dtype.is_floating_point:
            return f"y is {y.dtype} {tuple(y.shape)}, not a float type's {(case.m, case.n)}"
        out = torch.finfo(y.dtype).eps / 2 + torch.finfo(OUT_DTYPE).eps / 2
        for rows, columns, right in expected.parts:
            exact = right.double()
            squares = _column_squares(a.x_q[rows], a.x_scale[rows])
            root_s = math.sqrt(float(squares @ _column_squares(a.w_q[columns], a.w_scale[columns])))
            size = float(exact.norm())
            allowed = 2 * math.sqrt(2) * unit * root_s + out * size
            allowed += accumulate * case.k / 32 * max(root_s, size)
            off = float((_part(expected, y, rows, columns).double() - exact).norm())
            if not off <= allowed:  # NaN is no number below
                return f"y is {off / size:.3g} of its norm off, its roundings explain {allowed / size:.3g}"
        return ""

    return wrong


def _part(expected: Expected, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return y[rows] if len(columns) == expected.case.n else y[:, columns]


def _step(y: Tensor) -> Tensor:
    """float16 as integers in the order of its values; both zeros are 0."""
    bits = y.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _column_squares(q: Tensor, scale: Tensor) -> Tensor:
    """The squared norm of every column of q * scale, in pieces that fit."""
    total = torch.zeros(q.shape[1], dtype=torch.float64, device=q.device)
    for some, by in zip(q.split(4096), scale.split(4096), strict=True):
        total += (some.float() * by[:, None]).square().sum(0, dtype=torch.float64)
    return total


# --- where they cannot run --------------------------------------------------------------------------------------------


def anywhere(case: Case, device: torch.device) -> str:
    return ""


def _aligned(case: Case) -> str:
    return "it needs multiples of 16 for N and K" if case.n % 16 or case.k % 16 else ""


def int_mm_refusal(case: Case, device: torch.device) -> str:
    """Of a GPU; on a CPU anything runs that runs there."""
    if case.m <= 16:
        return "torch._int_mm needs M > 16"
    odd = case.k % 8 or case.n % 8
    return "torch._int_mm needs multiples of 8 for K and N" if odd else ""


def compiled_refusal(case: Case, device: torch.device) -> str:
    on_cpu = device.type != "cuda"
    return "torch.compile is not rehearsed on a CPU" if on_cpu else int_mm_refusal(case, device)


def fp8_refusal(case: Case, device: torch.device) -> str:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return "FP8 needs a GPU of compute capability 8.9 or more"
    return _aligned(case)


@functools.cache
def missing(name: str, attribute: str) -> str:
    """Why a name cannot be had from a module; a build for another torch or CUDA may raise anything."""
    try:
        getattr(importlib.import_module(name), attribute)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:
        return f"{name}.{attribute} cannot be used: {first_line(error)}"
    return ""


def triton_refusal(case: Case, device: torch.device) -> str:
    if reason := missing("triton", "jit"):
        return reason
    from benchmarks.lib.triton_int8 import INTERPRETED

    usable = device.type == "cuda" or INTERPRETED
    return "" if usable else "Triton needs a GPU, or TRITON_INTERPRET=1"


# --- the calls --------------------------------------------------------------------------------------------------------


def scaled(q: Tensor, by: Tensor, dtype: torch.dtype, most: float = math.inf) -> Tensor:
    """q times a factor per row, rounded once from float32; in pieces: float32 takes four times as much."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    for target, some, factor in zip(out.split(4096), q.split(4096), by.split(4096), strict=True):
        target.copy_((some.float() * factor[:, None]).clamp(-most, most))
    return out


def float_operands(a: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return scaled(a.x_q, a.x_scale, dtype), scaled(a.w_q, a.w_scale, dtype)


def float_calls(sets: Sequence[Operands], dtype: torch.dtype) -> list[Call]:
    """`F.linear`: cuBLAS on a GPU."""
    pairs = [float_operands(a, dtype) for a in sets]
    return [lambda p=p: F.linear(*p) for p in pairs]


def int_mm_calls(sets: Sequence[Operands]) -> list[Call]:
    return [lambda a=a: cases.int_mm(a) for a in sets]


@functools.cache
def _compiled_int_mm() -> Callable[[Operands], Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(
        lambda x_q, w_q, x_scale, w_scale: cases.int_mm(Operands(x_q, w_q, x_scale, w_scale)),
        dynamic=True,  # not again for every shape
    )
    return lambda a: compiled(a.x_q, a.w_q, a.x_scale, a.w_scale)


def compiled_calls(sets: Sequence[Operands]) -> list[Call]:
    function = _compiled_int_mm()
    return [lambda a=a: function(a) for a in sets]


def to_fp8(a: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w in e4m3 and their scales [M, 1], [1, N]: every row's maximum becomes the type's largest number."""
    most = torch.finfo(FP8).max

    def rows(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        absmax = torch.maximum(q.amax(1), -q.amin(1)).float().clamp(min=1)  # of int8; -127 at least
        factor = most / absmax
        return scaled(q, factor, FP8, most), scale / factor

    (x, x_scale), (w, w_scale) = rows(a.x_q, a.x_scale), rows(a.w_q, a.w_scale)
    return x, w, x_scale[:, None].contiguous(), w_scale[None, :].contiguous()


def fp8_product(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """bfloat16 out, the one type that row scales take everywhere; accumulated fast, as FP8 inference is."""
    y: Tensor = torch._scaled_mm(
        x, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y


def fp8_calls(sets: Sequence[Operands]) -> list[Call]:
    converted = [to_fp8(a) for a in sets]
    return [lambda c=c: fp8_product(*c) for c in converted]


def triton_calls(sets: Sequence[Operands]) -> list[Call]:
    from benchmarks.lib import triton_int8

    plain = [(a.x_q, a.w_q, a.x_scale, a.w_scale) for a in sets]
    config = triton_int8.choose(plain, OUT_DTYPE)
    return [lambda p=p: triton_int8.scaled_mm(p, config, OUT_DTYPE) for p in plain]


def other_library(name: str, what: str, module: str, function: str) -> Baseline:
    """A function that takes a column-major weight and columns of scales."""

    def refusal(case: Case, device: torch.device) -> str:
        if reason := missing(module, function):
            return reason
        return "it needs a GPU" if device.type != "cuda" else _aligned(case)

    def calls(sets: Sequence[Operands]) -> list[Call]:
        call: Any = getattr(importlib.import_module(module), function)
        ready = [(a.x_q, a.w_q.t(), a.x_scale[:, None], a.w_scale[:, None]) for a in sets]
        return [lambda r=r: call(*r, out_dtype=OUT_DTYPE) for r in ready]

    return Baseline(name, what, refusal, calls, beyond_one_step)


# --- weights of 4 bits: another product of the same sizes --------------------------------------------------------------


def w4_weight(a: Operands) -> tuple[Tensor, Tensor]:
    """w_q4 and w_group of a's N and K: bits of w_q, and all steps from 1 with offsets around which the weights lie."""
    n, k = a.w_q.shape
    groups = reference.w4_groups(k)
    padded = F.pad(a.w_q, (0, groups * reference.W4_GROUP - k))
    bits = padded.view(n, groups, 2, -1)[:, :, 0].reshape(n, -1).view(torch.uint8)
    places = [torch.arange(size, device=bits.device) for size in (groups, n)]
    step = 1 + (places[0][:, None] + places[1]) % reference.W4_MAX
    return bits, torch.stack([step, -(reference.W4_MAX * step) // 2], -1).to(torch.int8)


def w4_calls(sets: Sequence[Operands]) -> list[Call]:
    def call(a: Operands, w_q4: Tensor, w_group: Tensor) -> Tensor:
        return ops.gemm_w4a8(a.x_q, w_q4, w_group, a.x_scale, a.w_scale, out_dtype=OUT_DTYPE)

    return [functools.partial(call, a, *w4_weight(a)) for a in sets]


def not_equal_w4(expected: Expected, a: Operands, y: Tensor) -> str:
    """As for int8, where `expected` looks."""
    case = expected.case
    if y.dtype != OUT_DTYPE or tuple(y.shape) != (case.m, case.n):
        return f"y is {y.dtype} {tuple(y.shape)}, not {OUT_DTYPE} {(case.m, case.n)}"
    w_q4, w_group = w4_weight(a)
    for rows, columns, _ in expected.parts:
        x_q, x_scale = a.x_q[rows], a.x_scale[rows]
        for some in columns.split(4096):
            right = reference.gemm_w4a8(
                x_q, w_q4[some], w_group[:, some], x_scale, a.w_scale[some], out_dtype=OUT_DTYPE
            )
            actual = y[rows][:, some]
            if not torch.equal(actual, right):
                return cases.differences(actual, right, rows, some)
    return ""


# --- all of them ------------------------------------------------------------------------------------------------------

#: Half a step, relative: of 11, 8 and 4 significant bits. float32 accumulates with less than the rounding of y; FP8's
#: fast accumulation keeps 13 bits after the point of the largest summand (an instruction multiplies 32 of K).
UNITS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, FP8: 2.0**-4}
FAST_ACCUMULATION = 2.0**-13


def _float(name: str, dtype: torch.dtype) -> Baseline:
    what = f"F.linear in {str(dtype).removeprefix('torch.')} (cuBLAS)"
    calls = functools.partial(float_calls, dtype=dtype)
    return Baseline(name, what, anywhere, calls, beyond_rounding(UNITS[dtype]))


ALL = (
    _float("fp16", torch.float16),
    _float("bf16", torch.bfloat16),
    Baseline(
        "int_mm", "torch._int_mm, dequantized eagerly", int_mm_refusal, int_mm_calls, not_equal
    ),
    Baseline(
        "int_mm_compiled", "the same through torch.compile", compiled_refusal, compiled_calls,
        not_equal, usual=False,
    ),
    Baseline(
        "fp8", "torch._scaled_mm, e4m3, a scale per row of x and w, fast accumulation, bfloat16 out",
        fp8_refusal, fp8_calls, beyond_rounding(UNITS[FP8], FAST_ACCUMULATION),
    ),
    Baseline(
        "triton", "triton_int8.py, the best of its configurations", triton_refusal, triton_calls,
        not_equal,
    ),
    other_library(
        "vllm", "vLLM's cutlass_scaled_mm", "vllm._custom_ops", "cutlass_scaled_mm"
    ),
    other_library("sgl", "sgl-kernel's int8_scaled_mm", "sgl_kernel", "int8_scaled_mm"),
    Baseline(
        "w4a8", "gemm_w4a8, weights of 4 bits and of the same sizes", anywhere, w4_calls, not_equal_w4, usual=False
    ),
)  # fmt: skip
NAMES = tuple(baseline.name for baseline in ALL)
USUAL = tuple(baseline.name for baseline in ALL if baseline.usual)
BY_NAME = {baseline.name: baseline for baseline in ALL}
