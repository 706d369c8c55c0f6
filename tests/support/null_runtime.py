"""Programs that use the kernels' library on an empty CUDA runtime: what the host does, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

from build_support import ROOT


def python(*arguments: str) -> str:
    """Output of Python in a process of its own: the library takes the place of the ops' CPU kernels."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
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
