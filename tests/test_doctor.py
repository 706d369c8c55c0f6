"""The library's dispatch tables: read from a library, shown by `smoothquant-kernels doctor`."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from smoothquant_kernels import _doctor, _extension

ROWS = [
    {"path": "warp", "when": "K <= 1024", "why": "one warp holds the row"},
    {"path": "block", "when": "x_scale [m]", "why": "\u2026"},
]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Puts a library of this C source in the place of the package's own."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not here")
    (folder / "library.cpp").write_text(source)
    command = ["g++", "-shared", "-fPIC", "library.cpp", "-o", _extension.LIBRARY_NAME]
    subprocess.run(command, cwd=folder, check=True)
    monkeypatch.setattr(_extension, "_FOLDER", folder)
    monkeypatch.setattr(_extension, "_status", _extension.ExtensionStatus(True, ""))


def returning(value: str) -> str:
    return f'extern "C" const char* sqk_quantize_table() {{ return {value}; }}'


def as_c_string(text: str) -> str:
    return f'R"json({text})json"'


def rendered(document: _doctor.Document) -> str:
    console = Console(width=300, file=io.StringIO())
    with console.capture() as capture:
        console.print(_doctor.render_doctor(document))
    return capture.get()


def test_doctor_shows_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, returning(as_c_string(json.dumps(ROWS))))
    assert _extension.dispatch_tables() == {"quantize": ROWS}
    document = _doctor.examine()
    assert document["extension"]["tables"] == {"quantize": ROWS}
    lines = [line.split() for line in rendered(document).splitlines()]
    assert ["quantize", "by", "warp:", "K", "<=", "1024"] in lines
    assert ["block:", "x_scale", "[m]"] in lines


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
def test_a_damaged_table_is_none(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, returning(value))
    assert _extension.dispatch_tables() == {}


def test_a_library_without_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "")
    assert _extension.dispatch_tables() == {}
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path / "nothing")
    assert _extension.dispatch_tables() == {}


def test_no_library_has_no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_status", _extension.ExtensionStatus(False, "not built"))
    assert _extension.dispatch_tables() == {}
    document = _doctor.examine()
    assert document["extension"]["tables"] == {}
    assert "quantize by" not in rendered(document)
