"""The writer of an int8 cache: every byte of the cache and of the scales as the reference writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from smoothquant_kernels.ops import cache_checks
from tests.support import cases
from tests.support.backends import Backend
from tests.support.kv_calls import (
    WRITTEN,
    append,
    check,
    compare,
    largest_rotation,
    positions,
    problem,
    rope_tables,
    shuffled_table,
)

#: Channels of a head: one, a vector with and without a tail, and the limits of 8, 16 and 32 lanes.
DIMS = (1, 16, 63, 64, 80, 100, 128, 129, 256)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_smoke_kv_append(backend: Backend, dtype: torch.dtype) -> None:
    check(backend, dtype=dtype)
    check(backend, dtype=dtype, smooth=True, rotation=64, positions=positions(7, 0))
    check(backend, dtype=dtype, static=True, dim=100, v_dim=17, **rope_tables(1, 5, 50))
    table = shuffled_table(2, 3, 8)
    paged = {"size": 4, "blocks": 8, "block_table": table, "positions": positions(3, 6)}
    check(backend, dtype=dtype, **paged, **rope_tables(2, 5, 64, dtype), rotation=16)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("tokens", [1, 17])
def test_every_head(backend: Backend, dim: int, tokens: int, dtype: torch.dtype) -> None:
    for v_dim in (dim, 48):
        sizes: dict[str, Any] = {"dim": dim, "v_dim": v_dim, "tokens": tokens, "dtype": dtype}
        group = largest_rotation(dim, v_dim)
        check(backend, **sizes, rotation=group, smooth=True, positions=positions(1, 7))
        check(backend, **sizes, static=True)
        if dim > 1:
            check(backend, **sizes, **rope_tables(1, tokens, dim // 2 * 2, dtype))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_rotation(backend: Backend, dim: int) -> None:
    group = 2
    while group <= dim:
        for smooth in (False, True):
            check(backend, dim=dim, rotation=group, smooth=smooth)
            check(backend, dim=dim, v_dim=3 * group if 3 * group <= 256 else group, rotation=group)
        group *= 2


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize(
    ("dim", "width"),
    [(2, 2), (64, 64), (64, 32), (80, 80), (80, 20), (100, 50), (128, 126), (256, 256)],
)
def test_rope(backend: Backend, dim: int, width: int, dtype: torch.dtype) -> None:
    """All channels or the first ones; of both dtypes; one table for all sequences or one for each."""
    group = largest_rotation(dim)
    for rows in (1, 2):
        for of_tables in (torch.float32, dtype):
            tables = rope_tables(rows, 5, width, of_tables)
            check(backend, dim=dim, dtype=dtype, **tables, smooth=rows == 2, rotation=group)


def test_the_order_of_the_operations(backend: Backend) -> None:
    """Rope, then the factors, then the rotation: other orders round differently, or mean something else."""
    on_cpu = problem(dim=128, tokens=17, smooth=True, rotation=128, **rope_tables(2, 17, 128))
    on_device = append(backend, on_cpu)
    reference.kv_append(**on_cpu)
    compare(on_device, on_cpu)
    turned = reference.rope(on_cpu["k"].float(), on_cpu["cos"], on_cpu["sin"])
    rotated = reference.rotate(turned, 128) * on_cpu["k_inv_smooth"][:, None]
    early = reference.rope(
        on_cpu["k"].float() * on_cpu["k_inv_smooth"][:, None], on_cpu["cos"], on_cpu["sin"]
    )
    for other in (rotated, reference.rotate(early, 128)):
        x_q, _ = reference.quantize(other)
        assert not torch.equal(x_q, on_cpu["k_cache"][:, :, :17])


@pytest.mark.parametrize("size", [5, 17, 64])
def test_a_ring_keeps_the_newest(backend: Backend, size: int) -> None:
    for first in (0, 1, size - 1, size, 3 * size + 2, 2**31 - 40):
        where = positions(first, first // 2)
        for tokens in (1, size):
            check(
                backend, size=size, tokens=tokens, positions=where, ring=True, dim=80, rotation=16
            )
        check(backend, size=size, tokens=size, positions=where, ring=True, static=True)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_blocks(backend: Backend, size: int) -> None:
    """Shuffled tables, positions that begin and end within blocks, and blocks that nobody has."""
    for seed, tokens in enumerate((1, 7, 2 * size)):
        entries = -(-(tokens + size) // size) + 1
        paged = {
            "batch": 3,
            "blocks": 3 * entries + 2,
            "block_table": shuffled_table(3, entries, 3 * entries + 2, seed),
            "positions": positions(0, size - 1, size),
        }
        check(backend, size=size, tokens=tokens, **paged, rotation=64)
        check(backend, size=size, tokens=tokens, **paged, static=True, dim=100, v_dim=33)
    # Two tables whose entries may be anything where no token goes.
    table = torch.tensor([[2, -7], [0, 99]], dtype=torch.int32)
    check(backend, size=size, tokens=1, blocks=3, block_table=table)


@pytest.mark.parametrize("ring", [False, True])
def test_a_token_without_a_place_is_not_written(compiled: Backend, ring: bool) -> None:
    """On a GPU the host does not know the positions. Neighbors in memory stay as they are."""
    least, most = -(2**31), 2**31 - 1
    for where in ((-1, 3), (least, most), (20, -3), (24, 0), (22, most - 2)):
        given = {"size": 24, "positions": positions(*where), "ring": ring, "rotation": 32}
        on_cpu = problem(**given)
        on_device = append(compiled, on_cpu)
        _write_what_fits(on_cpu, on_cpu["k_cache"].shape[2], None)
        compare(on_device, on_cpu, str(where))


def test_blocks_that_do_not_exist(compiled: Backend) -> None:
    tables = ([[0, -1], [4, 2]], [[-(2**31), 1], [2**31 - 1, 3]], [[5, 6], [3, 0]])
    for table in tables:
        for where in ((0, 3), (1, -2), (5, 100)):
            given = {
                "size": 4, "blocks": 5, "tokens": 6,
                "block_table": torch.tensor(table, dtype=torch.int32), "positions": positions(*where),
            }  # fmt: skip
            for static in (False, True):
                on_cpu = problem(**given, static=static)
                on_device = append(compiled, on_cpu)
                _write_what_fits(on_cpu, 8, on_cpu["block_table"])
                compare(on_device, on_cpu, f"{table} {where}")


def _write_what_fits(call: dict[str, Any], capacity: int, table: Tensor | None) -> None:
    """The reference, for the tokens that have a place, one by one."""
    ring = call.get("ring", False)
    size, blocks = call["k_cache"].shape[2], call["k_cache"].shape[0]
    for b in range(len(call["k"])):
        first = int(call["positions"][b])
        for t in range(call["k"].shape[2]):
            where = first + t
            if first < 0 or (not ring and where >= capacity):
                continue
            one = {**call, "k": call["k"][b : b + 1, :, t : t + 1]}
            one |= {"v": call["v"][b : b + 1, :, t : t + 1], "positions": torch.tensor([where])}
            if table is None:
                one |= {n: call[n][b : b + 1] for n in WRITTEN if call.get(n) is not None}
            elif not 0 <= int(table[b, where // size]) < blocks:
                continue
            else:
                one["block_table"] = table[b : b + 1]
            reference.kv_append(**one)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_views(backend: Backend, dtype: torch.dtype) -> None:
    """Tokens as projections write them, rows that start anywhere, one head for all, and slices of a cache."""
    for dim in (64, 100):
        on_cpu = problem(dim=dim, dtype=dtype, **rope_tables(1, 5, dim // 2, dtype))
        reference.kv_append(**on_cpu)
        k, v = on_cpu["k"], on_cpu["v"]
        for name, view in (
            ("rows of a token", _of_tokens),
            ("unaligned", _unaligned),
            ("wide", _wide),
        ):
            fresh = backend.move(
                problem(dim=dim, dtype=dtype, **rope_tables(1, 5, dim // 2, dtype))
            )
            fresh |= {"k": view(backend, k), "v": view(backend, v)}
            fresh |= {n: view(backend, fresh[n][None].cpu())[0] for n in ("cos", "sin")}
            ops.kv_append(**fresh)
            compare(fresh, on_cpu, f"{dim} {name}")
    # One head, or one token, repeated by strides of 0.
    one = problem(dtype=dtype)
    for repeated in (
        one["k"][:, :1].expand(-1, 3, -1, -1),
        one["k"][:, :, :1].expand(-1, -1, 5, -1),
    ):
        expected = problem(dtype=dtype, k=repeated, v=repeated)
        reference.kv_append(**expected)
        found = backend.move(problem(dtype=dtype))
        least = [1 if repeated.stride(d) == 0 else n for d, n in enumerate(repeated.shape)]
        once = repeated.as_strided(least, repeated.stride())
        on_device = backend.put(once).expand(repeated.shape)
        found |= {"k": on_device, "v": on_device}
        ops.kv_append(**found)
        compare(found, expected, "repeated")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_unaligned_stride(backend: Backend, axis: int) -> None:
    """Of sequences, heads or tokens; all rows start somewhere else in their 16 bytes. Then of the rope's tables."""
    on_cpu = problem(**rope_tables(2, 5, 64, torch.float16))
    reference.kv_append(**on_cpu)
    for names in (("k", "v"), ("cos", "sin")[: 2 * (axis != 1)]):
        moved = backend.move(problem(**rope_tables(2, 5, 64, torch.float16)))
        for name in names:
            x = moved[name]
            strides = [4096, 64] if x.dim() == 3 else [4096, 1024, 64]
            strides[min(axis, len(strides) - 1)] += 1
            buffer = backend.put(torch.zeros(10_000, dtype=x.dtype))
            moved[name] = buffer.as_strided(x.shape, (*strides, 1)).copy_(x)
        ops.kv_append(**moved)
        compare(moved, on_cpu, f"{axis} {names}")


def _of_tokens(backend: Backend, x: Tensor) -> Tensor:
    """[B, T, H, D] in memory."""
    return backend.put(x.transpose(1, 2)).transpose(1, 2)


def _unaligned(backend: Backend, x: Tensor) -> Tensor:
    buffer = backend.put(torch.zeros(x.numel() + 1, dtype=x.dtype))
    view = buffer[1:].view(x.shape)
    view.copy_(x)
    return view


def _wide(backend: Backend, x: Tensor) -> Tensor:
    """Between other channels, whose number makes every second row unaligned."""
    buffer = backend.put(torch.full((*x.shape[:3], x.shape[3] + 12), torch.nan, dtype=x.dtype))
    view = buffer[..., 4:-8]
    view.copy_(x)
    return view


def test_slices_of_a_cache(backend: Backend) -> None:
    """Strides of blocks and heads. What lies between and around is not touched."""
    on_cpu = problem(size=40)
    wide = {n: torch.cat([on_cpu[n], on_cpu[n]], 1) for n in WRITTEN}
    on_device = {n: backend.put(t) for n, t in wide.items()}

    def of(t: Tensor) -> Tensor:
        return t[:, 1:6:2, 3:19]

    call = {n: backend.put(on_cpu[n]) for n in ("k", "v")}
    ops.kv_append(**call, **{n: of(t) for n, t in on_device.items()}, positions=None, rotation=64)
    reference.kv_append(
        on_cpu["k"], on_cpu["v"], **{n: of(t) for n, t in wide.items()}, rotation=64
    )
    compare(on_device, wide)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("dim", [63, 64, 128])
def test_edge_rows(backend: Backend, dim: int, dtype: torch.dtype) -> None:
    """Ties, zeros, subnormal numbers, NaN and Inf. A broken token spoils no other."""
    rows = torch.cat([cases.rows(t, dim, dtype) for t in (cases.FINITE_ROWS, cases.NONFINITE_ROWS)])
    for first, last in ((rows, rows.flip(0)), (rows.flip(0), rows)):
        tokens = {"k": first[None, None].clone(), "v": last[None, None].clone()}
        sizes = {"batch": 1, "heads": 1, "tokens": len(rows), "dim": dim, "dtype": dtype, **tokens}
        found = check(backend, **sizes)
        assert not found["k_scale"][..., : len(rows)].isfinite().all()
        check(backend, **sizes, rotation=largest_rotation(dim), smooth=True)
        check(backend, **sizes, static=True)
        check(backend, **sizes, static=True, **rope_tables(1, len(rows), 62))


def test_random_bits(backend: Backend) -> None:
    g = cases.generator(0)
    bits = torch.randint(-(2**31), 2**31, (1, 2, 60, 64), generator=g).to(torch.int32)
    for scale in (1.0, 2.0**-20):
        x = bits.view(torch.float32) * scale
        given = {"batch": 1, "heads": 2, "tokens": 60, "size": 60, "dtype": torch.float32}
        check(backend, **given, k=x, v=torch.where(x.abs() < 1e9, x, 1.0), rotation=16)
        check(backend, **given, k=x, v=x, static=True, **rope_tables(1, 60, 64))
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype).view(1, 1, 256, 256)
        given = {"batch": 1, "heads": 1, "tokens": 256, "size": 256, "dim": 256, "dtype": dtype}
        check(backend, **given, k=x, v=x)


def test_nothing_to_write(backend: Backend) -> None:
    check(backend, tokens=0)
    check(backend, tokens=0, static=True, positions=positions(0, 24))
    check(backend, batch=0)
    check(backend, batch=0, static=True, positions=positions(), ring=True)
    empty = torch.zeros(2, 0, dtype=torch.int32)
    check(backend, tokens=0, block_table=empty, blocks=3)


def test_many_rows(backend: Backend) -> None:
    """More rows than one block of threads takes, and than fit whole blocks."""
    check(
        backend,
        batch=3,
        heads=5,
        tokens=67,
        size=70,
        dim=128,
        rotation=128,
        positions=positions(0, 3, 1),
    )
    check(backend, batch=70, heads=1, tokens=1, dim=32)


def test_every_argument_by_chance(backend: Backend) -> None:
    cases_of = cases.covering(
        36, 0,
        dim=(8, 24, 64, 72, 128, 160, 200, 256), v_dim=(8, 16, 64, 88, 128, 256), dtype=cases.FLOATS,
        static=(False, False, True), smooth=(False, True), rope=(0, 2, 4, 8), tokens=(1, 2, 9),
        layout=("plain", "ring", "blocks"), rows=(1, 3), rope_dtype=cases.FLOATS,
    )  # fmt: skip
    for number, case in enumerate(cases_of):
        rope, layout, rows, rope_dtype = (
            case.pop(n) for n in ("rope", "layout", "rows", "rope_dtype")
        )
        more: dict[str, Any] = {"batch": 3, "heads": 2, "size": 12, "positions": positions(0, 3, 2)}
        if layout == "ring":
            more |= {"ring": True, "positions": positions(5, 30, 11)}
        if layout == "blocks":
            more |= {"size": 5, "blocks": 13, "block_table": shuffled_table(3, 4, 13, number)}
        if rope:
            more |= rope_tables(rows, case["tokens"], rope, rope_dtype)
        if not case["static"]:
            more["rotation"] = (0, 2, largest_rotation(case["dim"], case["v_dim"]))[number % 3]
        check(backend, f"{case} {layout} {rope}", **case, **more)


def test_limits_are_those_of_the_checks() -> None:
    assert max(DIMS) == cache_checks.MAX_HEAD
