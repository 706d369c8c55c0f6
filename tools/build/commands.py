"""The compiler commands of the CUDA library, and a small incremental runner for them."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build_support import (
    LIBRARY_NAME,
    ROOT,
    TORCH_TARGET,
    Arch,
    BuildError,
    Cutlass,
    Plan,
    archs_of_source,
    jobs,
    version_text,
)


def torch_target_macro() -> str:
    major, minor = TORCH_TARGET
    return f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"


def launcher(env: Mapping[str, str]) -> list[str]:
    """ccache, when it is there."""
    path = shutil.which("ccache", path=env.get("PATH"))
    return [path] if path else []


def sources(root: Path = ROOT, *, tuning: bool = False) -> list[str]:
    """Kernels and binding, relative to the root and sorted, so that builds are reproducible.

    Args:
        root: the checkout.
        tuning: with `tuning_*.cu`, the tiles that only a tuning build holds.
    """
    csrc = root / "csrc"
    found = [*csrc.rglob("*.cu"), *csrc.rglob("*.cpp")]
    kept = (path for path in found if tuning or not path.name.startswith("tuning_"))
    return sorted(path.relative_to(root).as_posix() for path in kept)


CUDA_FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",  # without it ptxas serialises wgmma (warning C7510)
    "-DCUTLASS_NAMESPACE=sqk",  # our CUTLASS and another extension's may live in one process
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",  # registers, stack and spills: read by parse_ptxas
)
CXX_FLAGS = ("-std=c++17", "-O2", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall")


def cuda_command(
    nvcc: str, source: str, output: str, cutlass: Cutlass, gencodes: list[str], extra: list[str]
) -> list[str]:
    includes = ["-Icsrc/include", "-Icsrc"]
    for folder in cutlass.includes:  # -isystem: their warnings are not ours
        includes += ["-isystem", str(folder)]
    dependencies = ["-MD", "-MF", f"{output}.d"]
    return [
        nvcc, "-c", source, "-o", output, *CUDA_FLAGS, *includes, *gencodes, *dependencies, *extra
    ]  # fmt: skip


def cxx_command(source: str, output: str, torch_include: Path, extra: list[str]) -> list[str]:
    compiler = os.environ.get("CXX", "g++")
    includes = ["-Icsrc/include", "-Icsrc", "-isystem", str(torch_include)]
    dependencies = ["-MD", "-MF", f"{output}.d"]
    # Errors of torch's inline functions name their file; keep the builder's folders out of them.
    includes.append(f"-ffile-prefix-map={torch_include}/=")
    return [
        compiler, "-c", source, "-o", output, *CXX_FLAGS, torch_target_macro(),
        *includes, *dependencies, *extra,
    ]  # fmt: skip


def link_command(nvcc: str, objects: list[str], output: str, torch_lib: Path) -> list[str]:
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


@dataclass(frozen=True)
class KernelUse:
    """What ptxas says about one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    stack: int
    spills: int


def parse_ptxas(text: str) -> list[KernelUse]:
    """Reads the output of ``ptxas -v``."""
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\S+)' for '(?P<arch>\S+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.S,
    )
    return [
        KernelUse(
            found["kernel"],
            found["arch"],
            int(found["registers"]),
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
        )
        for found in pattern.finditer(text)
    ]


def warnings(text: str) -> list[str]:
    """What the compilers warn of: nvcc in our sources, and ptxas, e.g. C7510: a wgmma kernel made serial.

    ptxas calls that one "info" in some versions, with the words below.
    """
    wanted = re.compile(
        r"ptxas warning|ptxas info *: .*Potential Performance Loss|csrc/\S+: warning"
    )
    return sorted({line for line in text.splitlines() if wanted.match(line)})


def _prerequisites(output: Path) -> list[Path] | None:
    """The files that the compiler read for this object, or None when it was never made."""
    depfile = ROOT / f"{output}.d"
    if not depfile.is_file():
        return None
    names = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return [ROOT / name for name in names]


def _is_current(output: Path, stamp: str, read: list[Path] | None) -> bool:
    """Whether the file was made by this very command from files that have not changed since."""
    made, recorded = ROOT / output, ROOT / f"{output}.command"
    if read is None or not (made.is_file() and recorded.is_file()):
        return False
    if recorded.read_text() != stamp:
        return False
    built = made.stat().st_mtime
    return all(file.is_file() and file.stat().st_mtime <= built for file in read)


def run(
    command: list[str], output: Path, prefix: list[str], objects: list[Path] | None = None
) -> str:
    """Runs one command from the project root and returns what it said; skipped when up to date.

    Args:
        command: compiler and arguments.
        output: the file it makes, relative to the root; its log is kept beside it.
        prefix: ccache, or nothing.
        objects: what a link reads; a compile command writes down what it read by itself.
    """
    stamp = hashlib.sha256(shlex.join(command).encode()).hexdigest()
    log = ROOT / f"{output}.log"
    read = _prerequisites(output) if objects is None else [ROOT / name for name in objects]
    if _is_current(output, stamp, read):
        return log.read_text()
    (ROOT / output).parent.mkdir(parents=True, exist_ok=True)
    print(shlex.join([*prefix, *command]), file=sys.stderr, flush=True)
    began = time.time()
    # Another checkout of the same sources finds these objects in ccache: its paths are taken from its root.
    cache = {"CCACHE_BASEDIR": str(ROOT), "CCACHE_NOHASHDIR": "1"} if prefix else {}
    done = subprocess.run(
        [*prefix, *command],
        cwd=ROOT,
        env={**os.environ, **cache},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    if done.returncode:
        raise BuildError(f"{Path(command[0]).name} failed on {output.name}:\n{said}")
    # As old as what the compiler may have read: a source saved while it ran is newer.
    os.utime(ROOT / output, (began, began))
    log.write_text(said)
    (ROOT / f"{output}.command").write_text(stamp)
    return said


def compile_all(tasks: list[tuple[list[str], Path]], env: Mapping[str, str]) -> str:
    """Runs the compile commands side by side and returns all that they said."""
    prefix = launcher(env)
    with ThreadPoolExecutor(jobs(env)) as pool:
        said = pool.map(lambda task: run(*task, prefix), tasks)
        return "".join(said)


def compile_tasks(plan: Plan, build_dir: Path) -> list[tuple[list[str], Path]]:
    """One (command, object) for every source that some architecture of the plan wants."""
    hopper = [arch.code == "90a" for arch in plan.archs]
    features = [
        f"-DSQK_WITH_SM80={int(not all(hopper))}",
        f"-DSQK_WITH_SM90={int(any(hopper))}",
        f"-DSQK_ARCHS={'/'.join(map(str, plan.archs))}",  # nvcc splits at commas
        *(["-DSQK_TUNING=1"] if plan.tuning else []),
    ]
    tasks = []
    for source in sources(tuning=plan.tuning):
        output = build_dir / (source.replace("/", ".") + ".o")
        if source.endswith(".cpp"):
            command = cxx_command(
                source, str(output), plan.torch.include, ["-DUSE_CUDA", *features]
            )
        else:
            archs: tuple[Arch, ...] = archs_of_source(source, plan.archs)
            if not archs:
                continue
            gencodes = [arch.gencode for arch in archs]
            command = cuda_command(
                plan.nvcc.path, source, str(output), plan.cutlass, gencodes, features
            )
        tasks.append((command, output))
    return tasks


def build_library(
    plan: Plan, build_dir: Path, env: Mapping[str, str]
) -> tuple[Path, dict[str, object]]:
    """Compiles and links in `build_dir`, a folder relative to the root.

    Returns: the library, relative to the root, and the facts that are shipped beside it.
    """
    tasks = compile_tasks(plan, build_dir)
    said = compile_all(tasks, env)
    library = build_dir / LIBRARY_NAME
    objects = [output for _, output in tasks]
    link = link_command(
        plan.nvcc.path, [str(name) for name in objects], str(library), plan.torch.root / "lib"
    )
    run(link, library, [], objects)
    return library, build_info(plan, said)


def build_info(plan: Plan, said: str) -> dict[str, object]:
    """Facts about the build; no date and no paths, so that the same sources give the same file."""
    kernels = parse_ptxas(said)
    return {
        "archs": [str(arch) for arch in plan.archs],
        "cutlass_version": plan.cutlass.version,
        "cuda_version": plan.nvcc.version,
        "tuning": plan.tuning,
        "torch_target": version_text(TORCH_TARGET),
        "torch_built_with": plan.torch.version,
        "cuda_flags": list(CUDA_FLAGS),
        "cxx_flags": [*CXX_FLAGS, torch_target_macro()],
        "kernels": [vars(use) for use in sorted(kernels, key=lambda use: (use.kernel, use.arch))],
        "warnings": warnings(said),
    }
