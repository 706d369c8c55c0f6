"""Runs a program with the CUDA kernels' PTX on CPU tensors, in the simulator of PTX.

    python -m benchmarks.on_gpu.simulated [--arch sm_90] -- -m pytest tests/kernels --backend simulator -k smoke
    python -m benchmarks.on_gpu.simulated -- -m benchmarks.gemm --device cpu --tiles --data random --seconds 0

The second one checks every tile of the real table by the benchmark's own code (lib/cases.py calls `bind`). After `--`
come Python's arguments. Exits with 77, and the reason, if the simulator, nvcc or CUTLASS is missing. Results are exact;
times are the simulator's and mean nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from typing import Any

import torch

from smoothquant_kernels.backends import cuda
from smoothquant_kernels.ops import registry

SKIPPED = 77


def simulator() -> Any:
    """tests/support/simulator.py, which builds the kernels for CPU tensors."""
    from tests.support import simulator

    return simulator


def bind(path: str) -> None:
    """In the program that is simulated: CPU tensors take the CUDA kernels, and the library's tables are used."""

    from tests.support import described

    torch.ops.load_library(path)
    registry.eager_cpu = lambda *call: False
    library = described.library(ctypes.CDLL(path))
    cuda.described_library = lambda: (library, "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", choices=["sm_80", "sm_89", "sm_90"], default="sm_90")
    parser.add_argument("program", nargs="+")
    args = parser.parse_args()
    import pytest

    found = simulator()
    try:
        found.require()
    except pytest.skip.Exception as reason:
        print(f"nothing is simulated: {reason}")
        return SKIPPED
    # Few multiprocessors: on toy shapes, persistent kernels then take several tiles.
    variables = {found.LIBRARY_VARIABLE: str(found.library()), "PTXSIM_SMS": "8"}
    done = found.python(args.program, arch=args.arch, environment=variables)
    print(done.stderr, end="", file=sys.stderr, flush=True)
    # Last: a caller that keeps the end of the output wants this.
    print(done.stdout, end="", flush=True)
    return done.returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.SubprocessError as error:
        sys.exit(f"simulated: {error}")
