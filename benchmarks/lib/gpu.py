"""The machine and its GPU, read only: facts for the results; clocks, power and temperature.

    python -m benchmarks.lib.gpu [--json FILE]
    python -m benchmarks.lib.gpu --same FILE     # exit status 1 where FILE is of another machine or software

The GPU is asked through pynvml if that can be imported, else through nvidia-smi.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tools.build.plan import ROOT

#: name in the results -> what nvidia-smi calls it
SAMPLED = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
}
#: What must be the same for results to be continued: a number from another machine or software is another number.
SAME = ("device", "cpu", "torch", "cuda", "driver", "commit")
Sampler = Callable[[], dict[str, float]]


def output_of(*command: str) -> str:
    """What a command prints; empty when it is absent or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _uuid(device: torch.device) -> str:
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _smi(fields: list[str], device: torch.device) -> dict[str, str]:
    """nvidia-smi's answers: one line, a field each, for the GPU that torch uses."""
    query = ["--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits"]
    lines = output_of("nvidia-smi", f"--id={_uuid(device)}", *query).splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return dict(zip(fields, values, strict=False))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]", "[Not Supported]"
        return None


def sampler(device: torch.device) -> Sampler:
    """A function that reads clocks (MHz), power (W) and temperature (°C) now; on the CPU it knows nothing."""
    if device.type != "cuda":
        return dict
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(_uuid(device))

        def sample() -> dict[str, float]:
            return {
                "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
                "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
                "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            }

        sample()
        return sample
    except Exception:  # absent, too old, or not allowed here: nvidia-smi knows the same, slower

        def ask() -> dict[str, float]:
            answers = _smi(list(SAMPLED.values()), device)
            numbers = {name: _number(answers.get(field, "")) for name, field in SAMPLED.items()}
            return {name: number for name, number in numbers.items() if number is not None}

        return ask


def machine(device: torch.device) -> dict[str, Any]:
    """What every number needs beside it."""
    facts: dict[str, Any] = {
        "device": "cpu (a rehearsal: no GPU was measured)" if device.type != "cuda" else "",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": os.environ.get("SQK_COMMIT") or output_of("git", "rev-parse", "--short", "HEAD"),
    }
    if device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    asked = _smi(["driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem"], device)
    return facts | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "driver": asked.get("driver_version", ""),
        "power_limit_watts": _number(asked.get("power.limit", "")),
        "max_sm_mhz": _number(asked.get("clocks.max.sm", "")),
        "max_memory_mhz": _number(asked.get("clocks.max.mem", "")),
        "now": sampler(device)(),
    }


def tools() -> dict[str, str]:
    """Versions of what builds and checks; empty where it is absent."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or f"{home}/bin/nvcc"
    sanitizer = shutil.which("compute-sanitizer") or f"{home}/bin/compute-sanitizer"
    last = [(output_of(tool, "--version").splitlines() or [""])[-1] for tool in (nvcc, sanitizer)]
    return {"nvcc": last[0], "compute-sanitizer": last[1]}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What of SAME is not the same."""
    other = [name for name in SAME if there.get(name) != here.get(name)]
    return [f"{name} was {there.get(name)!r}, is {here.get(name)!r}" for name in other]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--same", type=Path, metavar="FILE", help="of an earlier --json")
    args = parser.parse_args()
    facts = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.same:
        found = differences(json.loads(args.same.read_text()), facts)
        print("\n".join(found), end="\n" if found else "")
        return int(bool(found))
    facts |= tools()
    for name, value in facts.items():
        print(f"{name:18s} {value if value not in ('', None) else 'unknown'}")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
