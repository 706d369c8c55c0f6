"""benchmarks/run_on_gpu.sh, rehearsed without a GPU: stages, files, what is continued. No test looks at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.lib.producers import PRODUCERS
from tests.benchmarks.programs import Done, python, run, simulated
from tests.support import simulator
from tools.build.plan import CUTLASS_PYPI, ROOT

SCRIPT = ROOT / "benchmarks" / "run_on_gpu.sh"

needs_bash = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("timeout") is None,
    reason="the kit runs on Linux, with bash and coreutils",
)


def kit(folder: Path, *arguments: str, **env: str) -> Done:
    facts = {
        "OUT": str(folder / "out"),
        "SQK_RESULTS": str(folder / "results"),
        "SQK_VENV": str(folder / "venv"),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "CUTLASS_PATH": str(folder),  # what is not compiled needs none
        "SQK_REHEARSE_TORCH": "",  # the headers of another torch would come from the network
    }
    return run(["bash", str(SCRIPT), *arguments], {**os.environ, **facts, **env})


@needs_bash
@pytest.mark.slow
def test_a_failing_stage_stops_no_other(tmp_path: Path) -> None:
    chosen = "setup:200 tune:300 linear:230 gemm:300 quantize:300 build:100 info:100".split()
    done = kit(
        tmp_path, "--dry-run", *chosen, SMOOTHQUANT_KERNELS_BUILD="nonsense", SQK_SECONDS="3000"
    )
    out, results = tmp_path / "out", tmp_path / "results"
    summary = (out / "summary.txt").read_text()
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.endswith(summary)
    assert "WITHOUT A GPU" in summary.splitlines()[0]
    rows = [line.split() for line in summary.splitlines()[1:]]
    stages = ["setup", "info", "build", "gemm", "quantize", "tune", "linear"]
    assert [row[0] for row in rows] == stages
    assert [row[1] for row in rows] == ["failed" if name == "build" else "ok" for name in stages]
    assert "== linear (at most 230 s)" in done.stdout and "== tune (at most 300 s)" in done.stdout
    assert "SMOOTHQUANT_KERNELS_BUILD=nonsense is not one of" in done.stdout
    assert {path.name for path in out.iterdir()} == {"summary.txt", "run.log", "results.tar.gz"}
    with tarfile.open(out / "results.tar.gz") as packed:
        names = {name.removeprefix("./") for name in packed.getnames()}
    files = ("info", "gemm", "quantize", "linear", "tune")
    assert names >= {f"{name}.json" for name in files}
    found = {name: json.loads((results / f"{name}.json").read_text()) for name in files}
    assert {row["producer"] for row in found["quantize"]["rows"]} == set(PRODUCERS)
    assert len(found["tune"]["results"]) == 6
    assert len(found["linear"]["rows"]) == 6 * 6
    assert "rehearsal" in found["info"]["device"]
    log = (out / "run.log").read_text()
    assert "geomean all" in log and "constexpr RuleRow kToyRules[]" in log


@needs_bash
@pytest.mark.slow
@pytest.mark.in_turn
def test_a_whole_rehearsal_writes_every_file_and_a_second_one_continues_it(tmp_path: Path) -> None:
    names = (
        "gemm",
        "quantize",
        "tune",
        "linear",
        "block",
        "model",
        "attention",
        "experts",
        "report",
        "sanitizer",
    )
    first = ("setup", "info", "build", "first_light", "tests", "probe")
    limits = [f"{name}:300" for name in (*first, *names)]
    done = kit(tmp_path, "--dry-run", *limits, SQK_SECONDS="6000")  # the machine may be slow
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    tools = [line.split()[4] for line in done.stdout.splitlines() if line.startswith("would run")]
    assert tools == ["memcheck", "racecheck", "initcheck", "synccheck"]
    results = tmp_path / "results"
    for name in ("gemm", "quantize", "linear", "block", "model", "attention", "experts"):
        rows = json.loads((results / f"{name}.json").read_text())["rows"]
        assert rows and not any("failed" in row or "wrong" in row for row in rows)
    light = json.loads((results / "first_light.json").read_text())["rows"]
    assert {row["status"] for row in light} == {"ok"} and len(light) == 3 + len(PRODUCERS) + 2
    written = {"report.md", "report.txt", *(f"{n}.csv" for n in names[:2] + names[3:7])}
    assert {path.name for path in (results / "report").iterdir()} >= written
    packed = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"summary.txt", "run.log", "results.tar.gz"} <= packed and len(packed) <= 8
    before = (results / "gemm.json").read_text()
    again = kit(tmp_path, "--dry-run", "gemm")
    assert again.returncode == 0 and "0 are left" in again.stdout
    assert json.loads((results / "gemm.json").read_text())["rows"] == json.loads(before)["rows"]


@needs_bash
def test_results_of_other_sources_are_kept_apart(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "sources").write_text("of another checkout\n")
    (results / "gemm.json").write_text("{}")
    done = kit(tmp_path, "--dry-run", "info")
    assert done.returncode == 0, done.stdout + done.stderr
    (before,) = tmp_path.glob("results.before.*")
    assert f"the sources have changed: earlier results are in {before}" in done.stdout
    assert (before / "gemm.json").read_text() == "{}" and not (results / "gemm.json").exists()
    assert (results / "info.json").exists()


@needs_bash
@pytest.mark.parametrize("word", ["fly", "gemm:", "gemm:soon", "gemm:1:2"])
def test_an_unknown_stage_is_refused_before_anything_runs(tmp_path: Path, word: str) -> None:
    done = kit(tmp_path, "--dry-run", "info", word)
    assert done.returncode == 2
    assert done.stderr == (
        f"There is no stage '{word}'; the stages are: "
        "setup info truth build first_light tests gemm probe quantize attention experts tune linear block model report "
        "sanitizer; with :SECONDS, if wanted.\n"
    )
    assert not list(tmp_path.iterdir())


def words_of(array: str) -> dict[str, str]:
    """Name -> seconds or an empty text, of a list of the script."""
    (words,) = re.findall(rf"^{array}=\((.*?)\)$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    return {name: seconds for name, _, seconds in (word.partition(":") for word in words.split())}


def documented_calls() -> list[dict[str, int]]:
    """Of docs/guides/gpu.md: name -> seconds, with defaults filled in and `setup`, which always runs."""
    usual = words_of("STAGES")
    text = (ROOT / "docs" / "guides" / "gpu.md").read_text()
    found = []
    calls = r"^ +benchmarks/run_on_gpu\.sh (setup .*|tune:.*|block:.*)$"
    for line in re.findall(calls, text, re.MULTILINE):
        words = dict(word.partition(":")[::2] for word in line.split("#")[0].split())
        found.append({n: int(s or usual[n]) for n, s in {"setup": "", **words}.items()})
    return found


def test_the_documented_calls_leave_no_stage_without_time() -> None:
    """Each stage gets what is left, less half of the limits of those after it: none comes to nothing, even if every
    stage before it takes its whole limit."""
    calls = documented_calls()
    assert len(calls) == 3
    assert list(calls[0]) == list(words_of("FIRST")) and "report" in calls[1]
    for call in calls:
        order = [name for name in words_of("STAGES") if name in call]
        left = 570
        for place, name in enumerate(order):
            kept = sum(call[n] // 2 for n in order[place + 1 :] if n != "sanitizer")
            limit = min(call[name], left - kept)
            assert limit >= min(call[name] // 2, 60), (name, limit)
            assert limit <= 600
            left -= limit
        assert left >= 0


@needs_bash
def test_a_stage_leaves_time_to_those_after_it(tmp_path: Path) -> None:
    """Of 100 seconds `gemm` keeps 40 and `info` 20: `setup` may take 40 at most, whatever was asked for."""
    env = {"SQK_SECONDS": "100", "SQK_VENV": "/dev/null/no"}
    done = kit(tmp_path, "--dry-run", "setup:90", "info:40", "gemm:80", **env)
    assert re.search(r"== setup \(at most (3\d|40) s\)", done.stdout), done.stdout


@needs_bash
def test_without_time_no_stage_starts(tmp_path: Path) -> None:
    done = kit(tmp_path, "--dry-run", SQK_SECONDS="0")
    assert done.returncode == 1
    assert done.stdout.count("not started: no time left") == len(words_of("STAGES"))


@needs_bash
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_names_the_rehearsal(tmp_path: Path) -> None:
    done = kit(tmp_path, "info")
    assert done.returncode == 2 and "--dry-run" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_kit_asks_for_the_cutlass_of_the_build() -> None:
    lines = (ROOT / "benchmarks" / "on_gpu" / "requirements.txt").read_text().splitlines()
    assert CUTLASS_PYPI in lines


def test_without_nvcc_nothing_is_simulated(tmp_path: Path) -> None:
    command = ("-m", "benchmarks.on_gpu.simulated", "--", "-c", "print('run')")
    done = python(*command, CUDA_HOME=str(tmp_path))
    assert done.returncode == 77
    assert (
        "nothing is simulated: the kernels cannot be built for the simulator: nvcc" in done.stdout
    )
    assert "\nrun" not in done.stdout


@pytest.mark.simulator
@pytest.mark.slow
def test_the_gemm_benchmark_runs_the_real_tiles_in_the_simulator(tmp_path: Path) -> None:
    simulator.require()
    file = tmp_path / "gemm.json"
    options = ["-m", "benchmarks.gemm", "--device", "cpu", "--tiles", "--data", "random"]
    options += ["--seconds", "0", "--tokens", "5", "--baselines", "fp16", "--json", str(file)]
    done = simulated("sm_80", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 3
    for row in rows:
        # Of the A100's table, not of the toy one, whose middle tile is 16x32x64.
        names = set(row["tiles_us"])
        assert {"16x64x128", "128x128x64"} < names and "16x32x64" not in names
        assert row["tile"] in row["tiles_us"] and "tiles_wrong" not in row
