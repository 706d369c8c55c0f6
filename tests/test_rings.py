"""The rules of the source tree: includes of the rings, file lengths, no paths of a machine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.build.plan import ROOT
from tools.build.sources import module_sources

CSRC = ROOT / "csrc"
C_SUFFIXES = {".cu", ".cuh", ".h", ".hpp", ".cpp"}
TEXT_SUFFIXES = C_SUFFIXES | {".py", ".toml", ".md", ".yaml", ".yml", ".sh", ".in", ".cfg", ""}
LONGEST_FILE = 400
FOREIGN = ("torch", "ATen", "c10", "pybind11")
KERNEL_SUFFIXES = {".cu", ".cuh"}
#: Folders that every folder of csrc may include besides itself.
SHARED = ("common", "include")
#: Folders of csrc that call kernels but hold none.
BINDINGS = ("torch", "python")
#: Plain C++ that the binding shares with the kernels.
PLAIN = ("common/arithmetic.h", "cpu/threads.h")


def c_files() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in C_SUFFIXES)


def project_files() -> list[Path]:
    """The files that git has or would add; without git, all files outside hidden folders and build/."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = done.stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [
            str(path)
            for path in found
            if not any(part.startswith(".") or part == "build" for part in path.parts)
        ]
    paths = [ROOT / name for name in names]
    return [path for path in paths if path.is_file() and path.suffix in TEXT_SUFFIXES]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def includes_of_torch(path: Path) -> list[str]:
    return [name for name in includes(path) if name.split("/")[0] in FOREIGN]


def test_only_the_binding_includes_torch() -> None:
    files = c_files()
    assert any(includes_of_torch(path) for path in files), "the pattern finds nothing at all"
    bindings = {CSRC / "torch", CSRC / "python"}
    outside = [path for path in files if not bindings & set(path.parents)]
    wrong = {str(path.relative_to(ROOT)): includes_of_torch(path) for path in outside}
    assert not {name: found for name, found in wrong.items() if found}


def test_the_module_needs_neither_torch_nor_cuda() -> None:
    for name in module_sources():
        read = {root.split("/")[0] for root in includes(ROOT / name)}
        assert not read & {"torch", "ATen", "c10", "cuda_runtime.h", "cuda.h", "cuda_runtime_api.h"}


def test_public_headers_know_neither_cutlass_nor_cuda() -> None:
    for path in (CSRC / "include").rglob("*.h"):
        for name in includes(path):
            assert "/" not in name or name.startswith("sqk/"), f"{path.name} includes {name}"


def test_the_binding_does_not_reach_past_the_public_headers() -> None:
    for path in (CSRC / "torch").iterdir():
        for name in includes(path):
            own = (CSRC / "torch" / name).is_file()
            ok = own or "/" not in name or name.split("/")[0] in ("sqk", "torch") or name in PLAIN
            assert ok, f"{path.name} includes {name}"


def includes_of_siblings(csrc: Path) -> list[str]:
    """Includes of another folder of kernels by kernels, and of any folder of kernels by common/.

    C++ outside the folders may combine them, but a kernel outside them may not.
    """
    found = []
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in C_SUFFIXES):
        folder = path.relative_to(csrc).parts[0]
        joins = path.parent == csrc and path.suffix not in KERNEL_SUFFIXES
        if joins or folder in BINDINGS:
            continue
        for name in includes(path):
            places = (path.parent / name, csrc / "include" / name, csrc / name)
            place = next((place.resolve() for place in places if place.is_file()), None)
            if place is None:  # a header of the toolkit or of CUTLASS
                continue
            if place.relative_to(csrc.resolve()).parts[0] not in (folder, *SHARED):
                found.append(f"{path.relative_to(csrc)} includes {name}")
    return found


def test_no_folder_of_kernels_includes_a_sibling() -> None:
    folders = {path.relative_to(CSRC).parts[0] for path in c_files()}
    assert {"common", "gemm", "quantize"} <= folders
    assert not includes_of_siblings(CSRC)


@pytest.mark.parametrize(
    ("file", "include", "is_wrong"),
    [
        ("gemm/stream/rows.cuh", "quantize/producer.cuh", True),
        ("gemm/stream/rows.cuh", "../../quantize/producer.cuh", True),
        ("common/status.cu", "gemm/excluded.h", True),
        ("status.cu", "gemm/excluded.h", True),
        ("status.cpp", "gemm/excluded.h", False),
        (
            "torch/gemm.cpp",
            "gemm/excluded.h",
            False,
        ),  # allowed here; another test keeps the binding to the public headers
        ("gemm/stream/rows.cuh", "gemm/excluded.h", False),
        ("gemm/stream/rows.cuh", "common/scale.cuh", False),
        ("gemm/stream/rows.cuh", "sqk/quantize.h", False),
    ],
)
def test_an_include_of_a_sibling_is_found(
    file: str, include: str, is_wrong: bool, tmp_path: Path
) -> None:
    others = ("quantize/producer.cuh", "gemm/excluded.h", "common/scale.cuh")
    for name in (*others, "include/sqk/quantize.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("#pragma once\n")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f'#include "{include}"\n')
    assert includes_of_siblings(tmp_path) == ([f"{file} includes {include}"] if is_wrong else [])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("header", sorted((CSRC / "include").rglob("*.h")), ids=lambda p: p.name)
@pytest.mark.compiler
def test_a_public_header_compiles_alone(header: Path, tmp_path: Path) -> None:
    source = tmp_path / "alone.cpp"
    name = header.relative_to(CSRC / "include")
    source.write_text(f'#include "{name}"\n#include "{name}"\n')
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{CSRC / 'include'}"]
    done = subprocess.run(["g++", *flags, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_file_is_too_long_to_read_at_once() -> None:
    code = C_SUFFIXES | {".py", ".sh"}
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in project_files()
        if path.suffix in code
    }
    assert lengths, "no file was found"
    assert not {name: count for name, count in lengths.items() if count > LONGEST_FILE}


# Built from parts, so that the test does not match this file.
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:" + "|".join(("wo" + "rk", "ho" + "me", "Us" + "ers")) + ")/"
)


def test_no_file_names_a_folder_of_some_machine() -> None:
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in project_files()
        if (match := MACHINE_PATH.search(path.read_text(errors="replace")))
    }
    assert not found
