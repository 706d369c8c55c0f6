"""An INT8 GEMM with fused dequantization in Triton: what a good afternoon's kernel reaches, to compare with.

Pointers and masks (cp.async, not TMA), programs in groups that share rows of w in the L2 cache, int32 accumulation,
`acc * w_scale * x_scale` in float32 and one rounding: the specification, to the last bit. For few tokens several
programs share one tile's K; they leave int32 partial sums, which a second kernel adds and dequantizes. The
configuration is chosen for every shape and number of tokens by timing all of CONFIGS that fit, as the benchmark times.
Triton is imported when this module is: import it where that may fail.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.lib import timer

#: Triton's interpreter runs the kernels on CPU tensors: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Config:
    """A tile, how many programs share its K, and how Triton pipelines it."""

    m: int
    n: int
    k: int
    splits: int
    warps: int
    stages: int

    def __str__(self) -> str:
        shared = f" /{self.splits}" if self.splits > 1 else ""
        return f"{self.m}x{self.n}x{self.k}{shared} warps {self.warps} stages {self.stages}"


#: Few tokens: bandwidth, so narrow tiles, long pieces of K, and programs enough to fill the GPU.
FEW = tuple(
    Config(16, n, k, splits, 4, stages)
    for n, k, stages in ((32, 256, 4), (64, 128, 5), (64, 256, 3))
    for splits in (1, 4)
)
MEDIUM = (
    Config(32, 64, 128, 1, 4, 4),
    Config(32, 64, 128, 4, 4, 4),
    Config(64, 64, 128, 1, 4, 4),
    Config(64, 128, 128, 1, 4, 4),
    Config(64, 128, 128, 4, 4, 4),
    Config(128, 64, 128, 1, 4, 4),
)
MANY = (
    Config(128, 128, 128, 1, 8, 3),
    Config(128, 128, 128, 1, 4, 3),
    Config(128, 128, 64, 1, 4, 4),
    Config(128, 256, 128, 1, 8, 3),
    Config(128, 256, 64, 1, 8, 4),
    Config(256, 128, 128, 1, 8, 3),
    Config(256, 128, 64, 1, 8, 4),
)
CONFIGS = FEW + MEDIUM + MANY
#: Rows of tiles whose programs run together, so that they find w and x in the L2 cache.
GROUP = 8


def configs(m: int, k: int) -> tuple[Config, ...]:
    """Those worth trying for m tokens; a K is shared only where every program has two pieces of it or more."""
    found = FEW if m <= 16 else FEW + MEDIUM if m <= 64 else MEDIUM + MANY if m <= 512 else MANY
    return tuple(c for c in found if c.splits == 1 or k >= 2 * c.k * c.splits)


@triton.jit(do_not_specialize=["m"])
def _product(
    x, w, x_scale, w_scale, y, partial,
    m, n, k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    in_group = GROUP * tiles_n
    first = (program // in_group) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + (program % in_group) % height
    tile_n = (program % in_group) // height

    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    at_k = tl.arange(0, BK)
    # What lies beyond m and n is read from the start again, and not written.
    x_at = x + (rows % m).to(tl.int64)[:, None] * k + at_k[None, :]
    w_at = w + (columns % n).to(tl.int64)[None, :] * k + at_k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    pieces = tl.cdiv(k, BK)
    each = tl.cdiv(pieces, SPLITS)
    begin = split * each
    x_at += begin * BK
    w_at += begin * BK
    for piece in range(begin, tl.minimum(begin + each, pieces)):
        if EVEN_K:
            a, b = tl.load(x_at), tl.load(w_at)
        else:
            left = k - piece * BK
            a = tl.load(x_at, mask=at_k[None, :] < left, other=0)
            b = tl.load(w_at, mask=at_k[:, None] < left, other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        x_at += BK
        w_at += BK

    inside = (rows < m)[:, None] & (columns < n)[None, :]
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    if SPLITS == 1:
        by_column = tl.load(w_scale + columns, mask=columns < n, other=0.0)
        by_row = tl.load(x_scale + rows, mask=rows < m, other=0.0)
        value = acc.to(tl.float32) * by_column[None, :] * by_row[:, None]
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(partial + split.to(tl.int64) * m * n + at, acc, mask=inside)


@triton.jit(do_not_specialize=["m"])
def _finish(partial, x_scale, w_scale, y, m, n, SPLITS: tl.constexpr, BN: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = columns < n
    at = row.to(tl.int64) * n + columns
    acc = tl.zeros((BN,), dtype=tl.int32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial + split * (m * n).to(tl.int64) + at, mask=inside, other=0)
    by_column = tl.load(w_scale + columns, mask=inside, other=0.0)
    value = acc.to(tl.float32) * by_column * tl.load(x_scale + row)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


FINISH_BLOCK = 512


Arguments = tuple[Tensor, Tensor, Tensor, Tensor]  # x_q, w_q, x_scale, w_scale
#: A kernel, its grid, its arguments, those fixed at compile time and Triton's own options.
Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


def _launches(operands: Arguments, config: Config, y: Tensor) -> Iterator[Launch]:
    x_q, w_q, x_scale, w_scale = operands
    (m, k), n = x_q.shape, w_q.shape[0]
    split = config.splits > 1
    partial = y.new_empty(config.splits, m, n, dtype=torch.int32) if split else y
    grid = (triton.cdiv(m, config.m) * triton.cdiv(n, config.n), config.splits)
    fixed = {"BM": config.m, "BN": config.n, "BK": config.k, "SPLITS": config.splits}
    fixed |= {"GROUP": GROUP, "EVEN_K": k % config.k == 0}
    fixed |= {"num_warps": config.warps, "num_stages": config.stages}
    yield _product, grid, (x_q, w_q, x_scale, w_scale, y, partial, m, n, k), fixed
    if split:
        fixed = {"SPLITS": config.splits, "BN": FINISH_BLOCK}
        grid = (m, triton.cdiv(n, FINISH_BLOCK))
        yield _finish, grid, (partial, x_scale, w_scale, y, m, n), fixed


def scaled_mm(operands: Arguments, config: Config, dtype: torch.dtype) -> Tensor:
    """`gemm_s8` by one configuration; x_q [M, K], w_q [N, K] and both scales contiguous."""
    x_q, w_q, *_ = operands
    y = torch.empty(x_q.shape[0], w_q.shape[0], dtype=dtype, device=x_q.device)
    for kernel, grid, arguments, fixed in _launches(operands, config, y):
        kernel[grid](*arguments, **fixed)
    return y


# --- the choice -------------------------------------------------------------------------------------------------------

_chosen: dict[tuple[int, int, int], Config] = {}


def choose(sets: Sequence[Arguments], dtype: torch.dtype) -> Config:
    """The fastest configuration for the shape, timed on the sets as the benchmark times; remembered.

    Raises:
        RuntimeError: none runs on this GPU.
    """
    (m, k), n = sets[0][0].shape, sets[0][1].shape[0]
    if (m, n, k) in _chosen:
        return _chosen[m, n, k]
    found = configs(m, k)
    device = sets[0][0].device
    if device.type != "cuda":  # the interpreter's times mean nothing
        return found[0]
    # It only saves time: what fails here fails, with its reason, below.
    with contextlib.suppress(Exception):
        _compile(sets[0], found, dtype)
    times, refused = {}, ""
    for config in found:
        try:
            calls = [lambda a=a, c=config: scaled_mm(a, c, dtype) for a in sets]
            alone = {"": timer.record(calls, device)}
            times[config] = timer.measure(alone, device=device, seconds=0, least=3, most=3)[""]
        except Exception as error:  # more shared memory than the GPU has
            refused = str(error)
    if not times:
        raise RuntimeError(f"no configuration of the Triton kernel runs here: {refused}")
    _chosen[m, n, k] = min(times, key=lambda config: times[config].us)
    return _chosen[m, n, k]


def _compile(operands: Arguments, found: Sequence[Config], dtype: torch.dtype) -> None:
    """All of them at once, on as many threads; without it each is compiled when it first runs."""
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:
        return
    x_q, w_q, *_ = operands
    y = torch.empty(x_q.shape[0], w_q.shape[0], dtype=dtype, device=x_q.device)
    with ThreadPoolExecutor(len(found)) as threads, mode(threads, ignore_errors=True):
        for config in found:
            for kernel, grid, arguments, fixed in _launches(operands, config, y):
                kernel.warmup(*arguments, grid=grid, **fixed)
