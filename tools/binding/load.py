"""Links objects of the binding with stand-in kernels for the CPU, loads them into a torch and calls the ops."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.build import ninja
from tools.build.commands import CXX_FLAGS, cxx
from tools.build.plan import (
    BUILD_INFO_NAME,
    LIBRARY_NAME,
    PACKAGE,
    ROOT,
    TORCH_TARGET,
    BuildError,
    version_text,
)  # fmt: skip

KERNELS = "tools/binding/kernels.cpp"
CALLS = "tools/binding/calls.py"
FIND_TORCH = (
    "import importlib.util; print(importlib.util.find_spec('torch').submodule_search_locations[0])"
)
# The facts that the package reads before it loads a library.
FACTS = {
    "archs": ["8.0"],
    "cutlass_version": "0",
    "cuda_version": "13.0",
    "torch_target": version_text(TORCH_TARGET),
}


class LoadError(Exception):
    """A build does not load, or one of its ops returns a wrong result; the message says which."""


def torch_folder(python: str) -> Path:
    """The folder of another Python's torch."""
    try:
        done = subprocess.run(
            [python, "-c", FIND_TORCH], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise LoadError(f"it cannot be started: {error.strerror}") from None
    if done.returncode:
        raise LoadError("it has no torch")
    return Path(done.stdout.strip())


def link(objects: Sequence[Path], folder: Path, python: str) -> Path:
    """Links the objects and the stand-in kernels into a library, with the torch of that Python."""
    below = folder.relative_to(ROOT).parent / "kernels"
    kernels = str(below / "kernels.o")
    command = [cxx(), "-c", KERNELS, "-o", kernels, *CXX_FLAGS, "-Icsrc/include"]
    step = ninja.Step(kernels, (*command, "-MD", "-MF", f"{kernels}.d"), (KERNELS,))
    ninja.run([step], below, os.environ)
    library = folder / LIBRARY_NAME
    libraries = torch_folder(python) / "lib"
    done = subprocess.run(
        [cxx(), "-shared", "-o", str(library), *map(str, objects), str(ROOT / kernels),
         f"-L{libraries}", "-Wl,--no-undefined", "-ltorch_cpu", "-ldl"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise BuildError(f"the objects do not link with {libraries}:\n{done.stderr}")
    return library


def call_ops(library: Path, python: str) -> str:
    """Runs calls.py with that library in a copy of the package, and returns the last line that it printed."""
    with tempfile.TemporaryDirectory() as name:
        package = Path(name) / PACKAGE
        unwanted = shutil.ignore_patterns("__pycache__", "*.so", BUILD_INFO_NAME)
        shutil.copytree(ROOT / PACKAGE, package, ignore=unwanted)
        shutil.copyfile(library, package / LIBRARY_NAME)
        (package / BUILD_INFO_NAME).write_text(json.dumps(FACTS))
        done = subprocess.run(
            [python, str(ROOT / CALLS)], cwd=name, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": name, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise LoadError(said[-1] if said else f"it ended with code {done.returncode}")
    return done.stdout.strip().splitlines()[-1]
