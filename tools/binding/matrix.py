"""Compiles the binding (csrc/torch) against the headers of several torch versions; needs no GPU and no CUDA.

    python -m tools.binding                           # every version that CI checks
    python -m tools.binding --torch 2.11.0            # one version
    python -m tools.binding --load .venv/bin/python   # also loads each build there and calls its ops

The headers come from torch's own wheels, fetched with `pip download`. A cache folder keeps only the
headers of the stable ABI (1 MB per version), so including any other header is an error. An installed
torch of the wanted version is used as it is. A build must not need a function of libtorch that the
oldest promised torch lacks, whatever headers it was compiled with. Exit code 0: no problem; 1: a
version failed or could not be downloaded; 2: no compiler.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.binding.load import LoadError, call_ops, link
from tools.build import ninja
from tools.build.commands import cxx_command
from tools.build.plan import ROOT, TORCH_TARGET, BuildError, find_torch, version_text
from tools.build.sources import cpu_binding_sources, sources

OLDEST = version_text(TORCH_TARGET) + ".0"
# The oldest promised, one that GPU machines come with, that of `make test-cuda`, and the newest.
VERSIONS = (OLDEST, "2.11.0", "2.14.1", "2.15.0")

# The wheels for macOS are a third as large as those for Linux, and the headers that the binding
# reads are the same, byte for byte. The oldest version's wheel is for Linux, because the exports of
# its libtorch are read too.
SMALLEST = ("macosx_14_0_arm64", "macosx_11_0_arm64")
WITH_LIBRARY = ("manylinux_2_28_aarch64",)
PYTHON_TAG = "3.12"  # of the wheel; it need not be the running Python's
STABLE = ("csrc/stable", "csrc/inductor/aoti_torch", "headeronly")  # of torch/include/torch
LIBTORCH = "torch/lib/libtorch_cpu.so"
EXPORTS = "exports.txt"

BUILD = Path("build") / "binding"
# C functions of libtorch, and names in its C++ namespaces, which are not part of the stable ABI.
C_NAME = re.compile(r"(?:aoti_)?torch_\w+")
CXX_NAME = re.compile(r"_ZT?\w?N?K?(?:3c10|2at|5torch|6caffe2)")
DECLARED_IN = ("torch/csrc/stable", "torch/csrc/inductor/aoti_torch")


@dataclass(frozen=True)
class Headers:
    """One torch version's include folder and, if known, the exports of its libtorch_cpu."""

    version: str
    include: Path
    source: str  # for the table
    exports: frozenset[str] = frozenset()


@dataclass
class Row:
    """The results for one version."""

    version: str
    headers: str = "-"
    compiled: str = "-"
    symbols: str = "-"
    loaded: str = "-"
    problems: list[str] = field(default_factory=list)


# ----------------------------------------------------------------------------------------- headers


def cache_folder(env: Mapping[str, str]) -> Path:
    """Where headers are kept between runs and checkouts."""
    base = env.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "smoothquant-kernels" / "torch-headers"


def download_command(version: str, platforms: Sequence[str], folder: Path) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", f"torch=={version}", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--implementation", "cp", "--python-version", PYTHON_TAG, "--dest", str(folder)]
    for platform in platforms:
        command += ["--platform", platform]
    return command


def download(version: str, platforms: Sequence[str], folder: Path) -> Path:
    """Fetches a wheel with pip and its settings, except for constraints, because the version is given here."""
    # An empty value would keep a constraint from a configuration file; an empty file replaces it.
    env = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    command = download_command(version, platforms, folder)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("torch-*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = said[-1] if said else f"pip ended with code {done.returncode}"
        raise BuildError(f"torch {version} could not be downloaded: {reason}")
    return wheels[0]


def exported(library: Path) -> frozenset[str]:
    """The C functions that a libtorch exports."""
    names = nm(["-D", "--defined-only", str(library)])
    return frozenset(name for _, name in names if C_NAME.fullmatch(name))


def unpack(wheel: Path, target: Path) -> None:
    """Keeps the stable headers of a wheel, and the list of what its libtorch_cpu exports, if it is for Linux."""
    kept = tuple(f"torch/include/torch/{folder}/" for folder in STABLE)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(kept)]
            if not members:
                raise BuildError(f"{wheel.name} holds none of torch's stable headers.")
            archive.extractall(work, members)
            if LIBTORCH in archive.namelist():
                library = archive.extract(LIBTORCH, work)
                listed = "".join(f"{name}\n" for name in sorted(exported(Path(library))))
                (work / "torch" / EXPORTS).write_text(listed)
                shutil.rmtree(work / "torch" / "lib")
        # Moved last, so that the folder is either complete or absent.
        shutil.rmtree(target, ignore_errors=True)
        (work / "torch").rename(target)


def installed_headers(version: str) -> Headers | None:
    """The headers of the installed torch, if it has that version."""
    try:
        torch = find_torch()
    except BuildError:
        return None
    if torch.version.split("+")[0] != version or not torch.include.is_dir():
        return None
    library = torch.root / "lib" / "libtorch_cpu.so"
    names = exported(library) if library.is_file() else frozenset()
    return Headers(version, torch.include, f"installed ({torch.version})", names)


def get_headers(version: str, cache: Path, platforms: Sequence[str] = ()) -> Headers:
    """Installed, cached or downloaded, in this order; `platforms` asks for a certain wheel."""
    found = None if platforms else installed_headers(version)
    if found:
        return found
    wanted = tuple(platforms) or (WITH_LIBRARY if version == OLDEST else SMALLEST)
    target = cache / f"{version}-{wanted[0]}"
    source = f"cached {wanted[0]}"
    if not (target / "include").is_dir():
        source = f"downloaded {wanted[0]}"
        print(f"torch {version}: downloading its wheel ...", file=sys.stderr, flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            unpack(download(version, wanted, Path(folder)), target)
    listed = target / EXPORTS
    names = frozenset(listed.read_text().split()) if listed.is_file() else frozenset()
    return Headers(version, target / "include", source, names)


# ----------------------------------------------------------------------------------------- symbols


def nm(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(type, name) of each symbol that `nm` lists."""
    done = subprocess.run(["nm", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"nm failed: {done.stderr.strip()}")
    parts = [line.split() for line in done.stdout.splitlines()]
    return [(part[-2], part[-1].split("@")[0]) for part in parts if len(part) >= 2]


def declared(include: Path) -> frozenset[str]:
    """The C functions that a torch's stable headers declare."""
    found: set[str] = set()
    for folder in DECLARED_IN:
        for header in sorted((include / folder).rglob("*.h")):
            text = header.read_text(errors="replace")
            found.update(re.findall(rf"\b({C_NAME.pattern})\s*\(", text))
    return frozenset(found)


def needed(objects: Sequence[Path]) -> frozenset[str]:
    """The names that objects need from libtorch, without weak references: a library loads without those."""
    symbols = nm(["-u", *map(str, objects)])
    names = {name for kind, name in symbols if kind == "U"}
    return frozenset(n for n in names if C_NAME.fullmatch(n) or CXX_NAME.match(n))


def lacking(names: frozenset[str], oldest: Headers) -> list[str]:
    """One sentence for each name that the oldest promised torch lacks."""
    known = declared(oldest.include)
    problems = []
    for name in sorted(names):
        if not C_NAME.fullmatch(name):
            problems.append(f"needs {name}, which is not part of torch's stable ABI")
        elif name not in known:
            problems.append(f"needs {name}, which the headers of torch {oldest.version} lack")
        # Functions for CUDA are in libtorch_cuda, which is in no small wheel.
        elif oldest.exports and name not in oldest.exports and "cuda" not in name:
            problems.append(f"needs {name}, which libtorch_cpu {oldest.version} does not export")
    return problems


# ------------------------------------------------------------------------------------------ matrix


def compile_binding(headers: Headers, env: Mapping[str, str]) -> list[Path]:
    """Compiles csrc/torch as the build does for CUDA; up-to-date objects are kept."""
    files = [name for name in sources() if name.startswith("csrc/torch/")]
    return _compile(files, headers, BUILD / headers.version, "-DUSE_CUDA", env)


def compile_cpu_binding(headers: Headers, env: Mapping[str, str]) -> list[Path]:
    """The same for the CPU library."""
    return _compile(
        cpu_binding_sources(), headers, BUILD / headers.version / "cpu", "-DSQK_CPU", env
    )


def _compile(
    files: Sequence[str], headers: Headers, folder: Path, flag: str, env: Mapping[str, str]
) -> list[Path]:
    outputs = [folder / f"{Path(name).name}.o" for name in files]
    steps = []
    for name, output in zip(files, map(str, outputs), strict=True):
        command = cxx_command(name, output, headers.include, [flag])
        steps.append(ninja.Step(output, tuple(command), (name,)))
    ninja.run(steps, folder, env)
    return [ROOT / output for output in outputs]


def check(headers: Headers, oldest: Headers, pythons: Sequence[str], env: Mapping[str, str]) -> Row:
    row = Row(headers.version, headers.source)
    try:
        objects = compile_binding(headers, env)
        on_cpu = compile_cpu_binding(headers, env)
    except BuildError as error:
        row.compiled = "FAILED"
        row.problems.append(str(error))
        return row
    row.compiled = f"{len(objects) + len(on_cpu)} files"
    names = needed([*objects, *on_cpu])
    row.problems += lacking(names, oldest)
    if "aoti_torch_get_current_cuda_stream" in needed(on_cpu):
        row.problems.append("the binding of the CPU library needs libtorch_cuda")
    against = "exports" if oldest.exports else "headers"
    row.symbols = f"{len(names)} in {oldest.version}'s {against}"
    if row.problems:
        row.symbols = f"{len(row.problems)} of {len(names)} LACKING"
    loaded = []
    for python in pythons:
        try:
            library = link(objects, ROOT / BUILD / headers.version, python)
            loaded.append(call_ops(library, python))
        except (BuildError, LoadError) as error:
            loaded.append("FAILED")
            row.problems.append(f"{python}: {error}")
    row.loaded = ", ".join(loaded) or "-"
    return row


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, then what went wrong."""
    cells = [
        ["torch", "headers", "compiled", "functions of libtorch", "loaded and called with torch"]
    ]
    cells += [[row.version, row.headers, row.compiled, row.symbols, row.loaded] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines += [f"torch {row.version}: {problem}" for row in rows for problem in row.problems]
    return "\n".join(lines)


def run(arguments: argparse.Namespace, env: Mapping[str, str]) -> int:
    for program in (env.get("CXX", "g++"), "nm"):
        if shutil.which(program) is None:
            print(f"binding: {program} was not found; install a C++ compiler and binutils.")
            return 2
    cache = arguments.cache or cache_folder(env)
    rows, have = [], {}
    for version in dict.fromkeys([OLDEST, *arguments.torch]):
        try:
            have[version] = get_headers(version, cache, arguments.platform)
        except BuildError as error:
            allowed = version in arguments.may_miss
            note = "allowed" if allowed else f"allow it by --may-miss {version}"
            rows.append(Row(version, headers=f"MISSING ({note})"))
            if not allowed:
                rows[-1].problems.append(str(error))
    failed = any(row.problems for row in rows)
    # Without the oldest version, of which a line has been printed, a build is held to its own headers.
    for version in arguments.torch:
        if version in have:
            row = check(have[version], have.get(OLDEST, have[version]), arguments.load, env)
            failed = failed or bool(row.problems)
            rows.append(row)
    print(table(rows))
    return int(failed)


def absolute(python: str) -> str:
    """Makes a path absolute, because the Python is started in another folder. Links stay: a venv's Python is one."""
    return os.path.abspath(python) if os.sep in python else python


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.binding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--torch", nargs="+", metavar="VERSION", default=list(VERSIONS),
        help=f"versions to compile against (default: {' '.join(VERSIONS)})",
    )  # fmt: skip
    parser.add_argument(
        "--load", nargs="+", metavar="PYTHON", default=[], type=absolute,
        help="Pythons with a torch: load each build there and call its ops, with kernels that run on the CPU",
    )  # fmt: skip
    parser.add_argument(
        "--may-miss", nargs="+", metavar="VERSION", default=[],
        help="versions whose wheel may be unavailable; for any other version that is a failure",
    )  # fmt: skip
    parser.add_argument(
        "--platform", nargs="+", metavar="TAG", default=[],
        help="take the wheels for this platform, e.g. manylinux_2_28_x86_64 (large), and no installed torch",
    )  # fmt: skip
    parser.add_argument("--cache", type=Path, help="where headers are kept between runs")
    parsed = parser.parse_args(arguments)
    for version in [*parsed.torch, *parsed.may_miss]:
        if not re.fullmatch(r"\d+\.\d+\.\d+", version):
            parser.error(f"'{version}' is not a version of torch; write it as in 2.11.0.")
        if tuple(map(int, version.split(".")[:2])) < TORCH_TARGET:
            parser.error(f"torch {version} is older than {OLDEST}, the oldest that is promised.")
    return parsed
