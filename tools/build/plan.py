"""The decisions of setup.py, in functions that can be tested without torch, nvcc or a GPU.

This does not use torch.utils.cpp_extension, because that module rewrites the architecture list, looks
at the GPU of the machine that builds, and refuses CUDA sources when the installed torch has no CUDA.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "smoothquant_kernels"
LIBRARY_NAME = f"lib{PACKAGE}.so"
BUILD_INFO_NAME = "_build_info.json"
MODULE_NAME = "_kernels"  # describes the library to Python

# The oldest torch whose stable ABI the library uses; the one place where it is written.
# pyproject.toml asks for at least this version (tests/tools/test_build.py compares the two).
TORCH_TARGET = (2, 10)
CUTLASS_PYPI = "nvidia-cutlass==4.2.0.0"
TOOLS_PYPI = "'ninja>=1.11.1' 'pybind11>=3.0'"  # as in pyproject.toml's build-system.requires
MODE_VARIABLE = "SMOOTHQUANT_KERNELS_BUILD"
MODES = ("auto", "cuda", "cpu", "none")
TUNING_VARIABLE = "SMOOTHQUANT_KERNELS_TUNING"

# SASS for A100 (runs on 8.6 too), Ada and Hopper; the driver compiles the PTX for anything newer.
DEFAULT_ARCHS = "8.0+PTX;8.9;9.0a"
OLDEST_ARCH = (8, 0)

BUILD_COMMAND = f"{MODE_VARIABLE}=cuda pip install --no-build-isolation --no-deps ."


class BuildError(Exception):
    """A library cannot be built; the message is one sentence for the user."""


# ----------------------------------------------------------------------------------- architectures


@dataclass(frozen=True)
class Arch:
    """One entry of the architecture list, e.g. ``9.0a+PTX``."""

    major: int
    minor: int
    suffix: str = ""  # "a": this architecture only (wgmma needs 9.0a); "f": its family
    ptx: bool = False

    @property
    def code(self) -> str:
        return f"{self.major}{self.minor}{self.suffix}"

    @property
    def gencode(self) -> str:
        targets = [f"sm_{self.code}"] + ([f"compute_{self.code}"] if self.ptx else [])
        return f"-gencode=arch=compute_{self.code},code=[{','.join(targets)}]"

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}" + ("+PTX" if self.ptx else "")


def parse_archs(text: str | None) -> tuple[Arch, ...]:
    """Reads ``"8.0;8.9 9.0a+PTX"``; nothing given means DEFAULT_ARCHS."""
    archs: list[Arch] = []
    for token in re.split(r"[;,\s]+", (text or "").strip() or DEFAULT_ARCHS):
        if not token:
            continue
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", token)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: '{token}' is not an architecture; write numbers such as "
                f"'{DEFAULT_ARCHS}' (names such as 'Ampere' or 'native' are not accepted)."
            )
        major, minor, suffix, ptx = match.groups()
        arch = Arch(int(major), int(minor), suffix, bool(ptx))
        if (arch.major, arch.minor) < OLDEST_ARCH:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: '{token}' is too old; the INT8 kernels need "
                f"{OLDEST_ARCH[0]}.{OLDEST_ARCH[1]} (A100) or newer."
            )
        if arch not in archs:
            archs.append(arch)
    return tuple(archs)


def archs_of_source(name: str, archs: tuple[Arch, ...]) -> tuple[Arch, ...]:
    """The architectures one source is compiled for, by its name.

    ``*_sm90.cu`` holds TMA and wgmma, which only 9.0a can compile; ``*_sm80.cu`` holds mma.sync
    tiles, which Hopper does not need; every other file is compiled for all.
    """
    stem = Path(name).stem
    hopper = tuple(arch for arch in archs if arch.code == "90a")
    if stem.endswith("_sm90"):
        return hopper
    if stem.endswith("_sm80"):
        return tuple(arch for arch in archs if arch not in hopper)
    return archs


# ----------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class Cutlass:
    """A CUTLASS source tree."""

    root: Path
    version: str

    @property
    def includes(self) -> tuple[Path, Path]:
        return (self.root / "include", self.root / "tools" / "util" / "include")


def _cutlass_version(root: Path) -> str:
    text = (root / "include" / "cutlass" / "version.h").read_text()
    found = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH)\s+(\d+)", text))
    return ".".join(found[part] for part in ("MAJOR", "MINOR", "PATCH"))


def _pypi_cutlass() -> Path | None:
    spec = importlib.util.find_spec("cutlass_library")  # not imported: it only carries the headers
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) / "source" if places else None


def find_cutlass(env: Mapping[str, str], root: Path = ROOT) -> Cutlass:
    """The first with headers of: CUTLASS_PATH, third_party/cutlass, the PyPI package."""
    given = env.get("CUTLASS_PATH")
    candidates = [Path(given)] if given else [root / "third_party" / "cutlass", _pypi_cutlass()]
    for place in candidates:
        if place and (place / "include" / "cutlass" / "version.h").is_file():
            return Cutlass(place, _cutlass_version(place))
    if given:  # a wrong path is an error, so that no other version silently takes its place
        raise BuildError(f"CUTLASS_PATH={given} does not contain include/cutlass/version.h.")
    raise BuildError(
        "the CUTLASS headers were not found; set CUTLASS_PATH to a CUTLASS source tree, put one at "
        f"third_party/cutlass, or run: pip install --no-deps {CUTLASS_PYPI}"
    )


@dataclass(frozen=True)
class Nvcc:
    """The CUDA compiler."""

    path: str
    version: str  # "13.0"


def find_nvcc(env: Mapping[str, str]) -> Nvcc:
    """Searches CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda, in this order."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = env.get(variable)
        if home:
            path = shutil.which(str(Path(home) / "bin" / "nvcc"))
            if path is None:
                raise BuildError(f"nvcc was not found: {variable}={home} has no bin/nvcc.")
            break
    else:
        path = shutil.which("nvcc", path=env.get("PATH")) or shutil.which(
            "/usr/local/cuda/bin/nvcc"
        )
    if path is None:
        raise BuildError(
            "nvcc was not found; install the CUDA toolkit and set CUDA_HOME to it, "
            "or put nvcc on the PATH."
        )
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    if release is None:
        raise BuildError(f"{path} --version printed no release number.")
    return Nvcc(path, release.group(1))


@dataclass(frozen=True)
class Torch:
    """The torch to build against, found without importing it."""

    root: Path
    version: str
    cuda: str | None  # "13.0", or None for a CPU build
    has_cuda_library: bool

    @property
    def include(self) -> Path:
        return self.root / "include"


def find_torch(what: str = "a CUDA build of torch") -> Torch:
    """The installed torch; `what` names the remedy of the error."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            f"torch is not installed in the environment that builds; install {what} and pass --no-build-isolation "
            "to pip."
        )
    root = Path(spec.submodule_search_locations[0])
    text = (root / "version.py").read_text()
    version = re.search(r"^__version__ = '([^']+)'", text, re.M)
    cuda = re.search(r"^cuda[^=\n]*= '([^']+)'", text, re.M)
    has_library = (root / "lib" / "libtorch_cuda.so").is_file()
    return Torch(
        root, version.group(1) if version else "0", cuda.group(1) if cuda else None, has_library
    )


def check_torch_version(torch: Torch) -> None:
    numbers = tuple(int(part) for part in re.findall(r"\d+", torch.version)[:2])
    if numbers < TORCH_TARGET:
        raise BuildError(
            f"torch {torch.version} is too old; the kernels need torch "
            f"{version_text(TORCH_TARGET)} or newer."
        )


def check_torch(torch: Torch, nvcc: Nvcc) -> None:
    """Raises when the library could be compiled but not linked or loaded."""
    check_torch_version(torch)
    if torch.cuda is None or not torch.has_cuda_library:
        raise BuildError(
            f"torch {torch.version} is a build without CUDA, so there is no libtorch_cuda to link; "
            "install a CUDA build of torch."
        )
    if torch.cuda.split(".")[0] != nvcc.version.split(".")[0]:
        raise BuildError(
            f"torch {torch.version} was built with CUDA {torch.cuda}, but {nvcc.path} is CUDA "
            f"{nvcc.version}; the major versions must agree: set CUDA_HOME to a matching toolkit."
        )


@dataclass(frozen=True)
class Python:
    """What is needed to compile a module for the Python that runs the build."""

    includes: tuple[Path, ...]  # Python's own headers and pybind11's
    suffix: str  # of a module's file, ".cpython-311-x86_64-linux-gnu.so"


def find_python() -> Python:
    own = Path(sysconfig.get_paths()["include"])
    if not (own / "Python.h").is_file():
        raise BuildError(
            f"{own} has no Python.h; install the development files of this Python (Debian and Ubuntu: python3-dev)."
        )
    spec = importlib.util.find_spec("pybind11")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"pybind11 was not found; run: pip install {TOOLS_PYPI}")
    headers = Path(spec.submodule_search_locations[0]) / "include"
    return Python((own, headers), str(sysconfig.get_config_var("EXT_SUFFIX")))


def check_ninja() -> None:
    """Raises when the package that holds ninja and its syntax is missing."""
    if importlib.util.find_spec("ninja") is None:
        raise BuildError(f"the package ninja was not found; run: pip install {TOOLS_PYPI}")


# -------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """Everything the CUDA build needs."""

    nvcc: Nvcc
    torch: Torch
    cutlass: Cutlass
    python: Python
    archs: tuple[Arch, ...]
    tuning: bool = False  # with the tiles that only benchmarks/tuner runs


def wants_tuning(env: Mapping[str, str]) -> bool:
    """SMOOTHQUANT_KERNELS_TUNING: 1 makes a tuning build; 0, an empty value or none does not."""
    given = env.get(TUNING_VARIABLE, "").strip()
    if given not in ("", "0", "1"):
        raise BuildError(f"{TUNING_VARIABLE}={given} is not one of 0, 1.")
    return given == "1"


def build_mode(env: Mapping[str, str]) -> str:
    """The member of `MODES` that SMOOTHQUANT_KERNELS_BUILD asks for."""
    mode = env.get(MODE_VARIABLE) or "auto"
    if mode not in MODES:
        raise BuildError(f"{MODE_VARIABLE}={mode} is not one of {', '.join(MODES)}.")
    return mode


def make_plan(env: Mapping[str, str], platform: str = sys.platform) -> tuple[Plan | None, str]:
    """A plan of the CUDA library, or None, and a line that says what is built or why not; empty if nobody asked.

    Raises:
        BuildError: SMOOTHQUANT_KERNELS_BUILD has another value, or is ``cuda`` and something is
            missing, or TORCH_CUDA_ARCH_LIST or SMOOTHQUANT_KERNELS_TUNING is wrong.
    """
    mode = build_mode(env)
    if mode == "none":
        return None, f"{MODE_VARIABLE}=none: building the pure-Python package."
    if mode == "cpu":
        return None, ""
    archs, tuning = parse_archs(env.get("TORCH_CUDA_ARCH_LIST")), wants_tuning(env)
    try:
        if not platform.startswith("linux"):
            raise BuildError(f"the CUDA kernels are built on Linux only, not on {platform}.")
        nvcc = find_nvcc(env)
        torch = find_torch()
        check_torch(torch, nvcc)
        cutlass = find_cutlass(env)
        check_ninja()
        plan = Plan(nvcc, torch, cutlass, find_python(), archs, tuning)
    except BuildError as error:
        if mode == "cuda":
            raise BuildError(f"{MODE_VARIABLE}=cuda: {error}") from None
        return None, (
            f"no CUDA kernels: {error} Once that is fixed, build them with: {BUILD_COMMAND}"
        )
    named = " ".join(map(str, archs))
    return plan, (
        f"building the CUDA kernels for {named} with nvcc {nvcc.version}, torch {torch.version}, "
        f"CUTLASS {plan.cutlass.version}{', with the candidates of a tuning build' if tuning else ''}."
    )


def version_text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def jobs(env: Mapping[str, str]) -> int:
    """MAX_JOBS, or one per core."""
    given = env.get("MAX_JOBS", "").strip()
    if not given:
        return os.cpu_count() or 1
    if not given.isdigit() or int(given) < 1:
        raise BuildError(f"MAX_JOBS={given} is not a positive number.")
    return int(given)
