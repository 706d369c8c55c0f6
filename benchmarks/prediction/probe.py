"""Measures what the predictions assume of a GPU (probe.cu), and says which numbers its table should have.

python -m benchmarks.prediction.probe [--json probe.json] [--seconds 20]
python -m benchmarks.prediction.probe --compile 90      # only compiles, where there is nvcc
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.build.plan import ROOT

from . import planner
from .gpus import GPUS, Gpu, gpu_of

SOURCE = Path(__file__).with_name("probe.cu")
BUILD = ROOT / "build" / "probe"

Measured = dict[str, Any]


def read_lines(text: str) -> Measured:
    """The members that probe.cu printed; a line that was cut off is left out."""
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


def machine_row(measured: Mapping[str, Any], gpu: Gpu) -> dict[str, int]:
    """Of GemmMachine (csrc/gemm), what was measured, in clocks."""
    ghz = measured.get("idle_sm_ghz") or gpu.ghz
    found = {}
    if l2 := measured.get("l2_read_tb_per_s"):
        found["l2_bytes"] = round(l2 * 1e3 / ghz / gpu.sms)
    if memory := measured.get("dram_read_gb_per_s"):
        found["memory_bytes"] = round(memory / gpu.ghz)
    if node := measured.get("graph_node_us"):
        found["launch"] = round(node * 1e3 * gpu.ghz)
    return found


def findings(
    measured: Mapping[str, Any], gpu: Gpu | None = None, machine: Mapping[str, int] | None = None
) -> list[str]:
    """A line for each assumption: what was found, what was assumed; then the numbers that the table should have."""
    lines = []

    def add(name: str, what: str, found: str, assumed: object = None) -> None:
        """found: how the measured value is written."""
        if (value := measured.get(name)) is not None:
            lines.append(f"{what:34s} {found.format(value):>18s}   assumed {assumed or '-'}")

    memory = l2 = node = None
    if gpu and machine:
        memory = f"{machine['memory_bytes'] * gpu.ghz:.0f}"
        l2 = f"{machine['l2_bytes'] * gpu.sms * gpu.ghz / 1e3:.2f}"
        node = f"{machine['launch'] / gpu.ghz / 1e3:.2f}"
    add("dram_read_gb_per_s", "memory, read", "{:.0f} GB/s", memory)
    add("copy_gb_per_s", "memory, copied (read and written)", "{:.0f} GB/s")
    add("l2_read_tb_per_s", "L2, read", "{:.2f} TB/s", l2)
    add("dram_latency_clocks", "latency of memory", "{:.0f} clocks")
    add("l2_latency_clocks", "latency of L2", "{:.0f} clocks")
    add("graph_node_us", "a node of a graph", "{:.2f} us", node)
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
    if gpu and machine and (row := machine_row(measured, gpu)):
        wanted = ", ".join(f"{name} {value} (is {machine[name]})" for name, value in row.items())
        lines.append(f"the GPU's table by this: {wanted}")
    return lines + [f"{name}: {why}" for name, why in measured.items() if name.endswith("_failed")]


def findings_of(data: Mapping[str, Any]) -> list[str]:
    """Of a file that --json has written; KeyError where it is none."""
    try:
        gpu = GPUS[gpu_of(data["machine"])]
    except ValueError:
        return findings(data["measured"])
    machine = planner.machine_of(gpu) if planner.available() else None
    return findings(data["measured"], gpu, machine)


# --- the program ------------------------------------------------------------------------------------------------------


def nvcc() -> str:
    return str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")


def compile_probe(capability: tuple[int, int]) -> str:
    """Empty, or why it could not be compiled. A program of the same source for the same GPU is kept."""
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
        # A missing compiler is no failure of the probe.
        return 77 if why.startswith("there is no") else int(bool(why))
    import torch

    from benchmarks.lib import gpu, runner

    machine = gpu.machine(torch.device("cuda"))
    if why := compile_probe(torch.cuda.get_device_capability()):
        print(why)
        return 1
    measured, why = run_probe(max(3.0, args.seconds - (time.monotonic() - begin)))
    data = {"machine": machine, "measured": measured}
    print("\n".join([*findings_of(data), *filter(None, [why])]))
    runner.write_json(args.json, data)
    return int(bool(why) or not measured)


if __name__ == "__main__":
    sys.exit(main())
