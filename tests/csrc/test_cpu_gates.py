"""The compiled CPU kernels' object code: each level's instructions are there, and nowhere else.

A peer shipped an "int8" library without one int8 instruction. An inline function that several files compile is another
trap: the linker keeps one copy for all, and if that has AVX-512, every other processor stops at it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.build import cpu
from tools.build.plan import MODE_VARIABLE, ROOT

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(
        shutil.which("g++") is None or shutil.which("objdump") is None,
        reason="no g++ or no objdump",
    ),
]

#: Level -> the instruction of its products, on the registers that it must use.
PRODUCTS = {
    "avx2": r"vpmaddwd .*%ymm",
    "avx_vnni": r"\{vex\} vpdpbusd .*%ymm",
    "avx512_vnni": r"vpdpbusd .*%zmm",
    "amx": r"tdpb(ss|su|us)d ",
}
#: The same for products with 4-bit weights that are not unpacked. The last two share their code.
W4_PRODUCTS = {
    "avx2": r"vpmaddubsw .*%ymm",
    "avx_vnni": r"\{vex\} vpdpwssd .*%ymm",
    "avx512_vnni": r"vpdpwssd .*%zmm",
    "amx": r"vpdpwssd .*%zmm",
}
#: Any register or prefix of AVX.
AVX = re.compile(r"%[yz]mm|\b(?:v[a-z]\w+|tdpb\w+|tile\w+)\s+%|%k[0-7]\b")
#: May hold AVX: a symbol with the level's own name, such as its table of functions, cannot meet one of another level.
TABLES = {
    "portable": "kKernelsPortable", "avx2": "kKernelsAvx2", "avx_vnni": "kKernelsAvxVnni",
    "avx512_vnni": "kKernelsAvx512Vnni", "amx": "kKernelsAmx",
}  # fmt: skip


@pytest.fixture(scope="module")
def built() -> dict[str, object]:
    """The facts about the library, after it was built."""
    plan, message = cpu.make_cpu_plan({**os.environ, MODE_VARIABLE: "cpu"})
    assert plan is not None, message
    return cpu.build_cpu_library(plan, os.environ).facts


def objects() -> Iterator[tuple[str | None, Path]]:
    """(level or None, object) of each source of the library."""
    for source in (*cpu.cpu_sources(), *cpu.cpu_binding_sources()):
        file = ROOT / cpu.FOLDER / (source.replace("/", ".") + ".o")
        if file.is_file():
            yield cpu.level_of_source(source), file


def said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code(file: Path) -> str:
    return said("objdump", "-d", "--no-show-raw-insn", file)


def symbols(file: Path) -> list[tuple[str, str]]:
    """(type, demangled name) of each symbol that the object defines."""
    lines = said("nm", "--defined-only", "-C", file).splitlines()
    return [(line.split(maxsplit=2)[1], line.split(maxsplit=2)[2]) for line in lines]


def levels(built: dict[str, object]) -> list[str]:
    found = built["levels"]
    assert isinstance(found, list) and found[0] == "portable"
    return found


def test_every_level_has_its_instruction(built: dict[str, object]) -> None:
    found = dict(objects())
    library = code(ROOT / cpu.FOLDER / cpu.LIBRARY_NAME)
    for level in levels(built)[1:]:
        text = code(found[level])
        for products in (PRODUCTS, W4_PRODUCTS):
            wanted = products[level]
            assert re.search(wanted, text), f"{level} has no {wanted}"
            assert re.search(wanted, library), f"the linked library lost {wanted}"


def test_only_levels_have_avx(built: dict[str, object]) -> None:
    plain = [file for level, file in objects() if level in (None, "portable")]
    assert len(plain) > 5
    for file in plain:
        match = AVX.search(code(file))
        assert match is None, f"{file.name}: {match and match[0]}"


def test_no_level_has_a_function_that_others_could_get(built: dict[str, object]) -> None:
    """No weak symbol, and no other function that is visible to another file, without the level's name in it."""
    for level, file in objects():
        if level is None:
            continue
        defined = symbols(file)
        assert any(TABLES[level] in name for _, name in defined)
        shared = [name for kind, name in defined if kind in "TWVuBD" and TABLES[level] not in name]
        assert not shared, f"{file.name} shares {shared}"


def test_the_patterns_find_what_they_are_for(tmp_path: Path) -> None:
    """An inline function that two files compile is weak, and AVX is recognized."""
    source = tmp_path / "shared.cpp"
    source.write_text(
        "#include <immintrin.h>\ninline __m256 f(__m256 a) { return a * a; }\n"
        "__m256 (*pointer)(__m256) = f;\n"
    )
    file = tmp_path / "shared.o"
    subprocess.run(["g++", "-c", "-O0", "-mavx2", source, "-o", file], check=True)
    assert ("W", "f(float __vector(8))") in symbols(file)
    assert AVX.search(code(file))


def test_the_library_exports_its_c_entries_and_nothing_else(built: dict[str, object]) -> None:
    lines = said("nm", "-D", "--defined-only", ROOT / cpu.FOLDER / cpu.LIBRARY_NAME).splitlines()
    names = {line.split()[-1].split("@")[0] for line in lines}
    assert {"sqk_cpu_level", "sqk_cpu_use_level", "sqk_linear_s8"} <= names
    assert all(name.startswith("sqk_") for name in names), names
    needed = said("readelf", "--dynamic", ROOT / cpu.FOLDER / cpu.LIBRARY_NAME)
    assert "libtorch_cpu" in needed and "cuda" not in needed and "gomp" not in needed
