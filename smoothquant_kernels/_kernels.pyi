"""The compiled module beside the CUDA library (csrc/python/module.cpp), for the Python that built it."""

from collections.abc import Sequence
from typing import Literal, TypedDict

class BuiltWith(TypedDict):
    archs: list[str]
    cutlass_version: str
    cuda_version: str
    torch_target: str
    tuning: bool

class Tile(TypedDict):
    tile: int
    id: str
    name: str
    kernel: Literal["stream", "mma", "wgmma"]
    m: int
    n: int
    k: int
    warps_m: int
    warps_n: int
    stages: int
    schedule: Literal["", "pingpong", "cooperative", "stream-K"]
    swap_ab: bool
    cluster: list[int]
    most_splits: int
    rate: int
    shared_bytes: int
    candidate: bool
    excluded: bool

class Rule(TypedDict):
    most_m: int
    tiles: list[int]
    when: str
    why: str

class Machine(TypedDict):
    macs: int
    l2_bytes: int
    sm_bytes: int
    memory_bytes: int
    overhead: int
    launch: int

class Table(TypedDict):
    machine: Machine
    tiles: list[Tile]
    rules: list[Rule]

class PathRow(TypedDict):
    path: str
    when: str
    why: str

class GemmPlan(TypedDict):
    table: str
    tile: int
    name: str
    splits: int
    launches: int
    tiles: int
    blocks: int
    shared_bytes: int
    workspace_bytes: int
    expected_clocks: float
    bound_by: str

class QuantizePlan(TypedDict):
    path: str
    threads: int
    rows: int
    cluster: int
    splits: int
    slice: int
    slots: int
    launches: int
    blocks: int
    shared_bytes: int
    workspace_bytes: int

built_with: BuiltWith

class Device:
    """What a plan depends on besides the problem (csrc/include/sqk)."""

    def __init__(
        self, *, sms: int, capability: int, shared_bytes: int, wgmma: bool = ..., part: bool = ...
    ) -> None: ...
    @property
    def sms(self) -> int: ...
    @property
    def capability(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def wgmma(self) -> int: ...
    @property
    def part(self) -> int: ...

class Library:
    """The tables and plans of the library in that file, with the choices and the ruled-out rows that it has now.

    Without a path: of the module's own copy of csrc's plain C++, which knows no GPU.

    Raises:
        RuntimeError: the file does not load, or is a library of another version.
    """

    def __init__(self, path: str | None = ...) -> None: ...
    def gemm_tables(self) -> dict[str, Table]: ...
    def quantize_paths(self) -> list[PathRow]: ...
    def current_device(self) -> Device | None: ...
    def plan_gemm(self, m: int, n: int, k: int, device: Device | None = ...) -> GemmPlan | None: ...
    def plan_quantize(
        self,
        m: int,
        k: int,
        device: Device,
        *,
        producer: str = ...,
        scheme: str = ...,
        dtype: str = ...,
        rotation: int = ...,
    ) -> QuantizePlan | None: ...
    def use_measured(
        self, table: str, sms: int, rows: Sequence[tuple[int, int, int, str, int]]
    ) -> None:
        """Rows of n, k, m, the tile's name and splits. ValueError: the library refuses one."""

    def without_tiles(self, names: str | None) -> None:
        """None: what SQK_WITHOUT_TILES says. ValueError: no table has such a tile."""
