"""Runs programs with the kernels' library on an empty CUDA runtime, to test the host code without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

from tools.build.plan import ROOT


def python(*arguments: str) -> str:
    """The output of Python in a new process, where the library replaces the ops' CPU kernels."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
