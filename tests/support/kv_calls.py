"""Calls of `kv_append`: arguments, and comparisons of all that it may write with the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.support import cases
from tests.support.backends import Backend
from tests.support.compare import assert_bitwise_equal, count_result

#: What stands in a cache before: a byte and a scale that no test writes.
POISON, POISON_SCALE = -128, -5.0


def largest_rotation(*dims: int) -> int:
    """The largest group that divides all of these, or 0."""
    group = min(dim & -dim for dim in dims)
    return group if group > 1 else 0


def cache_of(blocks: int, heads: int, size: int, dim: int) -> Tensor:
    padded = reference.padded_k(dim, reference.HEAD_MULTIPLE)
    return torch.full((blocks, heads, size, padded), POISON, dtype=torch.int8)


def values(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    rows = cases.activations(batch * heads * tokens, dim, dtype, seed)
    return rows.view(batch, heads, tokens, dim)


def factors(heads: int, dim: int, seed: int) -> Tensor:
    return cases.inverse_smooth(heads * dim, seed).view(heads, dim)


def rope_tables(rows: int, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Any:
    angle = torch.rand(rows, tokens, width, generator=cases.generator(5)) * 7
    return {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}


def shuffled_table(batch: int, entries: int, blocks: int, seed: int = 0) -> Tensor:
    order = torch.randperm(blocks, generator=cases.generator(seed))[: batch * entries]
    return order.view(batch, entries).to(torch.int32)


def problem(
    batch: int = 2,
    heads: int = 3,
    tokens: int = 5,
    dim: int = 64,
    v_dim: int | None = None,
    size: int = 24,
    blocks: int | None = None,
    dtype: torch.dtype = torch.float16,
    static: bool = False,
    smooth: bool = False,
    **given: Any,
) -> dict[str, Any]:
    """The arguments of a call, on a CPU."""
    v_dim = dim if v_dim is None else v_dim
    blocks = batch if blocks is None else blocks
    made: dict[str, Any] = {
        "k": values(batch, heads, tokens, dim, dtype, 0),
        "v": values(batch, heads, tokens, v_dim, dtype, 1),
        "k_cache": cache_of(blocks, heads, size, dim),
        "v_cache": cache_of(blocks, heads, size, v_dim),
    }
    if not static:
        for name in ("k_scale", "v_scale"):
            made[name] = torch.full((blocks, heads, size), POISON_SCALE)
    if static or smooth:
        made["k_inv_smooth"] = factors(heads, dim, 2) * (40 if static else 1)
        made["v_inv_smooth"] = factors(heads, v_dim, 3) * (40 if static else 1)
    return {**made, **given}


WRITTEN = ("k_cache", "v_cache", "k_scale", "v_scale")


def compare(found: dict[str, Any], expected: dict[str, Any], what: str = "") -> None:
    for name in WRITTEN:
        if expected.get(name) is not None:
            assert_bitwise_equal(found[name].cpu(), expected[name], f"{what} {name}")
    count_result()


def check(backend: Backend, what: str = "", **given: Any) -> dict[str, Any]:
    """Runs a call, compares all that it may write, and returns its arguments on the device."""
    on_cpu = problem(**given)
    on_device = append(backend, on_cpu)
    reference.kv_append(**on_cpu)
    compare(on_device, on_cpu, what or str(given))
    return on_device


def append(backend: Backend, on_cpu: dict[str, Any]) -> dict[str, Any]:
    """Runs a call with copies of its tensors on the device, and returns these."""
    copies = {name: t.clone() if isinstance(t, Tensor) else t for name, t in on_cpu.items()}
    on_device = backend.move(copies)
    ops.kv_append(**on_device)
    return on_device


def positions(*first: int) -> Tensor:
    return torch.tensor(first, dtype=torch.int32)
