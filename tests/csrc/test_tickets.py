"""Tickets that need no memset (csrc/common/tickets.h): their owners, and what happens where there are none.

No kernel runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import null_runtime

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("host_time")]

START = """
import ctypes, pathlib, sys, tempfile
import torch
from tests.support import c_gemm, null_runtime

with tempfile.TemporaryDirectory() as folder:
    runtime, library = null_runtime.load(pathlib.Path(sys.argv[1]), pathlib.Path(folder))
c_gemm.declare(library)
clears = ctypes.c_long.in_dll(runtime, "null_clears")
memory = torch.zeros(512 << 20, dtype=torch.int8)  # no kernel runs: every operand may lie here
one = torch.ones(1)

def params_of(m, n, k, tile=-1, splits=0):
    p = c_gemm.Params(m=m, n=n, k=k, tile=tile, splits=splits, x_q_stride=k, w_q_stride=k, y_stride=n, y_dtype=1)
    p.x_q = p.w_q = p.y = p.workspace = memory.data_ptr()
    p.x_scale = p.w_scale = one.data_ptr()
    p.workspace_bytes = memory.numel()
    return p

def memsets(p, stream=None):
    before = clears.value
    assert library.sqk_gemm_s8(ctypes.byref(p), stream) == 0
    return clears.value - before

def shares_k(p):
    status, plan = c_gemm.plan(library, p)
    assert status == 0
    return plan.workspace_bytes > 0

# a problem of which some blocks share tiles, by GPU: few tiles, long rows
SHARED = {0: (64, 1024, 8192), 1: (64, 1024, 8192), 2: (64, 1024, 8192)}
"""

NODES = (
    START
    + """
for gpu in (0, 1, 2):
    runtime.null_use_device(gpu)
    shared = 0
    for n, k in ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 8192), (8192, 1024), (28672, 8192), (576, 576)):
        for m in (1, 8, 16, 17, 32, 64, 100, 128, 256, 512, 1024, 4096):
            p = params_of(m, n, k)
            shared += shares_k(p)
            assert memsets(p) == 0, (gpu, m, n, k)
    assert shared >= 5, (gpu, shared)
    # every tile that can share k, by stream-K or by splits
    tiles = c_gemm.tiles(library)
    counted = 0
    for tile in tiles:
        splits = min(2, tile["most_splits"])
        if splits > 1 or tile["schedule"] == "stream-K":
            p = params_of(8, 1024, 8192, tile["tile"], splits)
            assert shares_k(p) and memsets(p) == 0, tile["name"]
            counted += 1
    assert counted >= 3, counted
print("nodes")
"""
)

OWNERS = (
    START
    + """
runtime.null_use_device(1)
p = params_of(*SHARED[1])
assert shares_k(p)
# The library's code may not be loaded during a capture, so the very first GEMM clears.
runtime.null_capture(1)
assert memsets(p) == 1
runtime.null_capture(0)
assert memsets(p) == 0
runtime.null_capture(1)
assert memsets(p) == 0
# A graph and a stream keep what they have; each graph, and each stream in it, takes a part.
taken = 2  # the stream, the graph
for capture in range(1, 200):
    runtime.null_capture(capture)
    for stream in (None, 64, 128):
        again = memsets(p, stream)
        assert memsets(p, stream) == again
        if again:
            break
        taken += not (capture == 1 and stream is None)
    if again:
        break
assert taken == 512, taken
# Others still have theirs.
runtime.null_capture(1)
assert memsets(p) == 0
runtime.null_capture(0)
assert memsets(p) == 0
assert memsets(p, 64) == 1, "a stream that has none"
# Graphs give theirs back.
runtime.null_destroy_graphs()
assert memsets(p, 64) == 0
for capture in range(1000, 1100):
    runtime.null_capture(capture)
    assert memsets(p) == 0
print("owners")
"""
)

NONE = (
    START
    + """
runtime.null_use_device(1)
p = params_of(*SHARED[1])
assert memsets(p) == 0
# more tiles than tickets: only where splits are asked for
wide = params_of(512, 65536, 1024, next(t["tile"] for t in c_gemm.tiles(library) if t["most_splits"] > 1), 2)
assert memsets(wide) == 1
# another context, in which the array cannot be found
runtime.null_use_context(2, 0, 0)
runtime.null_refuse_symbols(1)
assert memsets(p) == 1
runtime.null_refuse_symbols(0)
assert memsets(p) == 0
print("none")
"""
)


@pytest.mark.parametrize(("script", "word"), [(NODES, "nodes"), (OWNERS, "owners"), (NONE, "none")])
def test_tickets(script: str, word: str, null_library: Path) -> None:
    assert null_runtime.python("-c", script, str(null_library)).split() == [word]
