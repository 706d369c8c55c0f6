"""The C entry of the writer of an int8 cache: what it refuses, before it reads or writes anything."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from smoothquant_kernels import reference
from tests.support import c_cache
from tests.support.backends import Backend
from tests.support.c_interface import INVALID_ARGUMENT, SUCCESS, UNSUPPORTED_SHAPE
from tests.support.kv_calls import compare, positions, problem, rope_tables, shuffled_table

Change = Callable[[c_cache.KvAppendParams], Any]


def set_to(name: str, value: Any) -> Change:
    """Sets a field, such as "cache.k.dim"."""

    def change(p: Any) -> None:
        *path, last = name.split(".")
        for part in path:
            p = getattr(p, part)
        setattr(p, last, value)

    return change


REFUSED = {
    "an unknown type": set_to("dtype", 9),
    "int8 tokens": set_to("dtype", 3),
    "fewer than no sequences": set_to("batch", -1),
    "fewer than no tokens": set_to("tokens", -1),
    "more tokens than the cache holds": set_to("tokens", 25),
    "no head": set_to("cache.heads", 0),
    "fewer blocks than sequences": set_to("cache.blocks", 1),
    "no channel": set_to("cache.k.dim", 0),
    "too many channels": set_to("cache.v.dim", 257),
    "a ring with a table": set_to("cache.table", 4096),
    "no keys": set_to("k.data", None),
    "no cache": set_to("cache.v.data", None),
    "scales of one half only": set_to("cache.k.scale", None),
    "a rotation that does not divide the channels": set_to("rotation", 128),
    "a rotation of no power of two": set_to("rotation", 48),
    "cos without sin": set_to("sin", None),
    "an odd rope": set_to("rope_dim", 31),
    "a rope wider than the head": set_to("rope_dim", 66),
    "a rope of an unknown type": set_to("rope_dtype", 7),
    "rows of the cache at any address": set_to("cache.k.head_stride", 1),
}


def ready(backend: Backend) -> tuple[dict[str, Any], c_cache.KvAppendParams]:
    call = backend.move(problem(ring=True, **rope_tables(1, 5, 64)))
    return call, c_cache.params_of(call)


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_the_header_rules_out_is_refused(
    compiled: Backend, library: ctypes.CDLL, change: Change
) -> None:
    call, p = ready(compiled)
    change(p)
    assert c_cache.append(library, p) == INVALID_ARGUMENT
    compare(call, problem(ring=True))  # nothing was written


def test_static_scales_need_factors_and_take_no_rotation(
    compiled: Backend, library: ctypes.CDLL
) -> None:
    call = compiled.move(problem(static=True))
    p = c_cache.params_of(call)
    p.rotation = 2
    assert c_cache.append(library, p) == INVALID_ARGUMENT
    p.rotation, p.k.inv_smooth = 0, None
    assert c_cache.append(library, p) == INVALID_ARGUMENT


def test_too_many_rows_are_refused(compiled: Backend, library: ctypes.CDLL) -> None:
    """Rows have 31-bit numbers, and so have the slots of a block."""
    _, p = ready(compiled)
    p.batch, p.cache.blocks = 2**29, 2**29  # times 3 heads and 5 tokens
    assert c_cache.append(library, p) == UNSUPPORTED_SHAPE
    p.batch, p.cache.blocks = 2**62, 2**62
    assert c_cache.append(library, p) == UNSUPPORTED_SHAPE
    _, p = ready(compiled)
    p.cache.block_size = 2**31
    assert c_cache.append(library, p) == UNSUPPORTED_SHAPE


@pytest.mark.parametrize("field", ["batch", "tokens"])
def test_nothing_to_write_needs_no_memory(
    compiled: Backend, library: ctypes.CDLL, field: str
) -> None:
    _, p = ready(compiled)
    setattr(p, field, 0)
    p.k.data = p.v.data = p.cache.k.data = p.cache.v.data = None
    assert c_cache.append(library, p) == SUCCESS


def test_the_entry_writes_as_the_op_does(compiled: Backend, library: ctypes.CDLL) -> None:
    paged = {"size": 4, "blocks": 8, "block_table": shuffled_table(2, 3, 8)}
    cases = (
        {"dim": 100, "v_dim": 33, "smooth": True, **rope_tables(2, 5, 50)},
        {**paged, "positions": positions(3, 6), "rotation": 16},
        {"ring": True, "positions": positions(22, 40), "static": True},
    )
    for given in cases:
        on_cpu = problem(**given)
        call = compiled.move(
            {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in on_cpu.items()}
        )
        assert c_cache.append(library, c_cache.params_of(call)) == SUCCESS
        if compiled.device == "cuda":
            torch.cuda.synchronize()
        reference.kv_append(**on_cpu)
        compare(call, on_cpu)
