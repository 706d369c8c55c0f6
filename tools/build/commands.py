"""The compilers' commands and flags."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tools.build.plan import TORCH_TARGET, Cutlass, Python


def torch_target_macro() -> str:
    major, minor = TORCH_TARGET
    return f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"


CUDA_FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",  # without it ptxas serializes wgmma (warning C7510)
    "-DCUTLASS_NAMESPACE=sqk",  # our CUTLASS and another extension's may live in one process
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",  # registers, stack and spills: read by facts.py
)
CXX_FLAGS = ("-std=c++17", "-O2", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall")


def cuda_command(
    nvcc: str,
    source: str,
    output: str,
    cutlass: Cutlass,
    gencodes: Sequence[str],
    extra: Sequence[str],
) -> list[str]:
    includes = ["-Icsrc/include", "-Icsrc"]
    for folder in cutlass.includes:  # -isystem: their warnings are not ours
        includes += ["-isystem", str(folder)]
    dependencies = ["-MD", "-MF", f"{output}.d"]
    return [
        nvcc, "-c", source, "-o", output, *CUDA_FLAGS, *includes, *gencodes, *dependencies, *extra
    ]  # fmt: skip


def cxx() -> str:
    return os.environ.get("CXX", "g++")


def cxx_command(source: str, output: str, torch_include: Path, extra: Sequence[str]) -> list[str]:
    includes = ["-Icsrc/include", "-Icsrc", "-isystem", str(torch_include)]
    dependencies = ["-MD", "-MF", f"{output}.d"]
    # Errors of torch's inline functions name their file; keep the builder's folders out of them.
    includes.append(f"-ffile-prefix-map={torch_include}/=")
    return [
        cxx(), "-c", source, "-o", output, *CXX_FLAGS, torch_target_macro(),
        *includes, *dependencies, *extra,
    ]  # fmt: skip


def link_command(nvcc: str, objects: Sequence[str], output: str, torch_lib: Path) -> list[str]:
    """Links against torch's libraries and the shared CUDA runtime, which torch has loaded by then.

    No run path: the package never loads the library before torch. nvcc's own device link is left
    out (there is nothing to link), and so are local symbols, among them the names of its temporary
    files: the same sources in the same folder give the same bytes. -ldl: torch's headers call dlsym
    since 2.13, which is in a library of its own before glibc 2.34.
    """
    return [
        nvcc, "-shared", "-cudart", "shared", "-o", output, *objects, f"-L{torch_lib}",
        "-Xlinker=--no-undefined,--discard-all", "--no-device-link", "-ltorch_cuda", "-ltorch_cpu",
        "-ldl",
    ]  # fmt: skip


def module_command(source: str, output: str, python: Python, extra: Sequence[str]) -> list[str]:
    """Compiles one source of the module; no path of the builder's gets into it."""
    includes = ["-Icsrc/include", "-Icsrc"]
    for folder in python.includes:
        includes += ["-isystem", str(folder), f"-ffile-prefix-map={folder}/="]
    dependencies = ["-MD", "-MF", f"{output}.d"]
    return [
        cxx(), "-c", source, "-o", output, *CXX_FLAGS, *includes, *dependencies, *extra
    ]  # fmt: skip


def link_module_command(objects: Sequence[str], output: str) -> list[str]:
    """Without -lpython: Python's functions are in the process. -Bsymbolic: the library exports some of the same
    names, and the module must call its own."""
    flags = ["-Wl,-Bsymbolic,--discard-all", "-s", "-ldl"]
    return [cxx(), "-shared", "-o", output, *objects, *flags]
