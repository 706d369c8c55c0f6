"""Runs the CUDA kernels on the CPU: builds them for ptxsim, a simulator of PTX, and runs programs.

The simulator is not part of this project. Tests that use it call `require()` first, which skips
with the reason when it, nvcc or the CUTLASS headers are not here. SQK_PTXSIM names its launcher or
its folder; without it ../shared/ptxsim beside the checkout is tried.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import build_commands
import pytest
from build_support import ROOT, BuildError, Torch, find_cutlass, find_nvcc, find_torch

_BUILD = ROOT / "build" / "simulator"
# PTX only: the simulator ignores SASS, and leaving it out halves the compile time.
_GENCODES = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ("80", "90a")]


def launcher() -> Path | None:
    """The simulator's launcher, or None when it is not here."""
    given = os.environ.get("SQK_PTXSIM")
    place = Path(given) if given else ROOT.parent / "shared" / "ptxsim"
    program = place / "bin" / "ptxsim" if place.is_dir() else place
    return program if program.is_file() and os.access(program, os.X_OK) else None


def require() -> None:
    """Skips the test when the kernels cannot be built or run here."""
    if launcher() is None:
        pytest.skip("the simulator is not here (SQK_PTXSIM names it)")
    try:
        find_nvcc(os.environ)
        find_cutlass(os.environ)
        torch = find_torch()
    except BuildError as error:
        pytest.skip(f"the kernels cannot be built for the simulator: {error}")
    if torch.has_cuda_library:
        # Its libtorch_cuda would start on the simulated runtime, which has no such functions.
        pytest.skip("the simulator needs a torch without CUDA")


def library() -> Path:
    """All kernels and their binding, bound to the CPU key; built once, then as sources change."""
    nvcc, cutlass, torch = find_nvcc(os.environ), find_cutlass(os.environ), find_torch()
    _BUILD.mkdir(parents=True, exist_ok=True)
    with open(_BUILD / "lock", "w") as lock:  # pytest-xdist: one worker builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(nvcc.path, cutlass, torch)


def _build(nvcc: str, cutlass: build_commands.Cutlass, torch: Torch) -> Path:
    flags = ["-DSQK_SIMULATOR", "-DSQK_WITH_SM90=1", "-DSQK_ARCHS=8.0+PTX/9.0a+PTX"]
    tasks = []
    for source in build_commands.sources():
        output = _BUILD.relative_to(ROOT) / (source.replace("/", ".") + ".o")
        if source.endswith(".cpp"):
            command = build_commands.cxx_command(source, str(output), torch.include, flags)
        else:
            codes = _GENCODES[1:] if Path(source).stem.endswith("_sm90") else _GENCODES
            codes = _GENCODES[:1] if Path(source).stem.endswith("_sm80") else codes
            command = build_commands.cuda_command(
                nvcc, source, str(output), cutlass, codes, [*flags, "--no-compress"]
            )
        tasks.append((command, output))
    build_commands.compile_all(tasks, os.environ)
    target = _BUILD / "libsqk_simulator.so"
    link = [nvcc, "-shared", "-cudart", "shared", "-o", str(target)]
    link += [str(output) for _, output in tasks]
    link += [f"-L{torch.root / 'lib'}", "-Xlinker=--no-undefined", "-ltorch_cpu", "-lc10"]
    build_commands.run(link, target, [], objects=[output for _, output in tasks])
    return target


def run(script: str, *arguments: str, arch: str = "sm_80", checks: str = "init,race") -> str:
    """Runs a Python program under the simulator, CPU tensors standing for CUDA ones.

    Args:
        script: the program's text; it exits with an error when something is wrong.
        arguments: its sys.argv[1:].
        arch: the GPU to simulate.
        checks: the simulator's own checks; what they find fails the launch.
    Returns: what the program printed.
    """
    program = launcher()
    assert program is not None, "call require() first"
    command = [str(program), "--arch", arch, "--check", checks, "--torch", "--"]
    command += [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
