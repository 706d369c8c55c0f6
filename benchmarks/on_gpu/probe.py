"""What the predictions (model_costs.py) assume of a GPU, measured by probe.cu; model.py reads the file (--assume).

python -m benchmarks.on_gpu.probe [--json probe.json] [--seconds 20]
python -m benchmarks.on_gpu.probe --compile 90      # compiles only; no GPU needed
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.prediction.model_costs import MACHINES, MEMORY_SHARE, Machine
from benchmarks.prediction.predict import GPUS, Gpu

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "benchmarks" / "on_gpu" / "probe.cu"
BUILD = ROOT / "build" / "probe"
#: Best and worst beside a value that was measured.
SPREAD = (0.97, 1.05)
#: A share of the data sheet above or below which a measurement is not believed.
BELIEVED = (0.2, 1.2)

Measured = dict[str, Any]


def read_lines(text: str) -> Measured:
    """The members that probe.cu has printed; a line that was cut off is left out."""
    found: Measured = {}
    for line in text.splitlines():
        try:
            member = json.loads(line)
        except ValueError:
            continue
        if isinstance(member, dict):
            found |= member
    return found


# --- what it says -----------------------------------------------------------------------------------------------------


def findings(measured: Mapping[str, Any], gpu: Gpu | None, machine: Machine | None) -> list[str]:
    """A line for each assumption: what was assumed, what was found."""
    lines = []

    def add(name: str, what: str, found: str, assumed: object = None) -> None:
        """found: how the measured value is written."""
        if (value := measured.get(name)) is not None:
            lines.append(f"{what:34s} {found.format(value):>18s}   assumed {assumed or '-'}")

    memory = f"{gpu.gb_per_s * MEMORY_SHARE[1]:.0f}" if gpu else None
    add("dram_read_gb_per_s", "memory, read", "{:.0f} GB/s", memory)
    add("copy_gb_per_s", "memory, copied (read and written)", "{:.0f} GB/s")
    add("l2_read_tb_per_s", "L2, read", "{:.2f} TB/s", triple(machine and machine.l2_tb_per_s))
    latency, launch = (machine.latency, machine.launch_us) if machine else (None, None)
    add("dram_latency_clocks", "latency of memory", "{:.0f} clocks", triple(latency))
    add("l2_latency_clocks", "latency of L2", "{:.0f} clocks")
    add("graph_node_us", "a node of a graph", "{:.2f} us", triple(launch))
    add("chain_us", "a kernel of 5,000 clocks in a graph", "{:.2f} us")
    add("chain_overlapped_us", "the same by dependent launch", "{:.2f} us")
    for size in (1, 2, 4, 8):
        assumed = gpu.sms // size if gpu else None
        add(f"max_active_clusters_{size}", f"clusters of {size} at a time", "{:.0f}", assumed)
    add("sms_busy_with_pairs", "SMs that pairs of blocks keep busy", "{:.0f}", gpu and gpu.sms)
    for how in ("default", "asked"):
        add(f"blocks_per_sm_{how}", f"blocks per SM, carveout {how}", "{:.0f}", 2)
    add("blocks_in_order", "share of blocks begun in order", "{:.2f}", 1)
    add("idle_sm_ghz", "SM clock without tensor cores", "{:.2f} GHz", gpu and gpu.ghz)
    return lines + [f"{name}: {why}" for name, why in measured.items() if name.endswith("_failed")]


def triple(values: Sequence[float] | None) -> str:
    return "-" if not values else f"{values[1]:g} ({values[0]:g} .. {values[2]:g})"


# --- what the model makes of it ---------------------------------------------------------------------------------------


def spread(value: float, more_is_better: bool) -> tuple[float, float, float]:
    """Best, likely, worst."""
    low, high = (value * by for by in SPREAD)
    return (high, value, low) if more_is_better else (low, value, high)


def assume(gpu: Gpu, machine: Machine, measured: Mapping[str, Any]) -> Machine:
    """The machine with what was measured in place of what was assumed; the rest stays."""
    changes: dict[str, Any] = {}
    if dram := measured.get("dram_read_gb_per_s"):
        share = dram / gpu.gb_per_s
        if not BELIEVED[0] < share < BELIEVED[1]:
            raise ValueError(
                f"the probe read {dram:.0f} GB/s from memory, but the data sheet of the {gpu.name} has "
                f"{gpu.gb_per_s:.0f}: it was made on another GPU, or another program used this one."
            )
        changes["memory_share"] = spread(share, True)
    if l2 := measured.get("l2_read_tb_per_s"):
        changes["l2_tb_per_s"] = spread(l2, True)
    if clocks := measured.get("dram_latency_clocks"):
        # Idle is the best; queues add what was assumed of them.
        worse = (clocks * other / machine.latency[0] for other in machine.latency)
        changes["latency"] = tuple(round(value) for value in worse)
    if node := measured.get("graph_node_us"):
        changes["launch_us"] = spread(node, False)
    clusters = {
        size: int(most)
        for size in (1, 2, 4, 8)
        if (most := measured.get(f"max_active_clusters_{size}"))
    }
    if clusters:
        changes["clusters"] = clusters
    return replace(machine, **changes)


def read_assumptions(path: Path) -> Measured:
    """Of --assume; ValueError where it is no file of this program."""
    try:
        found = json.loads(path.read_text())["measured"]
        if isinstance(found, dict):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is no file of benchmarks/on_gpu/probe.py --json")


# --- the program ------------------------------------------------------------------------------------------------------


def nvcc() -> str:
    return str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")


def compile_probe(capability: tuple[int, int]) -> str:
    """Empty, or why it could not be compiled. What was compiled for this GPU from this source is kept."""
    major, minor = capability
    arch = "90a" if capability == (9, 0) else f"{major}{minor}"
    BUILD.mkdir(parents=True, exist_ok=True)
    stamp, wanted = BUILD / "stamp", f"{arch}\n{SOURCE.read_text()}"
    if (BUILD / "probe").exists() and stamp.exists() and stamp.read_text() == wanted:
        return ""
    command = ["-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    for compiler in ("nvcc", nvcc()):
        try:
            done = subprocess.run(
                [compiler, *command, str(SOURCE), "-o", str(BUILD / "probe")],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        except OSError:
            continue
        if done.returncode:
            return f"{compiler} failed:\n{done.stderr}"
        stamp.write_text(wanted)
        return ""
    return f"there is no nvcc on the PATH, nor {nvcc()}"


def run_probe(seconds: float) -> tuple[Measured, str]:
    """What was measured, and why no more."""
    try:
        done = subprocess.run(
            [str(BUILD / "probe")], capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        text = out.decode() if isinstance(out, bytes) else out
        return read_lines(text), f"stopped after {seconds:.0f} s"
    why = done.stderr.strip() or f"exit status {done.returncode}" if done.returncode else ""
    return read_lines(done.stdout), why


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--compile", type=int, metavar="90")
    args = parser.parse_args(arguments)
    begin = time.monotonic()
    if args.compile:
        why = compile_probe(divmod(args.compile, 10))
        print(why or "the probe compiles")
        # That there is no compiler is not the probe's fault.
        return 77 if why.startswith("there is no") else int(bool(why))
    import torch

    from benchmarks.lib import gpu as facts

    machine = facts.machine(torch.device("cuda"))
    if why := compile_probe(torch.cuda.get_device_capability()):
        print(why)
        return 1
    measured, why = run_probe(max(3.0, args.seconds - (time.monotonic() - begin)))
    known = [name for name in GPUS if name in str(machine["device"])]
    gpu, assumed = (GPUS[known[0]], MACHINES[known[0]]) if known else (None, None)
    print("\n".join(findings(measured, gpu, assumed)))
    if why:
        print(why)
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine, "measured": measured}, indent=1) + "\n"
        )
    return int(bool(why) or not measured)


if __name__ == "__main__":
    sys.exit(main())
