"""What model.py predicts with: what is assumed of each GPU, the counts of a tile's kernel, and the time they make.

A tile's turn of the main loop takes clocks of several resources, of which the scarcest counts; to that comes what is
not hidden: launch, first loads, last stores, the adding up of partial sums; and memory, if all of that is done sooner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.prediction.predict import Gpu, floor

#: Share of the data sheet's memory bandwidth that a long read gets; assumption.
MEMORY_SHARE = (0.94, 0.90, 0.82)


@dataclass(frozen=True)
class Machine:
    """What the model assumes of a GPU beside its data sheet (predict.GPUS); triples are best, likely, worst."""

    macs: int  # int8 multiply-adds of an SM and clock: the data sheet's TOPS / (2 SMs clock)
    loaded_ghz: tuple[
        float, float, float
    ]  # under a load that keeps the tensor cores busy; assumption: power
    l2_tb_per_s: tuple[float, float, float]  # assumption, by what is published of read tests
    latency: tuple[
        int, int, int
    ]  # clocks to memory's first byte; idle, then with queues (assumption)
    intake: int = 64  # bytes that an SM takes in per clock (L2 to L1, NVIDIA's whitepapers)
    launch_us: tuple[float, float, float] = (0.5, 1.0, 2.0)  # a node of a graph; assumption
    memory_share: tuple[float, float, float] = MEMORY_SHARE
    clusters: Mapping[int, int] = field(default_factory=dict)  # at a time, by size; measured only


# Idle latencies: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499, find
# some 470 to 480 clocks for A100 and H100 and 540 for Ada; the others are assumptions. L2: A100's 5120 bytes a clock
# (NVIDIA's whitepaper) are 7.2 TB/s on paper, of which reads are assumed to get 4 to 5.5; H100 5.5 to 6.5; Ada 4 to
# 5.7. Clocks: the data sheet's boost is the best; int8 at 700 W (H100), 400 W (A100), 350 W (L40S) lowers it.
MACHINES = {
    "H100": Machine(4096, (1.83, 1.60, 1.30), (6.5, 5.9, 5.5), (480, 800, 1400)),
    "H200": Machine(4096, (1.83, 1.60, 1.30), (6.5, 5.9, 5.5), (480, 800, 1400)),
    "A100": Machine(2048, (1.41, 1.35, 1.20), (5.5, 4.6, 4.0), (470, 700, 1200)),
    "L40S": Machine(1024, (2.52, 2.20, 1.80), (5.7, 5.0, 4.0), (540, 900, 1500)),
    "4090": Machine(1024, (2.52, 2.50, 2.30), (5.7, 5.0, 4.0), (540, 900, 1500)),
}
#: Share of the tensor cores' rate that back-to-back instructions get in a loop that also loads; assumption.
RATE = {"mma": (1.0, 0.92, 0.80), "wgmma": (1.0, 0.97, 0.90), "stream": (1.0, 0.92, 0.80)}
#: Clocks of a turn that nothing hides (barrier, wait) with one block of mma.sync on an SM, and with two; assumption.
TURN = {1: (0, 24, 60), 2: (0, 8, 30)}
#: Share of a block's first loads and last stores that the other block on the SM hides; assumption.
HIDDEN = (1.0, 0.8, 0.4)
#: A warp's instructions of a tile beside the main loop are counted in PTX: what the machine's own are of them.
SASS_OF_PTX = (0.7, 1.0, 1.5)
SCHEDULERS = 4  # of an SM, an instruction each a clock
SHARED_BYTES = 128  # of an SM's shared memory per clock
#: cuBLAS in float16: share of the peak at the same clock that its full waves are assumed to reach, and its tiles.
CUBLAS = 0.90
CUBLAS_TILES = ((128, 256), (128, 128), (64, 128), (64, 64))


def up(x: int, by: int) -> int:
    return -(-x // by)


@dataclass(frozen=True)
class Costs:
    """Counts of one tile's kernel, per block and turn of its main loop where nothing else is said."""

    warps: int  # that multiply
    instructions: float  # of each of those warps; of the copying warp where there is one
    producer: float
    wavefronts: float  # of shared memory: read, and written
    reads: float  # those that read; the least that shared memory must serve
    tile_instructions: float  # of a warp, outside the main loop
    counted: bool = True  # False: scaled from a tile of the same kind


def warps_of(tile: Mapping[str, Any]) -> int:
    """Warps that multiply on the same turn."""
    if tile["kernel"] == "stream":
        return int(tile.get("warps_n") or 16)
    if tile["kernel"] == "wgmma":
        return 4 if tile["schedule"] == "pingpong" else 8
    return int(tile.get("warps_m", 2) * tile.get("warps_n", 2))


def wgmma_wavefronts(tile: Mapping[str, Any]) -> tuple[float, float]:
    """What wgmma reads of shared memory on a turn, and with what TMA writes: each instruction reads A and B anew."""
    rows, columns = (tile["n"], tile["m"]) if tile["swap_ab"] else (tile["m"], tile["n"])
    reads = (rows / 64) * (tile["k"] / 32) * (64 + columns) * 32 / SHARED_BYTES
    return reads, reads + (rows + columns) * tile["k"] / SHARED_BYTES


def costs_of(costs: Mapping[str, Any], table: str, tiles: Sequence[Any], tile: Any) -> Costs:
    """By the tile's name; one that was not counted takes those of the tile most like it, scaled."""
    known = costs["sass"].get(table, {})
    simulated = costs.get("simulated", {}).get(table, {})
    size = tile["m"] * tile["n"] * tile["k"]

    def nearest(names: Mapping[str, Any]) -> Any:
        same = [t for t in tiles if t["kernel"] == tile["kernel"] and t["name"] in names]
        if not same:
            raise ValueError(
                f"no tile of the kind {tile['kernel']} of {table} was counted; run "
                "`python -m benchmarks.prediction.model --counters` where the library is built."
            )

        def unlike(t: Any) -> tuple[bool, bool, float]:
            ratio = abs(math.log(t["m"] * t["n"] * t["k"] / size))
            return t["swap_ab"] != tile["swap_ab"], t["schedule"] != tile["schedule"], ratio

        return min(same, key=lambda t: (t["name"] != tile["name"], *unlike(t)))

    at = nearest(known)
    loop, warps = known[at["name"]], warps_of(tile)
    # Its turn is larger or smaller by the multiplications of a warp.
    scale = 1.0
    if tile["kernel"] != "stream" and at is not tile:
        scale = (size / warps) / (at["m"] * at["n"] * at["k"] / warps_of(at))
    tile_instructions = 0.0
    wavefronts = reads = 0.0
    if tile["kernel"] == "wgmma":
        reads, wavefronts = wgmma_wavefronts(tile)
    else:
        reads = warps * scale * 4.0 * (loop["ldsm"] + loop["lds"])
        wavefronts = reads + warps * scale * 4.0 * loop["copies"]
    if simulated:
        by = nearest(simulated)
        part = tile["m"] * tile["n"] / warps / (by["m"] * by["n"] / warps_of(by))
        tile_instructions = simulated[by["name"]]["tile_instructions"] * part
        if tile["kernel"] == "mma" and by is tile:
            # A conflict is a wavefront more, of reads and writes alike.
            reads *= max(1.0, simulated[by["name"]]["wavefronts"] / wavefronts)
            wavefronts = simulated[by["name"]]["wavefronts"]
    return Costs(
        warps,
        loop["instructions"] * scale,
        loop["producer"],
        wavefronts,
        reads,
        tile_instructions,
        at is tile,
    )


def grid(tile: Mapping[str, Any], m: int, n: int) -> tuple[int, float]:
    """Tiles, clusters being whole; and what is multiplied over what M and N need."""
    cluster_m, cluster_n = tile["cluster"]
    tiles = up(m, tile["m"] * cluster_m) * cluster_m * up(n, tile["n"] * cluster_n) * cluster_n
    return tiles, tiles * tile["m"] * tile["n"] / (m * n)


def waves(
    tile: Mapping[str, Any],
    tiles: int,
    splits: int,
    sms: int,
    clusters: Mapping[int, int] | None = None,
) -> int:
    """Blocks that the busiest SM works off; a cluster needs its SMs at a time. `clusters`: Machine.clusters."""
    cluster = tile["cluster"][0] * tile["cluster"][1]
    return up(tiles * splits, (clusters or {}).get(cluster, sms // cluster) * cluster)


def stream_k_share(tiles: int, turns: int, sms: int) -> float:
    """Tiles of the busiest SM when the last one or two waves are shared over K (as csrc/gemm/plan.cpp has it)."""
    full = tiles // sms
    if full * sms == tiles or turns <= 8:
        return math.ceil(tiles / sms)
    whole = max(0, full - 1)
    shared = tiles - whole * sms
    return whole + shared / max(1.0, min(sms, shared * turns / 8))


def dram_bytes(m: int, n: int, k: int, item: int = 1) -> int:
    """Read once and written once, y in 16 bits; what is read again because L2 is too small is not in it."""
    return item * (m * k + n * k) + 4 * (m + n) + 2 * m * n


def co_resident(tile: Mapping[str, Any], gpu: Gpu) -> int:
    """Blocks on an SM at a time: two of mma.sync where shared memory and 128 threads allow (mma_blocks_per_sm)."""
    if tile["kernel"] != "mma" or warps_of(tile) > 4:
        return 1
    return 2 if 2 * (tile["shared_bytes"] + 1024) <= gpu.shared_bytes + 1024 else 1


@dataclass(frozen=True)
class Time:
    """One case of a prediction in microseconds; the parts add up to the whole."""

    launch: float
    first_loads: float
    main_loop: float
    stores: float
    sharing: float  # partial sums of splits and stream-K
    memory: float  # what memory takes longer than all of that
    binds: str
    tops: float

    @property
    def us(self) -> float:
        parts = (self.launch, self.first_loads, self.main_loop, self.stores)
        return sum(parts) + self.sharing + self.memory


def turn_clocks(
    tile: Mapping[str, Any], costs: Costs, machine: Machine, l2: float, case: int
) -> dict[str, float]:
    """Clocks that one turn of one block takes of each resource. l2: bytes per SM and clock."""
    cluster_m, cluster_n = tile["cluster"]
    drawn = tile["m"] / cluster_n + tile["n"] / cluster_m
    issue = costs.warps * costs.instructions / SCHEDULERS
    return {
        "tensor cores": tile["m"]
        * tile["n"]
        * tile["k"]
        / (machine.macs * RATE[tile["kernel"]][case]),
        "issue": issue + costs.producer / SCHEDULERS,
        "shared memory": costs.reads if case == 0 else costs.wavefronts,
        "L2": drawn * tile["k"] / l2,
        "SM's intake": (tile["m"] + tile["n"]) * tile["k"] / machine.intake,
    }


def time_of(
    gpu: Gpu, machine: Machine, tile: Mapping[str, Any], costs: Costs, shape: tuple[int, int, int],
    splits: int, case: int, ghz: float | None = None,
) -> Time:  # fmt: skip
    """case: 0 best, 1 likely, 2 worst. ghz: the SM's clock where one was measured."""
    m, n, k = shape
    if ghz is None:
        # What memory bounds leaves the power for the boost clock.
        ghz = gpu.ghz if floor(gpu, m, n, k)[1] == "memory" else machine.loaded_ghz[case]
    tiles, _ = grid(tile, m, n)
    turns = up(k, tile["k"])
    stream_k, stream = tile["schedule"] == "stream-K", tile["kernel"] == "stream"
    busy = gpu.sms if stream_k else min(gpu.sms, tiles * splits)
    l2 = min(machine.intake, machine.l2_tb_per_s[case] * 1e3 / ghz / busy)
    latency = machine.latency[case]
    store = max(
        costs.tile_instructions * SASS_OF_PTX[case] * costs.warps / SCHEDULERS,
        2 * tile["m"] * tile["n"] / l2,
    )
    memory = dram_bytes(m, n, k) / (gpu.gb_per_s * machine.memory_share[case]) * ghz  # clocks
    sharing, launches = 0.0, 1
    if stream:
        # Persistent: x_q stays, the ring runs on from tile to tile, and stages are shared by the warps.
        chunks = tiles * turns / busy
        clocks = {
            "issue": chunks * costs.instructions / SCHEDULERS,
            "shared memory": chunks * costs.wavefronts / costs.warps,
            "L2": chunks * tile["n"] * tile["k"] / l2,
        }
    else:
        turn = turn_clocks(tile, costs, machine, l2, case)
        share = (
            stream_k_share(tiles, turns, gpu.sms)
            if stream_k
            else waves(tile, tiles, splits, gpu.sms, machine.clusters)
        )
        each = turns if stream_k else up(turns, splits)
        clocks = {name: share * each * spent for name, spent in turn.items()}
    binds = max(clocks, key=lambda name: clocks[name])
    main = clocks[binds]
    last = store
    if not stream:
        resident = co_resident(tile, gpu)
        if tile["kernel"] == "mma":
            main += share * each * TURN[resident][case]
            hidden = HIDDEN[case] if resident > 1 else 0.0
            again = up(math.ceil(share), resident) - 1
            last = store + again * (1 - hidden) * (latency + store)
        elif tile["schedule"] == "pingpong":
            # One warpgroup stores while the other multiplies, unless that is done sooner.
            last = store + (share - 1) * max(0.0, store - main / share)
        elif not stream_k:
            last = share * store
        area = 4 * tile["m"] * tile["n"]
        if stream_k and share != int(share):
            sharing, launches = 2 * area / l2 + latency, 2
        elif stream_k:
            last, launches = share * store, 2
        elif splits > 1:
            # One block writes its sums, the last one reads those of all others.
            sharing, launches = splits * area / l2 + 2 * latency, 2
    spent = main + last + sharing
    late = max(0.0, memory - spent)
    if late > 0:
        binds = "memory"
    us = 1e-3 / ghz
    # A second node of the graph (clearing counters) is short: half a launch.
    launch = machine.launch_us[case] * (1 + 0.5 * (launches - 1))
    first = latency * us  # to the first data; the tiles after the first load while others multiply
    if launch + first > 0.5 * (launch + first + (spent + late) * us):
        binds = "launch"
    total = launch + first + (spent + late) * us
    return Time(
        launch, first, main * us, last * us, sharing * us, late * us, binds,
        2 * m * n * k / total / 1e6,
    )  # fmt: skip
