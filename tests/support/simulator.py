"""Runs the CUDA kernels on the CPU: builds them for the PTX simulator (tools/ptxsim) and runs programs in it.

Tests that use it call `require()` first, which skips with the reason if nvcc or the CUTLASS headers are
missing. The simulator itself is built at its first use.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.support.backends import LIBRARY_VARIABLE
from tests.support.fork_server import ForkServer
from tools.build import ninja
from tools.build.commands import cuda_command, cxx_command
from tools.build.library import flat
from tools.build.module import module_steps
from tools.build.plan import (
    MODULE_NAME,
    ROOT,
    BuildError,
    check_ninja,
    find_cutlass,
    find_nvcc,
    find_python,
    find_torch,
)
from tools.build.sources import sources, units

LAUNCHER = ROOT / "tools" / "ptxsim" / "bin" / "ptxsim"
_PYTEST = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--backend", "simulator")
_BUILD = Path("build") / "simulator"
#: Names the folder of a CUDA library's build whose kernels are taken instead of compiling them again. They must hold
#: the PTX of `_GENCODES`, uncompressed. An object that is older than a source is not taken.
OBJECTS_VARIABLE = "SQK_SIMULATOR_OBJECTS"
# PTX only: the simulator ignores SASS, and leaving it out halves the compile time.
_GENCODES = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ("80", "90a")]


def require() -> None:
    """Skips the test if the kernels cannot be built or run on this machine."""
    try:
        find_nvcc(os.environ)
        find_cutlass(os.environ)
        find_python()
        check_ninja()
        torch = find_torch()
    except BuildError as error:
        pytest.skip(f"the kernels cannot be built for the simulator: {error}")
    if torch.has_cuda_library:
        # Its libtorch_cuda would call functions that the simulated runtime lacks.
        pytest.skip("the simulator needs a torch without CUDA")


def library() -> Path:
    """Builds all kernels, their binding for the CPU key, and the module next to them, if sources changed."""
    whole = units(sources(), _BUILD)
    steps = [_step(unit, _BUILD) for unit in whole if _compiled_before(unit) is None]
    link = _link(_BUILD, [_object_of_library(unit) for unit in whole])
    module = module_steps(_BUILD, find_python(), [])
    ninja.run([*steps, link, *module], _BUILD, os.environ)
    return ROOT / link.output


def library_with(root: Path, changed: Sequence[str], arch: str = "sm_80") -> Path:
    """The library with some sources from a changed copy. The other objects come from `library()`, which must run first.

    Args:
        root: the folder that holds the copy of csrc and receives the build.
        changed: the sources to compile from the copy, e.g. "csrc/quantize/launch.cu".
        arch: the GPU to simulate. The copy is compiled for it alone, which halves the time.
    """
    whole = units(sources(), _BUILD)
    assert set(changed) <= set(whole), changed
    steps = [_step(source, root, root, arch) for source in changed]
    objects = [
        _object(unit, root) if unit in changed else _object_of_library(unit) for unit in whole
    ]
    link = _link(root, objects)
    ninja.run([*steps, link], root, os.environ)
    (module,) = (ROOT / _BUILD).glob(f"{MODULE_NAME}.*so")
    shutil.copyfile(module, root / module.name)
    return ROOT / link.output


def _object_of_library(unit: str) -> str:
    return _compiled_before(unit) or _object(unit, _BUILD)


def _compiled_before(unit: str) -> str | None:
    """The object of the folder that OBJECTS_VARIABLE names; C++ is compiled for another torch there."""
    folder = os.environ.get(OBJECTS_VARIABLE)
    if not folder or unit.endswith(".cpp"):
        return None
    path = Path(folder) / f"{flat(unit, _BUILD)}.o"
    found = (ROOT / path).is_file() and (ROOT / path).stat().st_mtime > _newest_source()
    return str(path) if found else None


@cache
def _newest_source() -> float:
    return max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())


def _object(source: str, folder: Path) -> str:
    return str(folder / (source.replace("/", ".") + ".o"))


def _step(source: str, folder: Path, root: Path | None = None, arch: str = "") -> ninja.Step:
    """Compiles a source of this checkout, or of a copy of it."""
    flags = [
        "-DSQK_SIMULATOR",
        "-DSQK_WITH_SM80=1",
        "-DSQK_WITH_SM90=1",
        "-DSQK_ARCHS=8.0+PTX/9.0a+PTX",
    ]
    output = _object(source, folder)
    if source.endswith(".cpp"):
        command = cxx_command(source, output, find_torch().include, flags)
    else:
        for_80, for_90 = _GENCODES
        stem = Path(source).stem
        if stem.endswith("_sm90") or (arch == "sm_90" and not stem.endswith("_sm80")):
            codes = [for_90]  # only this code has dependent launches
        else:
            codes = [for_80] if arch or stem.endswith("_sm80") else [for_80, for_90]
        nvcc, cutlass = find_nvcc(os.environ).path, find_cutlass(os.environ)
        flags += ["--no-compress", "-lineinfo"]
        command = cuda_command(nvcc, source, output, cutlass, codes, flags)
    if root is not None:
        moved = {source: str(root / source)}
        for place in ("csrc/include", "csrc"):
            moved[f"-I{place}"] = f"-I{root / place}"
        command = [moved.get(part, part) for part in command]
        source = moved[source]
    return ninja.Step(output, tuple(command), (source,))


def _link(folder: Path, objects: list[str]) -> ninja.Step:
    target = str(folder / "libsqk_simulator.so")
    torch = find_torch().root / "lib"
    link = [find_nvcc(os.environ).path, "-shared", "-cudart", "shared", "-o", target, *objects]
    link += [f"-L{torch}", "-Xlinker=--no-undefined", "-ltorch_cpu", "-lc10"]
    return ninja.Step(target, tuple(link), tuple(objects), compiles=False)


def _launcher(checks: str, arch: str = "sm_80", stats: Path | None = None) -> list[str]:
    command = [str(LAUNCHER), "--arch", arch, "--check", checks, "--torch"]
    return [*command, *([] if stats is None else ["--stats", str(stats)]), "--"]


def _environment() -> dict[str, str]:
    # One thread, because the kernels take the time, and the simulator has its own threads.
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def python(
    arguments: Sequence[str],
    *,
    arch: str = "sm_80",
    checks: str = "init,race",
    stats: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs Python in the simulator, where CPU tensors stand for CUDA tensors.

    Args:
        arguments: the arguments of Python.
        arch: the GPU to simulate.
        checks: the simulator's checks; a finding fails the launch.
        stats: a file for one line of JSON per launch.
        environment: variables to set in addition to the existing ones.
    """
    command = [*_launcher(checks, arch, stats), sys.executable, *arguments]
    variables = {**_environment(), **(environment or {})}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False
    )


def adversarial(seed: int, *, weak: bool = False) -> dict[str, str]:
    """The simulator's environment for blocks and warps in a random order, the same for the same seed.

    Args:
        seed: 1 or more.
        weak: other blocks see a block's stores only after a fence, or at some later time, word by word.
    """
    variables = {"PTXSIM_SEED": str(seed), "PTXSIM_THREADS": "1"}
    return {**variables, "PTXSIM_WEAK": "1"} if weak else variables


#: The simulator's environment for dependent launches that start before the kernel before them has ended.
OVERLAP = {"PTXSIM_OVERLAP": "1"}


def _of_kernel_tests(library: Path, environment: Mapping[str, str] | None) -> dict[str, str]:
    # With few multiprocessors, "many rows" are few enough to simulate, and blocks take several
    # rows.
    return {LIBRARY_VARIABLE: str(library), "PTXSIM_SMS": "8", **(environment or {})}


def kernel_tests(
    library: Path,
    *arguments: str,
    arch: str = "sm_80",
    checks: str = "init,race",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs pytest in the simulator; the arguments select tests of tests/kernels and may add options."""
    pytest_command = ["-m", "pytest", *_PYTEST, *arguments]
    variables = _of_kernel_tests(library, environment)
    return python(pytest_command, arch=arch, checks=checks, environment=variables)


def few_kernel_tests(
    library: Path,
    *arguments: str,
    arch: str = "sm_80",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`kernel_tests` in a fork of a process of this thread that has imported torch, which saves seconds."""
    variables = {**_of_kernel_tests(library, environment), "PTXSIM_ARCH": arch}
    server = ForkServer.of_thread([*_launcher("init,race"), sys.executable], _environment())
    return server.run([*_PYTEST, *arguments], variables)


def run(
    script: str,
    *arguments: str,
    arch: str = "sm_80",
    checks: str = "init,race",
    stats: Path | None = None,
) -> str:
    """Runs a Python program in the simulator and returns its output.

    Args:
        script: the program's text; it must exit with an error if something is wrong.
        arguments: its sys.argv[1:].
        arch, checks, stats: as for `python`.
    """
    done = python(["-c", script, *arguments], arch=arch, checks=checks, stats=stats)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
