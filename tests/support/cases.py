"""Shapes, dtypes and rows on which kernels break, for every test that runs a kernel.

The operands do not depend on the backend: the CPU, the simulator and a GPU get the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smoothquant_kernels import W8A8Linear, reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

#: (M, K): zero, one and several rows; one, odd and even numbers of channels; vectors with and without a tail.
QUANTIZE_SHAPES = ((0, 8), (1, 1), (17, 1), (1, 31), (5, 7), (3, 513), (33, 64), (2, 4099))

#: (M, N, K): below, at and above the usual tiles, with odd and one-element sides.
GEMM_SHAPES = (
    (0, 3, 5),
    (1, 1, 1),
    (1, 64, 64),
    (4, 1, 1),
    (1, 3, 2048),
    (3, 17, 31),
    (16, 96, 64),
    (17, 33, 257),
    (65, 130, 100),
)

#: Every granularity of a scale that a quantizer takes. `quantize_options` supplies the scale of "static".
SCHEMES = ("token", "tensor", "static")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(m: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """[M, K] as in a language model: normally distributed, with a few channels a hundred times larger."""
    g = generator(seed)
    x = torch.randn(m, k, generator=g)
    x[:, torch.rand(k, generator=g) < 0.03] *= 100
    return x.to(dtype)


def inverse_smooth(k: int, seed: int = 0) -> Tensor:
    """[K] float32 reciprocals of smoothing factors, which are not powers of two."""
    return torch.rand(k, generator=generator(seed + 1)) * 1.9 + 0.1


def random_int8(*shape: int, seed: int = 0, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator(seed), dtype=torch.int8)


def quantize_options(scheme: str, scale: float = 0.013) -> dict[str, object]:
    """Keyword arguments of the quantizers for one of `SCHEMES`."""
    if scheme == "static":
        return {"scale": torch.tensor([scale])}
    return {"granularity": scheme}


# --- rows ---------------------------------------------------------------------------------------


def _ties(k: int, dtype: torch.dtype) -> Tensor:
    """Every tie between two integers, of both signs, under a scale of exactly 1."""
    row = torch.arange(k) % 253 - 126.0
    row = row + torch.where(row < 0, -0.5, 0.5)
    row[0] = 127.0
    return row


def _spike(k: int, dtype: torch.dtype) -> Tensor:
    """The only large value is the last one, which a vectorized maximum handles in its tail."""
    row = torch.full((k,), 0.01)
    row[-1] = -1000.0
    return row


def _mixed(k: int, dtype: torch.dtype) -> Tensor:
    """The largest number among the smallest."""
    row = torch.full((k,), torch.finfo(dtype).tiny)
    row[k // 2] = -torch.finfo(dtype).max
    return row


def _last(value: float) -> Callable[[int, torch.dtype], Tensor]:
    def row(k: int, dtype: torch.dtype) -> Tensor:
        result = torch.linspace(-2, 2, k)
        result[-1] = value
        return result

    return row


def _nan_then_large(k: int, dtype: torch.dtype) -> Tensor:
    """A maximum that compares with `>` loses the NaN when a larger value follows."""
    row = torch.linspace(1, 2, k)
    row[0] = torch.nan
    return row


_SMALLEST = torch.finfo(torch.float32).smallest_normal

#: name -> (K, dtype) -> float32 row, to be rounded to dtype.
FINITE_ROWS: dict[str, Callable[[int, torch.dtype], Tensor]] = {
    "zero": lambda k, dtype: torch.zeros(k),
    "minus_zero": lambda k, dtype: torch.full((k,), -0.0),
    "constant": lambda k, dtype: torch.full((k,), 3.25),
    "negative_constant": lambda k, dtype: torch.full((k,), -1e-3),
    "ties": _ties,
    "spike": _spike,
    "mixed": _mixed,
    "largest": lambda k, dtype: torch.full((k,), torch.finfo(dtype).max),
    "subnormal": lambda k, dtype: torch.full((k,), torch.finfo(dtype).tiny / 4),
    # In float16 these round to 0: only float32 and bfloat16 reach a scale that is subnormal.
    "scale_subnormal": lambda k, dtype: torch.full((k,), 126.0 * _SMALLEST),
    "scale_smallest": lambda k, dtype: torch.full((k,), 128.0 * _SMALLEST),
}
NONFINITE_ROWS: dict[str, Callable[[int, torch.dtype], Tensor]] = {
    "nan_last": _last(torch.nan),
    "inf_last": _last(torch.inf),
    "minus_inf_last": _last(-torch.inf),
    "nan_first": _nan_then_large,
    "all_nan": lambda k, dtype: torch.full((k,), torch.nan),
    "all_inf": lambda k, dtype: torch.full((k,), torch.inf),
}


def rows(
    table: dict[str, Callable[[int, torch.dtype], Tensor]], k: int, dtype: torch.dtype
) -> Tensor:
    """[len(table), K] dtype."""
    return torch.stack([make(k, dtype) for make in table.values()]).to(dtype)


# --- GEMM operands --------------------------------------------------------------------------------


class Gemm(NamedTuple):
    """Operands of `gemm_s8`."""

    x_q: Tensor
    w_q: Tensor
    x_scale: Tensor
    w_scale: Tensor
    bias: Tensor
    residual: Tensor


def gemm_operands(
    m: int,
    n: int,
    k: int,
    *,
    per_token: bool = True,
    per_channel: bool = True,
    dtype: torch.dtype = torch.float32,
    largest_weight: int = 128,
    seed: int = 0,
) -> Gemm:
    """Full-range operands with a row of -128 on each side. Their scales make outputs of the order of 1."""
    x_q = random_int8(m, k, seed=seed)
    high = min(largest_weight, 127)
    w_q = random_int8(n, k, seed=seed + 1, low=-largest_weight, high=high)
    if m > 1:
        x_q[-1] = -128
    if n > 1:
        w_q[-1] = -largest_weight
        w_q[0] = high
    g = generator(seed + 2)
    unit = 1.0 / (74.0 * k**0.5)
    return Gemm(
        x_q,
        w_q,
        (torch.rand(m if per_token else 1, generator=g) + 0.1) * unit,
        (torch.rand(n if per_channel else 1, generator=g) + 0.1) / 74.0,
        torch.randn(n, generator=g).to(dtype),
        torch.randn(m, n, generator=g).to(dtype),
    )


class W4Gemm(NamedTuple):
    """The operands of `gemm_w4a8`, in the order of its arguments."""

    x_q: Tensor
    w_q4: Tensor
    w_group: Tensor
    x_scale: Tensor
    w_scale: Tensor
    bias: Tensor
    residual: Tensor


def w4_operands(m: int, n: int, k: int, *, seed: int = 0, **options: Any) -> W4Gemm:
    """As `gemm_operands`: all values and steps, and offsets with which every weight is an int8."""
    x_q, _, x_scale, w_scale, bias, residual = gemm_operands(m, n, k, seed=seed, **options)
    g = generator(seed + 3)
    groups = reference.w4_groups(k)
    q = torch.randint(0, reference.W4_MAX + 1, (n, groups * reference.W4_GROUP), generator=g)
    step = torch.randint(0, reference.W4_MAX + 1, (groups, n), generator=g)
    place = torch.rand(groups, n, generator=g)
    offset = ((255.0 - reference.W4_MAX * step) * place).round() - 128
    w_group = torch.stack([step, offset], -1).to(torch.int8)
    # Values beyond K, which no kernel may read as anything but 0 times something.
    return W4Gemm(x_q, reference.pack_w4(q), w_group, x_scale, w_scale, bias, residual)


class ExpertGemm(NamedTuple):
    """The operands of `grouped_gemm_s8`, in the order of its arguments, and those of `combine_experts`."""

    x_q: Tensor
    w_q: Tensor
    x_scale: Tensor
    w_scale: Tensor
    offsets: Tensor
    rows: Tensor
    bias: Tensor
    position: Tensor
    weights: Tensor


def expert_operands(
    tokens: int,
    experts: int,
    n: int,
    k: int,
    *,
    choices: int = 2,
    counts: Sequence[int] | None = None,
    elsewhere: int = 0,
    seed: int = 0,
) -> ExpertGemm:
    """Tokens that choose experts at random, or so that expert e has `counts[e]` of them.

    Args:
        elsewhere: how many of the choices name an expert of another process. `counts` leaves them out.
    """
    g = generator(seed + 5)
    if counts is None:
        chosen = torch.randint(0, experts, (tokens * choices,), generator=g)
        chosen[torch.randperm(len(chosen), generator=g)[:elsewhere]] = experts
    else:
        chosen = torch.repeat_interleave(
            torch.arange(len(counts) + 1), torch.tensor([*counts, elsewhere])
        )
        chosen = chosen[torch.randperm(len(chosen), generator=g)]
        tokens = len(chosen) // choices
    order, position, offsets = reference.sort_by_expert(chosen.view(tokens, choices), experts)
    rows = tokens * choices
    weights = [gemm_operands(1, n, k, seed=seed + 7 * e) for e in range(experts)]
    return ExpertGemm(
        gemm_operands(tokens, 1, k, seed=seed).x_q,
        torch.stack([w.w_q for w in weights]),
        gemm_operands(rows, 1, k, seed=seed + 1).x_scale,
        torch.stack([w.w_scale for w in weights]),
        offsets,
        order // choices,
        torch.stack([w.bias for w in weights]),
        position,
        torch.rand(tokens, choices, generator=g),
    )


def covering(count: int, seed: int, **dimensions: Sequence[Any]) -> list[dict[str, Any]]:
    """`count` cases in which each value of a dimension occurs equally often, in a reproducible shuffled order."""
    g = generator(seed)
    columns = []
    for values in dimensions.values():
        order = torch.randperm(count, generator=g).tolist()
        columns.append([values[i % len(values)] for i in order])
    return [dict(zip(dimensions, row, strict=True)) for row in zip(*columns, strict=True)]


#: The placeholder for the CPU's GEMM, which has no tiles.
NO_TILE = {
    "tile": -1, "name": "none", "kernel": "cpu", "m": 16, "n": 16, "k": 32, "stages": 2, "cluster": [1, 1],
    "most_splits": 1,
}  # fmt: skip


def k_of_all_stages(tile: dict[str, Any]) -> int:
    """The K at which a block (a streaming kernel: each of its 16 warps) has filled each of its stages once."""
    stage: int = tile["stages"] * tile["k"]
    return stage or 16 * 3 * 128


def gemm_sizes(tile: dict[str, Any]) -> dict[str, list[int]]:
    """M, N and K for a tile: one, below, at and above its edges, and several tiles and clusters."""
    sizes = {}
    for side, cluster, odd in (("m", tile["cluster"][0], 3), ("n", tile["cluster"][1], 7)):
        edge = tile[side]
        sizes[side] = sorted({1, odd, edge - 1, edge, edge + 1, 2 * edge * cluster + odd})
    if tile["kernel"] == "stream":
        sizes["m"] = [m for m in sizes["m"] if m <= tile["m"]]
    return {**sizes, "k": [1, 31, 100, tile["k"], tile["k"] + 1, k_of_all_stages(tile) + 33]}


# --- layers -----------------------------------------------------------------------------------------


def float_linear(k: int, n: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias)


def quantized(linear: nn.Module, scheme: str = "per_token", **options: Any) -> W8A8Linear:
    if scheme == "static":
        options.setdefault("x_scale", 0.02)
    return W8A8Linear.from_linear(linear, activation_scheme=scheme, **options)
