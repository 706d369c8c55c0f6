"""The build: architectures, the search for CUTLASS, build modes, and the contents of the wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support import described
from tools.build import cpu
from tools.build import plan as build_plan
from tools.build.commands import torch_target_macro
from tools.build.facts import build_info, parse_ptxas, warnings
from tools.build.library import compile_steps
from tools.build.module import load_module, module_steps
from tools.build.plan import ROOT, BuildError, Nvcc, Python, Torch, parse_archs
from tools.build.sources import (
    cpu_binding_sources,
    cpu_sources,
    module_sources,
    sources,
    units,
)

SETUPTOOLS = pytest.importorskip("setuptools")
needs_setuptools = pytest.mark.skipif(
    int(SETUPTOOLS.__version__.split(".")[0]) < 77, reason="setuptools >= 77 builds the package"
)

# ----------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;8.9;9.0a+PTX", ["8.0", "8.9", "9.0a+PTX"]),
        ("8.0 8.6", ["8.0", "8.6"]),
        ("8.0, 12.0 ;; 10.0f", ["8.0", "12.0", "10.0f"]),
        ("9.0a;9.0a", ["9.0a"]),
        (None, ["8.0+PTX", "8.9", "9.0a"]),
        ("  ", ["8.0+PTX", "8.9", "9.0a"]),
    ],
)
def test_architectures_are_read(text: str | None, expected: list[str]) -> None:
    assert [str(arch) for arch in parse_archs(text)] == expected


@pytest.mark.parametrize("token", ["Ampere", "native", "8", "8.0a+ptx", "sm_80", "8.05", "all"])
def test_a_name_is_not_an_architecture(token: str) -> None:
    with pytest.raises(BuildError, match=f"'{re.escape(token)}' is not an architecture; write"):
        parse_archs(f"8.0;{token}")


def test_an_architecture_without_int8_mma_is_refused() -> None:
    with pytest.raises(BuildError, match=r"'7.5' is too old; the INT8 kernels need 8.0"):
        parse_archs("7.5")


def test_gencode() -> None:
    plain, ptx = parse_archs("9.0a;8.0+PTX")
    assert plain.gencode == "-gencode=arch=compute_90a,code=[sm_90a]"
    assert ptx.gencode == "-gencode=arch=compute_80,code=[sm_80,compute_80]"


def test_sources_are_compiled_for_the_architectures_in_their_name() -> None:
    archs = parse_archs("8.0+PTX;8.9;9.0a")

    def codes(name: str) -> list[str]:
        return [arch.code for arch in build_plan.archs_of_source(name, archs)]

    assert codes("csrc/gemm/instances/tile_sm90.cu") == ["90a"]
    assert codes("csrc/gemm/instances/tile_sm80.cu") == ["80", "89"]
    assert codes("csrc/quantize/saturate.cu") == ["80", "89", "90a"]


# ------------------------------------------------------------------------------------------ CUTLASS


def fake_cutlass(root: Path, version: tuple[int, int, int]) -> Path:
    header = root / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    names = ("MAJOR", "MINOR", "PATCH")
    lines = [f"#define CUTLASS_{n} {v}" for n, v in zip(names, version, strict=True)]
    header.write_text("\n".join(lines))
    return root


def test_cutlass_path_wins_over_third_party_and_that_over_pypi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = fake_cutlass(tmp_path / "given", (4, 1, 0))
    pypi = fake_cutlass(tmp_path / "pypi", (4, 2, 0))
    monkeypatch.setattr(build_plan, "_pypi_cutlass", lambda: pypi)
    project = tmp_path / "project"

    assert build_plan.find_cutlass({}, project).version == "4.2.0"
    submodule = fake_cutlass(project / "third_party" / "cutlass", (4, 0, 7))
    found = build_plan.find_cutlass({}, project)
    assert (found.root, found.version) == (submodule, "4.0.7")
    assert found.includes == (submodule / "include", submodule / "tools" / "util" / "include")
    found = build_plan.find_cutlass({"CUTLASS_PATH": str(given)}, project)
    assert (found.root, found.version) == (given, "4.1.0")


def test_a_wrong_cutlass_path_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pypi = fake_cutlass(tmp_path / "pypi", (4, 2, 0))
    monkeypatch.setattr(build_plan, "_pypi_cutlass", lambda: pypi)
    with pytest.raises(BuildError, match=r"does not contain include/cutlass/version\.h"):
        build_plan.find_cutlass({"CUTLASS_PATH": str(tmp_path)}, tmp_path)


def test_no_cutlass_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_plan, "_pypi_cutlass", lambda: None)
    with pytest.raises(BuildError, match=r"pip install --no-deps nvidia-cutlass==4\.2\.0\.0"):
        build_plan.find_cutlass({}, tmp_path)


# -------------------------------------------------------------------------------- torch and modes


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        (Torch(Path("t"), "2.9.1+cu130", "13.0", True), "torch 2.9.1.cu130 is too old.*2.10"),
        (Torch(Path("t"), "2.13.0+cpu", None, False), "torch 2.13.0.cpu is a build without CUDA"),
        (Torch(Path("t"), "2.12.0+cu126", "12.6", True), "built with CUDA 12.6, but .* CUDA 13.0"),
    ],
)
def test_a_torch_that_cannot_be_linked_is_refused(torch: Torch, expected: str) -> None:
    with pytest.raises(BuildError, match=expected):
        build_plan.check_torch(torch, Nvcc("/cuda/bin/nvcc", "13.0"))


def test_torch_is_found_without_importing_it() -> None:
    import torch

    found = build_plan.find_torch()
    assert found.version == torch.__version__
    assert found.cuda == torch.version.cuda
    assert (found.include / "torch" / "csrc" / "stable" / "library.h").is_file()


def test_the_oldest_torch_is_the_same_in_the_build_and_in_the_requirements() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    wanted = re.search(r'"torch>=([\d.]+)"', text)
    assert wanted is not None
    assert wanted.group(1) == build_plan.version_text(build_plan.TORCH_TARGET)
    assert torch_target_macro() == "-DTORCH_TARGET_VERSION=0x020a000000000000"


def test_the_build_requirements_are_the_same_everywhere() -> None:
    """In the requirements, in errors, in the instructions without isolation, and for machines with a GPU."""
    wanted = re.findall("'(.+?)'", build_plan.TOOLS_PYPI)
    assert len(wanted) == 2
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^requires = (.+)", text, re.M)[1] == str(
        ["setuptools>=77", *wanted]
    ).replace("'", '"')
    for name in ("Makefile", "CONTRIBUTING.md"):
        assert f"'setuptools>=77' {build_plan.TOOLS_PYPI}" in (ROOT / name).read_text(), name
    kit = (ROOT / "benchmarks" / "on_gpu" / "requirements.txt").read_text().splitlines()
    assert set(wanted) <= set(kit)


def test_max_jobs() -> None:
    assert build_plan.jobs({"MAX_JOBS": "3"}) == 3
    assert build_plan.jobs({}) == os.cpu_count()
    with pytest.raises(BuildError, match="MAX_JOBS=no is not a positive number"):
        build_plan.jobs({"MAX_JOBS": "no"})


def run_setup(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py in a process with only the given variables, and without nvcc unless they name one."""
    env = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere/cuda", **env}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@needs_setuptools
def test_mode_cuda_without_nvcc_is_one_sentence() -> None:
    done = run_setup("--name", SMOOTHQUANT_KERNELS_BUILD="cuda")
    assert done.returncode == 1
    assert done.stderr == (
        "smoothquant-kernels: SMOOTHQUANT_KERNELS_BUILD=cuda: nvcc was not found: "
        "CUDA_HOME=/nowhere/cuda has no bin/nvcc.\n"
    )


@needs_setuptools
def test_an_unknown_mode_lists_the_allowed_ones() -> None:
    done = run_setup("--name", SMOOTHQUANT_KERNELS_BUILD="gpu")
    assert done.returncode == 1
    assert "SMOOTHQUANT_KERNELS_BUILD=gpu is not one of auto, cuda, cpu, none." in done.stderr
    assert "Traceback" not in done.stderr


@needs_setuptools
def test_a_wrong_architecture_stops_even_mode_auto() -> None:
    done = run_setup("--name", TORCH_CUDA_ARCH_LIST="Hopper")
    assert done.returncode == 1
    assert "'Hopper' is not an architecture" in done.stderr


@needs_setuptools
def test_mode_auto_without_compilers_says_that_it_builds_pure_python(tmp_path: Path) -> None:
    done = run_setup("build", "--build-base", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "smoothquant-kernels: no CUDA kernels: nvcc was not found" in done.stderr
    assert "smoothquant-kernels: no compiled CPU kernels: no C++ compiler was found" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_mode_auto_with_nvcc_but_no_torch_is_pure_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_torch(what: str = "") -> Torch:
        raise BuildError("torch is not installed")

    monkeypatch.setattr(build_plan, "find_nvcc", lambda env: Nvcc("nvcc", "13.0"))
    monkeypatch.setattr(build_plan, "find_torch", no_torch)
    plan, message = build_plan.make_plan({}, "linux")
    assert plan is None
    assert "torch is not installed" in message
    with pytest.raises(BuildError, match="BUILD=cuda: torch is not installed"):
        build_plan.make_plan({"SMOOTHQUANT_KERNELS_BUILD": "cuda"}, "linux")


def test_ptxas_output_is_read() -> None:
    text = """
ptxas info    : Compiling entry function '_Zone' for 'sm_80'
ptxas info    : Function properties for _Zone
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 0 barriers, 376 bytes cmem[0]
ptxas info    : Compiling entry function '_Ztwo' for 'sm_90a'
ptxas info    : Function properties for _Ztwo
    944 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas warning : (C7510) Potential Performance Loss: wgmma.mma_async is serialized
ptxas info    : Used 168 registers, used 2 barriers, 944 bytes cumulative stack size
"""
    one, two = parse_ptxas(text)
    (warning,) = warnings(text)
    assert "C7510" in warning
    assert (one.kernel, one.arch, one.registers, one.stack, one.spills) == (
        "_Zone",
        "sm_80",
        14,
        0,
        0,
    )
    assert (two.arch, two.registers, two.stack, two.spills) == ("sm_90a", 168, 944, 20)


# ----------------------------------------------------------------------------------------- sources


def plan_with(archs: str, *, tuning: bool = False) -> build_plan.Plan:
    python = Python((Path("/python"),), ".so")
    cutlass = build_plan.Cutlass(Path("/cutlass"), "4.2.0")
    torch = Torch(Path("/torch"), "2.14.0", "13.0", True)
    return build_plan.Plan(Nvcc("nvcc", "13.0"), torch, cutlass, python, parse_archs(archs), tuning)


def test_only_a_tuning_build_compiles_candidates(tmp_path: Path) -> None:
    names = {path.name for path in (ROOT / "csrc" / "gemm" / "instances").glob("tuning_*")}
    assert names
    for tuning in (False, True):
        plan = plan_with("8.0;9.0a", tuning=tuning)
        steps = compile_steps(plan, tmp_path)
        compiled = {Path(source).name for step in steps for source in step.inputs}
        for unit in tmp_path.glob("unit_*.cu"):
            if unit.name in compiled:
                compiled |= {Path(name).name for name in re.findall('"(.+)"', unit.read_text())}
        assert names & compiled == (names if tuning else set())
        assert all(("-DSQK_TUNING=1" in step.command) == tuning for step in steps)
        assert build_info(plan, "")["tuning"] is tuning
    variable = build_plan.TUNING_VARIABLE
    found = [build_plan.wants_tuning({variable: text}) for text in ("1", "0", "", " 1 ")]
    assert found == [True, False, False, True] and not build_plan.wants_tuning({})
    with pytest.raises(BuildError, match=f"{variable}=yes is not one of 0, 1"):
        build_plan.wants_tuning({variable: "yes"})


@pytest.mark.parametrize("tuning", [False, True])
def test_every_source_is_compiled_once(tmp_path: Path, tuning: bool) -> None:
    """By itself or in a unit. A unit's sources begin with the same macros, and units are the same on every machine."""
    names = sources(tuning=tuning)
    given = units(names, tmp_path)
    included = []
    for unit in set(given) - set(names):
        own = [f"csrc/{name}" for name in re.findall(r'#include "(.+)"', Path(unit).read_text())]
        macros = {re.search(r"(#define .*\n)*", (ROOT / name).read_text())[0] for name in own}
        assert 1 < len(own) <= 4 and len(macros) == 1 and unit.endswith("_sm90.cu")
        included += own
    assert sorted([*included, *(set(given) & set(names))]) == names
    assert len([name for name in included if "wgmma_" in name]) > 5
    before = {unit: Path(unit).stat().st_mtime_ns for unit in set(given) - set(names)}
    assert units(names, tmp_path) == given
    assert before == {unit: Path(unit).stat().st_mtime_ns for unit in before}


def test_without_hopper_its_kernels_are_not_compiled(tmp_path: Path) -> None:
    found = {step.inputs[0] for step in compile_steps(plan_with("8.0"), tmp_path)}
    assert found and not [name for name in found if name.endswith("_sm90.cu")]
    assert not [name for name in found if name.startswith("csrc/python/")]
    found = {step.inputs[0] for step in compile_steps(plan_with("9.0a"), tmp_path)}
    assert not [name for name in found if name.endswith("_sm80.cu")]


def test_the_module_holds_all_sources_without_torch_or_nvcc(tmp_path: Path) -> None:
    *compiled, link = module_steps(tmp_path, Python((Path("/python"),), ".abi.so"), ["-DX"])
    assert [step.inputs for step in compiled] == [(name,) for name in module_sources()]
    assert {"csrc/gemm/plan.cpp", "csrc/quantize/plan.cpp"} < set(module_sources())
    assert link.output == str(tmp_path / "_kernels.abi.so") and len(link.inputs) == len(compiled)
    assert not any("torch" in word or "cuda" in word for step in compiled for word in step.command)


# ------------------------------------------------------------------------------- sdist and wheel


def build(kind: str, where: Path) -> Path:
    env = {**os.environ, "SMOOTHQUANT_KERNELS_BUILD": "none"}
    program = f"import setuptools.build_meta as b; b.build_{kind}({str(where)!r})"
    # Making a wheel writes to build/, so each test worker uses its own copy of the tree.
    tree = where / "tree"
    if not tree.exists():
        files = ["pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"]
        folders = ["csrc", "tools", "smoothquant_kernels", "third_party"]
        present = [name for name in (*files, *folders) if (ROOT / name).exists()]
        tree.mkdir(parents=True)
        subprocess.run(["cp", "-r", *present, str(tree)], cwd=ROOT, check=True)
        # A library that was built earlier must not get into a pure-Python wheel.
        stale = (
            build_plan.LIBRARY_NAME,
            cpu.LIBRARY_NAME,
            "_kernels.cpython-311-x86_64-linux-gnu.so",
        )
        for name in stale:
            (tree / "smoothquant_kernels" / name).write_text("stale")
    subprocess.run(
        [sys.executable, "-c", program], cwd=tree, env=env, check=True, capture_output=True
    )
    (made,) = where.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


@needs_setuptools
def test_the_pure_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    wheel = build("wheel", tmp_path)
    assert wheel.name == "smoothquant_kernels-0.1.0-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {"smoothquant_kernels/py.typed", "smoothquant_kernels/_kernels.pyi"} <= set(names)
    assert "smoothquant_kernels/backends/cuda.py" in names
    assert {f"smoothquant_kernels/report/page.{kind}" for kind in ("html", "css")} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    folders = {name.split("/")[0] for name in names}
    assert folders == {"smoothquant_kernels", "smoothquant_kernels-0.1.0.dist-info"}
    assert not [name for name in names if name.endswith((".so", ".cu", ".json"))]


@needs_setuptools
def test_the_sdist_holds_what_builds_the_kernels(tmp_path: Path) -> None:
    sdist = build("sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {*sources(), *module_sources(), *cpu_sources(), *cpu_binding_sources(), cpu.EXPORTS}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tools/build").glob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*h")}
    wanted |= {f"smoothquant_kernels/report/page.{kind}" for kind in ("html", "css")}
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", "_build_info_cpu.json"))]


@pytest.mark.compiler
def test_two_files_of_the_module_are_two_modules(tmp_path: Path) -> None:
    """Each has the tables that it was built with, and its own ruled-out tiles."""
    plain, tuning = described.built(), described.built("-DSQK_TUNING=1")
    copy = Path(described.copied(tmp_path)._name)
    one, two, candidates = (load_module(path).Library() for path in (plain, copy, tuning))
    first = one.gemm_tables()["sm90"]["tiles"][0]
    one.without_tiles(first["id"])
    try:
        ruled_out = [
            library.gemm_tables()["sm90"]["tiles"][0]["excluded"]
            for library in (one, two, candidates)
        ]
    finally:
        one.without_tiles("")
    assert ruled_out == [True, False, False]
    assert len(candidates.gemm_tables()["sm90"]["tiles"]) > len(two.gemm_tables()["sm90"]["tiles"])
