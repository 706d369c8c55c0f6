"""The state of the CPU library: what is loaded, what is refused and why, and the choice of a level."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from smoothquant_kernels import SmoothQuantError, ops, reference
from smoothquant_kernels.backends import cpu_choice, cpu_native, library, onednn
from smoothquant_kernels.ops import registry
from tests.support import backends, cases
from tests.support.compare import assert_all_bitwise_equal, assert_bitwise_equal

needs_library = pytest.mark.skipif(
    not cpu_native.cpu_status().available,
    reason=f"no CPU library: {cpu_native.cpu_status().reason}",
)


def in_a_process(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )


# ----------------------------------------------------------------------------------------- what is loaded


def fake_install(folder: Path, **changed: object) -> Path:
    file = folder / cpu_native.LIBRARY_NAME
    file.write_bytes(b"not a library")
    facts = {"levels": ["portable", "avx2"], "machine": platform.machine(), "bytes": 13}
    facts |= {"compiler": "g++ 12", "torch_target": "2.10", **changed}
    (folder / cpu_native.BUILD_INFO_NAME).write_text(json.dumps(facts))
    return folder


def test_no_library(tmp_path: Path) -> None:
    status, entries = cpu_native._load(tmp_path)
    assert not status.available and entries is None and status.levels == ()
    assert status.reason.startswith("the CPU library was not built; to build it: SMOOTHQUANT")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"torch_target": "99.1"}, "the CPU library needs torch 99.1 or newer, but this is"),
        ({"torch_target": ""}, "_build_info_cpu.json is missing or damaged"),
        ({"machine": "s390x"}, "the CPU library was built for s390x, but this is"),
        ({"bytes": 99}, "is damaged: it has 13 bytes, not 99"),
        ({}, "libsmoothquant_kernels_cpu.so does not load with torch"),
    ],
)
def test_a_library_that_does_not_fit_is_not_loaded(
    changed: dict[str, object], expected: str, tmp_path: Path
) -> None:
    status, entries = cpu_native._load(fake_install(tmp_path, **changed))
    assert not status.available and entries is None
    assert expected in status.reason and status.levels == ("portable", "avx2")
    assert "to build it again: SMOOTHQUANT_KERNELS_BUILD=cpu" in status.reason


def test_portable_code_alone_serves_only_if_asked_for(tmp_path: Path) -> None:
    """As on ARM, where oneDNN is faster."""
    folder = fake_install(tmp_path, levels=["portable"])
    status, entries = cpu_native._load(folder)
    assert not status.available and entries is None
    assert "SMOOTHQUANT_KERNELS_CPU=portable chooses it" in status.reason
    assert "does not load" in cpu_native._load(folder, "portable")[0].reason


def test_status_is_consistent() -> None:
    status = cpu_native.cpu_status()
    assert status.available == (status.reason == "") == bool(cpu_native.levels_here())
    assert registry.COMPILED == set(cpu_native.COMPILED_ON_CPU)
    assert (cpu_native.level() in cpu_native.levels_here()) == status.available


@needs_library
def test_the_level_may_change_while_others_compute() -> None:
    """A workspace that was sized for one level is large enough for every other."""
    x, w = torch.ones(100, 256), torch.ones(64, 256, dtype=torch.int8)
    scale = torch.full((64,), 0.5)
    w4 = torch.zeros(64, 128, dtype=torch.uint8), torch.ones(2, 64, 2, dtype=torch.int8)
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for name in cpu_native.levels_here():
                cpu_native.use_level(name)

    before = cpu_native.level()
    worker = threading.Thread(target=change)
    worker.start()
    try:
        for _ in range(3000):
            assert float(ops.linear_s8(x, w, scale)[0, 0]) == 128.0
            assert float(ops.linear_w4a8(x, *w4, scale)[0, 0]) == 128.0
    finally:
        done.set()
        worker.join()
        cpu_native.use_level(before)


@needs_library
@pytest.mark.parametrize("level", cpu_native.levels_here())
@pytest.mark.parametrize("flush", [False, True])
def test_every_16_bit_float_is_read_and_written(level: str, flush: bool) -> None:
    """A product of 0 leaves the residual. Also where the process treats subnormal float32 as 0."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16)
    zero, one = torch.zeros(256, 1, dtype=torch.int8), torch.ones(1)
    for dtype in (torch.float16, torch.bfloat16):
        residual = values.view(dtype).view(256, 256)
        wanted = residual.float() + 0.0
        if flush and dtype is torch.bfloat16:
            continue  # its subnormal numbers are float32's, which are 0 then
        torch.set_flush_denormal(flush)
        try:
            with backends.at_level(level):
                args = (zero, zero, one, one)
                y = ops.gemm_s8(*args, residual=residual, out_dtype=torch.float32)
                same = ops.gemm_s8(*args, residual=residual, out_dtype=dtype)
        finally:
            torch.set_flush_denormal(False)
        assert_bitwise_equal(y, wanted)
        assert_bitwise_equal(same, wanted.to(dtype))


@needs_library
@pytest.mark.parametrize("level", cpu_native.levels_here())
@pytest.mark.parametrize("n", [4112, 4100])
def test_a_float32_output_larger_than_the_caches(level: str, n: int) -> None:
    """17 MB. The level amx writes tiles of 16 aligned columns past the caches, and the others as usual."""
    gemm = cases.gemm_operands(1043, n, 33)
    arguments = (gemm.x_q, gemm.w_q, gemm.x_scale, gemm.w_scale)
    for residual in (None, gemm.residual):
        added = {"bias": gemm.bias, "residual": residual, "out_dtype": torch.float32}
        with backends.at_level(level):
            y = ops.gemm_s8(*arguments, **added)
        assert_bitwise_equal(y, reference.gemm_s8(*arguments, **added))


@needs_library
def test_the_ops_have_the_kernels_of_the_library() -> None:
    """One call of the dispatcher: neither the checks nor the kernels in Python run. The library replaces no kernel."""
    done = in_a_process(
        "import torch; from smoothquant_kernels import ops; from smoothquant_kernels.ops import registry\n"
        "registry._CPU_KERNELS.clear()\n"
        "one = torch.ones(1, 4); w = one.char(); s = one[0, :1]\n"
        "print(ops.linear_s8(one, w, s).item(), ops.gemm_s8(w, w, s, s).item(), ops.quantize(one)[0].tolist())\n"
        "print(ops.rms_norm_quantize(one, one[0], 0.0)[0].tolist(), ops.act_quantize(one, 'relu')[0].tolist())\n"
        "w4 = torch.full((1, 64), 0x11).byte(), torch.tensor([[[2, -1]]]).char()\n"
        "print(ops.linear_w4a8(one, *w4, s).item(), ops.gemm_w4a8(w, *w4, s, s).item())"
    )
    largest = "[[127, 127, 127, 127]]"
    assert done.stdout.splitlines() == [
        f"4.0 4.0 {largest}",
        f"{largest} {largest}",
        "4.0 4.0",
    ]
    assert not done.stderr, "torch warns of a kernel that replaces another"


@needs_library
@pytest.mark.parametrize("first", ["backends.cpu_native", "backends.onednn"])
def test_the_modules_can_be_imported_in_any_order(first: str) -> None:
    done = in_a_process(
        f"import smoothquant_kernels.{first}; from smoothquant_kernels.ops import registry; "
        "print(len(registry.COMPILED))"
    )
    assert done.stdout == f"{len(cpu_native.COMPILED_ON_CPU)}\n" and not done.stderr


# ------------------------------------------------------------------------------------- the environment's choice

WHO = (
    "from smoothquant_kernels.backends import cpu_native as c, onednn; from smoothquant_kernels.ops import registry; "
    "print(c.level(), len(registry.COMPILED), onednn.gemm_mode(), c.cpu_status().reason)"
)


@pytest.mark.parametrize("choice", ["onednn", "onednn_float"])
def test_the_environment_chooses_onednn(choice: str) -> None:
    said = in_a_process(WHO, SMOOTHQUANT_KERNELS_CPU=choice).stdout.split()
    assert said[0] == "0" and said[2:] == [f"SMOOTHQUANT_KERNELS_CPU={choice}", "chooses", "oneDNN"]
    assert said[1] == choice if choice in onednn.MODES else said[1] in onednn.MODES


@needs_library
def test_the_environment_chooses_a_level() -> None:
    said = in_a_process(WHO, SMOOTHQUANT_KERNELS_CPU="portable").stdout
    assert said.split()[0] == "portable"


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ("fast", "SMOOTHQUANT_KERNELS_CPU must be one of auto, amx, avx512_vnni, .*; got 'fast'."),
        ("vnni", "SMOOTHQUANT_KERNELS_CPU must be one of auto, .*, onednn_float; got 'vnni'."),
    ],
)
def test_an_unknown_choice_is_refused(
    choice: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu_choice.VARIABLE, choice)
    with pytest.raises(SmoothQuantError, match=sentence):
        cpu_choice.wanted()


def test_a_level_that_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setattr(cpu_native, "_status", cpu_native.cpu_status())
    monkeypatch.setattr(cpu_native, "_entries", None)
    monkeypatch.setenv(cpu_choice.VARIABLE, "avx2")
    sentence = (
        "SMOOTHQUANT_KERNELS_CPU=avx2: there is no level to choose: the CPU library was not built"
    )
    with pytest.raises(SmoothQuantError, match=sentence):
        cpu_native._serve()


class Entries:
    """The C entries of a library on a processor with AVX2."""

    def sqk_cpu_has_level(self, level: int) -> int:
        return int(level < 2)

    def sqk_cpu_use_level(self, level: int) -> int:
        return int(level > 1)


@pytest.mark.parametrize(
    ("level", "cause"),
    [
        ("amx", "this processor lacks its instructions; it can use portable, avx2."),
        ("avx_vnni", "the CPU library was built without it, by g.. 9; it can use portable, avx2."),
    ],
)
def test_a_missing_level_is_explained(
    level: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = cpu_native.CpuStatus(True, "", ("portable", "avx2", "amx"), "g++ 9", "2.10")
    monkeypatch.setattr(cpu_native, "_status", status)
    monkeypatch.setattr(cpu_native, "_entries", Entries())
    cpu_native.use_level("avx2")
    with pytest.raises(SmoothQuantError, match=f"the level {level} cannot be used: {cause}"):
        cpu_native.use_level(level)
    with pytest.raises(SmoothQuantError, match=r"level must be one of portable, .*; got 'sse'"):
        cpu_native.use_level("sse")


# ------------------------------------------------------------------------------------------------ at run time


@needs_library
def test_the_kernels_in_python_take_turns_with_the_compiled_ones() -> None:
    x, op = cases.activations(5, 40), cases.gemm_operands(5, 7, 40)

    def results() -> list[torch.Tensor]:
        return [
            *ops.quantize(x),
            ops.gemm_s8(*op[:4], bias=op.bias),
            ops.linear_s8(x, op.w_q, op.w_scale),
        ]

    expected, before = results(), set(registry.COMPILED)
    with backends.kernels_in_python():
        assert not registry.COMPILED
        assert_all_bitwise_equal(results(), expected)
    assert registry.COMPILED == before
    assert_all_bitwise_equal(results(), expected)


@needs_library
def test_several_threads_and_any_number_of_torchs_threads() -> None:
    """Each Python thread has workspaces of its own, below and above the size that a thread keeps."""
    layers = [cases.gemm_operands(m, 65, k) for m, k in ((1, 16), (3, 1000), (700, 2000))]
    xs = [cases.activations(len(op.x_scale), op.w_q.shape[1]) for op in layers]
    expected = [ops.linear_s8(x, op.w_q, op.w_scale) for x, op in zip(xs, layers, strict=True)]
    wrong: list[str] = []

    def work(number: int) -> None:
        for i in range(30):
            case = (number + i) % len(layers)
            found = ops.linear_s8(xs[case], layers[case].w_q, layers[case].w_scale)
            if not torch.equal(found, expected[case]):
                wrong.append(f"thread {number}, call {i}")

    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    finally:
        torch.set_num_threads(threads)
    assert not wrong


@needs_library
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_weights_are_used_in_place_at_any_alignment(offset: int) -> None:
    n, k = 33, 61
    memory = torch.zeros(offset + n * (k + 2), dtype=torch.int8)
    op = cases.gemm_operands(4, n, k)
    w_q = memory.as_strided((n, k), (k + 2, 1), offset)
    w_q.copy_(op.w_q)
    expected = ops.gemm_s8(*op[:4])
    assert_bitwise_equal(ops.gemm_s8(op.x_q, w_q, op.x_scale, op.w_scale), expected)
