"""Layers on a CPU: nothing wrong is timed, who is absent is named, instructions can be kept from a process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from benchmarks import linear as bench
from benchmarks.lib import cpu_isa, cpu_linear, cpu_peers, cpu_worker
from benchmarks.lib.cpu_peers import VARIANTS, Made
from benchmarks.lib.cpu_worker import PeerFailed, Setup, Worker
from benchmarks.lib.runner import WrongResult
from tests.benchmarks.programs import python

OURS = ("int8", "before", "float32", "bfloat16")
OTHERS = [name for name in VARIANTS if name not in OURS]
TOY = ["--device", "cpu", "--shapes", "96x64", "--seconds", "0"]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("compiler") is None:
        monkeypatch.setattr(cpu_isa, "build_chain", lambda: None)


@contextmanager
def worker(name: str, program: str = sys.executable, **setup: Any) -> Iterator[Worker]:
    with Worker(name, program, Setup(**setup), {}, None) as started:
        yield started


def program(folder: Path, *lines: str) -> str:
    """An executable that stands for a Python."""
    file = folder / "python"
    file.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    file.chmod(0o755)
    return str(file)


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_cpu_form(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "linear.json"
    command = [*TOY, "--tokens", "1", "17", "--json", str(file), "--variants", *OURS]
    assert bench.run(bench.parse(command)) == 0
    data = json.loads(file.read_text())
    assert [(row["N"], row["K"], row["M"]) for row in data["rows"]] == [(96, 64, 1), (96, 64, 17)]
    for row in data["rows"]:
        assert row["rounds"] >= 5 and row["copies"] == cpu_worker.MOST_COPIES
        assert row["gops"] == pytest.approx(2 * 96 * 64 * row["M"] / row["int8_us"] / 1e3)
        assert all(row[f"{name}_us"] > 0 and row[f"vs_{name}"] > 0 for name in OURS[1:])
        assert row["int8_error"] == row["before_error"] < 0.05
        assert row["float32_error"] < 1e-5 < row["bfloat16_error"] < row["int8_error"]
        assert "best_peer" not in row and "ghz" not in row
    machine = data["machine"]
    assert machine["int8_mode"] == machine["levels"]["int8"] and machine["isa"] == "native"
    assert set(machine["peers"]) == set(OURS) and machine["missing"] == {}
    assert set(data["geomeans"]) == {"small, M = 1", "small, M >= 16", "all"}
    assert "geometric mean, all, 2 cases: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "lines, reason",
    [
        (['echo \'{"missing": "onnxruntime is not installed"}\''], "onnxruntime is not installed"),
        (["echo first >&2", "echo no such thing >&2", "exit 3"], "ended with 3: no such thing"),
        (None, "No such file or directory"),
    ],
)
def test_who_is_absent_is_named_once_and_the_rest_is_timed(
    lines: list[str] | None, reason: str, tmp_path: Path, capsys: Any
) -> None:
    other = program(tmp_path, *lines) if lines is not None else str(tmp_path / "nothing")
    command = [*TOY, "--tokens", "1", "2", "--variants", "onnxruntime", "--python", f"onnxruntime={other}"]  # fmt: skip
    assert bench.run(bench.parse([*command, "--json", str(tmp_path / "a.json")])) == 0
    assert capsys.readouterr().out.count("without onnxruntime: ") == 1
    data = json.loads((tmp_path / "a.json").read_text())
    assert reason in data["machine"]["missing"]["onnxruntime"]
    assert len(data["rows"]) == 2 and all("onnxruntime_us" not in row for row in data["rows"])


def test_options_are_checked(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        bench.parse([*TOY, "--python", "numpy=/usr/bin/python"])
    assert "--python NAME=PATH" in capsys.readouterr().err
    args = bench.parse([*TOY, "--variants", "float32"])
    assert args.variants == ["int8", "float32"] and args.shapes == [(96, 64)]


def fake_turns(us: dict[str, list[float]], ghz: float) -> dict[str, list[cpu_worker.Reply]]:
    more = {"int8": {"ghz": ghz}}
    return {name: [{"us": v} | more.get(name, {}) for v in values] for name, values in us.items()}


def test_columns_say_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    us = {"int8": [10.0, 20.0, 30.0], "float32": [40.0] * 3, "onnxruntime": [5.0, 30.0, 45.0],
          "vllm": [24.0] * 3, "vllm_bfloat16": [1.0] * 3}  # fmt: skip
    monkeypatch.setattr(cpu_worker, "interleaved", lambda *_: fake_turns(us, 2.5))
    row = cpu_linear.measure(("up", 1536, 576, 16), [], "avx512_vnni", 1.0)
    assert (row["int8_us"], row["rounds"], row["float32_us"]) == (20.0, 3, 40.0)
    assert row["vs_onnxruntime"] == 1.5  # the median of ratios, not of times
    assert row["macs_per_clock"] == pytest.approx(1536 * 576 * 16 / (20.0 * 2500))
    assert row["peak_share"] == pytest.approx(row["macs_per_clock"] / 128)
    # bfloat16 in and out is another job
    assert (row["best_peer"], row["best_peer_us"], row["vs_best_peer"]) == ("vllm", 24.0, 1.2)
    assert "2.50 GHz" in cpu_linear.line(row) and "1.50x onnxruntime" in cpu_linear.line(row)
    assert cpu_linear.means([row])["small, M >= 16"]["onnxruntime"] == 1.5
    split = cpu_linear.measure(("up", 1536, 576, 16), [], "split", 1.0)
    assert "macs_per_clock" in split and "peak_share" not in split


# --- the processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_others_compute_the_product(name: str, request: pytest.FixtureRequest) -> None:
    if name == "torchao_compiled":
        pytest.skip("torchao_compiled: it starts a compiler")
    with worker(name) as started:
        first = started.receive()
        if "missing" in first:
            pytest.skip(f"{name}: {first['missing']}")
        assert first["versions"]
        for m in (1, 5):
            started.send(n=96, k=64, m=m, copies=2)
            answer = started.receive()
            assert 1e-3 < answer["error"] < 0.05, answer
            started.send()
            assert started.receive()["us"] > 0


def test_a_process_survives_what_it_cannot_do() -> None:
    with worker("float32") as started:
        assert "torch" in started.receive()["versions"]
        started.send(n=8, k=-1, m=1, copies=1)
        assert "failed" in started.receive()
        started.send(n=8, k=8, m=1, copies=1)
        assert "error" in started.receive()


def test_a_process_that_hangs_is_given_up(tmp_path: Path) -> None:
    with worker("float32", program(tmp_path, "exec sleep 60")) as started:
        with pytest.raises(PeerFailed, match="float32 did not answer within 0 s"):
            started.receive(patience=0.05)
        started.process.kill()


def numpy_layer(changed: Any) -> Made:
    def layer(w: cpu_peers.Floats, x: cpu_peers.Floats) -> Any:
        return lambda: changed(x @ w.T)

    return Made(layer)


@pytest.mark.parametrize(
    "changed, wrong",
    [
        (lambda y: y, ""),
        (lambda y: y * 1.04, ""),
        (lambda y: y * 1.06, "relative error 0.06"),
        (lambda y: y[:, :-1], "relative error nan"),
        (lambda y: y * np.nan, "relative error nan"),
        (lambda y: np.concatenate([y[:-1], y[:1]]), "relative error"),  # the last row
    ],
)
def test_what_is_wrong_is_not_timed(changed: Any, wrong: str) -> None:
    answer = cpu_worker.Served("torchao", numpy_layer(changed)).load(24, 16, 40, 1)
    assert answer.get("wrong", "")[: len(wrong)] == wrong and ("error" in answer) == (not wrong)


def test_this_packages_layer_must_equal_the_specification() -> None:
    def exact(w: Any, x: Any, rows: list[int]) -> Any:
        return (x @ w.T)[rows]

    made = replace(numpy_layer(lambda y: y), exact=exact)
    assert "error" in cpu_worker.Served("int8", made).load(24, 16, 3, 2)
    one_bit = replace(numpy_layer(lambda y: np.nextafter(y, np.float32(9))), exact=exact)
    answer = cpu_worker.Served("int8", one_bit).load(24, 16, 3, 2)
    assert answer == {"wrong": "the result is not the specification's"}


class Fake:
    asked: ClassVar[list[str]] = []

    def __init__(self, name: str, answer: dict[str, Any]) -> None:
        self.name, self.answer = name, answer

    def send(self, **_: Any) -> None:
        self.asked.append(self.name)

    def receive(self) -> dict[str, Any]:
        return self.answer


def test_a_wrong_peer_is_left_out_and_a_wrong_layer_ends_the_case(capsys: Any) -> None:
    row = cpu_linear.key_of(("up", 96, 64, 1)) | {"copies": 1}
    right, wrong = Fake("int8", {"error": 0.01}), Fake("vllm", {"wrong": "relative error 1"})
    some: Any = [right, wrong]
    assert cpu_linear.loaded(some, row) == [right]
    assert (row["int8_error"], row["vllm_missing"]) == (0.01, "relative error 1")
    ours: Any = [Fake("int8", {"wrong": "not equal"})]
    with pytest.raises(WrongResult, match="not equal"):
        cpu_linear.loaded(ours, row)


def test_turns_alternate_and_keep_their_order_in_the_result() -> None:
    Fake.asked.clear()
    workers: Any = [Fake("int8", {"us": 1.0}), Fake("vllm", {"us": 2.0}), Fake("torchao", {"failed": "x"})]  # fmt: skip
    found = cpu_worker.interleaved(workers, 0.0)
    assert list(found) == ["int8", "vllm"] and found["vllm"] == [{"us": 2.0}] * 5
    there, back = ["int8", "vllm", "torchao"], ["torchao", "vllm", "int8"]
    assert Fake.asked == [*there, *there, *there, *back, *there, *back, *there]


def test_weights_exceed_the_cache() -> None:
    assert cpu_worker.copies_of(4096, 4096, 2 * 2**20) == 1
    assert cpu_worker.copies_of(1536, 576, 2 * 2**20) == 5  # 4 MiB of 0.84
    (w, x), (other, _) = (cpu_worker.operands(8, 16, 2, copy) for copy in (0, 1))
    assert w.shape == (8, 16) and x.shape == (2, 16) and not np.array_equal(w, other)
    assert np.array_equal(w, cpu_worker.operands(8, 16, 2, 0)[0])


@pytest.mark.parametrize("options", [{"smooth": True}, {"scheme": "static"}, {"scheme": "per_tensor"}])  # fmt: skip
def test_every_scheme_is_exact(options: dict[str, Any]) -> None:
    with worker("int8", **options) as started:
        assert started.receive()["level"]
        started.send(n=40, k=23, m=20, copies=1)
        assert "error" in started.receive()


# --- instructions and clocks ------------------------------------------------------------------------------------------


def test_a_command_runs_without_amx() -> None:
    show = "from benchmarks.lib import cpu_isa; print(cpu_isa.facts())"
    done = python("-m", "benchmarks.lib.cpu_isa", "avx512_vnni", sys.executable, "-c", show)
    assert done.returncode == 0, done.stderr
    assert "'ONEDNN_MAX_CPU_ISA': 'AVX512_CORE_VNNI'" in done.stdout
    assert "'amx_allowed': True" not in done.stdout
    assert ("'amx_allowed': False" in done.stdout) == ("amx_tile" in cpu_isa.flags())


def test_levels_need_a_switch(tmp_path: Path, capsys: Any) -> None:
    command = [*TOY, "--tokens", "1", "--isa", "avx2", "--variants", "onnxruntime"]
    assert bench.run(bench.parse([*command, "--json", str(tmp_path / "a.json")])) == 0
    assert "without onnxruntime: no switch keeps it to avx2" in capsys.readouterr().out
    machine = json.loads((tmp_path / "a.json").read_text())["machine"]
    assert machine["isa"] == "avx2" and machine["int8_mode"] not in ("amx", "vnni")


def test_a_level_reaches_the_compiled_kernels() -> None:
    assert "SMOOTHQUANT_KERNELS_CPU" not in cpu_isa.environment("avx2", native_kernels=False)
    assert cpu_isa.environment("avx2", native_kernels=True)["SMOOTHQUANT_KERNELS_CPU"] == "avx2"
    assert cpu_isa.environment("native", native_kernels=True) == {}


@pytest.mark.compiler
def test_the_clock_is_a_processors() -> None:
    library = cpu_isa.build_chain()
    if library is None:
        pytest.skip("needs a C compiler and x86")
    clock = cpu_isa.Clock(library)
    assert 0.3 < max(clock() for _ in range(9)) < 8
    subprocess.run(["rm", "-r", str(library.parent)], check=True)
