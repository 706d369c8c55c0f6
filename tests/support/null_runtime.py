"""Runs programs with the kernels' library on an empty CUDA runtime, to test the host code without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch

from smoothquant_kernels.ops import registry
from tools.build import plan
from tools.build.plan import ROOT


class Missing(Exception):
    """This machine lacks something; the message is one sentence."""


def python(*arguments: str) -> str:
    """The output of Python in a new process, where the library replaces the ops' CPU kernels."""
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


def simulator_library() -> Path:
    """The binding for CPU tensors, built if it is missing or out of date."""
    try:
        from tests.support import simulator
    except ImportError as error:
        raise Missing(
            f"tests/support/simulator.py builds the library; it lacks {error.name}."
        ) from None
    try:
        plan.find_cutlass(os.environ)
        if plan.find_torch().has_cuda_library:
            raise Missing("this torch brings its own CUDA runtime; a torch without CUDA is needed.")
        return simulator.library()
    except plan.BuildError as error:
        raise Missing(f"the library for CPU tensors cannot be built: {error}") from None


def compiled(folder: Path) -> ctypes.CDLL:
    """Compiles and loads null_cudart.c: libraries that are loaded later take it for the CUDA runtime."""
    versions, library = folder / "versions", folder / "libcudart.so.13"
    versions.write_text("libcudart.so.13 { *; };\n")
    command = [os.environ.get("CC", "gcc"), "-O2", "-shared", "-fPIC", "-o", str(library)]
    command += ["-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={versions}"]
    command.append(str(ROOT / "tests" / "support" / "null_cudart.c"))
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Missing(f"a C compiler is needed, but {command[0]} was not found (set CC).") from None
    if done.returncode:
        raise Missing(f"{command[0]} cannot compile null_cudart.c: {done.stderr.strip()}")
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def load(library: Path, folder: Path) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """(the null runtime, the library), with the ops bound to the CPU key."""
    runtime = compiled(folder)
    torch.ops.load_library(str(library))  # warns that it replaces the CPU kernels
    # Calls go through the dispatcher, as for a tensor on a GPU.
    registry.eager_cpu = lambda *call: False
    # Large results come from the heap, because a GPU's allocator does not map new pages for each
    # result.
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return runtime, ctypes.CDLL(str(library))
