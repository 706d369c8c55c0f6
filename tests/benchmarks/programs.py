"""Programs in processes of their own, as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools.build.plan import ROOT

Done = subprocess.CompletedProcess[str]


def run(command: list[str], env: dict[str, str], cwd: Path = ROOT) -> Done:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def python(*arguments: str, cwd: Path = ROOT, **env: str) -> Done:
    """This Python, which finds the packages of this tree."""
    facts = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return run([sys.executable, *arguments], facts, cwd)


def simulated(arch: str, *arguments: str) -> Done:
    """The same with the kernels' PTX on CPU tensors."""
    return python("-m", "benchmarks.on_gpu.simulated", "--arch", arch, "--", *arguments)
