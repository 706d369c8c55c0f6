"""INT8 GEMMs as cases of a benchmark: layers x tokens, operands, the expected result, the tiles that can be forced."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.lib import gpu, real_data, timer
from benchmarks.lib.shapes import Layer, by_place, distinct
from smoothquant_kernels import ops, reference
from smoothquant_kernels.backends import cuda as _extension

OUT_DTYPE = torch.float16
#: Products up to which a whole result is compared; of larger ones a row and a column of every SAMPLED_BLOCK.
FULL_CHECK, SAMPLED_BLOCK = 2**34, 64
#: Bytes of float64 that a comparison may take at a time.
CHECK_BYTES = 2**28
#: How long the GPU works while its clocks are read: long enough for nvidia-smi, where pynvml is absent.
LOAD_SECONDS = 0.06

#: "random": all of int8 alike, the worst case for power; "real": with the values of a model (real_data.py).
Data = Literal["random", "real"]
#: As `_extension.gemm_tables()` has it, with its name.
Table = dict[str, Any]
#: A row of the table, and how many blocks share its k.
Choice = tuple[int, int]
#: What the tables of the CUDA library look like, for a rehearsal without one. No tile of it exists.
TOY_TABLE: Table = {
    "name": "toy",
    "machine": {"macs": 4096},
    "tiles": [
        {"tile": 0, "name": "stream 8x16", "kernel": "stream", "m": 8, "n": 16, "k": 64, "most_splits": 1, "rate": 50},
        {"tile": 1, "name": "16x32x64", "kernel": "mma", "m": 16, "n": 32, "k": 64, "most_splits": 4, "rate": 40},
        {"tile": 2, "name": "64x64x64", "kernel": "mma", "m": 64, "n": 64, "k": 64, "most_splits": 1, "rate": 80},
    ],
    "rules": [
        {"most_m": 8, "tiles": [0], "when": "M <= 8", "why": "toy"},
        {"most_m": 1 << 40, "tiles": [2, 1], "when": "M > 8", "why": "toy"},
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One problem: the layer's weight, m tokens, and the kind of values."""

    layer: Layer
    m: int
    data: Data = "random"

    @property
    def n(self) -> int:
        return self.layer.n

    @property
    def k(self) -> int:
        return self.layer.k

    @property
    def key(self) -> tuple[int, int, int]:
        return (self.m, self.n, self.k)

    @property
    def operations(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """The least that any implementation moves: x_q, w_q and both scales read once, y written once."""
        read = (self.m + self.n) * (self.k + 4)
        return read + OUT_DTYPE.itemsize * self.m * self.n

    def __str__(self) -> str:
        shape = f"{self.layer!s:18s} M {self.m:4d} N {self.n:5d} K {self.k:5d}"
        return shape if self.data == "random" else f"{shape} {self.data}"


def cases_of(layers: Iterable[Layer], tokens: Sequence[int]) -> list[Case]:
    """All combinations, the most telling first; a shape that several models have comes once."""
    kept = list(distinct(list(layers)))
    return [Case(kept[i], tokens[j]) for i, j in by_place(kept, tokens)]


# --- operands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    x_q: Tensor
    w_q: Tensor
    x_scale: Tensor
    w_scale: Tensor


def generator_of(case: Case, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(case.m * 1_000_003 + case.n * 1_009 + case.k)


def make_operands(case: Case, generator: torch.Generator) -> Operands:
    """Random int8 in all of [-127, 127], or what was recorded of a model: that, and more so zeros, needs less power."""
    device = generator.device
    if case.data == "real":
        site = "mlp" if case.layer.name in real_data.AFTER_ACTIVATION else "norm"
        return Operands(*real_data.draw(case.m, case.n, case.k, site, generator))

    def integers(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator, device=device)

    def scales(size: int, mean: float) -> Tensor:
        return mean * (0.5 + torch.rand(size, generator=generator, device=device))

    x_q, w_q = integers(case.m, case.k), integers(case.n, case.k)
    # A sum has a deviation of 73 ** 2 * sqrt(K): the product of the scales keeps y within float16.
    return Operands(x_q, w_q, scales(case.m, 0.02), scales(case.n, 0.01))


def make_floats(
    case: Case, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x and w of a float layer."""
    device = generator.device
    x = torch.randn(case.m, case.k, dtype=dtype, generator=generator, device=device)
    w = torch.randn(case.n, case.k, dtype=dtype, generator=generator, device=device)
    return x, w.mul_(0.02)


# --- what runs --------------------------------------------------------------------------------------------------------


def dispatched(a: Operands) -> Tensor:
    return ops.gemm_s8(a.x_q, a.w_q, a.x_scale, a.w_scale, out_dtype=OUT_DTYPE)


def forced(a: Operands, tile: int, splits: int) -> Tensor:
    """The same by one row of the current GPU's table; RuntimeError where it cannot serve the shape."""
    options = {"out_dtype": OUT_DTYPE, "tile": tile, "splits": splits}
    op = torch.ops.smoothquant_kernels._gemm_s8_tile
    y: Tensor = op(a.x_q, a.w_q, a.x_scale, a.w_scale, **options)
    return y


def int_mm(a: Operands) -> Tensor:
    """The INT8 product that PyTorch has, and dequantization in PyTorch."""
    acc = torch._int_mm(a.x_q, a.w_q.t())
    return (acc.float() * a.w_scale * a.x_scale[:, None]).to(OUT_DTYPE)


@functools.cache
def has_cuda_ops(device: torch.device) -> bool:
    """Whether the ops are the CUDA library's: on a GPU, and on a CPU in the simulator of simulated.py."""
    path = os.environ.get("SQK_SIMULATOR_LIBRARY")
    if device.type != "cuda" and path:
        from benchmarks.on_gpu import simulated  # not a part of any measurement

        simulated.bind(path)
    return device.type == "cuda" or bool(path)


def current_table(device: torch.device) -> Table | None:
    """The table of tiles and rules that serves the GPU, with its "name"; the toy one on the CPU, None without any."""
    if not has_cuda_ops(device):
        return TOY_TABLE
    plan = _extension.gemm_plan(16, 16, 16)
    if not plan:
        return None
    return {"name": plan["table"], **_extension.gemm_tables()[plan["table"]]}


def why_no_table() -> str:
    """On a GPU for which `current_table` has none: what describes the library may be missing, and not the library."""
    return _extension.described_library()[1] or "the library has no plan for this GPU"


def chosen(case: Case, device: torch.device) -> Choice | None:
    """The tile and the splits that the dispatch takes, or None where no library says so."""
    if not has_cuda_ops(device):
        rule = next(r for r in TOY_TABLE["rules"] if case.m <= r["most_m"])
        return rule["tiles"][0], 1
    plan = _extension.gemm_plan(case.m, case.n, case.k)
    return (int(plan["tile"]), int(plan["splits"])) if plan else None


def tile_name(table: Table | None, tile: Choice | None) -> str:
    """ "128x128x64", or with splits "128x128x64 /4"; "-" for none."""
    if table is None or tile is None:
        return "-"
    row, splits = tile
    name = str(table["tiles"][row]["name"])
    return name if splits <= 1 else f"{name} /{splits}"


def choices(table: Table, m: int) -> list[Choice]:
    """Every row of the table that may serve m tokens, with 1, 2, 4, 8 splits where it can."""
    return [
        (int(tile["tile"]), splits)
        for tile in table["tiles"]
        if serves(tile, m)
        for splits in (1, 2, 4, 8)
        if splits <= tile["most_splits"]
    ]


def serves(tile: dict[str, Any], m: int) -> bool:
    """A streaming kernel takes no more tokens than its tile has.

    A row may be ruled out (SQK_WITHOUT_TILES), or serve weights of 4 bits only.
    """
    if tile.get("excluded") or tile.get("w4_only"):
        return False
    return bool(tile["kernel"] != "stream" or m <= tile["m"])


# --- what is right ----------------------------------------------------------------------------------------------------


class Expected:
    """The specification's result for some operands, to the last bit.

    All of it up to FULL_CHECK products; of larger problems one random row and one random column of every
    SAMPLED_BLOCK, each in full, so that no tile of 64 tokens or 64 channels goes unseen.
    """

    def __init__(self, case: Case, operands: Operands, generator: torch.Generator) -> None:
        self.case = case
        device = operands.x_q.device
        rows, columns = (torch.arange(size, device=device) for size in (case.m, case.n))
        pairs = [(rows, columns)]
        if case.operations // 2 > FULL_CHECK:
            some_rows = _one_of_each(rows, generator)
            pairs = [(some_rows, columns), (rows, _one_of_each(columns, generator))]
        self.parts = [(i, j, self._value(operands, i, j)) for i, j in pairs]

    def _value(self, a: Operands, rows: Tensor, columns: Tensor) -> Tensor:
        x_q, x_scale = a.x_q[rows], a.x_scale[rows]
        at_a_time = max(1, CHECK_BYTES // (8 * self.case.k + 8 * len(rows)))
        parts = [
            reference.gemm_s8(x_q, a.w_q[some], x_scale, a.w_scale[some], out_dtype=OUT_DTYPE)
            for some in columns.split(at_a_time)
        ]
        return torch.cat(parts, dim=1)

    def wrong(self, y: Tensor) -> str:
        """Empty, or one sentence on why y is not the specification's result."""
        shape = (self.case.m, self.case.n)
        if tuple(y.shape) != shape or y.dtype != OUT_DTYPE:
            return f"y is {y.dtype} {tuple(y.shape)}, not {OUT_DTYPE} {shape}"
        for rows, columns, right in self.parts:
            actual = y[rows] if len(columns) == self.case.n else y[:, columns]
            if not torch.equal(actual, right):
                return differences(actual, right, rows, columns)
        return ""


def differences(actual: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> str:
    """How many elements differ, and the first: `rows` and `columns` are its places in the whole result."""
    off = (actual != right).nonzero()  # NaN is unequal to all
    i, j = off[0].tolist()
    return (
        f"{len(off)} of {right.numel()} elements differ, first y[{int(rows[i])}, {int(columns[j])}] = "
        f"{actual[i, j].item()}, not {right[i, j].item()}"
    )


def _one_of_each(indices: Tensor, generator: torch.Generator) -> Tensor:
    starts = indices[::SAMPLED_BLOCK]
    steps = torch.randint(
        0, SAMPLED_BLOCK, starts.shape, generator=generator, device=indices.device
    )
    return (starts + steps).clamp(max=len(indices) - 1)


def poison(case: Case, device: torch.device) -> None:
    """Leaves NaN in the block that the allocator most likely gives to the next y: what is left unwritten then shows."""
    torch.full((case.m, case.n), math.nan, dtype=OUT_DTYPE, device=device)


# --- the clock --------------------------------------------------------------------------------------------------------


def sample_under_load(
    variant: timer.Recorded, us: float, sample: gpu.Sampler, device: torch.device
) -> dict[str, float]:
    """Clocks, power and temperature while the GPU works on a variant whose call takes `us`."""
    if device.type == "cuda":
        begin = time.perf_counter()
        for _ in range(max(1, math.ceil(LOAD_SECONDS * 1e6 / (us * variant.calls)))):
            variant.replay()
        # Half of the work is done, the other half still to do; the queue may have taken as long to fill.
        time.sleep(max(0.0, LOAD_SECONDS / 2 - (time.perf_counter() - begin)))
    found = sample()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found


def record_each(
    function: Callable[[Operands], Tensor], sets: Sequence[Operands], device: torch.device
) -> timer.Recorded:
    """A variant that calls the function once on each of the sets."""
    return timer.record([lambda a=a: function(a) for a in sets], device)
