"""The logic of the matrix of torch versions that the binding is compiled with, tested with fake wheels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools.binding import load as binding_load
from tools.binding import matrix as binding_matrix
from tools.binding.matrix import OLDEST, VERSIONS, Headers, Row, parse
from tools.build.plan import TORCH_TARGET, BuildError, version_text

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("nm") is None, reason="no g++ or nm"
)
SHIM = "torch/csrc/inductor/aoti_torch/c/shim.h"


def include_folder(root: Path, names: Sequence[str]) -> Path:
    header = root / "include" / SHIM
    header.parent.mkdir(parents=True)
    header.write_text("".join(f"AOTITorchError {name}(int32_t);\n" for name in names))
    return root / "include"


def wheel_with(folder: Path, files: Mapping[str, str], version: str = "2.11.0") -> Path:
    path = folder / f"torch-{version}-py3-none-any.whl"
    info = f"torch-{version}.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, **metadata}.items():
            archive.writestr(name, text)
    return path


# ----------------------------------------------------------------------------------------- headers


def test_the_oldest_version_is_the_one_that_the_build_targets() -> None:
    assert OLDEST == f"{version_text(TORCH_TARGET)}.0"
    assert VERSIONS[0] == OLDEST and len(set(VERSIONS)) == 4


def test_the_cache_folder_follows_the_xdg_convention(tmp_path: Path) -> None:
    own = Path("smoothquant-kernels") / "torch-headers"
    assert binding_matrix.cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / own
    assert binding_matrix.cache_folder({}) == Path.home() / ".cache" / own


def test_only_stable_headers_and_a_list_of_exports_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding_matrix, "exported", lambda _: frozenset({"torch_b", "torch_a"}))
    files = {f"torch/include/{SHIM}": "x", binding_matrix.LIBTORCH: "y", "torch/nn.py": "z"}
    files["torch/include/ATen/ATen.h"] = files["torch/include/torch/all.h"] = ""
    target = tmp_path / "kept"
    binding_matrix.unpack(wheel_with(tmp_path, files), target)
    kept = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert kept == ["exports.txt", f"include/{SHIM}"]
    assert (target / "exports.txt").read_text() == "torch_a\ntorch_b\n"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["kept"]


def test_a_wheel_without_headers_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"torch-2.11.0-py3-none-any.whl holds none of"):
        binding_matrix.unpack(wheel_with(tmp_path, {"torch/nn.py": ""}), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.slow  # pip starts three times
def test_pip_takes_a_version_that_a_constraint_forbids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Runs the real pip with a configuration file that caps torch. The file's other settings stay in
    # force.
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    wheels.mkdir()
    wheel_with(wheels, {}, "2.15.0")
    cap, settings = tmp_path / "cap.txt", tmp_path / "pip.conf"
    cap.write_text("torch<=2.14.1\n")
    settings.write_text(f"[global]\nconstraint = {cap}\nno-index = true\nfind-links = {wheels}\n")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    command = binding_matrix.download_command("2.15.0", ["any"], target)
    capped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "ResolutionImpossible" in capped.stderr  # the cap works
    wheel = binding_matrix.download("2.15.0", ["any"], target)
    assert wheel.name == "torch-2.15.0-py3-none-any.whl"
    with pytest.raises(
        BuildError, match=r"torch 2\.16\.0 could not be downloaded: ERROR: No match"
    ):
        binding_matrix.download("2.16.0", ["any"], tmp_path / "other")


def test_headers_come_from_the_nearest_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def download(version: str, platforms: Sequence[str], folder: Path) -> Path:
        asked.append((version, tuple(platforms)))
        return wheel_with(folder, {f"torch/include/{SHIM}": f"of {version}"}, version)

    monkeypatch.setattr(binding_matrix, "download", download)
    include = include_folder(tmp_path / "torch", [])
    here = SimpleNamespace(version="2.13.0+cpu", include=include, root=tmp_path / "torch")
    monkeypatch.setattr(binding_matrix, "find_torch", lambda: here)
    cache = tmp_path / "cache"

    assert binding_matrix.get_headers("2.13.0", cache).include == include
    assert not asked and not cache.exists()
    for source in ("downloaded", "cached"):
        found = binding_matrix.get_headers("2.11.0", cache)
        assert found.source.startswith(source)
        assert (found.include / SHIM).read_text() == "of 2.11.0"
    binding_matrix.get_headers(OLDEST, cache)
    binding_matrix.get_headers("2.13.0", cache, ["other"])
    assert asked == [
        ("2.11.0", binding_matrix.SMALLEST),
        (OLDEST, binding_matrix.WITH_LIBRARY),
        ("2.13.0", ("other",)),
    ]


# ----------------------------------------------------------------------------------------- symbols


def test_names_that_the_oldest_torch_lacks_are_reported(tmp_path: Path) -> None:
    include = include_folder(
        tmp_path, ["aoti_torch_get_dim", "torch_declared_only", "torch_get_cuda"]
    )
    oldest = Headers("2.10.0", include, "", frozenset({"aoti_torch_get_dim"}))
    have = frozenset({"aoti_torch_get_dim", "torch_get_cuda"})
    assert binding_matrix.lacking(have, oldest) == []
    cxx = "_ZN3c105ErrorC1Ev"
    assert binding_matrix.lacking(have | {"torch_new", "torch_declared_only", cxx}, oldest) == [
        f"needs {cxx}, which is not part of torch's stable ABI",
        "needs torch_declared_only, which libtorch_cpu 2.10.0 does not export",
        "needs torch_new, which the headers of torch 2.10.0 lack",
    ]
    by_headers = Headers("2.10.0", include, "")
    assert len(binding_matrix.lacking(frozenset({"torch_declared_only"}), by_headers)) == 0


@needs_compiler
@pytest.mark.compiler
def test_needed_symbols_are_read_from_objects(tmp_path: Path) -> None:
    source = tmp_path / "a.cpp"
    source.write_text(
        """
        #include <cstdio>
        extern "C" int aoti_torch_strong(int);
        extern "C" __attribute__((weak)) int torch_weak();
        namespace c10 { struct Device { ~Device(); }; }
        namespace torch { namespace stable { inline int own() { return 1; } } }
        namespace other { void torch_like(); }
        extern "C" int torch_defined_here(int x) {
          c10::Device device;
          other::torch_like();
          std::puts("x");
          return torch_weak ? torch_weak() : aoti_torch_strong(x) + torch::stable::own();
        }
        """
    )
    made = tmp_path / "a.o"
    subprocess.run(["g++", "-c", str(source), "-fPIC", "-o", str(made)], check=True)
    assert binding_matrix.needed([made]) == {"aoti_torch_strong", "_ZN3c106DeviceD1Ev"}
    library = tmp_path / "a.so"
    subprocess.run(["g++", "-shared", str(made), "-o", str(library)], check=True)
    assert binding_matrix.exported(library) == {"torch_defined_here"}


# ------------------------------------------------------------------------------------------ matrix


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Every version has headers except those in `missing`; `broken` ones do not compile; objects need `names`."""
    state = SimpleNamespace(missing=set(), broken=set(), names={"aoti_torch_get_dim"}, loaded=[])
    include = include_folder(tmp_path, ["aoti_torch_get_dim"])

    def get_headers(version: str, cache: Path, platforms: Sequence[str]) -> Headers:
        if version in state.missing:
            raise BuildError(f"torch {version} could not be downloaded: no network")
        return Headers(version, include, "fake")

    def compile_binding(headers: Headers, env: Mapping[str, str]) -> list[Path]:
        if headers.version in state.broken:
            raise BuildError("g++ failed on gemm.cpp.o:\nno such macro")
        return [Path(f"{headers.version}.o")]

    def call_ops(library: Path, python: str) -> str:
        state.loaded.append((library.name, python))
        if python == "wrong":
            raise binding_load.LoadError("AssertionError: quantize: got 1, expected 2")
        return "2.13.0: 3 calls right"

    monkeypatch.setattr(binding_matrix.shutil, "which", lambda name: name)
    monkeypatch.setattr(binding_matrix, "get_headers", get_headers)
    monkeypatch.setattr(binding_matrix, "compile_binding", compile_binding)
    monkeypatch.setattr(binding_matrix, "compile_cpu_binding", lambda headers, env: [])
    monkeypatch.setattr(binding_matrix, "needed", lambda objects: frozenset(state.names))
    monkeypatch.setattr(binding_matrix, "link", lambda objects, folder, python: objects[0])
    monkeypatch.setattr(binding_matrix, "call_ops", call_ops)
    return state


def test_a_green_matrix(fakes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert binding_matrix.run(parse([]), {}) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[1] for line in rows] == list(VERSIONS)
    assert all("1 in 2.10.0's headers" in line for line in rows)
    assert binding_matrix.run(parse(["--torch", "2.11.0", "--load", "python3"]), {}) == 0
    assert fakes.loaded == [("2.11.0.o", "python3")]
    assert "2.13.0: 3 calls right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        ({"missing": {"2.15.0"}}, [], "2.15.0 could not be downloaded: no network"),
        ({"missing": {OLDEST}}, ["--torch", "2.11.0"], f"{OLDEST} could not be downloaded"),
        ({"broken": {"2.11.0"}}, [], "torch 2.11.0: g++ failed on gemm.cpp.o"),
        ({"names": {"torch_new"}}, [], "which the headers of torch 2.10.0 lack"),
        ({}, ["--load", "wrong"], "wrong: AssertionError: quantize: got 1, expected 2"),
    ],
)
def test_problems_fail_the_matrix(
    fakes: Any,
    change: dict[str, Any],
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vars(fakes).update(change)
    assert binding_matrix.run(parse(arguments), {}) == 1
    assert words in capsys.readouterr().out


def test_a_version_may_be_allowed_to_be_missing(
    fakes: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.missing = {"2.15.0"}
    assert binding_matrix.run(parse(["--may-miss", "2.15.0"]), {}) == 0
    assert "| 2.15.0 | MISSING (allowed)" in capsys.readouterr().out


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(binding_matrix.shutil, "which", lambda name: None)
    assert binding_matrix.run(parse([]), {}) == 2
    assert "g++ was not found; install a C++ compiler" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "words"),
    [("2.9.1", "older than 2.10.0, the oldest"), ("newest", "'newest' is not a version of torch")],
)
def test_invalid_versions_are_refused(version: str, words: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parse(["--torch", version])
    assert words in capsys.readouterr().err


def test_the_table_is_markdown() -> None:
    lines = binding_matrix.table([Row("2.11.0", "cached", "3 files", problems=["bad"])]).split("\n")
    assert len({line.count("|") for line in lines[:3]}) == 1
    assert lines[3:] == ["torch 2.11.0: bad"]


def test_a_python_that_fails_says_why(tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.write_bytes(b"")
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport sys\nsys.exit('Traceback\\nOSError: no such symbol')"
    )
    python.chmod(0o755)
    with pytest.raises(binding_load.LoadError, match=r"^OSError: no such symbol$"):
        binding_load.call_ops(library, str(python))
    with pytest.raises(binding_load.LoadError, match="it has no torch"):
        binding_load.torch_folder(str(python))
    with pytest.raises(binding_load.LoadError, match="cannot be started: No such file"):
        binding_load.torch_folder(str(tmp_path / "none"))
