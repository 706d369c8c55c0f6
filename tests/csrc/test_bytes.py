"""Compares the bytes that the int8 producers move, as the simulator counts them, with the minimum.

`PYTHONPATH=tools python -m tests.csrc.test_bytes [sm_80|sm_90]` prints the whole table.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lib import producers
from benchmarks.lib.producers import Case
from smoothquant_kernels.ops import registry
from tests.support import c_interface, simulator

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("bytes")]

ARCHS = ("sm_80", "sm_90")
#: (M, K, layout): many short rows, the paths of csrc/quantize/table.h, and unaligned rows.
SHAPES = (
    (531, 128, "whole"),
    (64, 4096, "whole"),
    (16, 5120, "whole"),
    (28, 11008, "whole"),
    (2, 28672, "whole"),
    (16, 4096, "unaligned"),
    (16, 4099, "whole"),
)
#: What is also counted with a rotation: a warp, a block or fewer registers per row, and unaligned rows.
ROTATED_SHAPES = (
    (531, 128, "whole"),
    (1, 4096, "whole"),
    (64, 4096, "whole"),
    (16, 4096, "unaligned"),
)
ROTATED = ("quantize", "rms_norm_quantize+residual", "act_quantize:silu+gate")
GROUPS = (64, 128, 256)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ALLOWED = 1.05
SECTOR = 32


@dataclass(frozen=True)
class Row:
    """One case of the table; all numbers are bytes of one call.

    Attributes:
        case: the benchmark's case.
        layout: "whole", or "unaligned": every row begins one element after a multiple of 16 bytes.
        path, launches: the path taken and the number of its launches.
        minimum: activations, int8, scales and sum once per launch that needs them; [K] parameters once per row.
        moved: the bytes of those that the threads read and wrote.
        shared: read by all threads of a launch: a static scale, or the maxima of the first launch. They come from L1
            and L2, in requests of one sector.
        load_excess, store_excess: 32-byte sectors touched / sectors that the requests' bytes would fill.
        expected_excess: load_excess if everything is aligned.
        instructions: PTX instructions of all threads per element.
    """

    case: Case
    layout: str
    path: str
    launches: int
    minimum: int
    moved: int
    shared: int
    load_excess: float
    store_excess: float
    expected_excess: float
    instructions: float

    @property
    def ratio(self) -> float:
        return self.moved / self.minimum

    def __str__(self) -> str:
        elements = self.case.m * self.case.k
        return (
            f"{self.case!s:<66} {self.layout:<9} {self.path:<7} {self.launches} {self.moved / elements:8.3f} "
            f"{self.minimum / elements:8.3f} {self.ratio:6.3f} {self.shared / elements:8.3f} "
            f"{self.load_excess:6.3f} {self.store_excess:6.3f} {self.instructions:6.1f}"
        )


HEADER = (
    f"{'bytes per element':<66} {'layout':<9} {'path':<7} L {'moved':>8} {'minimum':>8} {'ratio':>6} "
    f"{'shared':>8} {'loads':>6} {'stores':>6} {'PTX':>6}"
)


def all_cases() -> Iterator[tuple[Case, str]]:
    for m, k, layout in SHAPES:
        for name, producer in producers.PRODUCERS.items():
            for dtype in DTYPES.values():
                for scheme in producers.SCHEMES:
                    for smooth in (False, True):
                        # The plain activations differ only in arithmetic, so one of them is enough.
                        if len(producer.names) > 1 or name in ("quantize", "act_quantize:gelu"):
                            yield Case(name, smooth, scheme, dtype, m, k), layout
    for (m, k, layout), name, dtype in product(ROTATED_SHAPES, ROTATED, DTYPES.values()):
        for group, scheme in product((0, *GROUPS), producers.SCHEMES):
            if k % group == 0 if group else (m, k, layout) not in SHAPES:
                yield Case(name, False, scheme, dtype, m, k, group), layout


# --- inside the simulator -------------------------------------------------------------------------


def unaligned(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same rows, each starting one element after a multiple of 16 bytes."""
    moved = dict(inputs)
    for name, value in inputs.items():
        if value.dim() == 2:
            wide = torch.zeros(value.shape[0], value.shape[1] + 8, dtype=value.dtype)
            wide[:, 1 : 1 + value.shape[1]] = value
            moved[name] = wide[:, 1 : 1 + value.shape[1]]
    return moved


def count_all(library: str, result: str) -> None:
    """Runs all cases and writes their launches, one list per case."""
    torch.ops.load_library(library)
    registry.eager_cpu = lambda *call: False
    launches = []
    scale = torch.tensor([0.02])
    with open(os.environ["PTXSIM_STATS"]) as stats:
        for case, layout in all_cases():
            inputs = producers.make_inputs(case, torch.Generator().manual_seed(0))
            if layout == "unaligned":
                inputs = unaligned(inputs)
            producers.run_op(case, inputs, scale)
            launches.append([json.loads(line) for line in stats.read().splitlines()])
    Path(result).write_text(json.dumps(launches))


# --- outside ----------------------------------------------------------------------------------------

SCRIPT = """
import sys
sys.path[:0] = ["tools"]
from tests.csrc import test_bytes
test_bytes.count_all(*sys.argv[1:])
"""


@cache
def table(arch: str) -> tuple[Row, ...]:
    """Runs all cases in one start of the simulator."""
    library = simulator.library()
    with tempfile.TemporaryDirectory() as folder:
        result, stats = Path(folder) / "launches.json", Path(folder) / "stats.json"
        # No checks: tests/kernels runs them, and counting is twice as fast without them.
        simulator.run(SCRIPT, str(library), str(result), arch=arch, checks="", stats=stats)
        counted = json.loads(result.read_text())
    return tuple(
        make_row(case, layout, launches)
        for (case, layout), launches in zip(all_cases(), counted, strict=True)
    )


def least_bytes(case: Case, launches: int) -> int:
    """Activations once per launch that needs them, and each parameter [K] once per row and launch."""
    names = producers.PRODUCERS[case.producer].names
    elements, size = case.m * case.k, case.dtype.itemsize
    parameters = sum(size for name in names if name in ("weight", "bias")) + 4 * case.smooth
    inputs = sum({"weight": 0, "bias": 0, "fused": 2}.get(name, 1) for name in names)
    bytes_moved = elements * (size * inputs + parameters)
    # int8, the scales, and x + residual, which the second launch reads instead of the two.
    bytes_moved += elements + 4 * (1 if case.scheme == "per_tensor" else case.m)
    bytes_moved += elements * size * ("residual" in names)
    if launches == 2:
        again = inputs - ("residual" in names)
        bytes_moved += elements * (size * again + parameters)
    return bytes_moved


def make_row(case: Case, layout: str, launches: list[dict[str, Any]]) -> Row:
    number = re.search(r"QuantizePath\)(\d+)", launches[-1]["kernel"])
    assert number is not None
    path = c_interface.PATHS[int(number[1])]
    blocks, threads = launches[-1]["grid"][0], launches[-1]["block"][0]
    scale = maxima = 0
    if case.scheme == "static":  # read by every thread that has a row or a part of one
        scale = 4 * (case.m * 32 if path == "warp" else blocks * threads)
    if len(launches) == 2:  # one per block, or per slice of a row; read by every block
        maxima = 4 * blocks * (blocks if case.scheme == "per_tensor" else blocks // case.m)
    total = {
        (way, what): sum(launch[f"global_{way}"][what] for launch in launches)
        for way in ("load", "store")
        for what in ("bytes", "sectors", "ideal_sectors")
    }
    # A warp's request for the scale touches one sector, not four.
    scale_requests = scale // 128
    touched = total["load", "sectors"] - scale_requests
    # A thread with eight 16-bit elements reads its eight float32 factors in two requests of 16 bytes, 32 bytes
    # apart from its neighbors': each touches every sector. The second finds them in L1.
    strided = case.smooth and case.dtype.itemsize == 2 and path != "element"
    strided_bytes = 4 * case.m * case.k * len(launches) if strided else 0
    return Row(
        case,
        layout,
        path,
        len(launches),
        least_bytes(case, len(launches)),
        total["load", "bytes"] + total["store", "bytes"] - scale - maxima,
        scale + maxima,
        touched / (total["load", "ideal_sectors"] - 4 * scale_requests),
        total["store", "sectors"] / total["store", "ideal_sectors"],
        1 + strided_bytes / (total["load", "bytes"] - scale),
        sum(launch["thread_instructions"] for launch in launches) / (case.m * case.k),
    )


def print_table(rows: list[Row]) -> None:
    print("", HEADER, *rows, sep="\n")


@pytest.mark.parametrize("arch", ARCHS)
def test_bytes_moved_are_near_the_minimum(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    simulator.require()
    rows = table(arch)
    with capsys.disabled():
        print(f"\n{arch}, the worst of each shape:")
        shapes: dict[tuple[int, int, str], list[Row]] = {}
        for row in rows:
            shapes.setdefault((row.case.m, row.case.k, row.layout), []).append(row)
        print_table([max(some, key=lambda row: row.ratio) for some in shapes.values()])
    for row in rows:
        # A smaller ratio would be an error in the count.
        assert 0.999 <= row.ratio <= ALLOWED, row
        # Per tensor, the maxima of many short rows matter, because all blocks read them, from L2.
        assert row.shared <= row.minimum * (0.25 if row.case.k >= 4096 else 1), row


def stages(row: Row) -> tuple[int, int]:
    """How many stages of a rotation lie within a thread, and how many between lanes."""
    all_stages = row.case.rotation.bit_length() - 1
    distance = 1 if row.path == "element" else 16 // row.case.dtype.itemsize
    between = min(5, max(0, all_stages - (distance.bit_length() - 1)))
    return all_stages - between, between


@pytest.mark.parametrize("arch", ARCHS)
def test_a_rotation_moves_no_bytes_and_costs_few_instructions(
    arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    simulator.require()
    rows = {(row.case, row.layout): row for row in table(arch)}
    rotated = [row for row in rows.values() if row.case.rotation]
    assert len(rotated) == len(ROTATED) * len(DTYPES) * len(producers.SCHEMES) * (2 + 3 * 3)
    with capsys.disabled():
        print(f"\n{arch}, PTX instructions per element:")
        some = [row for row in rows.values() if (row.case.m, row.case.k) in ((1, 4096), (64, 4096))]
        print_table(
            [row for row in some if row.case.name.startswith("quantize") and not row.case.smooth]
        )
    for row in rotated:
        plain = rows[replace(row.case, rotation=0), row.layout]
        assert row.path == plain.path and row.moved == plain.moved, row
        # "element" keeps all elements in shared memory to rotate them. A short row leaves a thread with empty vectors,
        # which are rotated too.
        if row.path == "element" or row.case.k < 4096:
            continue
        # Within a thread, a sum or a difference per element. Between lanes an exchange and a product with 1 or -1;
        # PTX moves the value before and after, and the loop adds as many instructions as there are for one value
        # or two. Besides, the branches around all this move values.
        inside, between = stages(row)
        most = (inside + 5 * between + 3) * row.launches
        assert inside + 4 * between <= row.instructions - plain.instructions <= most, row


@pytest.mark.parametrize("arch", ARCHS)
def test_requests_fill_their_sectors(arch: str) -> None:
    simulator.require()
    for row in table(arch):
        if row.path != "element":
            assert row.load_excess <= row.expected_excess + 0.01, row
            assert row.store_excess <= 1.01, row
        else:
            # A warp reads 32 elements of a row that begins anywhere: 64 bytes span three sectors,
            # 32 bytes two.
            assert row.load_excess <= 1.51, row
            assert row.store_excess <= 2.01, row


@pytest.mark.parametrize("arch", ARCHS)
def test_the_cases_take_all_paths(arch: str) -> None:
    simulator.require()
    paths = {"cluster"} if arch == "sm_90" else set()
    assert paths | {"warp", "block", "wide", "long", "element"} <= {row.path for row in table(arch)}


if __name__ == "__main__":
    print_table(list(table(sys.argv[1] if len(sys.argv) > 1 else "sm_80")))
