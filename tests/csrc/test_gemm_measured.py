"""Measured choices precede the rules: in csrc/gemm/plan.cpp, compiled without CUDA, and in the simulator."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import pytest

from tests.csrc.test_gemm_plan import GPUS, assert_can_be_launched, compiled, params, plan
from tests.support import c_gemm, simulator
from tests.support.c_gemm import Device, Measured, Plan
from tests.support.c_interface import INVALID_ARGUMENT, SUCCESS

pytestmark = pytest.mark.compiler

H100, A100 = GPUS["H100"][0], GPUS["A100"][0]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("gemm_measured"))


@pytest.fixture
def library(built: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """Removes the measured choices afterwards."""
    yield built
    assert use(built, []) == SUCCESS


def use(
    library: ctypes.CDLL,
    rows: list[tuple[int, int, int, str | int, int]],
    table: int = 2,
    sms: int = 132,
) -> int:
    """Sets choices of (n, k, m, tile, splits), with the tile's name or number; for an H100 by default."""
    array = (Measured * len(rows))()
    for i, (n, k, m, tile, splits) in enumerate(rows):
        row = tile if isinstance(tile, int) else names(library, c_gemm.TABLES[table]).index(tile)
        array[i] = Measured(n, k, m, row, splits)
    status: int = library.sqk_gemm_use_measured(table, sms, array, ctypes.c_int64(len(rows)))
    return status


def names(library: ctypes.CDLL, table: str) -> list[str]:
    return [tile["name"] for tile in c_gemm.tables(library)[table]["tiles"]]


def taken(library: ctypes.CDLL, m: int, n: int, k: int, device: Device = H100) -> tuple[str, int]:
    found = plan(library, params(m, n, k), device)
    return names(library, c_gemm.TABLES[found.table])[found.tile], found.splits


# --- the library ------------------------------------------------------------------------------------------------------

#: (m, tile) of one n and k, unordered. The rules never choose these tiles there.
ONE, TWO = "128x128x128 stream-K", "64x128x128"
MEASURED = ((300, ONE), (8, "stream 16x16"), (64, ONE), (4096, TWO), (1, "16x64x256 swap"))
TILE_OF = dict(MEASURED)


def expected(m: int) -> str | None:
    """The tile by the rule in docs/guides/gpu.md, implemented another way; None: the table's own rules apply."""
    above = [size for size in TILE_OF if size >= m]
    if above:
        return TILE_OF[min(above)] if min(above) / m < 2 else None
    return TILE_OF[max(TILE_OF)] if max(TILE_OF) >= 1024 else None


def test_every_number_of_tokens_takes_the_choice_measured_near_it(library: ctypes.CDLL) -> None:
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
    assert changed > 150, "the rules choose the same tiles: this shows nothing"
    assert tiles[c_gemm.choice(library, 300, 4096, 4096, H100)["tile"]]["name"] == ONE


def test_other_problems_and_other_gpus_follow_the_rules(library: ctypes.CDLL) -> None:
    others = [(64, 4096, 4095), (64, 4095, 4096), (64, 4097, 1), (64, 1, 9999)]
    devices = [A100, Device(114, 90, H100.shared_bytes, 1), Device(132, 90, H100.shared_bytes, 0)]
    before = [taken(library, *p) for p in others] + [
        taken(library, 64, 4096, 4096, d) for d in devices
    ]
    assert (
        use(library, [(4096, 4096, 64, ONE, 1), (2, 2, 4096, "128x256x128 stream-K", 1)]) == SUCCESS
    )
    assert taken(library, 64, 4096, 4096) == (ONE, 1)
    assert before == [taken(library, *p) for p in others] + [
        taken(library, 64, 4096, 4096, d) for d in devices
    ]
    # a GPU with the same table and SMs, but less shared memory per block than the tile needs
    small = Device(132, 90, 64 << 10, 1)
    alone = taken(library, 5, 4096, 4096, small)
    assert use(library, [(4096, 4096, 5, ONE, 1)]) == SUCCESS
    assert taken(library, 5, 4096, 4096, small) == alone
    assert taken(library, 5, 4096, 4096) == (ONE, 1)


def test_a_streaming_tile_takes_no_more_tokens_than_it_has(library: ctypes.CDLL) -> None:
    assert use(library, [(64, 64, 16, "stream 16x16", 1)]) == SUCCESS
    assert [taken(library, m, 64, 64)[0] for m in (9, 16)] == ["stream 16x16"] * 2
    assert taken(library, 17, 64, 64)[0] != "stream 16x16"
    assert use(library, [(64, 64, 17, "stream 16x16", 1)]) == INVALID_ARGUMENT


def test_an_explicit_tile_or_splits_wins(library: ctypes.CDLL) -> None:
    device, tiles = A100, c_gemm.tables(library)["sm80"]["tiles"]
    problem = (200, 4096, 4096)
    by_rules = [plan(library, params(*problem, splits=s), device) for s in (1, 2)]
    measured, other = "64x128x128", names(library, "sm80").index("128x128x64")
    assert use(library, [(4096, 4096, 200, measured, 7)], table=0, sms=108) == SUCCESS
    assert taken(library, *problem, device) == (measured, 7)
    found = plan(library, params(*problem), device)
    # the workspace is that of the measured tile and splits
    assert_can_be_launched(params(*problem), found, device, tiles)
    assert found.workspace_bytes > found.counter_bytes > 0
    forced = plan(library, params(*problem, tile=other, splits=2), device)
    assert (forced.tile, forced.splits) == (other, 2)
    for splits, before in zip((1, 2), by_rules, strict=True):
        assert bytes(plan(library, params(*problem, splits=splits), device)) == bytes(before)
    # k has two tiles, so at most two blocks can share it
    assert use(library, [(4096, 256, 200, measured, 7)], table=0, sms=108) == SUCCESS
    assert taken(library, 200, 4096, 256, device) == (measured, 2)


@pytest.mark.parametrize(
    "row",
    [
        (64, 64, 64, 64, 1), (64, 64, 64, -1, 1), (64, 64, 64, TWO, 2), (64, 64, 64, TWO, 0), (64, 64, 0, TWO, 1),
        (0, 64, 64, TWO, 1), (64, 0, 64, TWO, 1), (64, 131072, 64, TWO, 1), (64, 64, 9, "stream 8x16", 1),
        (4096, 4096, 64, TWO, 1),
    ],
    ids=str,
)  # fmt: skip
def test_an_invalid_row_changes_nothing(
    library: ctypes.CDLL, row: tuple[int, int, int, str | int, int]
) -> None:
    sound = (4096, 4096, 64, ONE, 1)
    assert use(library, [sound]) == SUCCESS
    assert use(library, [sound, row]) == INVALID_ARGUMENT
    assert taken(library, 64, 4096, 4096) == (ONE, 1)
    numbered = (4096, 4096, 64, names(library, "sm90").index(ONE), 1)
    for table in (-1, 3):
        assert use(library, [numbered], table=table) == INVALID_ARGUMENT


def test_plans_on_other_threads_see_one_list_or_the_other(library: ctypes.CDLL) -> None:
    known, rule = names(library, "sm90"), taken(library, 64, 4096, 4096)[0]
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
        rows = [(4096, 4096, m, (ONE, TWO)[turn % 2], 1) for m in (128, 64, 32)]
        assert use(library, rows) == SUCCESS
    stop.set()
    for thread in threads:
        thread.join()
    assert {known[row] for row in set().union(*seen)} <= {rule, ONE, TWO}
    assert taken(library, 64, 4096, 4096) == (TWO, 1)


# --- the kernels ------------------------------------------------------------------------------------------------------

SAME_BITS = """
import ctypes, sys
import torch
from smoothquant_kernels import ops, reference
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
        if tile["w4_only"] or (tile["kernel"] == "stream" and m > tile["m"]):
            continue
        row = c_gemm.Measured(n, k, m, tile["tile"], tile["most_splits"])
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
    """Each tile is the measured one in turn, with its splits and their workspace.

    A linear layer that is one launch by the rules stays one launch.
    """
    simulator.require()
    assert "same bits" in simulator.run(SAME_BITS, str(simulator.library()), arch=arch)
