"""The library's dispatch tables, as `smoothquant-kernels doctor` reads and shows them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import smoothquant_kernels
from smoothquant_kernels.backends import cpu_choice, cpu_native, cuda, onednn
from smoothquant_kernels.cli import doctor
from tests.support import described

A100 = {"sms": 108, "capability": 80, "shared_bytes": 166912}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module replaces the package's own module and its library: csrc's tables and plans, without a GPU."""
    loaded = described.copied(tmp_path)
    module = described.module_of(loaded)
    (tmp_path / cuda.BUILD_INFO_NAME).write_text(json.dumps(module.built_with))
    monkeypatch.setitem(sys.modules, "smoothquant_kernels._kernels", module)
    monkeypatch.setattr(smoothquant_kernels, "_kernels", module, raising=False)
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    monkeypatch.setattr(cuda, "LIBRARY_NAME", Path(loaded._name).name)
    monkeypatch.setattr(cuda, "_status", cuda.ExtensionStatus(True, ""))
    return described.library(loaded)


def rendered(document: doctor.Document) -> str:
    console = Console(width=300, file=io.StringIO())
    with console.capture() as capture:
        console.print(doctor.render(document))
    return capture.get()


@pytest.mark.compiler
def test_doctor_shows_the_tables_of_the_library(library: Any) -> None:
    tables = doctor.work()["extension"]["tables"]
    assert list(tables) == ["quantize", *(f"gemm_s8 {name}" for name in library.gemm_tables())]
    assert tables["quantize"] == library.quantize_paths() and len(tables["quantize"]) > 5
    assert all(
        row["path"] and row["when"] and row["why"] for rows in tables.values() for row in rows
    )
    lines = [" ".join(line.split()) for line in rendered(doctor.work()).splitlines()]
    (first, *_) = library.quantize_paths()
    assert f"quantize by {first['path']}: {first['when']}" in lines
    table = library.gemm_tables()["sm80"]
    rule = table["rules"][-1]
    names = ", ".join(table["tiles"][tile]["name"] for tile in rule["tiles"])
    assert f"{names}: {rule['when']}" in lines
    assert not any("cannot be shown" in line for line in lines)


@pytest.mark.compiler
def test_doctor_shows_what_the_library_does_now(library: Any) -> None:
    """The library is queried each time, because its state is stored nowhere else."""
    device = sys.modules["smoothquant_kernels._kernels"].Device(**A100)
    before = library.plan_gemm(4096, 4096, 4096, device)["name"]
    library.without_tiles(f"sm80/{before.replace(' ', '-')}")
    assert library.plan_gemm(4096, 4096, 4096, device)["name"] != before
    shown = str(doctor.work()["extension"]["tables"]["gemm_s8 sm80"])
    assert f"{before} (ruled out)" in shown
    library.without_tiles("")
    assert "ruled out" not in str(doctor.work()["extension"]["tables"])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("module", "was not built for Python 3."),
        ("facts", "is of another build"),
        ("library", "cannot open shared object file"),
    ],
)
@pytest.mark.compiler
def test_doctor_says_why_it_shows_no_tables(
    library: Any, damage: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if damage == "module":
        monkeypatch.setitem(sys.modules, "smoothquant_kernels._kernels", None)
        monkeypatch.delattr(smoothquant_kernels, "_kernels")
    elif damage == "facts":
        (tmp_path / cuda.BUILD_INFO_NAME).write_text(json.dumps({"archs": ["9.0a"]}))
    else:
        monkeypatch.setattr(cuda, "LIBRARY_NAME", "none.so")
    assert cuda.dispatch_tables() == {} == cuda.gemm_tables()
    assert cuda.gemm_plan(8, 8, 8) is None
    document = doctor.work()
    assert document["extension"]["tables"] == {}
    said = rendered(document)
    assert "its tables cannot be shown: " in said and reason in said
    assert cuda.BUILD_COMMAND in document["extension"]["not_described"]


def test_no_library_has_no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_status", cuda.ExtensionStatus(False, "not built"))
    assert cuda.dispatch_tables() == {}
    document = doctor.work()
    assert document["extension"]["tables"] == {}
    assert "quantize by" not in rendered(document)


@pytest.mark.parametrize("tuned", [False, True])
def test_doctor_says_when_no_table_was_tuned(tuned: bool) -> None:
    document = doctor.work()
    document["extension"] |= {"available": True, "tuned": tuned}
    document["cuda"]["devices"] = []
    assert "no tuned table" not in rendered(document), "there is no GPU"
    gpu = {"name": "NVIDIA H100", "capability": "9.0", "memory_bytes": 80 << 30}
    document["cuda"]["devices"] = [gpu]
    assert ("no tuned table exists for this GPU" in rendered(document)) == (not tuned)


@pytest.mark.parametrize("serves", [False, True])
def test_doctor_names_the_cpu_library(serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = ("portable", "avx2")
    reason = "" if serves else f"it was not built; to build it: {cpu_native.BUILD_COMMAND}"
    status = cpu_native.CpuStatus(serves, reason, levels, "g++ 12.2.0", "2.10")
    monkeypatch.setattr(cpu_native, "_status", status)
    monkeypatch.setattr(cpu_native, "levels_here", lambda: levels if serves else ())
    monkeypatch.setattr(cpu_native, "level", lambda: "avx2" if serves else "")
    document = doctor.work()
    said = " ".join(rendered(document).split())
    assert "built for portable avx2 with g++ 12.2.0, for torch 2.10 or newer" in said
    if serves:
        assert "CPU library loaded" in said and "int8 on the CPU avx2: 16-bit products" in said
        assert "this processor runs portable avx2" in said
        assert "models on the CPU run on the compiled CPU kernels (avx2)" in said
    else:
        assert (
            f"CPU library not in use: {reason}" in said and document["cpu"]["int8"] in onednn.MODES
        )
        assert "models on the CPU run on oneDNN" in said


def test_every_level_and_mode_has_a_meaning() -> None:
    assert doctor._LEVELS.keys() == set(cpu_choice.LEVELS)
    assert doctor._MODES.keys() == set(onednn.MODES)
