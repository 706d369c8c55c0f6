"""benchmarks/host_time.py: sound lines, as many launches as promised, and no memory leak."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import host_time
from tests.support import null_runtime

pytestmark = [pytest.mark.simulator, pytest.mark.xdist_group("host_time")]

#: Bytes that the heap grows by for each call: what malloc hands out and does not get back.
LEAKS = """
import ctypes, gc, pathlib, sys, tempfile
import torch
from benchmarks import host_time
from smoothquant_kernels import ops
from tests.support import null_runtime

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
with tempfile.TemporaryDirectory() as folder:
    null_runtime.load(pathlib.Path(sys.argv[1]), pathlib.Path(folder))
cases = list(host_time.make_cases(1, 64, 64, "fp16"))
x = torch.randn(4, 64)
calls = {case.op: case.call for case in cases}
calls["rms_norm_quantize"] = lambda: ops.rms_norm_quantize(x, x[0], 1e-6)
calls["layer_norm_quantize"] = lambda: ops.layer_norm_quantize(x, None, None, 1e-6, residual=x)
calls["act_quantize"] = lambda: ops.act_quantize(x, "silu_mul")
with torch.no_grad():
    for name, call in calls.items():
        for _ in range(200):
            call()
        gc.collect()
        before = libc.mallinfo2().h
        for _ in range(2000):
            call()
        gc.collect()
        print(name.replace(" ", ""), (libc.mallinfo2().h - before) / 2000)
"""


def test_lines_and_launches(null_library: Path, tmp_path: Path) -> None:
    said = null_runtime.python(
        *("-m", "benchmarks.host_time", "--library", str(null_library)),
        *("--json", str(tmp_path / "h.json")),
        *("--tokens", "1", "64", "--n", "64", "--k", "64", "--seconds", "0.1"),
        *("--layers", "small", "--layer-tokens", "1", "64", "512"),
    )
    rows = json.loads((tmp_path / "h.json").read_text())["rows"]
    launches = {(r["op"], r["M"], r["gpu"]): r["calls"]["launches"] for r in rows}
    for gpu in host_time.GPUS:
        assert launches["_saturate_s8", 1, gpu] == 1
        for m, layer in ((1, 1), (64, 2)):  # a token: quantized by the GEMM's own launch
            assert launches["quantize", m, gpu] == launches["gemm_s8", m, gpu] == 1
            assert launches["quantize, gemm_s8", m, gpu] == 2
            assert launches["linear_s8", m, gpu] == launches["W8A8Linear", m, gpu] == layer
            assert launches["linear_s8 with residual", m, gpu] == layer
            assert launches["fused_linear_s8", m, gpu] == 2
            assert launches["gemm_s8_gated", m, gpu] == 1
    assert len(rows) == len(launches) == len(host_time.GPUS) * (1 + 2 * 8 + 3 * 2)
    layers = {(r["op"], r["M"], r["gpu"]): r for r in rows if r["op"].startswith("layer")}
    for gpu in host_time.GPUS:
        for m, fused, unfused in ((1, 7, 7), (64, 8, 14), (512, 8, 14)):
            # 4 GEMMs, 3 producers and attention's output, which the GEMM of a token quantizes; against 7 layers.
            assert launches["layer small fused", m, gpu] == fused
            assert launches["layer small unfused", m, gpu] == unfused
            of_torch = [layers[f"layer small {v}", m, gpu]["torch"] for v in ("fused", "unfused")]
            # Attention, and the rotary positions of q and k; norms, activation and residuals are in the producers.
            assert sum(of_torch[0].values()) == 11 and sum(of_torch[1].values()) == 31
            assert {"silu", "rsqrt"} <= of_torch[1].keys() and not {"silu", "rsqrt"} & of_torch[
                0
            ].keys()
        assert f"layer small fused M 1 {gpu}: " in said
    for row in rows:
        # Tickets reset themselves; only a gated GEMM needs a memset, of y_scale.
        assert row["calls"]["clears"] == int(row["op"] == "gemm_s8_gated")
        if not row["op"].startswith("layer") or row["M"] <= host_time.MOST_TIMED:
            assert row["us"] > 0 and row["rounds"] >= 5
        assert row["calls"]["attributes"] == 0, "what a GPU is like is asked for once"
        if not row["op"].startswith("layer"):
            assert row["calls"]["tensor_maps"] in ((0, 2) if row["gpu"] == "h100" else (0,))
        assert any(
            line.startswith(f"{row['op']} ") and f"M {row['M']:4d} " in line and row["gpu"] in line
            for line in said.splitlines()
        )


def test_no_call_loses_memory(null_library: Path) -> None:
    said = null_runtime.python("-c", LEAKS, str(null_library))
    lost = {line.split()[0]: float(line.split()[1]) for line in said.splitlines()}
    assert len(lost) == 11
    assert all(bytes_per_call < 8 for bytes_per_call in lost.values()), lost


def test_what_is_missing_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    with pytest.raises(null_runtime.Missing, match="a C compiler is needed"):
        null_runtime.compiled(tmp_path)
