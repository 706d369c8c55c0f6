"""benchmarks/run_on_gpu.sh on a machine whose GPU and Python are fakes: what is called, in which order, with what."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.benchmarks.programs import Done, run
from tests.benchmarks.test_gpu_script import needs_bash, words_of
from tools.build.plan import ROOT

FAKE_PYTHON = """#!{python}
import os, sys
arguments = sys.argv[1:]
with open(os.environ["FAKE_LOG"], "a") as log:
    facts = [os.environ.get("SQK_RUN_STAGE", "main"), os.environ.get("SQK_WITHOUT_TILES", "-")]
    print(*facts, *" ".join(arguments).split(), file=log)
if arguments[:1] == ["-c"] and "get_device_capability" in arguments[1]:
    print("9.0a" if "9.0a" in arguments[1] else "90")
elif arguments[:1] == ["-m"] and "install" in arguments and "--editable" in arguments:
    open("smoothquant_kernels/libsmoothquant_kernels.so", "w").close()
elif "benchmarks.on_gpu.first_light" in arguments:
    if "--without" in arguments:
        print("sm90/128x128x128,sm90/64x64x256-swap")
    elif "--producers" in arguments:
        print("quantize\\nact_quantize:silu")
    else:
        open(arguments[arguments.index("--json") + 1], "w").write("{{}}")
elif "benchmarks.on_gpu.tests" in arguments:
    print("FAILED tests/kernels/test_x.py::test_y (call)" if os.environ.get("FAKE_FAILURE") else "quiet")
    sys.exit(bool(os.environ.get("FAKE_FAILURE")))
elif "benchmarks.gemm" in arguments:
    file = arguments[arguments.index("--json") + 1]
    first = not os.path.exists(file)
    open(file, "w").close()
    sys.exit(75 if first else 0)
elif "--same" in arguments:
    sys.exit(int(os.environ.get("FAKE_OTHER_MACHINE", "0")))
elif "benchmarks.lib.gpu" in arguments:
    open(arguments[arguments.index("--json") + 1], "w").write("{{}}")
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A copy of what the script reads, and a Python that only writes down how it was called: a GPU is seen."""
    root = tmp_path / "tree"
    ignored = shutil.ignore_patterns("results", "__pycache__", "*.safetensors")
    for name in ("benchmarks", "tools", "csrc"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("smoothquant_kernels", "tests/kernels", "tests/gpu", "venv/bin"):
        (root / name).mkdir(parents=True)
    (root / "setup.py").touch()
    (root / "tests" / "gpu" / "test_simulator_truth.py").touch()
    python = root / "venv" / "bin" / "python"
    python.write_text(FAKE_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    return root


def on_machine(root: Path, *arguments: str, **env: str) -> tuple[Done, list[str]]:
    """The script's run, and the calls of Python: stage, SQK_WITHOUT_TILES, arguments."""
    log = root / "calls.txt"
    log.unlink(missing_ok=True)
    facts = {
        "OUT": str(root / "out"), "SQK_RESULTS": str(root / "results"), "SQK_VENV": str(root / "venv"),
        "PYTHON": str(root / "venv" / "bin" / "python"), "FAKE_LOG": str(log), "CUTLASS_PATH": str(root),
    }  # fmt: skip
    command = ["bash", str(root / "benchmarks" / "run_on_gpu.sh"), *arguments]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SQK_")}
    done = run(command, {**inherited, **facts, **env})
    return done, log.read_text().splitlines() if log.exists() else []


def calls_of(calls: list[str], program: str) -> list[str]:
    return [call for call in calls if f" benchmarks.{program} " in f"{call} "]


@needs_bash
def test_the_first_call_on_a_machine(machine: Path) -> None:
    """In the documented order; one build; broken tiles are left out by all that come after; no Triton yet."""
    done, calls = on_machine(machine)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (machine / "out" / "summary.txt").read_text()
    found = [line.split()[:2] for line in summary.splitlines()]
    assert found == [[name, "ok"] for name in words_of("FIRST")]
    builds = [call for call in calls if "--editable" in call]
    assert len(builds) == 1 and builds[0].startswith("build - ")
    (light,) = (c for c in calls_of(calls, "on_gpu.first_light") if "--json" in c)
    assert light.startswith("first_light - ") and "--device cuda" in light
    without = "sm90/128x128x128,sm90/64x64x256-swap"
    (tests,) = calls_of(calls, "on_gpu.tests")
    assert tests.startswith(f"tests {without} ")
    gemm = calls_of(calls, "gemm")
    # The first process loses its CUDA context; the second one goes on.
    assert len(gemm) == 2 and all(call.startswith(f"gemm {without} ") for call in gemm)
    assert all("--baselines fp16 bf16 int_mm fp8 vllm sgl" in call for call in gemm)
    assert not any("triton" in call for call in gemm)
    compiled, *_, probe = calls_of(calls, "prediction.probe")
    assert compiled.endswith("--compile 90") and probe.startswith("probe ") and "--json" in probe
    assert len(list((machine / "out").iterdir())) <= 8


@needs_bash
def test_failed_tests_are_printed_and_stop_no_other_stage(machine: Path) -> None:
    done, _ = on_machine(machine, "build", "tests", "report", FAKE_FAILURE="1")
    assert done.returncode == 1 and "FAILED tests/kernels/test_x.py::test_y" in done.stdout
    rows = [line.split()[:2] for line in (machine / "out" / "summary.txt").read_text().splitlines()]
    assert rows == [["setup", "ok"], ["build", "ok"], ["tests", "failed"], ["report", "ok"]]


@needs_bash
def test_a_later_call_goes_on_with_the_same_build(machine: Path) -> None:
    on_machine(machine)
    done, calls = on_machine(machine, "tune:330", "gemm:120", "quantize:60", "report")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [call for call in calls if "--editable" in call]
    (gemm,) = calls_of(calls, "gemm")
    assert "--baselines" not in gemm  # Triton too
    (quantize,) = calls_of(calls, "quantize")
    assert quantize.split("--producers ")[1].startswith("quantize act_quantize:silu ")
    assert "moved" not in done.stdout and "earlier results are" not in done.stdout


@needs_bash
def test_a_later_call_on_a_bare_machine_builds_first(machine: Path) -> None:
    on_machine(machine)
    (machine / "smoothquant_kernels" / "libsmoothquant_kernels.so").unlink()
    done, calls = on_machine(machine, "gemm")
    assert "build is added" in done.stdout and len([c for c in calls if "--editable" in c]) == 1
    # So does a source that has changed since; its results are another's.
    (machine / "csrc" / "common" / "status.cu").write_text("// changed\n")
    done, calls = on_machine(machine, "gemm")
    assert "build is added" in done.stdout and "the sources have changed" in done.stdout
    done, calls = on_machine(machine, "gemm")
    assert "build is added" not in done.stdout


@needs_bash
def test_results_of_another_machine_are_kept_apart(machine: Path) -> None:
    on_machine(machine)
    done, _ = on_machine(machine, "info", FAKE_OTHER_MACHINE="1")
    (before,) = machine.glob("results.before.*")
    assert f"this is another machine: earlier results are in {before}" in done.stdout
    assert (before / "gemm.json").exists() and not (machine / "results" / "gemm.json").exists()


@needs_bash
def test_the_archive_of_an_earlier_call_is_continued(machine: Path) -> None:
    on_machine(machine)
    packed = machine / "earlier.tar.gz"
    shutil.copy(machine / "out" / "results.tar.gz", packed)
    shutil.rmtree(machine / "results")
    done, calls = on_machine(machine, "gemm", SQK_CONTINUE=str(packed))
    assert "earlier results are" not in done.stdout
    assert "--baselines" not in calls_of(calls, "gemm")[0]


@needs_bash
def test_tiles_that_the_user_leaves_out_stay_out(machine: Path) -> None:
    _, calls = on_machine(machine, "first_light", "gemm", SQK_WITHOUT_TILES="sm90/stream-8x16")
    stages = dict(call.split(" ")[:2] for call in calls)
    assert stages["gemm"] == "sm90/stream-8x16,sm90/128x128x128,sm90/64x64x256-swap"
