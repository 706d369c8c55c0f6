"""The library's dispatch tables: read from a library, shown by `smoothquant-kernels doctor`."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from smoothquant_kernels.backends import cuda as _extension
from smoothquant_kernels.cli import doctor as _doctor

ROWS = [
    {"path": "warp", "when": "K <= 1024", "why": "one warp holds the row"},
    {"path": "block", "when": "x_scale [m]", "why": "\u2026"},
]


GEMM = {
    "sm80": {
        "tiles": [{"name": "16x32x64"}, {"name": "64x64x64"}],
        "rules": [
            {"most_m": 16, "tiles": [0], "when": "M <= 16", "why": "few tokens"},
            {"most_m": 99, "tiles": [1, 0], "when": "M > 16", "why": "many"},
        ],
    },
}
GEMM_ROWS = [
    {"path": "16x32x64", "when": "M <= 16", "why": "few tokens"},
    {"path": "64x64x64, 16x32x64", "when": "M > 16", "why": "many"},
]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Puts a library of this C source in the place of the package's own."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not here")
    (folder / "library.cpp").write_text(source)
    command = ["g++", "-shared", "-fPIC", "library.cpp", "-o", _extension.LIBRARY_NAME]
    subprocess.run(command, cwd=folder, check=True)
    monkeypatch.setattr(_extension, "FOLDER", folder)
    monkeypatch.setattr(_extension, "_status", _extension.ExtensionStatus(True, ""))


def returning(value: str, entry: str = "sqk_quantize_table") -> str:
    return f'extern "C" const char* {entry}() {{ return {value}; }}\n'


def as_c_string(text: str) -> str:
    return f'R"json({text})json"'


def rendered(document: _doctor.Document) -> str:
    console = Console(width=300, file=io.StringIO())
    with console.capture() as capture:
        console.print(_doctor.render(document))
    return capture.get()


@pytest.mark.compiler
def test_doctor_shows_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, returning(as_c_string(json.dumps(ROWS))))
    assert _extension.dispatch_tables() == {"quantize": ROWS}
    document = _doctor.work()
    assert document["extension"]["tables"] == {"quantize": ROWS}
    lines = [line.split() for line in rendered(document).splitlines()]
    assert ["quantize", "by", "warp:", "K", "<=", "1024"] in lines
    assert ["block:", "x_scale", "[m]"] in lines


@pytest.mark.compiler
def test_doctor_shows_the_tables_of_the_gemm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = returning(as_c_string(json.dumps(ROWS)))
    both += returning(as_c_string(json.dumps(GEMM)), "sqk_gemm_tables")
    install(tmp_path, monkeypatch, both)
    assert _extension.gemm_tables() == GEMM
    expected = {"quantize": ROWS, "gemm_s8 sm80": GEMM_ROWS}
    assert _extension.dispatch_tables() == expected
    lines = [line.split() for line in rendered(_doctor.work()).splitlines()]
    assert ["gemm_s8", "sm80", "by", "16x32x64:", "M", "<=", "16"] in lines
    assert ["64x64x64,", "16x32x64:", "M", ">", "16"] in lines


@pytest.mark.parametrize(
    "damaged", ["[]", '{"sm80": 1}', '{"sm80": {"tiles": [], "rules": [{"tiles": [0]}]}}']
)
@pytest.mark.compiler
def test_a_damaged_table_of_the_gemm_is_none(
    damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, returning(as_c_string(damaged), "sqk_gemm_tables"))
    assert _extension.dispatch_tables() == {}


@pytest.mark.parametrize(
    "value",
    [
        "nullptr",
        '""',
        '"\\xff"',
        '"null"',
        '"{\\"a\\": 1}"',
        '"[1]"',
        as_c_string('[{"path": "warp"}]'),
    ],
)
@pytest.mark.compiler
def test_a_damaged_table_is_none(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, returning(value))
    assert _extension.dispatch_tables() == {}


@pytest.mark.compiler
def test_a_library_without_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "")
    assert _extension.dispatch_tables() == {}
    monkeypatch.setattr(_extension, "FOLDER", tmp_path / "nothing")
    assert _extension.dispatch_tables() == {}


def test_no_library_has_no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_status", _extension.ExtensionStatus(False, "not built"))
    assert _extension.dispatch_tables() == {}
    document = _doctor.work()
    assert document["extension"]["tables"] == {}
    assert "quantize by" not in rendered(document)


@pytest.mark.parametrize("tuned", [False, True])
def test_doctor_says_when_no_table_was_tuned(tuned: bool) -> None:
    document = _doctor.work()
    document["extension"] |= {"available": True, "tuned": tuned}
    document["cuda"]["devices"] = []
    assert "no tuned table" not in rendered(document), "there is no GPU"
    gpu = {"name": "NVIDIA H100", "capability": "9.0", "memory_bytes": 80 << 30}
    document["cuda"]["devices"] = [gpu]
    assert ("no tuned table exists for this GPU" in rendered(document)) == (not tuned)
