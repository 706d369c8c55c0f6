"""What the launchers ask the CUDA runtime for, how often, and how they use the answer. No kernel runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import null_runtime

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("host_time")]

#: Loads the null runtime and the library's C entries, and defines calls of a GEMM by tile.
START = """
import ctypes, pathlib, sys, tempfile
import torch
from tests.support import c_gemm, null_runtime
from tests.support.c_gemm import Device, Params, Plan
from tests.support.c_interface import SUCCESS, UNSUPPORTED_SHAPE
from smoothquant_kernels import ops

with tempfile.TemporaryDirectory() as folder:
    runtime, library = null_runtime.load(pathlib.Path(sys.argv[1]), pathlib.Path(folder))
c_gemm.declare(library)
count = {name: ctypes.c_long.in_dll(runtime, f"null_{name}") for name in ("function_attributes", "occupancies")}
carveout = ctypes.c_int.in_dll(runtime, "null_carveout")
gpus = {name: runtime.null_use_device for name in ("h100", "a100")}
x, w = torch.zeros(64, 256, dtype=torch.int8), torch.zeros(512, 256, dtype=torch.int8)
scale = torch.ones(1)

def asked(call):
    before = {name: number.value for name, number in count.items()}
    call()
    return {name: number.value - before[name] for name, number in count.items()}

def gemm(tile, m):
    torch.ops.smoothquant_kernels._gemm_s8_tile(x[:m], w, scale, scale, out_dtype=torch.float16, tile=tile)
"""

ONCE = (
    START
    + """
for index, table in ((0, "sm90"), (1, "sm80"), (0, "sm90")):
    again = table in seen if "seen" in globals() else False
    seen = globals().get("seen", set()) | {table}
    runtime.null_use_device(index)
    # every GPU of a table is another device, so settings of one are not those of another
    for tile in c_gemm.tables(library)[table]["tiles"]:
        if tile["w4_only"]:
            continue
        call = lambda: gemm(tile["tile"], min(tile["m"], 8))
        first, second = asked(call), asked(call)
        assert not any(second.values()), (tile["name"], second)
        assert bool(first["function_attributes"]) == (not again), (tile["name"], first)
        assert first["occupancies"] == (tile["cluster"] != [1, 1] and not again), (tile["name"], first)
        if again or tile["kernel"] == "stream":
            continue
        # room for the blocks that the row assumes, in percent, rounded up
        sms_bytes, blocks = {"sm90": (233472, 1), "sm80": (167936, 2)}[table]
        if tile["warps_m"] * tile["warps_n"] > 4:
            blocks = 1
        # The driver reserves 1 KiB of each. For a wgmma tile the table holds a bound, some hundred
        # bytes too large.
        wanted = [min(100, -(-100 * blocks * (tile["shared_bytes"] + more) // sms_bytes)) for more in (0, 1024)]
        least = wanted[0 if tile["kernel"] == "wgmma" else 1]
        assert least <= carveout.value <= wanted[1], (tile["name"], carveout.value)
runtime.null_use_device(0)
long = torch.zeros(40, 70_000).half()  # too many rows for slices, too long for registers
for call in (lambda: ops.quantize(long), lambda: ops.quantize(long[:, 1:])):
    assert asked(call)["function_attributes"] == 2 and carveout.value == 100
    assert asked(call)["function_attributes"] == 0
assert asked(lambda: ops.quantize(long[:, :64].contiguous()))["function_attributes"] == 0
print("once")
"""
)

PARTS = (
    START
    + """
def device():
    return c_gemm.current_device(library)

def choice(m, n, k):
    found = c_gemm.choice(library, m, n, k, device())
    return c_gemm.tables(library)[found["table"]]["tiles"][found["tile"]]

def facts():
    here = device()
    return here.sms, here.part

problem = (64, 1024, 8192)  # few tiles: shared over k if that is allowed
runtime.null_use_device(0)
assert facts() == (132, 0)
assert choice(*problem)["schedule"] == "stream-K"
for context, (green, mps) in enumerate(((20, 0), (0, 66), (40, 66), (66, 40), (131, 0)), 2):
    runtime.null_use_context(ctypes.c_ulonglong(context), green, mps)
    expected = min(n for n in (green, mps) if n)
    assert facts() == (expected, 1), facts()
    assert choice(*problem)["schedule"] != "stream-K"
    p = Params(m=8, n=1024, k=8192, x_q=4096, w_q=4096, x_scale=4096, w_scale=4096, y=4096)
    p.x_q_stride = p.w_q_stride = 8192
    p.y_stride, p.y_dtype = 1024, 1
    for tile in c_gemm.tables(library)["sm90"]["tiles"]:
        if tile["w4_only"]:  # the problem's weight is int8
            continue
        p.tile = tile["tile"]
        status, _ = c_gemm.plan(library, p)
        assert status == (UNSUPPORTED_SHAPE if tile["schedule"] == "stream-K" else SUCCESS)
# the whole GPU again, and answers that make no sense, which are ignored
for context, green in ((50, 132), (51, 133), (52, -1), (1, 0)):
    runtime.null_use_context(ctypes.c_ulonglong(context), green, 0)
    assert facts() == (132, 0)
assert choice(*problem)["schedule"] == "stream-K"
print("parts")
"""
)

#: The null runtime has no function that waits: a call of one would end the program.
EXPERTS = (
    START
    + """
from tests.support import c_grouped, cases
c_grouped.declare(library)
launches = ctypes.c_long.in_dll(runtime, "null_launches")
for index in (0, 1):
    runtime.null_use_device(index)
    tiles = set()
    for tokens in (1, 40, 300, 2000):
        e = cases.expert_operands(tokens, 4, 64, 64)
        gemm = lambda: ops.grouped_gemm_s8(*e[:5], rows=e.rows, bias=e.bias)
        combine = lambda: ops.combine_experts(torch.zeros(2 * tokens, 64), e.position, e.weights)
        copies = index == 0 and tokens > 8  # wgmma needs the rows next to each other
        for call, expected in ((gemm, 1 + copies), (combine, 1)):
            call()
            before = launches.value
            assert not any(asked(call).values())
            assert launches.value == before + expected, launches.value - before
        y = torch.empty(2 * tokens, 64)
        p = c_grouped.params_of(e.x_q, e.w_q, e.x_scale, e.w_scale, e.offsets, y, rows=e.rows)
        status, plan = c_grouped.plan(library, p)
        assert status == SUCCESS and plan.launches == 1 + copies
        tiles.add(plan.tile)
    assert len(tiles) >= 3, "each number of rows has the same tile"
print("experts")
"""
)


def test_a_kernel_is_set_up_once_for_each_gpu(null_library: Path) -> None:
    assert "once" in null_runtime.python("-c", ONCE, str(null_library))


def test_a_part_of_a_gpu_is_recognized_and_runs_no_stream_k(null_library: Path) -> None:
    """The part comes from a green context or from MPS."""
    assert "parts" in null_runtime.python("-c", PARTS, str(null_library))


def test_the_rows_of_experts_are_not_waited_for(null_library: Path) -> None:
    """One launch, and one that copies rows on Hopper, whatever the experts have."""
    assert "experts" in null_runtime.python("-c", EXPERTS, str(null_library))
