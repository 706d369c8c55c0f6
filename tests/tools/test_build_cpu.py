"""The build of the CPU library: the compiler, the levels and their flags, modes, refusals, the wheel's platform."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smoothquant_kernels.backends import cpu_choice, cpu_native
from tools.build import cpu, install
from tools.build import plan as build_plan
from tools.build.plan import ROOT, BuildError, Torch
from tools.build.sources import cpu_binding_sources, cpu_sources, module_sources, sources

COMPILER = cpu.Compiler("g++", "g++ 12.2.0")
TORCH = Torch(Path("/torch"), "2.13.0", None, False)
PLAN = cpu.CpuPlan(COMPILER, TORCH)
ALL = dict.fromkeys(cpu.LEVELS, "")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def program(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


# --------------------------------------------------------------------------------- the plan and its refusals


def test_the_compiler_is_cxx_or_the_first_on_the_path(tmp_path: Path) -> None:
    program(tmp_path, "clang++", "echo clang 19; echo more")
    env = {"PATH": str(tmp_path)}
    assert cpu.find_compiler(env) == cpu.Compiler(str(tmp_path / "clang++"), "clang 19")
    program(tmp_path, "g++", "echo g++ 14")
    assert cpu.find_compiler(env).version == "g++ 14"
    own = program(tmp_path, "own", "echo own 1")
    assert cpu.find_compiler({**env, "CXX": str(own)}).path == str(own)
    for wrong in (tmp_path / "none", program(tmp_path, "broken", "exit 1")):
        with pytest.raises(BuildError, match=f"CXX={wrong} is not a C\\+\\+ compiler"):
            cpu.find_compiler({**env, "CXX": str(wrong)})


def test_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = build_plan.MODE_VARIABLE
    monkeypatch.setattr(cpu, "find_torch", lambda what: TORCH)
    here = {"PATH": str(tmp_path)}
    plan, message = cpu.make_cpu_plan(here, "linux")
    assert plan is None and "no C++ compiler was found" in message and cpu.BUILD_COMMAND in message
    with pytest.raises(BuildError, match=f"{variable}=cpu: no C.. compiler was found; install g"):
        cpu.make_cpu_plan({**here, variable: "cpu"}, "linux")
    program(tmp_path, "g++", "echo g++ 14")
    for mode in ("auto", "cpu", "cuda", ""):
        plan, message = cpu.make_cpu_plan({**here, variable: mode}, "linux")
        assert plan is not None and message == "building the CPU kernels with g++ 14, torch 2.13.0."
    assert cpu.make_cpu_plan({**here, variable: "none"}, "linux") == (None, "")
    with pytest.raises(BuildError, match="built on Linux only, not on darwin"):
        cpu.make_cpu_plan({**here, variable: "cpu"}, "darwin")
    # The CUDA library is not asked for by a build of the CPU library.
    assert build_plan.make_plan({**here, variable: "cpu"}, "linux") == (None, "")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_torch(name: str) -> None:
        return None

    monkeypatch.setattr(cpu, "find_compiler", lambda env: COMPILER)
    monkeypatch.setattr(build_plan.importlib.util, "find_spec", no_torch)
    _, message = cpu.make_cpu_plan({}, "linux")
    wanted = "torch is not installed in the environment that builds; install torch and pass --no-build-isolation"
    assert wanted in message
    monkeypatch.setattr(cpu, "find_torch", lambda what: Torch(Path("/t"), "2.9.1", None, False))
    with pytest.raises(BuildError, match=r"torch 2\.9\.1 is too old; the kernels need torch 2\.10"):
        cpu.make_cpu_plan({build_plan.MODE_VARIABLE: "cpu"}, "linux")


# ------------------------------------------------------------------------------------------------ sources and flags


def commands(levels: dict[str, str]) -> dict[str, tuple[str, ...]]:
    *compiled, _ = cpu.cpu_steps(PLAN, levels)
    return {step.inputs[0]: step.command for step in compiled}


def test_the_levels_are_the_same_everywhere() -> None:
    text = (ROOT / "csrc/cpu/levels.h").read_text()
    assert tuple(re.findall(r"^  X\(\w+, (\w+)\)", text, re.M)) == tuple(cpu.LEVELS)
    assert tuple(cpu.LEVELS) == cpu_choice.LEVELS
    assert cpu.LIBRARY_NAME == cpu_native.LIBRARY_NAME
    assert cpu.BUILD_INFO_NAME == cpu_native.BUILD_INFO_NAME
    assert cpu.BUILD_COMMAND in cpu_native.BUILD_COMMAND


def test_each_library_has_its_own_sources() -> None:
    ours = {*cpu_sources(), *cpu_binding_sources()}
    assert set(commands(ALL)) == ours and all((ROOT / name).is_file() for name in ours)
    assert not set(cpu_sources()) & {*sources(), *module_sources()}
    assert {f"csrc/cpu/level_{level}.cpp" for level in cpu.LEVELS} <= ours


def test_only_the_source_of_a_level_has_its_instructions() -> None:
    for source, command in commands(ALL).items():
        level = cpu.level_of_source(source)
        instructions = {word for word in command if word.startswith("-m")}
        assert instructions == set(cpu.LEVELS[level] if level else ()), source
        if source in cpu_sources():
            assert {"-O3", "-ffp-contract=off", "-fvisibility=hidden"} <= set(command)
            assert "-DSQK_CPU_HAS_AMX=1" in command and not any("torch" in word for word in command)
        else:
            assert "-DSQK_CPU" in command and "-DUSE_CUDA" not in command


def test_the_library_needs_no_cuda() -> None:
    *_, link = cpu.cpu_steps(PLAN, ALL)
    assert "-ltorch_cpu" in link.command and not any("cuda" in word for word in link.command)


def test_a_level_that_cannot_be_compiled_is_left_out(tmp_path: Path) -> None:
    script = 'case "$*" in *-mamx-tile*|*-mavxvnni*) exit 1;; esac'
    old = cpu.Compiler(str(program(tmp_path, "old", script)), "g++ 10")
    levels = cpu.usable_levels(old, "x86_64")
    assert levels == {
        "portable": "",
        "avx2": "",
        "avx_vnni": "g++ 10 cannot compile it",
        "avx512_vnni": "",
        "amx": "g++ 10 cannot compile it",
    }
    found = commands(levels)
    assert "csrc/cpu/level_amx.cpp" not in found and "csrc/cpu/level_avx2.cpp" in found
    assert {"-DSQK_CPU_HAS_AMX=0", "-DSQK_CPU_HAS_AVX2=1"} <= set(found["csrc/cpu/levels.cpp"])
    facts = cpu.build_info(PLAN, levels, 7)
    assert facts["levels"] == ["portable", "avx2", "avx512_vnni"] and facts["bytes"] == 7
    assert not [why for why in cpu.usable_levels(old, "aarch64").values() if why == ""][1:]


# -------------------------------------------------------------------------------------------- the wheel's platform


READELF = """
 0x01 (NEEDED)  Shared library: [libtorch_cpu.so]
 0x01 (NEEDED)  Shared library: [libc.so.6]
  000000: Name: GLIBC_2.{glibc}  Flags: none
  000010: Name: GLIBCXX_3.4.{cxx}  Flags: none
  000010: Name: CXXABI_1.3.7  Flags: none
"""


@pytest.mark.parametrize(
    ("glibc", "cxx", "expected"),
    [
        ("17", "19", "manylinux_2_17_x86_64"),
        ("2.5", "24", "manylinux_2_28_x86_64"),
        ("32", "26", "manylinux_2_34_x86_64"),
        ("34", "30", "manylinux_2_35_x86_64"),
        ("99", "19", None),
    ],
)
def test_the_platform_of_a_wheel(
    glibc: str, cxx: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = READELF.format(glibc=glibc, cxx=cxx)
    program(tmp_path, "readelf", f"cat <<'END'\n{said}\nEND")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert install.manylinux(tmp_path / "any.so", "x86_64") == expected
    program(tmp_path, "readelf", f"cat <<'END'\n{said.replace('libc.so.6', 'libgomp.so.1')}\nEND")
    assert install.manylinux(tmp_path / "any.so", "x86_64") is None


# ------------------------------------------------------------------------------------------------- a real build


@needs_compiler
@pytest.mark.compiler
def test_the_library_is_built_and_loads(tmp_path: Path) -> None:
    """With all levels that this compiler has, in a process that then multiplies."""
    plan, message = cpu.make_cpu_plan({**os.environ, build_plan.MODE_VARIABLE: "cpu"})
    assert plan is not None, message
    built = cpu.build_cpu_library(plan, os.environ)
    package = tmp_path / "smoothquant_kernels"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_build_info*.json")
    shutil.copytree(ROOT / "smoothquant_kernels", package, ignore=unwanted)
    files = {cpu.LIBRARY_NAME: built.library}
    install.place(files, built.facts, cpu.BUILD_INFO_NAME, package)
    assert json.loads((package / cpu.BUILD_INFO_NAME).read_text())["levels"][0] == "portable"
    code = (
        "import torch; from smoothquant_kernels import ops; from smoothquant_kernels.backends import cpu_native as c; "
        "one = torch.ones(1, 4); print(c.level(), ops.linear_s8(one, one.char(), one[0, :1]).item())"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "SMOOTHQUANT_KERNELS_CPU": "portable"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout == "portable 4.0\n" and not done.stderr, done.stderr
