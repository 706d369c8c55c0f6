"""Runs a program with the CUDA kernels' PTX on CPU tensors, where the simulator of tests/support/simulator.py is.

    python benchmarks/simulated.py [--arch sm_90] -- -m pytest tests/kernels --backend simulator -k smoke
    python benchmarks/simulated.py -- benchmarks/bench_gemm.py --device cpu --tiles --data random --seconds 0

The second one checks every tile of the real table by the benchmark's own code (`gemm_cases` calls `bind`).
What comes after `--` is Python's. Exits with 77 where the simulator, nvcc or CUTLASS is not here, and says which.
Results are exact; times are those of the simulator and mean nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import pytest  # noqa: E402  (tools/ is no package)
import torch  # noqa: E402

from smoothquant_kernels.backends import cuda as _extension  # noqa: E402
from smoothquant_kernels.ops import registry  # noqa: E402
from tests.support import simulator  # noqa: E402
from tests.support.backends import LIBRARY_VARIABLE  # noqa: E402

SKIPPED = 77


def bind(path: str) -> None:
    """In the program that is simulated: CPU tensors take the CUDA kernels, and the library's tables are used."""

    def entry(name: str, restype: Any = ctypes.c_int32) -> Any:
        found = getattr(ctypes.CDLL(path), name)
        found.restype = restype
        return found

    torch.ops.load_library(path)
    registry.eager_cpu = lambda *call: False
    _extension._entry = entry


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", choices=["sm_80", "sm_89", "sm_90"], default="sm_90")
    parser.add_argument("program", nargs="+")
    args = parser.parse_args()
    try:
        simulator.require()
    except pytest.skip.Exception as reason:
        print(f"nothing is simulated: {reason}")
        return SKIPPED
    # Few multiprocessors: persistent kernels then go round on toy shapes.
    variables = {LIBRARY_VARIABLE: str(simulator.library()), "PTXSIM_SMS": "8"}
    done = simulator.python(args.program, arch=args.arch, environment=variables)
    print(done.stderr, end="", file=sys.stderr, flush=True)
    print(done.stdout, end="", flush=True)  # last: who cuts the output wants its end
    return done.returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.SubprocessError as error:
        sys.exit(f"simulated: {error}")
