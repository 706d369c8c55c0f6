"""The library of compiled CPU kernels: csrc/cpu and the binding, compiled with a C++ compiler alone.

A level is an instruction set. The code of a level is one source, and only that source is compiled with the level's
instructions: an inline function of any other file must run on every processor.
"""

from __future__ import annotations

import os
import platform as platform_module
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.build import ninja
from tools.build.commands import CXX_FLAGS, cxx_command, torch_target_macro
from tools.build.plan import (
    MODE_VARIABLE,
    ROOT,
    TORCH_TARGET,
    BuildError,
    Torch,
    build_mode,
    check_ninja,
    check_torch_version,
    find_torch,
    version_text,
)
from tools.build.sources import cpu_binding_sources, cpu_sources

LIBRARY_NAME = "libsmoothquant_kernels_cpu.so"
BUILD_INFO_NAME = "_build_info_cpu.json"
BUILD_COMMAND = f"{MODE_VARIABLE}=cpu pip install --no-build-isolation --no-deps ."
#: Where objects are kept, relative to the root.
FOLDER = Path("build") / "cpu"
#: Exports the C entries and nothing else.
EXPORTS = "tools/build/exports.map"

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni",
    "-mprefer-vector-width=512",
)  # fmt: skip
#: Level -> the flags of its source, from the slowest to the fastest, as in csrc/cpu/levels.h.
LEVELS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": _AVX2,
    "avx_vnni": (*_AVX2, "-mavxvnni"),
    "avx512_vnni": _AVX512,
    "amx": (*_AVX512, "-mamx-tile", "-mamx-int8"),
}
#: Level -> an instruction that an old compiler, its headers or its assembler may lack.
_PROBES = {
    "avx2": "__m256i f(__m256i a) { return _mm256_maddubs_epi16(a, a); }",
    "avx_vnni": "__m256i f(__m256i a) { return _mm256_dpbusd_avx_epi32(a, a, a); }",
    "avx512_vnni": "__m512i f(__m512i a) { return _mm512_dpbusd_epi32(a, a, a); }",
    "amx": "void f() { _tile_dpbssd(0, 1, 2); _tile_dpbusd(0, 1, 2); }",
}

#: No contraction: a multiply-add that is fused where the source has two operations gives other bits.
FLAGS = (
    "-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fstack-clash-protection", "-Wall",
)  # fmt: skip


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        path: as it is called.
        version: the first line that it prints.
    """

    path: str
    version: str


@dataclass(frozen=True)
class CpuPlan:
    """Everything that the build of the CPU library needs."""

    compiler: Compiler
    torch: Torch


@dataclass(frozen=True)
class CpuBuilt:
    """The result: the library, and the facts that are shipped beside it as `_build_info_cpu.json`."""

    library: Path
    facts: dict[str, object]


def find_compiler(env: Mapping[str, str]) -> Compiler:
    """CXX, or the first of g++, clang++ and c++ on the PATH."""
    given = env.get("CXX", "").strip()
    names = [given] if given else ["g++", "clang++", "c++"]
    for name in names:
        path = shutil.which(name, path=env.get("PATH"))
        if path is None:
            continue
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return Compiler(path, done.stdout.splitlines()[0].strip())
    if given:  # a wrong compiler is an error, so that no other one silently takes its place
        raise BuildError(f"CXX={given} is not a C++ compiler that can be run.")
    raise BuildError(
        "no C++ compiler was found; install g++ (Debian and Ubuntu: apt-get install g++) or clang++, or set CXX."
    )


def make_cpu_plan(
    env: Mapping[str, str], platform: str = sys.platform
) -> tuple[CpuPlan | None, str]:
    """A plan, or None, and a line that says what is built or why not; the line is empty if nobody asked.

    Raises:
        BuildError: SMOOTHQUANT_KERNELS_BUILD has another value, or is ``cpu`` and something is missing.
    """
    mode = build_mode(env)
    if mode == "none":
        return None, ""
    try:
        if not platform.startswith("linux"):
            raise BuildError(f"the CPU kernels are built on Linux only, not on {platform}.")
        compiler = find_compiler(env)
        torch = find_torch("torch")
        check_torch_version(torch)
        check_ninja()
    except BuildError as error:
        if mode == "cpu":
            raise BuildError(f"{MODE_VARIABLE}=cpu: {error}") from None
        return None, (
            f"no compiled CPU kernels: {error} The package runs without them, slower, with the same numbers. "
            f"Once that is fixed, build them with: {BUILD_COMMAND}"
        )
    return CpuPlan(compiler, torch), (
        f"building the CPU kernels with {compiler.version}, torch {torch.version}."
    )


def usable_levels(compiler: Compiler, machine: str | None = None) -> dict[str, str]:
    """Level -> why it is left out, or an empty string, for each member of `LEVELS`."""
    machine = machine or platform_module.machine()
    return {level: _refusal(compiler, level, machine) for level in LEVELS}


def _refusal(compiler: Compiler, level: str, machine: str) -> str:
    if level == "portable":
        return ""
    if machine.lower() not in ("x86_64", "amd64"):
        return f"it is for x86_64, and this is {machine}"
    command = [compiler.path, "-x", "c++", "-c", "-", "-o", os.devnull, "-std=c++17"]
    source = f"#include <immintrin.h>\n{_PROBES[level]}\n"
    done = subprocess.run(
        [*command, *LEVELS[level]], input=source, capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else f"{compiler.version} cannot compile it"


def level_of_source(name: str) -> str | None:
    """The level that a source is compiled for: ``csrc/cpu/level_avx2.cpp`` is ``avx2``'s."""
    stem = Path(name).stem
    level = stem.removeprefix("level_")
    return level if stem != level and level in LEVELS else None


def cpu_steps(
    plan: CpuPlan, levels: Mapping[str, str], folder: Path = FOLDER, root: Path = ROOT
) -> list[ninja.Step]:
    """The commands that build the library in a folder relative to the root. The last one links it."""
    macros = [f"-DSQK_CPU_HAS_{level.upper()}={int(not why)}" for level, why in levels.items()]
    steps = []
    for source in cpu_sources(root):
        level = level_of_source(source)
        if level is not None and levels[level]:
            continue
        output = str(folder / (source.replace("/", ".") + ".o"))
        command = [
            plan.compiler.path, "-c", source, "-o", output, *FLAGS, *(LEVELS[level] if level else ()), *macros,
            "-Icsrc/include", "-Icsrc", "-MD", "-MF", f"{output}.d",
        ]  # fmt: skip
        steps.append(ninja.Step(output, tuple(command), (source,)))
    for source in cpu_binding_sources():
        output = str(folder / (source.replace("/", ".") + ".o"))
        command = cxx_command(
            source, output, plan.torch.include, ["-DSQK_CPU"], compiler=plan.compiler.path
        )
        steps.append(ninja.Step(output, tuple(command), (source,)))
    objects = tuple(step.output for step in steps)
    target = str(folder / LIBRARY_NAME)
    # No run path, because the package loads torch before the library. libstdc++ is the process's own: with a second
    # one inside, an exception would be thrown by one and caught by the other. -Bsymbolic, because the CUDA library
    # exports some of the same C entries.
    link = [
        plan.compiler.path, "-shared", "-o", target, *objects, f"-L{plan.torch.root / 'lib'}",
        f"-Wl,--no-undefined,-Bsymbolic,--version-script={EXPORTS}", "-ltorch_cpu", "-ldl",
    ]  # fmt: skip
    return [*steps, ninja.Step(target, tuple(link), (*objects, EXPORTS), compiles=False)]


def build_cpu_library(plan: CpuPlan, env: Mapping[str, str], folder: Path = FOLDER) -> CpuBuilt:
    """Compiles and links in `folder`, which is relative to the root.

    Raises:
        BuildError: a command failed.
    """
    levels = usable_levels(plan.compiler)
    steps = cpu_steps(plan, levels, folder)
    ninja.run(steps, folder, env)
    library = ROOT / steps[-1].output
    return CpuBuilt(library, build_info(plan, levels, library.stat().st_size))


def build_info(plan: CpuPlan, levels: Mapping[str, str], size: int) -> dict[str, object]:
    """Facts about the build, without dates and paths, so that the same sources give the same file."""
    return {
        "levels": [level for level, why in levels.items() if not why],
        "left_out": {level: why for level, why in levels.items() if why},
        "machine": platform_module.machine(),
        "compiler": plan.compiler.version,
        "torch_target": version_text(TORCH_TARGET),
        "torch_built_with": plan.torch.version,
        "flags": list(FLAGS),
        "level_flags": {level: list(LEVELS[level]) for level, why in levels.items() if not why},
        "binding_flags": [*CXX_FLAGS, torch_target_macro()],
        "bytes": size,
    }
