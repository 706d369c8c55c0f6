"""What one turn of each GEMM kernel's main loop costs, read off the compiled library: benchmarks/kernel_costs.json.

`python benchmarks/model.py --counters` writes it. Counts of instructions are of the SASS; shared-memory wavefronts and
the instructions of a whole tile come from the simulator of PTX where it can be built (nvcc and CUTLASS,
tests/support/simulator.py) and are called `simulated`: without it the model goes on with what the SASS and the tile
say.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

import sass  # noqa: E402  (tools/ is no package)
from build_support import BUILD_INFO_NAME, LIBRARY_NAME, PACKAGE  # noqa: E402
from kernel_gates import GatesError, find_tools  # noqa: E402

LIBRARY = ROOT / PACKAGE / LIBRARY_NAME
COSTS = ROOT / "benchmarks" / "kernel_costs.json"
#: The code that a table's GPU runs.
ARCHS = {"sm80": "sm_80", "sm89": "sm_89", "sm90": "sm_90a"}
#: What the simulator is asked for, and the table whose tiles it can then run.
SIMULATED = {"sm80": "sm_80", "sm89": "sm_89", "sm90": "sm_90"}

_LINE = re.compile(
    r"^\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);",
    re.M,
)
Instruction = tuple[int, str, str]  # address, opcode, operands


def instructions(body: str) -> list[Instruction]:
    """Of one function of ``cuobjdump --dump-sass``, without padding."""
    return [
        (int(found["at"], 16), found["opcode"], found["rest"])
        for found in _LINE.finditer(body)
        if found["guard"] not in ("!PT", "!UPT")
    ]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The instructions from the target of each branch backwards to the branch, the shortest first."""
    places = [at for at, _, _ in code]
    found = []
    for i, (at, opcode, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            found.append(code[bisect_left(places, int(target[1], 16)) : i + 1])
    return sorted(found, key=len)


def _plain(opcode: str) -> str:
    return opcode.split(".")[0]


def macs_of(opcode: str) -> int:
    """Multiply-adds of a tensor-core instruction: IMMA.16832.S8.S8, IGMMA.64x256x32.S8.S8."""
    if found := re.match(r"IGMMA\.(\d+)x(\d+)x(\d+)\.", opcode):
        return int(found[1]) * int(found[2]) * int(found[3])
    if re.match(r"IMMA\.16832\.", opcode):
        return 16 * 8 * 32
    return 0


def loop_counts(code: list[Instruction]) -> dict[str, int]:
    """Of the innermost loop that multiplies, per warp and turn; `producer`: of the one that issues TMA loads."""
    found = loops(code)
    inner = next((part for part in found if any(macs_of(op) for _, op, _ in part)), None)
    if inner is None:
        raise ValueError("no loop with a tensor-core instruction: is this a GEMM kernel?")
    count = Counter(_plain(op) for _, op, _ in inner)
    producer = next((part for part in found if any("UTMALDG" in op for _, op, _ in part)), [])
    return {
        "instructions": len(inner),
        "tensor": sum(bool(macs_of(op)) for _, op, _ in inner),
        "macs": sum(macs_of(op) for _, op, _ in inner),
        "ldsm": count["LDSM"],
        "lds": count["LDS"],
        "copies": count["LDGSTS"],
        "barriers": count["BAR"],
        "producer": len(producer),
        "code": len(code),
    }


def pattern(tile: Mapping[str, Any]) -> str:
    """A regex for the mangled name of a tile's kernel; of the streaming one, that for x_q."""
    if tile["kernel"] == "stream":
        return f"stream_gemm_kernelIaLi{1 if tile['m'] <= 8 else 2}E"
    sides = [tile["m"], tile["n"], tile["k"]]
    if tile["kernel"] == "wgmma":
        return "wgmma_gemm_kernelI" + "".join(f"Li{i}E" for i in (tile["tile"], *sides)) + "E"
    if "warps_m" in tile:
        sides += [tile["warps_m"], tile["warps_n"], tile["stages"]]
        return "mma_gemm_kernelI" + "".join(f"Li{i}E" for i in sides) + "E"
    return "mma_gemm_kernelI" + "".join(f"Li{i}E" for i in sides) + rf"\w*Li{tile['stages']}EE"


def _cuobjdump(*arguments: str, env: Mapping[str, str]) -> str:
    cuobjdump, nvdisasm = find_tools(env)
    places = os.pathsep.join([str(Path(nvdisasm).parent), env.get("PATH", os.defpath)])
    done = subprocess.run(
        [cuobjdump, *arguments],
        env={**env, "PATH": places},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise GatesError(f"cuobjdump {arguments[0]} failed: {done.stderr.strip()[:300]}")
    return done.stdout


def from_sass(
    tables: Mapping[str, Any], library: Path = LIBRARY, env: Mapping[str, str] = os.environ
) -> dict[str, dict[str, Any]]:
    """Table -> tile's name -> counts, for the tiles of `tables` that the library has; all take cuobjdump 30 s."""
    listed = _cuobjdump("--dump-resource-usage", str(library), env=env)
    wanted = "|".join(pattern(tile) for table in tables.values() for tile in table["tiles"])
    every = set(re.findall(r"^ Function (\w*_gemm_kernel\w+):", listed, re.M))
    names = sorted(name for name in every if re.search(wanted, name))
    text = _cuobjdump("--dump-sass", "-fun", ",".join(names), str(library), env=env)
    code: dict[tuple[str, str], str] = {}
    for chunk in sass.elf_chunks(text):
        parts = re.split(r"^\s*Function : (\S+)$", chunk, flags=re.M)
        for name, body in zip(parts[1::2], parts[2::2], strict=True):
            code[sass.parse_arch(chunk), name] = body
    found: dict[str, dict[str, Any]] = {}
    for table in tables:
        arch = ARCHS[table]
        found[table] = {
            tile["name"]: loop_counts(instructions(body))
            for tile in tables[table]["tiles"]
            for (of, name), body in code.items()
            if of == arch and re.search(pattern(tile), name)
        }
    return found


#: Runs every tile of a table on one tile (a cluster of them) of K = 8 and of 16 turns; one launch each.
_PROGRAM = """
import ctypes, json, sys
import torch
from smoothquant_kernels import ops
from smoothquant_kernels.ops import registry
registry.eager_cpu = lambda *call: False
torch.ops.load_library(sys.argv[1])
for tile in json.loads(sys.argv[2]):
    m, n = tile["m"] * tile["cluster"][0], tile["n"] * tile["cluster"][1]
    for turns in (8, 16):
        x, w = (torch.randint(-127, 128, (r, turns * tile["k"]), dtype=torch.int8) for r in (m, n))
        torch.ops.smoothquant_kernels._gemm_s8_tile(
            x, w, torch.rand(m), torch.rand(n), out_dtype=torch.float16, tile=tile["tile"], splits=1)
"""


def per_turn_and_tile(short: Mapping[str, Any], long: Mapping[str, Any]) -> dict[str, float]:
    """Two launches that differ by 8 turns of the main loop: what a turn costs a block, and what the rest of it does."""
    blocks = short["grid"][0] * short["grid"][1] * short["grid"][2]
    warps = blocks * short["block"][0] / 32
    waves = [one["shared"]["wavefronts"] for one in (short, long)]
    executed = [one["warp_instructions"] for one in (short, long)]
    return {
        "wavefronts": (waves[1] - waves[0]) / 8 / blocks,
        "tile_instructions": round((2 * executed[0] - executed[1]) / warps, 2),  # of a warp, PTX
        "stores": short["global_store"]["requests"] / blocks,
        "store_sectors": short["global_store"]["sectors"] / blocks,
        "conflicts": short["shared"].get("conflict_factor") or 1.0,
    }


def from_simulator(tables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Table -> tile's name -> `per_turn_and_tile`; stream-K spreads over all SMs, so its tiles are left out."""
    from tests.support import simulator

    library = os.environ.get("SQK_SIMULATOR_LIBRARY") or str(simulator.library())
    found: dict[str, dict[str, Any]] = {}
    for table, arch in SIMULATED.items():
        tiles = [t for t in tables[table]["tiles"] if t["schedule"] != "stream-K"]
        with tempfile.TemporaryDirectory() as folder:
            stats = Path(folder) / "stats.jsonl"
            asked = ["-c", _PROGRAM, library, json.dumps(tiles)]
            done = simulator.python(asked, arch=arch, checks="", stats=stats)
            if done.returncode:
                raise RuntimeError(f"the simulator failed on {table}: {done.stderr[-500:]}")
            lines = [json.loads(line) for line in stats.read_text().splitlines()]
        found[table] = {
            tile["name"]: per_turn_and_tile(lines[2 * i], lines[2 * i + 1])
            for i, tile in enumerate(tiles)
        }
    return found


def library_facts(library: Path = LIBRARY) -> dict[str, str]:
    """What the counts depend on beside the sources."""
    facts = json.loads((library.parent / BUILD_INFO_NAME).read_text())
    return {name: facts[name] for name in ("cuda_version", "cutlass_version")}


def collect(tables: Mapping[str, Any]) -> dict[str, Any]:
    """All of kernel_costs.json; `simulated` is missing where there is no simulator, and a line says so."""
    costs: dict[str, Any] = {"library": library_facts(), "sass": from_sass(tables)}
    try:
        from tests.support import simulator

        if os.environ.get("SQK_SIMULATOR_LIBRARY") is None:
            simulator.require()
        costs["simulated"] = from_simulator(tables)
    except BaseException as reason:  # pytest's skip is no Exception
        if isinstance(reason, KeyboardInterrupt):
            raise
        print(f"model: without the simulator's counts: {reason}", file=sys.stderr)
    return costs


def write(tables: Mapping[str, Any], path: Path = COSTS) -> None:
    """At once or not at all; what only the simulator can count is never lost."""
    costs = collect(tables)
    if "simulated" not in costs and path.is_file() and "simulated" in json.loads(path.read_text()):
        sys.exit(
            f"model: {path} has the simulator's counts, and there is no simulator here: nothing was written"
        )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(costs, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)
    print(f"written: {path}")
