"""Problems for `decode_attention_s8`, and how far a kernel may be from the reference.

The reference has exact scores in float32, and the softmax and the sum over tokens in float64. A kernel may multiply the
same factors in another order, take exponentials of base 2, sum in float32 and, as the CUDA kernel does, round the
weights to float16. `expected` derives a bound for each output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels import reference
from tests.support import cases
from tests.support.compare import count_result

U = 2.0**-24
#: A token that does not exist: a kernel that reads it gives a NaN, or a sum that is wrong.
GARBAGE, GARBAGE_SCALE = -128, float("nan")
#: Half a unit in the last place of 1, and the smallest step near 0, of an output's type.
ROUNDING = {
    torch.float32: (U, 2.0**-149),
    torch.float16: (2.0**-11, 2.0**-24),
    torch.bfloat16: (2.0**-8, 2.0**-133),
}


def table_of(lengths: list[int], entries: int, size: int, blocks: int, seed: int = 0) -> Tensor:
    """A shuffled block table, with numbers of no block behind the end of each sequence."""
    order = torch.randperm(blocks, generator=cases.generator(seed)).tolist()
    table = torch.full((len(lengths), entries), 2**31 - 1, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for entry in range(-(-length // size)):
            table[row, entry] = order.pop()
    return table


def problem(
    lengths: list[int] | None = None,
    batch: int = 2,
    heads: int = 2,
    group: int = 1,
    tokens: int = 1,
    dim: int = 64,
    size: int = 80,
    dtype: torch.dtype = torch.float16,
    static: bool = False,
    smooth: bool = False,
    paged: int = 0,
    seed: int = 0,
    **given: Any,
) -> dict[str, Any]:
    """The arguments of a call, on a CPU.

    Args:
        lengths: of the sequences, or None.
        batch, heads, group, tokens, dim, size, dtype: heads are those of the keys, size the positions of a sequence.
        static: no scales in the cache.
        smooth: factors besides scales.
        paged: entries of a block table, or 0.
        seed: of all values.
        given: more arguments of the op.
    """
    g = cases.generator(seed)
    blocks = batch * paged + 3 if paged else batch
    shape = (blocks, heads, size)
    padded = reference.padded_k(dim, reference.HEAD_MULTIPLE)
    made: dict[str, Any] = {
        "q": torch.randn(batch, heads * group, tokens, dim, generator=g).to(dtype),
        "scale": dim**-0.5,
    }
    for half in ("k", "v"):
        cache = torch.randint(-127, 128, (*shape, padded), dtype=torch.int8, generator=g)
        cache[..., dim:] = 0
        made[f"{half}_cache"] = cache
        if not static:
            made[f"{half}_scale"] = torch.rand(shape, generator=g) * 0.02 + 0.01
        if static or smooth:
            factor = 0.02 if static else 1.0
            made[f"{half}_smooth"] = (torch.rand(heads, dim, generator=g) + 0.5) * factor
    if lengths is not None:
        made["lengths"] = torch.tensor(lengths, dtype=torch.int32)
        if paged:
            made["block_table"] = table_of(lengths, paged, size, blocks, seed)
        hide(made, lengths, ring=given.get("ring", False))
    return {**made, **given}


def hide(made: dict[str, Any], lengths: list[int], ring: bool = False) -> None:
    """Puts garbage wherever no token is."""
    exists = torch.zeros(made["k_cache"].shape[0], made["k_cache"].shape[2], dtype=torch.bool)
    size = exists.shape[1]
    table = made.get("block_table")
    for row, length in enumerate(lengths):
        for p in range(min(length, size if table is None else length)):
            block = row if table is None else int(table[row, p // size])
            if 0 <= block < len(exists):
                exists[block, p % size] = True
    assert not ring or table is None
    for half in ("k", "v"):
        made[f"{half}_cache"].masked_fill_(~exists[:, None, :, None], GARBAGE)
        if made.get(f"{half}_scale") is not None:
            made[f"{half}_scale"].masked_fill_(~exists[:, None], GARBAGE_SCALE)


@dataclass(frozen=True)
class Expected:
    """The reference's float32 outputs, and the bound on a kernel's distance from them before it rounds to q's dtype."""

    y: Tensor
    bound: Tensor


def expected(given: dict[str, Any], weight: float = 2.0**-11, least: float = 2.0**-25) -> Expected:
    """The reference's outputs and the bound.

    `weight` is the relative error of rounding a weight, `least` that of the smallest ones, as a part of the largest.

    A weight's relative error: 16 roundings of the score's factors, times the score, because it is an exponent; 2^-21
    for two exponentials; 2^-11 for float16. A weight below float16's normal range is off by 2^-25 of the largest one.
    On a GPU a sum over n tokens rounds n / 16 times in a product of 16 tokens, and as often when the maximum grows;
    merging warps and splits adds fewer than 80 roundings; hardware may cut off instead of rounding. On a CPU 256 tokens
    are added one by one, then tiles and parts, fewer than 100: less. The denominator has the same errors but for
    float16. A rotation adds up the bounds of its group.
    """
    y = reference.decode_attention_s8(**{**given, "q": given["q"].float()})
    rotation, scale = given.get("rotation", 0), given["scale"]
    q = given["q"].float()
    group = q.shape[1] // given["k_cache"].shape[1]
    groups = max(rotation, 1)
    if given.get("k_smooth") is not None:
        q = q * given["k_smooth"].repeat_interleave(group, 0)[:, None]
    q_q, q_scale = reference.quantize(q, rotation=rotation)
    dequantized = q_q.float() * q_scale.view(*q.shape[:-1], 1)
    plain = {
        **given, "q": dequantized, "scale": scale / groups, "rotation": 0, "k_smooth": None, "v_smooth": None
    }  # fmt: skip

    def total(v: Tensor) -> Tensor:  # of weight * v
        found = reference.decode_attention_s8(**{**plain, "v_cache": v})
        return torch.where(found.isfinite(), found, 0.0).double()

    sums = total(given["v_cache"].int().abs().clamp(max=127).to(torch.int8))
    ones = total(torch.ones_like(given["v_cache"]))
    n = reference.kv_capacity(given["k_cache"], given.get("block_table"))
    k_scale = given.get("k_scale")
    top = 1.0 if k_scale is None else min(1e3, float(k_scale.nan_to_num(0, 0, 0).abs().max()))
    finite = torch.where(dequantized.isfinite(), dequantized, 0.0).double()
    score = finite.abs().sum(-1, keepdim=True) * 128 * top * abs(scale) / groups
    relative = weight + 2 * (16 * U * score + 2.0**-21) + 8 * U * (n / 16 + 80)
    bound = relative * sums + n * least * 127 * ones
    if rotation:
        wide = bound.unflatten(-1, (bound.shape[-1] // rotation, rotation)).sum(-1, keepdim=True)
        bound = (wide * (1 + 20 * U) / rotation).expand(*wide.shape[:-1], rotation).flatten(-2)
        bound = bound + 20 * U * y.nan_to_num(0, 0, 0).abs().double()
    if given.get("v_smooth") is not None:
        bound = bound * given["v_smooth"].repeat_interleave(group, 0)[:, None].double().abs()
    return Expected(y, bound + 4 * U * y.nan_to_num(0, 0, 0).abs().double() + 2.0**-126)


def assert_close(found: Tensor, want: Expected, what: str = "") -> None:
    """Compares outputs; where the reference has a NaN or Inf, the kernel must have one too."""
    assert found.shape == want.y.shape, what
    finite = want.y.isfinite()
    there = found.cpu().double()
    assert bool((there.isfinite() == finite).all()), f"{what}: NaN or Inf in other places"
    relative, step = ROUNDING[found.dtype]
    y = torch.where(finite, want.y.double(), 0.0)
    bound = want.bound * (1 + relative) + relative * y.abs() + step
    distance = (torch.where(finite, there, 0.0) - y).abs()
    worst = float((distance / bound).max()) if distance.numel() else 0.0
    assert worst <= 1, f"{what}: {worst} times the bound, distance {float(distance.max())}"
    count_result()
