"""Runs the CUDA kernels on the CPU: builds them for tools/ptxsim, the simulator of PTX, and runs programs.

Tests that use it call `require()` first, which skips with the reason when nvcc or the CUTLASS headers
are not here. The simulator itself is built when it is first asked for.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import build_commands
import pytest
from build_support import ROOT, BuildError, find_cutlass, find_nvcc, find_torch, jobs

from tests.support.backends import LIBRARY_VARIABLE

LAUNCHER = ROOT / "tools" / "ptxsim" / "bin" / "ptxsim"
_BUILD = ROOT / "build" / "simulator"
# PTX only: the simulator ignores SASS, and leaving it out halves the compile time.
_GENCODES = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ("80", "90a")]


def require() -> None:
    """Skips the test when the kernels cannot be built or run here."""
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
    _BUILD.mkdir(parents=True, exist_ok=True)
    with open(_BUILD / "lock", "w") as lock:  # pytest-xdist: one worker builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        build = _BUILD.relative_to(ROOT)
        tasks = [_task(unit, build) for unit in _units()]
        build_commands.compile_all(tasks, os.environ)
        return _link(_BUILD, [output for _, output in tasks])


def library_with(root: Path, sources: Sequence[str]) -> Path:
    """The library with some sources from a changed copy; the other objects are those of `library()`, called before.

    Args:
        root: the folder in which the copy of csrc lies; what is built is put there.
        sources: to compile there, e.g. "csrc/quantize/launch.cu".
    """
    units = _units()
    assert set(sources) <= set(units), sources
    objects = [(root if unit in sources else _BUILD) / _object_name(unit) for unit in units]
    for source in sources:
        command, output = _task(source, root, root)
        build_commands.run(command, output, build_commands.launcher(os.environ))
    return _link(root, objects)


def _units() -> list[str]:
    """What is compiled: the sources, but those of wgmma kernels together, by their macros and by the number of jobs.

    Each takes 40 s of a processor by itself, of which 30 are CUTLASS's headers.
    """
    units, wgmma = [], defaultdict(list)
    for source in build_commands.sources():
        if Path(source).name.startswith("wgmma_"):
            macros = re.findall(r"^#define .*", (ROOT / source).read_text(), re.M)
            wgmma[tuple(macros)].append(source)
        else:
            units.append(source)
    for i, together in enumerate(wgmma.values()):
        count = min(-(-jobs(os.environ) // len(wgmma)), len(together))
        for j in range(count):
            unit = _BUILD / f"wgmma_{i}_{j}_of_{count}_sm90.cu"
            names = (source.removeprefix("csrc/") for source in together[j::count])
            text = "".join(f'#include "{name}"\n' for name in names)
            if not unit.is_file() or unit.read_text() != text:
                unit.write_text(text)
            units.append(unit.relative_to(ROOT).as_posix())
    return units


def _object_name(source: str) -> str:
    return source.replace("/", ".") + ".o"


def _task(source: str, build: Path, root: Path | None = None) -> tuple[list[str], Path]:
    """The command that compiles a source of the checkout, or of a copy elsewhere, and its object."""
    flags = [
        "-DSQK_SIMULATOR",
        "-DSQK_WITH_SM80=1",
        "-DSQK_WITH_SM90=1",
        "-DSQK_ARCHS=8.0+PTX/9.0a+PTX",
    ]
    output = build / _object_name(source)
    if source.endswith(".cpp"):
        include = find_torch().include
        command = build_commands.cxx_command(source, str(output), include, flags)
    else:
        codes = _GENCODES[1:] if Path(source).stem.endswith("_sm90") else _GENCODES
        # Newer GPUs run PTX for 8.0 too: enough for a copy, in half the time.
        one = Path(source).stem.endswith("_sm80") or root is not None
        nvcc, cutlass = find_nvcc(os.environ).path, find_cutlass(os.environ)
        command = build_commands.cuda_command(
            nvcc,
            source,
            str(output),
            cutlass,
            codes[:1] if one else codes,
            [*flags, "--no-compress", "-lineinfo"],
        )
    if root is not None:
        moved = {source: str(root / source)}
        for folder in ("csrc/include", "csrc"):
            moved[f"-I{folder}"] = f"-I{root / folder}"
        command = [moved.get(part, part) for part in command]
    return command, output


def _link(build: Path, objects: list[Path]) -> Path:
    target = build / "libsqk_simulator.so"
    torch = find_torch().root / "lib"
    link = [find_nvcc(os.environ).path, "-shared", "-cudart", "shared", "-o", str(target)]
    link += [str(output) for output in objects]
    link += [f"-L{torch}", "-Xlinker=--no-undefined", "-ltorch_cpu", "-lc10"]
    build_commands.run(link, target, [], objects=objects)
    return target


def python(
    arguments: Sequence[str],
    *,
    arch: str = "sm_80",
    checks: str = "init,race",
    stats: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs Python under the simulator, CPU tensors standing for CUDA ones.

    Args:
        arguments: Python's own.
        arch: the GPU to simulate.
        checks: the simulator's own checks; what they find fails the launch.
        stats: a file for one line of JSON per launch.
        environment: variables to set beside those that are there.
    """
    command = [str(LAUNCHER), "--arch", arch, "--check", checks, "--torch"]
    command += [] if stats is None else ["--stats", str(stats)]
    command += ["--", sys.executable, *arguments]
    # One thread: the kernels are what takes time, and the simulator has threads of its own.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False
    )


def adversarial(seed: int, *, weak: bool = False) -> dict[str, str]:
    """The simulator's environment for blocks and warps in a random order, the same for the same seed.

    Args:
        seed: 1 or more.
        weak: a block's stores are seen by other blocks only after a fence, or at some time, word by word.
    """
    variables = {"PTXSIM_SEED": str(seed), "PTXSIM_THREADS": "1"}
    return {**variables, "PTXSIM_WEAK": "1"} if weak else variables


def kernel_tests(
    library: Path,
    *arguments: str,
    arch: str = "sm_80",
    checks: str = "init,race",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs pytest in the simulator; the arguments say which of tests/kernels, and more if need be."""
    pytest_command = ["-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    pytest_command += ["--backend", "simulator", *arguments]
    # Few multiprocessors: "many rows" are then few enough to simulate, and blocks take several rows.
    variables = {LIBRARY_VARIABLE: str(library), "PTXSIM_SMS": "8", **(environment or {})}
    return python(pytest_command, arch=arch, checks=checks, environment=variables)


def run(
    script: str,
    *arguments: str,
    arch: str = "sm_80",
    checks: str = "init,race",
    stats: Path | None = None,
) -> str:
    """Runs a Python program under the simulator and returns what it printed.

    Args:
        script: the program's text; it exits with an error when something is wrong.
        arguments: its sys.argv[1:].
        arch, checks, stats: as for `python`.
    """
    done = python(["-c", script, *arguments], arch=arch, checks=checks, stats=stats)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
