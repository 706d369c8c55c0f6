"""The C entries of decode_attention_s8: workspaces, statuses, and lengths and blocks that do not exist."""

from __future__ import annotations

import ctypes
from ctypes import byref
from typing import Any

import pytest
import torch

from tests.support import c_attention
from tests.support.attention import assert_close, expected, problem
from tests.support.backends import Backend
from tests.support.c_interface import (
    INVALID_ARGUMENT,
    SUCCESS,
    UNSUPPORTED_SHAPE,
    WORKSPACE_TOO_SMALL,
)

POISON = 77.0


@pytest.fixture
def entries(compiled: Backend) -> ctypes.CDLL:
    return c_attention.declare(compiled.c_library)


class Call:
    """A problem with several splits, its outputs between poisoned neighbors, and its workspace."""

    def __init__(self, backend: Backend, entries: ctypes.CDLL, **sizes: Any) -> None:
        self.entries = entries
        self.given = problem(**{"lengths": [500, 450], "size": 512, "group": 2, **sizes})
        self.want = expected(self.given)
        self.moved = backend.move(self.given)
        count = self.given["q"].numel()
        self.buffer = backend.put(torch.full((count + 32,), POISON, dtype=self.given["q"].dtype))
        self.y = self.buffer[16:-16].view(self.given["q"].shape)
        self.params = c_attention.params_of(self.moved, self.y)
        self.bytes = entries.sqk_attention_workspace_bytes(byref(self.params))
        # Whatever is in the workspace, and not one byte more than was asked for.
        self.workspace = backend.put(torch.full((max(self.bytes, 16),), 0x7F, dtype=torch.uint8))
        self.params.workspace = self.workspace.data_ptr()
        self.params.workspace_bytes = self.bytes

    def run(self) -> int:
        return int(self.entries.sqk_decode_attention_s8(byref(self.params), None))

    def check(self) -> None:
        assert self.run() == SUCCESS
        assert_close(self.y, self.want)
        self.y.fill_(POISON)
        assert bool((self.buffer == POISON).all()), "wrote outside y"


@pytest.mark.parametrize("dim", [64, 100, 128, 256])
def test_workspaces_need_not_be_cleared(backend: Backend, entries: ctypes.CDLL, dim: int) -> None:
    call = Call(backend, entries, dim=dim)
    status, plan = c_attention.plan(entries, call.params)
    assert status == SUCCESS and plan.workspace_bytes == call.bytes
    assert plan.splits > 1, "this test needs blocks that merge"
    for _ in range(3):  # a call leaves the tickets as it found them
        call.check()


def test_refused_calls(backend: Backend, entries: ctypes.CDLL) -> None:
    """A status for each, and nothing is written."""
    refusals = (
        (WORKSPACE_TOO_SMALL, {"workspace_bytes": -1}),
        (INVALID_ARGUMENT, {"workspace": None}),
        (INVALID_ARGUMENT, {"workspace": 8}),
        (INVALID_ARGUMENT, {"q": None}),
        (INVALID_ARGUMENT, {"y": None}),
        (INVALID_ARGUMENT, {"dtype": 3}),
        (INVALID_ARGUMENT, {"dtype": 9}),
        (INVALID_ARGUMENT, {"tokens": 9}),
        (INVALID_ARGUMENT, {"tokens": -1}),
        (INVALID_ARGUMENT, {"batch": 3}),
        (INVALID_ARGUMENT, {"batch": -1}),
        (INVALID_ARGUMENT, {"heads": 3}),
        (INVALID_ARGUMENT, {"heads": 0}),
        (INVALID_ARGUMENT, {"rotation": 3}),
        (INVALID_ARGUMENT, {"rotation": 128}),
        (INVALID_ARGUMENT, {"window": -1}),
        (INVALID_ARGUMENT, {"cache.ring": 1, "cache.table": 4096}),
        (INVALID_ARGUMENT, {"cache.k.dim": 0}),
        (INVALID_ARGUMENT, {"cache.k.dim": 257}),
        (INVALID_ARGUMENT, {"cache.v.dim": 63}),
        (INVALID_ARGUMENT, {"cache.k.data": None}),
        (INVALID_ARGUMENT, {"cache.v.head_stride": 8}),
        (INVALID_ARGUMENT, {"cache.k.scale": None}),
        (INVALID_ARGUMENT, {"cache.heads": 0}),
        (INVALID_ARGUMENT, {"cache.block_size": -1}),
        (UNSUPPORTED_SHAPE, {"cache.block_size": 2**31}),
    )
    for status, changes in refusals:
        call = Call(backend, entries)
        for name, value in changes.items():
            *path, last = name.split(".")
            place: Any = call.params
            for part in path:
                place = getattr(place, part)
            setattr(place, last, getattr(place, last) - 1 if name == "workspace_bytes" else value)
        assert call.run() == status, changes
        assert bool((call.buffer == POISON).all()), changes


def test_nothing_is_launched_without_tokens(backend: Backend, entries: ctypes.CDLL) -> None:
    for name in ("tokens", "batch"):
        call = Call(backend, entries)
        setattr(call.params, name, 0)
        assert call.run() == SUCCESS
        assert bool((call.buffer == POISON).all())


def test_lengths_that_do_not_exist(backend: Backend, entries: ctypes.CDLL) -> None:
    """No memory outside of the cache is read. Beyond the end all tokens count, and below 0 none."""
    call = Call(backend, entries, lengths=[512, 0])
    for lengths in ([513, -1], [2**31 - 1, -(2**31)]):
        call.moved["lengths"].copy_(torch.tensor(lengths, dtype=torch.int32))
        call.check()


def test_blocks_that_do_not_exist(compiled: Backend) -> None:
    """The table names no block: any other is read instead, but nothing outside of the cache."""
    given = problem(lengths=[90, 70], size=16, paged=6)
    for half in ("k", "v"):
        given[f"{half}_cache"].clamp_(min=-127)
        given[f"{half}_scale"].nan_to_num_(0.01)
    given["block_table"][0, 2], given["block_table"][1, 1] = -7, 2**31 - 1
    moved = compiled.move(given)
    y = torch.ops.smoothquant_kernels.decode_attention_s8(**moved)
    assert_close(y, expected(given))
