"""Compares the PTX simulator with a GPU: its instruction tests must give the same bits on the GPU.

tools/ptxsim/tests/exactness.py lists where the PTX ISA does not promise the same bits. Without a GPU, the replay runs
on the simulator, which tests that it compares, reports, and survives a kernel that hangs.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.simulator import LAUNCHER
from tools.build.plan import ROOT, BuildError, find_nvcc

Case = dict[str, Any]

TESTS = ROOT / "tools" / "ptxsim" / "tests"
#: Tests of test_isa*.py that run no kernel, so that there is nothing to compare, and the reason.
NOT_COMPARED = {
    "test_unknown_instruction": "expects the simulator's message for PTX that no assembler accepts",
    "test_tensor_map_validation": "checks arguments on the host",
}
#: The file that tools/ptxsim/notice.py reads once it is committed in that folder.
REPORT = "compared_with_gpu.json"


def environment() -> dict[str, str]:
    try:
        nvcc = Path(find_nvcc(os.environ).path)
    except BuildError as error:
        pytest.skip(f"the simulator cannot be built: {error}")
    home = nvcc.resolve().parent.parent
    found = (home / "include" / "cuda_runtime_api.h").is_file()
    return {**os.environ, **({"CUDA_HOME": str(home)} if found else {})}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases that the simulator's instruction tests ran in their own process, one per line."""
    path = tmp_path_factory.mktemp("simulator") / "record.jsonl"
    variables = {**environment(), "PTXSIM_RECORD": str(path)}
    tests = sorted(map(str, TESTS.glob("test_isa*.py")))
    options = ["-v", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = set(re.findall(r"::(\w+)(?:\[.*\])? PASSED", done.stdout))
    recorded = {re.split(r"::|\[", case["test"])[1] for case in cases_of(path)}
    assert passed - recorded == set(NOT_COMPARED), "a test that runs no kernel needs a reason"
    return path


def cases_of(path: Path) -> list[Case]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def replay(path: Path, *options: str, simulated: bool) -> subprocess.CompletedProcess[str]:
    """Runs the cases on the GPU, or on the simulator instead."""
    launcher = [str(LAUNCHER), "--arch", "sm_90", "--"] if simulated else []
    command = [*launcher, sys.executable, str(TESTS / "replay.py"), str(path), *options]
    # Without the limit, the simulator would report an endless loop instead of hanging as a GPU
    # does.
    variables = {**environment(), "PTXSIM_SPIN_LIMIT": str(10**15)}
    return subprocess.run(command, capture_output=True, text=True, env=variables)


@pytest.mark.cuda
@pytest.mark.simulator
def test_the_gpu_gives_the_same_bits(record: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    report = tmp_path / REPORT
    done = replay(record, "--report", str(report), simulated=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    if "OUT" in os.environ:  # benchmarks/run_on_gpu.sh brings it back
        shutil.copy(report, Path(os.environ["OUT"]) / REPORT)


@pytest.mark.simulator
def test_the_replay_on_the_simulator_agrees_with_the_record(record: Path, tmp_path: Path) -> None:
    report = tmp_path / REPORT
    done = replay(record, "--report", str(report), simulated=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    said, count = json.loads(report.read_text()), len(cases_of(record))
    assert count >= 200
    assert said["cases"] == count and said["different"] == said["not available"] == []
    assert said["same"] + len(said["approximate"]) == count
    assert len(said["approximate"]) == 7
    assert said["device"]["name"] == "ptxsim sm_90" and len(said["sources_sha256"]) == 64


@pytest.mark.simulator
def test_every_recorded_kernel_assembles(record: Path, tmp_path: Path) -> None:
    """A GPU's driver assembles PTX as ptxas does, but the simulator's parser accepts more."""
    environment()
    ptxas = Path(find_nvcc(os.environ).path).resolve().with_name("ptxas")

    def errors(numbered: tuple[int, Case]) -> str:
        number, case = numbered
        source = tmp_path / f"{number}.ptx"
        source.write_text(case["ptx"])
        command = [str(ptxas), "-arch=sm_90a", "-O0", "-o", os.devnull, str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        return (
            "" if done.returncode == 0 else f"{case['test']}: {case['instruction']}: {done.stderr}"
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = pool.map(errors, enumerate(cases_of(record)))
        assert [text for text in said if text] == []


def only(record: Path, *instructions: str) -> list[Case]:
    """The first recorded case of each instruction that starts with one of these texts."""
    cases = cases_of(record)
    return [next(c for c in cases if c["instruction"].startswith(text)) for text in instructions]


def write(path: Path, cases: Sequence[Case]) -> Path:
    path.write_text("".join(json.dumps(case) + "\n" for case in cases))
    return path


def plant(case: Case, element: int, change: Callable[[int], int]) -> int:
    """Changes one 32-bit element of the recorded result and returns the new value."""
    data = bytearray(base64.b64decode(case["outputs"][0]["data"]))
    place = slice(4 * element, 4 * element + 4)
    value = change(int.from_bytes(data[place], "little"))
    data[place] = value.to_bytes(4, "little")
    case["outputs"][0]["data"] = base64.b64encode(data).decode()
    return value


@pytest.mark.simulator
def test_one_wrong_bit_is_reported(record: Path, tmp_path: Path) -> None:
    cases = only(record, "add.s32 o0, i0, i1;", "xor.b32 ")
    planted = plant(cases[0], 17, lambda value: value ^ 4)
    done = replay(write(tmp_path / "cases", cases), simulated=True)
    assert done.returncode == 1
    assert "1 same, 0 approximate, 0 not available, 1 different" in done.stdout
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("different:")]
    assert "test_int[add.s32" in line and "1 of 128 differ" in line
    assert (
        f"o0[17]: simulator {planted} ({planted:#x}), GPU {planted ^ 4} ({planted ^ 4:#x})" in line
    )


@pytest.mark.simulator
def test_bounds_hold_for_approximate_functions_only(record: Path, tmp_path: Path) -> None:
    """PTX allows an error of 1 ulp for rcp.approx but not 4 ulp; rcp.rn is exact."""
    for instruction, ulps, status in (
        ("rcp.approx.f32 ", 1, 0),
        ("rcp.approx.f32 ", 4, 1),
        ("rcp.rn.f32 ", 1, 1),
    ):
        cases = only(record, instruction)
        plant(cases[0], 2, lambda value, ulps=ulps: value + ulps)
        done = replay(write(tmp_path / "cases", cases), simulated=True)
        assert done.returncode == status, (instruction, ulps, done.stdout, done.stderr[-2000:])


@pytest.mark.simulator
def test_results_of_division_by_zero_are_not_compared(record: Path, tmp_path: Path) -> None:
    (case,) = only(record, "div.u32 ")
    divisors = torch.frombuffer(
        bytearray(base64.b64decode(case["inputs"][1]["data"])), dtype=torch.int32
    )
    for zero, status in ((True, 0), (False, 1)):
        (case,) = only(record, "div.u32 ")
        plant(case, int(torch.nonzero((divisors == 0) == zero)[0]), lambda value: value ^ 1)
        done = replay(write(tmp_path / "cases", [case]), simulated=True)
        assert done.returncode == status, done.stdout + done.stderr[-2000:]


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("body", "sentence"),
    [("L: bra L;", "no result after 2 s"), ("trap;", "cuLaunchKernel returned CUDA error 719")],
    ids=["hang", "trap"],
)
def test_a_failing_kernel_fails_only_its_own_case(
    record: Path, tmp_path: Path, body: str, sentence: str
) -> None:
    before, broken, after = only(record, "add.s32 ", "xor.b32 ", "and.b32 ")
    broken["ptx"] = broken["ptx"].replace(broken["instruction"], body)
    path = write(tmp_path / "cases", [before, broken, after])
    done = replay(path, "--seconds", "2", simulated=True)
    assert done.returncode == 1
    assert "2 same, 0 approximate, 0 not available, 1 different" in done.stdout, done.stderr
    assert f"xor.b32 o0, i0, i1;: {sentence}" in done.stdout
