"""Choices that were measured come before the rules: csrc/gemm/plan.cpp, compiled without CUDA; and the kernels in the
simulator."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Iterator

import pytest

from smoothquant_kernels.backends import tuned_tiles as _tune
from tests.csrc.test_gemm_plan import GPUS, assert_can_be_launched, compiled, params, plan
from tests.support import c_gemm, simulator
from tests.support.c_gemm import Device, Plan
from tests.support.c_interface import INVALID_ARGUMENT, SUCCESS

pytestmark = pytest.mark.compiler

H100, A100 = GPUS["H100"][0], GPUS["A100"][0]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("gemm_measured"))


@pytest.fixture
def library(built: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """By the rules alone again afterwards."""
    yield built
    assert use(built, []) == SUCCESS


def use(
    library: ctypes.CDLL, rows: list[tuple[int, int, int, int, int]], table: int = 2, sms: int = 132
) -> int:
    """Rows of n, k, m, tile, splits; for an H100 unless said otherwise."""
    array = (_tune._Measured * len(rows))(*(_tune._Measured(*row) for row in rows))
    status: int = library.sqk_gemm_use_measured(table, sms, array, ctypes.c_int64(len(rows)))
    return status


def taken(library: ctypes.CDLL, m: int, n: int, k: int, device: Device = H100) -> tuple[int, int]:
    found = plan(library, params(m, n, k), device)
    return found.tile, found.splits


# --- the library ------------------------------------------------------------------------------------------------------

#: (m, tile) of one n and k, in no order; tile 0 streams 8 tokens, tile 1 16. The rules never take any of these there.
MEASURED = ((300, 9), (8, 1), (64, 9), (4096, 7), (1, 2))
TILE_OF = dict(MEASURED)


def expected(m: int) -> int | None:
    """The tile by the rule that docs/guides/gpu.md states, or None for the table's own rules; written another way."""
    above = [size for size in TILE_OF if size >= m]
    if above:
        return TILE_OF[min(above)] if min(above) / m < 2 else None
    return TILE_OF[max(TILE_OF)] if max(TILE_OF) >= 1024 else None


def test_every_number_of_tokens_takes_what_was_measured_near_it(library: ctypes.CDLL) -> None:
    tokens = [*range(1, 700), 2047, 2048, 2049, 4095, 4096, 4097, 1 << 17]
    by_rules = {m: taken(library, m, 4096, 4096) for m in tokens}
    assert use(library, [(4096, 4096, m, tile, 1) for m, tile in MEASURED]) == SUCCESS
    tiles = c_gemm.tables(library)["sm90"]["tiles"]
    changed = 0
    for m in tokens:
        right = expected(m)
        assert taken(library, m, 4096, 4096) == (
            (right, 1) if right is not None else by_rules[m]
        ), m
        changed += right is not None and by_rules[m][0] != right
        assert_can_be_launched(
            params(m, 4096, 4096), plan(library, params(m, 4096, 4096), H100), H100, tiles
        )
    assert changed > 150, "the rules take the same tiles: this shows nothing"
    assert json.loads(library.sqk_gemm_choice(300, 4096, 4096, ctypes.byref(H100)))["tile"] == 9


def test_other_problems_and_other_gpus_go_by_the_rules(library: ctypes.CDLL) -> None:
    others = [(64, 4096, 4095), (64, 4095, 4096), (64, 4097, 1), (64, 1, 9999)]
    devices = [A100, Device(114, 90, H100.shared_bytes, 1), Device(132, 90, H100.shared_bytes, 0)]
    before = [taken(library, *p) for p in others] + [
        taken(library, 64, 4096, 4096, d) for d in devices
    ]
    assert use(library, [(4096, 4096, 64, 9, 1), (2, 2, 4096, 12, 1)]) == SUCCESS
    assert taken(library, 64, 4096, 4096) == (9, 1)
    assert before == [taken(library, *p) for p in others] + [
        taken(library, 64, 4096, 4096, d) for d in devices
    ]
    # a GPU of that name with less shared memory per block than the tile takes
    small = Device(132, 90, 64 << 10, 1)
    alone = taken(library, 5, 4096, 4096, small)
    assert use(library, [(4096, 4096, 5, 9, 1)]) == SUCCESS
    assert taken(library, 5, 4096, 4096, small) == alone
    assert taken(library, 5, 4096, 4096) == (9, 1)


def test_a_streaming_tile_is_not_for_more_tokens_than_it_has(library: ctypes.CDLL) -> None:
    assert use(library, [(64, 64, 16, 1, 1)]) == SUCCESS
    assert [taken(library, m, 64, 64)[0] for m in (9, 16)] == [1, 1]
    assert taken(library, 17, 64, 64)[0] != 1
    assert use(library, [(64, 64, 17, 1, 1)]) == INVALID_ARGUMENT


def test_who_names_a_tile_or_splits_gets_them(library: ctypes.CDLL) -> None:
    device, tiles = A100, c_gemm.tables(library)["sm80"]["tiles"]
    problem = (200, 4096, 4096)
    by_rules = [plan(library, params(*problem, splits=s), device) for s in (1, 2)]
    assert use(library, [(4096, 4096, 200, 5, 7)], table=0, sms=108) == SUCCESS
    found = plan(library, params(*problem), device)
    assert (found.tile, found.splits) == (5, 7)
    # the workspace is that of the tile and the splits which were measured
    assert_can_be_launched(params(*problem), found, device, tiles)
    assert found.workspace_bytes > found.counter_bytes > 0
    forced = plan(library, params(*problem, tile=6, splits=2), device)
    assert (forced.tile, forced.splits) == (6, 2)
    for splits, before in zip((1, 2), by_rules, strict=True):
        assert bytes(plan(library, params(*problem, splits=splits), device)) == bytes(before)
    # k has two tiles: no more than two blocks can share it
    assert use(library, [(4096, 256, 200, 5, 7)], table=0, sms=108) == SUCCESS
    assert taken(library, 200, 4096, 256, device) == (5, 2)


@pytest.mark.parametrize(
    "row",
    [
        (64, 64, 64, 13, 1), (64, 64, 64, -1, 1), (64, 64, 64, 8, 2), (64, 64, 64, 8, 0), (64, 64, 0, 8, 1),
        (0, 64, 64, 8, 1), (64, 0, 64, 8, 1), (64, 131072, 64, 8, 1), (64, 64, 9, 0, 1), (4096, 4096, 64, 8, 1),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_that_cannot_be_changes_nothing(
    library: ctypes.CDLL, row: tuple[int, int, int, int, int]
) -> None:
    sound = (4096, 4096, 64, 9, 1)
    assert use(library, [sound]) == SUCCESS
    assert use(library, [sound, row]) == INVALID_ARGUMENT
    assert taken(library, 64, 4096, 4096) == (9, 1)
    for table in (-1, 3):
        assert use(library, [sound], table=table) == INVALID_ARGUMENT


def test_plans_on_other_threads_see_one_list_or_the_other(library: ctypes.CDLL) -> None:
    rule = taken(library, 64, 4096, 4096)[0]
    stop, seen = threading.Event(), [set[int]() for _ in range(3)]

    def ask(mine: set[int]) -> None:
        p, found = params(64, 4096, 4096), Plan()
        while not stop.is_set():
            library.sqk_gemm_plan(ctypes.byref(p), ctypes.byref(H100), ctypes.byref(found))
            mine.add(found.tile)

    threads = [threading.Thread(target=ask, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    for turn in range(200):
        rows = [(4096, 4096, m, (9, 7)[turn % 2], 1) for m in (128, 64, 32)]
        assert use(library, rows) == SUCCESS
    stop.set()
    for thread in threads:
        thread.join()
    assert set().union(*seen) <= {rule, 9, 7}
    assert taken(library, 64, 4096, 4096) == (7, 1)


# --- the kernels ------------------------------------------------------------------------------------------------------

SAME_BITS = """
import ctypes, sys
import torch
from smoothquant_kernels import ops, reference
from smoothquant_kernels.backends import tuned_tiles as _tune
from smoothquant_kernels.ops import registry
from tests.support import c_gemm, c_interface, cases

torch.ops.load_library(sys.argv[1])
registry.eager_cpu = lambda *call: False
library = c_gemm.declare(ctypes.CDLL(sys.argv[1]))
device = c_gemm.current_device(library)
table = c_gemm.choice(library, 64, 64, 64, device)["table"]
n, k = 72, 528
use = library.sqk_gemm_use_measured
for m in (5, 16, 40):
    gemm = cases.gemm_operands(m, n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).half()
    def linear():
        return ops.linear_s8(x, gemm.w_q, gemm.w_scale, bias=gemm.bias)
    def fused():
        x_q, x_scale = torch.empty(m, k, dtype=torch.int8), torch.empty(m)
        quantizer = c_interface.params_of(x, x_q, x_scale, scheme="token", scale=None, inv_smooth=None, k=k)
        product = c_gemm.params_of(None, gemm.w_q, None, gemm.w_scale, torch.empty(m, n).half())
        status, found = c_gemm.linear_plan(library, c_gemm.LinearParams(quantizer, product))
        assert status == 0
        return bool(found.fused)
    assert use(c_gemm.TABLES.index(table), device.sms, None, ctypes.c_int64(0)) == 0
    one_launch = fused()  # by the rules
    right, whole = reference.gemm_s8(*gemm[:4], None, None, torch.float16), linear()
    for tile in c_gemm.tables(library)[table]["tiles"]:
        if tile["kernel"] == "stream" and m > tile["m"]:
            continue
        row = _tune._Measured(n, k, m, tile["tile"], tile["most_splits"])
        assert use(c_gemm.TABLES.index(table), device.sms, ctypes.byref(row), ctypes.c_int64(1)) == 0
        assert c_gemm.choice(library, m, n, k, device)["tile"] == tile["tile"]
        assert fused() == (one_launch or tile["kernel"] == "stream"), tile["name"]
        y = ops.gemm_s8(*gemm[:4], out_dtype=torch.float16)
        assert torch.equal(y, right) and torch.equal(linear(), whole), tile["name"]
print("same bits")
"""


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_measured_choices_give_the_same_bits(arch: str) -> None:
    """Every tile as the measured one, with its splits and the workspace that they take; linear layers that are one
    launch by the rules stay one."""
    simulator.require()
    assert "same bits" in simulator.run(SAME_BITS, str(simulator.library()), arch=arch)
