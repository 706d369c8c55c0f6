"""Stream-K cannot wait forever: runs CUTLASS's schedule on the host, without a GPU, and checks who waits for whom.

A block that works on the end of a tile waits until the blocks that have its beginning are done. All waits end if blocks
wait only for blocks with lower numbers: the unfinished block with the lowest number then waits for none, and it runs,
because the hardware starts blocks in the order of their numbers. This holds for any number of multiprocessors. With
MPS, a green context or another kernel, fewer blocks run at once than the schedule assumes, and they still finish.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.csrc.test_gemm_plan import compiled
from tests.support import c_gemm
from tools.build.plan import ROOT, BuildError, find_cutlass, find_nvcc

pytestmark = [pytest.mark.slow, pytest.mark.compiler]  # 6 s of compiler


class Part(NamedTuple):
    """A block's work on a tile: `count` tiles of k, starting at `first`."""

    block: int
    turn: int
    m: int
    n: int
    first: int
    count: int


class Case(NamedTuple):
    row: int
    m: int
    n: int
    k: int
    sms: int
    clusters: int


def toolkit_of(nvcc: str) -> Path:
    """The folder of nvcc's headers. The program `nvcc` may be a script in another folder."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"^#\$ TOP=(.*)$", said, re.M)
    assert found, said
    return Path(found[1])


class Schedules:
    """The compiled program, and the rows whose blocks share tiles over k."""

    def __init__(self, folder: Path) -> None:
        tiles = c_gemm.tables(compiled(folder, "-DSQK_TUNING=1"))["sm90"]["tiles"]
        self.rows = {tile["tile"]: tile for tile in tiles if tile["schedule"] == "stream-K"}
        self.sides = {}
        cases = []
        for row, tile in self.rows.items():
            order = 1 - 2 * tile["swap_ab"]  # -1: the instruction's rows are channels
            self.sides[row] = (tile["m"], tile["n"])[::order]
            sizes = (*self.sides[row], tile["k"], *tile["cluster"][::order])
            arguments = ", ".join(map(str, sizes))
            cases.append(f"case {row}: print_parts<{arguments}>(m, n, k, sms, clusters); break;")
        cutlass = find_cutlass(os.environ)
        toolkit = toolkit_of(find_nvcc(os.environ).path) / "include"
        self._program = folder / "stream_k"
        command = ["g++", "-std=c++17", "-O0", "-w", "-fpermissive", f"-DROWS={' '.join(cases)}"]
        command += [f"-I{place}" for place in (*cutlass.includes, toolkit, toolkit / "cccl")]
        command += ["tests/csrc/stream_k.cpp", "-o", str(self._program)]
        subprocess.run(command, cwd=ROOT, check=True)

    def run(self, cases: list[Case]) -> list[tuple[int, list[Part]]]:
        """(blocks, parts) of each case."""
        given = "\n".join(" ".join(map(str, case)) for case in cases)
        done = subprocess.run(
            [str(self._program)], input=given, capture_output=True, text=True, check=True
        )
        found = []
        for text in done.stdout.split("end\n")[:-1]:
            grid, *lines = text.splitlines()
            x, y = grid.split()[1:]
            found.append((int(x) * int(y), [Part(*map(int, line.split())) for line in lines]))
        assert len(found) == len(cases)
        return found


@pytest.fixture(scope="module")
def schedules(tmp_path_factory: pytest.TempPathFactory) -> Schedules:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    try:
        return Schedules(tmp_path_factory.mktemp("stream_k"))
    except BuildError as error:
        pytest.skip(f"CUTLASS's scheduler cannot be compiled: {error}")


def waits(parts: list[Part]) -> list[tuple[Part, Part]]:
    """Pairs of a part that waits and the part that it waits for: a tile's parts are added in the order of k."""
    tiles = defaultdict(list)
    for part in parts:
        tiles[part.m, part.n].append(part)
    found = []
    for shared in tiles.values():
        shared.sort(key=lambda part: part.first)
        found += [(later, one) for i, later in enumerate(shared) for one in shared[:i]]
    return found


def can_wait_forever(parts: list[Part]) -> bool:
    return any((one.block, one.turn) >= (later.block, later.turn) for later, one in waits(parts))


def cases_of(schedules: Schedules) -> list[Case]:
    choose = random.Random(14)
    cases = []
    for row, tile in schedules.rows.items():
        rows, columns = schedules.sides[row]
        size = tile["cluster"][0] * tile["cluster"][1]
        for _ in range(60):
            sms = choose.choice((8, 16, 78, 114, 132, 144))
            m = choose.randint(1, choose.choice((1, 4, 20)) * rows)
            n = choose.randint(1, choose.choice((1, 8, 40)) * columns)
            k = choose.randint(1, choose.choice((4, 16, 100)) * tile["k"])
            # Unknown, all that fit, or a few less, as when GPCs are not a multiple of the cluster.
            clusters = choose.choice((0, sms // size, max(1, sms // size - 3)))
            cases.append(Case(row, m, n, k, sms, clusters if size > 1 else 0))
    return cases


@pytest.mark.compiler
def test_blocks_wait_only_for_blocks_with_lower_numbers(schedules: Schedules) -> None:
    cases, waiting, backwards = cases_of(schedules), defaultdict(int), 0
    for case, (blocks, parts) in zip(cases, schedules.run(cases), strict=True):
        assert not can_wait_forever(parts), case
        assert {part.block for part in parts} <= set(range(blocks))
        found = waits(parts)
        waiting[case.row] += len(found)
        # The check must fail in the reverse order, or it would prove nothing.
        backwards += can_wait_forever([p._replace(block=blocks - 1 - p.block) for p in parts])
    assert set(waiting) == set(schedules.rows) and min(waiting.values()) > 100
    assert backwards > len(cases) / 4


def test_every_tile_of_k_is_multiplied_once(schedules: Schedules) -> None:
    cases = cases_of(schedules)
    for case, (_, parts) in zip(cases, schedules.run(cases), strict=True):
        rows, columns = schedules.sides[case.row]
        k_tiles = -(-case.k // schedules.rows[case.row]["k"])
        tiles = defaultdict(list)
        for part in parts:
            tiles[part.m, part.n] += range(part.first, part.first + part.count)
        wanted = {(i, j) for i in range(-(-case.m // rows)) for j in range(-(-case.n // columns))}
        assert wanted <= set(tiles)
        assert all(sorted(found) == list(range(k_tiles)) for found in tiles.values()), case
