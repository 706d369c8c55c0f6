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
    "-DCUTLASS_NAMESPACE=sqk",  # another extension's CUTLASS may be in the same process
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


def cxx_command(
    source: str, output: str, torch_include: Path, extra: Sequence[str], compiler: str | None = None
) -> list[str]:
    """Compiles C++ that needs torch, with the given compiler or that of `cxx`."""
    includes = ["-Icsrc/include", "-Icsrc", "-isystem", str(torch_include)]
    dependencies = ["-MD", "-MF", f"{output}.d"]
    # Errors of torch's inline functions name their file; keep the builder's folders out of them.
    includes.append(f"-ffile-prefix-map={torch_include}/=")
    return [
        compiler or cxx(), "-c", source, "-o", output, *CXX_FLAGS, torch_target_macro(),
        *includes, *dependencies, *extra,
    ]  # fmt: skip


def link_command(nvcc: str, objects: Sequence[str], output: str, torch_lib: Path) -> list[str]:
    """Links against torch's libraries and the shared CUDA runtime, which torch has loaded by then.

    No run path is needed, because the package loads torch before the library. nvcc's device link is
    left out, because there is nothing to link. Local symbols are left out, because they hold the
    names of nvcc's temporary files: without them, the same sources in the same folder give the same
    bytes. -ldl: since 2.13 torch's headers call dlsym, which has its own library before glibc 2.34.
    """
    return [
        nvcc, "-shared", "-cudart", "shared", "-o", output, *objects, f"-L{torch_lib}",
        "-Xlinker=--no-undefined,--discard-all", "--no-device-link", "-ltorch_cuda", "-ltorch_cpu",
        "-ldl",
    ]  # fmt: skip


def module_command(source: str, output: str, python: Python, extra: Sequence[str]) -> list[str]:
    """Compiles one source of the module, and keeps the builder's paths out of it."""
    includes = ["-Icsrc/include", "-Icsrc"]
    for folder in python.includes:
        includes += ["-isystem", str(folder), f"-ffile-prefix-map={folder}/="]
    dependencies = ["-MD", "-MF", f"{output}.d"]
    return [
        cxx(), "-c", source, "-o", output, *CXX_FLAGS, *includes, *dependencies, *extra
    ]  # fmt: skip


def link_module_command(objects: Sequence[str], output: str) -> list[str]:
    """Links the module.

    Without -lpython, because Python's functions are already in the process. -Bsymbolic, because the library
    exports some of the same names and the module must call its own.
    """
    flags = ["-Wl,-Bsymbolic,--discard-all", "-s", "-ldl"]
    return [cxx(), "-shared", "-o", output, *objects, *flags]
