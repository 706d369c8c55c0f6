"""The checks of one kernel, in a process that it may break: first_light.py starts one for each.

graph      the layer (the producer, then the GEMM) captured in a CUDA graph before its kernels ever ran here
shapes     three shapes against the specification
dependent  three layers whose GEMM may start while the kernel before it ends (programmatic dependent launch)
repeats    the layer a thousand times, in graphs, each result compared on the device
"-" stands for a check that does not exist there: graphs on a CPU, dependent launch for a tile without it. On a CPU in
the simulator (simulated.py) the same code runs the kernels' PTX, on toy shapes.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import caches, cases, gpu, producers
from benchmarks.lib.cases import Case, Expected, Operands
from benchmarks.lib.runner import first_line
from benchmarks.lib.shapes import Layer
from benchmarks.on_gpu.first_light import MARK, PHASES
from smoothquant_kernels import reference
from smoothquant_kernels.backends import cuda
from tests.support import c_gemm, c_interface

REPEATS, IN_A_GRAPH = 1000, 20
#: Of a layer after a producer: no streaming kernel serves so many tokens, so that the GEMM is a launch of its own.
MANY_TOKENS = 40
#: The ops of cache_checks.py.
CACHE_OPS = (caches.APPEND, caches.ATTENTION)


def say(**message: Any) -> None:
    print(MARK + json.dumps(message), flush=True)


class NotHere(Exception):
    """The check does not exist for this row, or not on this device."""


# --- a layer through the C interface ----------------------------------------------------------------------------------


def c_library() -> ctypes.CDLL:
    """The built library, or in the simulator the one that it has compiled."""
    path = os.environ.get("SQK_SIMULATOR_LIBRARY")
    built = cuda.FOLDER / cuda.LIBRARY_NAME
    return c_gemm.declare(ctypes.CDLL(path or str(built)))


class Chain:
    """A producer of int8, then the GEMM: two launches, of which the second may begin before the first has ended.

    Args:
        producer: of producers.PRODUCERS.
        tile: a row of the table, or -1 for what the dispatch takes.
    """

    def __init__(
        self, device: torch.device, shape: tuple[int, int, int], producer: str, scheme: str, tile: int
    ) -> None:  # fmt: skip
        self.device, self.scheme, self.library = device, scheme, c_library()
        m, n, self.k = shape
        case = producers.Case(producer, True, scheme, torch.float16, m, self.k)
        g = torch.Generator(device).manual_seed(m + n + self.k)
        self.case, self.inputs = case, producers.make_inputs(case, g)
        self.scale = producers.static_scale(case, self.inputs)
        gemm = cases.make_operands(Case(Layer("", "", n, self.k), m), g)
        # Products of x as it is would not fit into float16.
        self.w_scale = gemm.w_scale * 1e-3
        padded = -(-self.k // c_gemm.ALIGNMENT) * c_gemm.ALIGNMENT
        self.w_q = torch.zeros(n, padded, dtype=torch.int8, device=device)
        self.w_q[:, : self.k] = gemm.w_q
        self.x_q = torch.zeros(m, padded, dtype=torch.int8, device=device)
        self.x_scale = torch.zeros(m, device=device)
        self.total = torch.zeros(m, self.k, dtype=torch.float16, device=device)
        self.y = torch.empty(m, n, dtype=torch.float16, device=device)
        self.params = self._params(tile)
        status, self.plan = c_gemm.linear_plan(self.library, self.params)
        if status != c_interface.SUCCESS:
            raise RuntimeError(f"the plan for {shape} was refused with status {status}")
        size = max(1, self.plan.workspace_bytes)
        self.workspace = torch.full((size,), 77, dtype=torch.int8, device=device)
        self.params.gemm.workspace = self.workspace.data_ptr()
        self.params.gemm.workspace_bytes = size

    def _params(self, tile: int) -> c_gemm.LinearParams:
        name, _, extra = self.case.producer.partition("+")
        kind, _, activation = name.removesuffix("_quantize").partition(":")
        given: dict[str, Any] = {"producer": activation or kind}
        x = self.inputs.get("x")
        if activation == "silu_mul":
            gate, x = self.inputs["fused"].split(self.k, 1)
            given |= {"other": gate, "producer": "silu"}
        elif extra:
            given["other"] = self.inputs[extra]
            given |= {"sum_out": self.total} if extra == "residual" else {}
        assert x is not None
        given |= {name: self.inputs.get(name) for name in ("weight", "bias", "inv_smooth")}
        quantizer = c_interface.params_of(
            x, self.x_q, self.x_scale, scheme=self.scheme.removeprefix("per_"), k=self.k,
            scale=self.scale, eps=producers.EPS, **given,
        )  # fmt: skip
        w_q = self.w_q[:, : self.k]
        gemm = c_gemm.params_of(None, w_q, None, self.w_scale, self.y, tile=tile)
        return c_gemm.LinearParams(quantizer, gemm)

    def launch(self) -> None:
        stream = None
        if self.device.type == "cuda":
            stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        status = self.library.sqk_linear_s8(byref(self.params), stream)
        if status != c_interface.SUCCESS:
            raise RuntimeError(f"the launch was refused with status {status}")

    def expected(self) -> Tensor:
        """By the specification, after what a producer that may round otherwise gives in a launch of its own."""
        if producers.PRODUCERS[self.case.producer].exact:
            x_q, x_scale = producers.run_reference(self.case, self.inputs, self.scale)[:2]
        else:
            x_q, x_scale = producers.run_op(self.case, self.inputs, self.scale)[:2]
        w_q = self.w_q[:, : self.k]
        return reference.gemm_s8(x_q, w_q, x_scale, self.w_scale, out_dtype=torch.float16)

    def wrong(self, expected: Tensor) -> str:
        """Empty, or how y differs."""
        if torch.equal(self.y, expected):  # NaN is unequal to all
            return ""
        return cases.differences(self.y, expected, *map(torch.arange, expected.shape))


# --- rows -------------------------------------------------------------------------------------------------------------


class Row:
    """What the checks of a tile and of a producer share; a check returns what was wrong, or an empty text."""

    producer, tile, schemes = "quantize", -1, producers.SCHEMES
    overlaps = True  # the GEMM's kernel may be launched to overlap with the one before it

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.large = device.type == "cuda"

    layer_shapes: Callable[[], list[tuple[int, int, int]]]

    def chain(self, place: int) -> Chain:
        shape = self.layer_shapes()[place]
        return Chain(self.device, shape, self.producer, self.schemes[place], self.tile)

    def dependent(self) -> str:
        if not cases.has_cuda_ops(self.device):
            raise NotHere
        overlaps = False
        for place in range(3):
            chain = self.chain(place)
            chain.y.fill_(torch.nan)
            chain.launch()
            overlaps |= self.overlaps and bool(chain.plan.gemm.overlap)
            if wrong := chain.wrong(chain.expected()):
                return f"{self.layer_shapes()[place]}: {wrong}"
        if not overlaps:
            raise NotHere
        return ""

    def graph(self) -> str:
        if self.device.type != "cuda":
            raise NotHere
        chain = self.chain(0)
        chain.y.fill_(torch.nan)
        self._captured(chain.launch).replay()
        torch.cuda.synchronize()
        return chain.wrong(chain.expected())

    def repeats(self) -> str:
        if not cases.has_cuda_ops(self.device):
            raise NotHere
        chain = self.chain(1)
        chain.launch()
        expected = chain.expected()
        different = torch.zeros((), dtype=torch.int64, device=self.device)

        def once() -> None:
            chain.y.fill_(torch.nan)
            chain.launch()
            different.add_((chain.y != expected).any())

        once()
        if self.device.type == "cuda":
            graph = self._captured(lambda: [once() for _ in range(IN_A_GRAPH)])
            different.zero_()
            for _ in range(REPEATS // IN_A_GRAPH):
                graph.replay()
        else:
            once()
        bad = int(different)
        return f"{bad} results differ from the specification's" if bad else ""

    def _captured(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph


class TileRow(Row):
    """A row of the GEMM table."""

    def __init__(self, device: torch.device, tile: dict[str, Any]) -> None:
        super().__init__(device)
        self.facts, self.tile = tile, int(tile["tile"])

    def _m(self, m: int) -> int:
        return min(m, self.facts["m"]) if self.facts["kernel"] == "stream" else m

    def layer_shapes(self) -> list[tuple[int, int, int]]:
        """Odd sides and one tile; more tiles than one wave has; enough K for tiles to be shared over it."""
        m, n, k = (int(self.facts[side]) for side in "mnk")
        if not self.large:
            return [(self._m(5), n + 3, k + 17), (self._m(m + 1), n, 2 * k), (self._m(3), 9, 9 * k)]
        return [
            (self._m(m + 5), 3 * n + 5, 2 * k + 17),
            (self._m(4 * m + 3), 41 * n, 8 * k),
            (self._m(m), 2 * n - 3, 40 * k + 16),
        ]

    def shapes(self) -> str:
        shapes = self.layer_shapes()
        if self.large:  # as a model has them
            shapes[1] = (self._m(1024), 4096, 4096)
        for m, n, k in shapes:
            case = Case(Layer("first", "light", n, k), m)
            g = cases.generator_of(case, self.device)
            operands = cases.make_operands(case, g)
            cases.poison(case, self.device)
            if wrong := Expected(case, operands, g).wrong(self._multiply(operands)):
                return f"{(m, n, k)}: {wrong}"
        return ""

    def _multiply(self, operands: Operands) -> Tensor:
        if not cases.has_cuda_ops(self.device):
            # A rehearsal: the toy table's tiles do not exist.
            return cases.dispatched(operands)
        return cases.forced(operands, self.tile, 0)


class ProducerRow(Row):
    """A producer of int8 activations; the GEMM after it is the dispatch's."""

    def __init__(self, device: torch.device, name: str) -> None:
        super().__init__(device)
        self.producer = name

    def layer_shapes(self) -> list[tuple[int, int, int]]:
        if not self.large:
            return [(MANY_TOKENS, 24, 80), (MANY_TOKENS, 40, 131), (MANY_TOKENS, 16, 64)]
        return [(300, 1024, 4096), (64, 2048, 5120), (MANY_TOKENS, 515, 11003)]

    def shapes(self) -> str:
        widths = [(2048, 4096), (5, 515), (3, 14336)] if self.large else [(3, 96), (2, 131), (1, 64)]  # fmt: skip
        for m, k in widths:
            for scheme in producers.SCHEMES:
                for dtype in (torch.float16, torch.bfloat16):
                    case = producers.Case(self.producer, True, scheme, dtype, m, k)
                    g = torch.Generator(self.device).manual_seed(k)
                    inputs = producers.make_inputs(case, g)
                    scale = producers.static_scale(case, inputs)
                    actual = producers.run_op(case, inputs, scale)
                    expected = producers.run_reference(case, inputs, scale)
                    if wrong := producers.wrong_op(case, actual, expected):
                        return f"{case}: {wrong}"
        return ""


# --- the process ------------------------------------------------------------------------------------------------------


def rows_here(device: torch.device) -> list[dict[str, Any]]:
    """Shipped tiles, producers, ops with a cache, then candidates: if the time runs out, those are missed first."""

    def row(name: str, id: str, kind: str, candidate: bool = False) -> dict[str, Any]:
        return {"name": name, "id": id, "kind": kind, "candidate": candidate}

    table = cases.current_table(device) or {"name": "", "tiles": []}
    tiles = []
    for tile in table["tiles"]:
        if tile.get("w4_only"):
            continue
        id = f"{table['name']}/{tile['name'].replace(' ', '-')}"
        tiles.append(row(tile["name"], id, "tile", bool(tile.get("candidate"))))
    made = [row(name, name, "producer") for name in producers.PRODUCERS]
    made += [row(name, name, "cache") for name in CACHE_OPS]
    return [t for t in tiles if not t["candidate"]] + made + [t for t in tiles if t["candidate"]]


def row_of(name: str, device: torch.device) -> Row:
    table = cases.current_table(device)  # in the simulator it binds the ops
    if name in producers.PRODUCERS:
        return ProducerRow(device, name)
    if name in CACHE_OPS:
        from benchmarks.on_gpu.cache_checks import CacheRow  # which needs this module

        return CacheRow(device, name)
    if table is None:
        sys.exit(f"error: the GEMM table cannot be read: {cases.why_no_table()}")
    for tile in table["tiles"]:
        if tile["name"] == name:
            return TileRow(device, tile)
    sys.exit(f"error: the table {table['name']} has no tile '{name}'")


def check(name: str, phase: Callable[[], str]) -> str:
    """One check's word. A CUDA graph that is refused leaves the kernel usable; any other error ends the process."""
    try:
        wrong = phase()
    except NotHere:
        return "-"
    except RuntimeError as error:
        if name != "graph":
            raise
        torch.cuda.synchronize()  # raises if the context is broken
        return f"refused: {first_line(error)}"
    return f"wrong: {wrong}" if wrong else "ok"


@torch.inference_mode()
def listing(device_name: str) -> None:
    device = torch.device(device_name)
    missing = "" if cases.current_table(device) else cases.why_no_table()
    say(machine=gpu.machine(device), rows=rows_here(device), without_tiles=missing)


@torch.inference_mode()
def check_row(name: str, device_name: str) -> None:
    row = row_of(name, torch.device(device_name))
    for phase in PHASES:
        say(begin=phase)
        say(phases={phase: check(phase, getattr(row, phase))})
    say(done=True)
