"""The static gates on compiled kernels: each one fails on a planted defect and passes good kernels."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.build import plan as build_plan
from tools.build.plan import ROOT
from tools.gates import kernel_gates, kernel_tables
from tools.gates.kernel_gates import GATES, Gate, GatesError, failures_of
from tools.gates.sass import Code, Kernel
from tools.gates.unpacking import Unpacking

ROW_NAME = "void sqk::row_kernel<{}, (sqk::Producer){}, (sqk::QuantizePath){}>(sqk::RowParams)"


APPEND = "void sqk::kv_append_kernel<__half, (bool)1>(sqk::AppendParams)"
WGMMA = "void sqk::wgmma_gemm_kernel<8, 128, 128, 128>(P)"
STREAM = "void sqk::stream_gemm_kernel<float, 1>(P)"
HOPPER = {"IGMMA": 4}
STREAMS: dict[str, Any] = {"counts": {"IMMA": 4}, "copies": {128: 8}}
DECODE = "void sqk::decode_attention_kernel<128, 8>(sqk::DecodeParams)"
BOTH = {"IMMA": 8, "HMMA": 8}
W4 = "void sqk::w4_mma_gemm_kernel<16, 64, 1, 4, 8>(sqk::W4MmaParams)"


def kernel(name: str = "void sqk::f<1>(int)", arch: str = "sm_80", **changed: object) -> Kernel:
    base = Kernel("_Z1f", name, arch, 32, 0, 0, 256, True, Code())
    return dataclasses.replace(base, **changed)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------- the gate table


def row(bits: int = 16, path: int = 2, **loads: int) -> Kernel:
    name = ROW_NAME.format("__half" if bits == 16 else "float", 0, path)
    widths = {int(width.strip("_")): number for width, number in loads.items()}
    return kernel(name, code=Code(loads=widths))


def w4_hopper(**changed: object) -> Kernel:
    """A good kernel of Hopper for weights of 4 bits, apart from what is changed."""
    good: dict[str, Any] = {
        "fresh_loads": 4,
        "early": {"UTMALDG": 3},
        "unpacking": Unpacking(48, 144),
    }
    code = Code(counts=HOPPER, overlaps=True, **{**good, **changed})
    name = "void sqk::w4_wgmma_gemm_kernel<sqk::W4WgmmaTile<16, 22, 1>>(sqk::W4WgmmaParams)"
    return kernel(name, "sm_90a", code=code)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (kernel(stack=16), "f<1> on sm_80: 16 bytes of stack frame; allowed: none."),
        (kernel(code=Code(local=2)), "2 loads and stores of local memory; allowed: none."),
        (kernel(registers=65, max_threads=1024), "65 registers x 1024 threads and 0 bytes of"),
        (kernel(registers=128, max_threads=1024, bounded=False), "assumed: it has no launch bounds"),
        (kernel(shared=100 * 1024), "do not fit sm_86; so a launch can fail"),
        # wide: 4 loads of x and 8 of the smoothing factors
        (row(_32=16, _128=8), "8x128 16x32 loads (instructions x bits), not 12x128 or more"),
        (row(32, _128=15), "15x128 loads (instructions x bits), not 16x128 or more"),
        (row(16, 3), "no loads (instructions x bits), not 18x128 or more"),
        (row(16, _128=12, _16=1), "1 loads of 16 bits; allowed: none."),
        # two inputs, cos and sin in three types, and the factors
        (kernel(APPEND, code=Code(loads={128: 11})), "11x128 loads (instructions x bits), not 12x128 or more"),
        (kernel(APPEND, code=Code(loads={128: 12, 16: 8})), "8 loads of 16 bits; allowed: none."),
        (
            kernel(APPEND, "sm_90a", code=Code(loads={128: 12}, overlaps=True, early={"LDG": 1})),
            "1 LDG can come before any wait; allowed: none.",
        ),
        # 16 tokens of 128 channels, of keys and of values
        (kernel(DECODE, code=Code(counts=BOTH, copies={128: 7})), "not 8x128 or more; a warp copies 16 tokens"),
        (kernel(DECODE, code=Code(counts={"IMMA": 8}, copies={128: 8})), "no HMMA; wanted"),
        (kernel(DECODE, code=Code(counts={"HMMA": 8}, copies={128: 8})), "no IMMA; wanted"),
        (
            kernel(DECODE, "sm_90a", code=Code(counts=BOTH, copies={128: 8}, overlaps=True)),
            "no load from L2 of what others write (LDG.STRONG.GPU); wanted: load_fresh",
        ),
        (kernel("gemm<int>(P)", "sm_90a", code=Code(counts={"IMMA": 4})), "no IGMMA; wanted"),
        (kernel("sqk::Gemm(P)", code=Code(counts={"IDP": 4})), "no IMMA; wanted"),
        (
            kernel("gemm(P)", "sm_90a", code=Code(counts={"IGMMA": 4}, waiting_igmma=4)),
            "each of 4 IGMMA is waited for",
        ),
        (
            kernel(
                "sqk::mma_gemm_kernel<256>(P)",
                code=Code(counts={"IMMA": 4}, stores={128: 36, 32: 34, 16: 32}),
            ),
            "34 stores of 4 bytes, 32 of 2; allowed: one more, the reset of a ticket.",
        ),
        (
            kernel(
                WGMMA,
                "sm_90a",
                code=Code(counts=HOPPER, overlaps=True, fresh_loads=4, early={"LDG": 1, "STG": 2}),
            ),
            "1 LDG, 2 STG can come before any wait; allowed: none.",
        ),
        (kernel(WGMMA, "sm_90a", code=Code(counts=HOPPER, overlaps=True)), "no load from L2 of what others write"),
        (kernel(WGMMA, "sm_90a", code=Code(counts=HOPPER, fresh_loads=1)), "no wait for the preceding kernel"),
        (kernel(ROW_NAME.format("int", 0, 4), "sm_90a"), "no wait for the preceding kernel"),
        (
            kernel(STREAM, "sm_90a", code=Code(**STREAMS, overlaps=True, early={"LDGSTS": 8, "LDG": 1})),
            "1 LDG can come before any wait; wanted: copies of weights",
        ),
        (kernel(STREAM, "sm_90a", code=Code(**STREAMS, overlaps=True)), "no LDGSTS before the wait"),
        (kernel(STREAM, code=Code(**STREAMS, size=300 << 10)), "300.0 KiB of code; allowed: 288"),
        (kernel(STREAM, code=Code(**{**STREAMS, "copies": {128: 7}})), "not 8x128 or more; a lane"),
        (kernel(W4, code=Code(counts={"IMMA": 4})), "no mask of half a byte, with which"),
        (
            kernel(W4, code=Code(counts={"IMMA": 4}, unpacking=Unpacking(16, 49))),
            "49 instructions unpack 16 times 4 weights; allowed: 3 for 4 weights",
        ),
        (
            kernel(W4, code=Code(counts={"IMMA": 4}, unpacking=Unpacking(1, 3), stores={32: 34, 16: 32})),
            "34 stores of 4 bytes, 32 of 2; allowed: one more",
        ),
        (w4_hopper(early={}), "no UTMALDG before the wait; wanted: copies of weights before the wait"),
        (w4_hopper(early={"UTMALDG": 3, "LDG": 1}), "1 LDG can come before any wait"),
        (w4_hopper(unpacking=Unpacking(48, 145)), "145 instructions unpack 48 times 4 weights"),
        (w4_hopper(fresh_loads=0), "no load from L2 of what others write"),
    ],
)  # fmt: skip
def test_a_gate_fails_on_a_defect(bad: Kernel, sentence: str) -> None:
    (failure,) = failures_of([bad], whole=False)
    assert sentence in failure


@pytest.mark.parametrize(
    "good",
    [
        kernel(),
        kernel(registers=64, max_threads=1024),
        row(_32=3, _128=12),
        row(32, _32=3, _128=16),
        row(path=4, _16=32),  # the path of single elements
        kernel(APPEND, code=Code(loads={128: 12, 32: 2})),
        kernel(APPEND.replace("(bool)1", "(bool)0"), code=Code(loads={16: 48})),
        kernel(DECODE, code=Code(counts=BOTH, copies={128: 8})),
        kernel("gemm(P)", "sm_90a", code=Code(counts={"IGMMA": 4}, waiting_igmma=1)),
        kernel("gemm(P)", "sm_89", code=Code(counts={"IMMA": 4})),
        kernel(WGMMA, "sm_90a", code=Code(counts=HOPPER, overlaps=True, fresh_loads=4)),
        kernel(
            STREAM,
            "sm_90a",
            code=Code(**STREAMS, overlaps=True, early={"LDGSTS": 8}),
        ),
        kernel(STREAM, "sm_89", code=Code(**STREAMS)),
        kernel(W4, "sm_89", code=Code(counts={"IMMA": 4}, unpacking=Unpacking(16, 48))),
        w4_hopper(),
        kernel(
            "sqk::mma_gemm_kernel<256>(P)",
            code=Code(counts={"IMMA": 4}, stores={128: 40, 32: 32, 16: 32}),
        ),
    ],
)
def test_gates_let_good_kernels_pass(good: Kernel) -> None:
    assert failures_of([good], whole=False) == []


def test_a_gate_that_guards_nothing_fails() -> None:
    gate = Gate("g", kernel_gates.no_stack, "allowed: none.", kernels="other", archs="sm_80")
    (failure,) = failures_of([kernel()], gates=[gate])
    assert failure.startswith("gate 'g' guards nothing: no kernel's name matches 'other'")
    assert failures_of([kernel()], gates=[gate], whole=False) == []
    assert failures_of([kernel()], gates=[dataclasses.replace(gate, optional=True)]) == []
    hopper = dataclasses.replace(gate, archs="sm_90a")
    assert failures_of([kernel()], gates=[hopper]) == [], "nothing was compiled for Hopper"
    assert failures_of([kernel(stack=8)], only="g<", gates=GATES[:1]) == []


def test_ptxas_warnings_of_the_build_are_failures(tmp_path: Path) -> None:
    library = tmp_path / build_plan.LIBRARY_NAME
    assert kernel_gates.build_warnings(library) == []
    facts = {"warnings": ["ptxas info    : (C7510) Potential Performance Loss: wgmma ..."]}
    (tmp_path / build_plan.BUILD_INFO_NAME).write_text(json.dumps(facts))
    (failure,) = kernel_gates.build_warnings(library)
    assert "C7510" in failure and library.name in failure


def test_markdown() -> None:
    kernels = [kernel(), kernel(arch="sm_90a", registers=64, max_threads=1024)]
    text = kernel_tables.markdown(kernels)
    assert "### f\n\n| kernel | sm_80 (A100) | sm_86 (A10) | sm_89 (L40S) | sm_90 (H100) |" in text
    assert "| `f<1>` | 32 / 64 | 32 / 48 | 32 / 48 | 64 / 32 |\n" in text


def test_an_architecture_without_limits_has_no_occupancy() -> None:
    assert kernel_tables.table_row(kernel(arch="sm_120"))[-2:] == ("-", "-")


# ---------------------------------------------------------------------------------- the whole script


def test_no_library_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_gates.main([str(tmp_path / "none.so")]) == 2
    assert "none.so does not exist; build the kernels" in capsys.readouterr().err


def test_missing_tools_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_gates, "_of_package", lambda package, program: None)
    with pytest.raises(GatesError, match="cuobjdump was not found; run: pip install --no-deps nv"):
        kernel_gates.find_tools({"PATH": "/nowhere", "CUDA_HOME": "/nowhere"})


DEFECTS = """
namespace sqk {
enum class Producer : int { kQuantize };
enum class QuantizePath : int { kBlock = 1 };

__global__ void __launch_bounds__(64) array_in_memory(const int* x, int* y) {
  int count[32] = {};
  for (int i = 0; i < 32; ++i) count[x[i] & 31] += i;
  y[threadIdx.x] = count[threadIdx.x & 31];
}

__device__ float4 sum(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Every value is needed on both sides of the barrier.
template <int kValues>
__device__ void keep(const float* x, float* y) {
  float v[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) v[i] = x[i * blockDim.x + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) y[i * blockDim.x + threadIdx.x] = v[kValues - 1 - i] * v[i];
}
__global__ void __launch_bounds__(1024) spilled(const float* x, float* y) { keep<96>(x, y); }
__global__ void unbounded(const float* x, float* y) { keep<96>(x, y); }

template <typename T, Producer, QuantizePath>
__global__ void __launch_bounds__(256) row_kernel(const T* x, T* y) {
  for (int i = 0; i < 4; ++i) y[threadIdx.x * 4 + i] = x[threadIdx.x * 4 + i] + 1;
}
template __global__ void row_kernel<float, Producer::kQuantize, QuantizePath::kBlock>(
    const float*, float*);
}
"""

GOOD = """
namespace sqk {
enum class Producer : int { kQuantize };
enum class QuantizePath : int { kBlock = 1 };
template <typename T, Producer, QuantizePath>
__global__ void __launch_bounds__(256) row_kernel(const float4* x, float4* y) {
#pragma unroll
  for (int i = 0; i < 4; ++i) y[i * 256 + threadIdx.x] = x[i * 256 + threadIdx.x];
}
template __global__ void row_kernel<float, Producer::kQuantize, QuantizePath::kBlock>(
    const float4*, float4*);
}
"""

WGMMA = """
.version 8.4
.target sm_90a
.address_size 64
.visible .entry gemm(.param .u64 p, .param .u64 a, .param .u64 b)
{
.reg .b32 %r<4>; .reg .b64 %d<3>; .reg .pred %t;
ld.param.u64 %d0, [p]; ld.param.u64 %d1, [a]; ld.param.u64 %d2, [b];
mov.u32 %r0, 0; mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0;
setp.eq.b32 %t, 1, 1;
wgmma.fence.sync.aligned;
STEPS
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
st.global.v4.u32 [%d0], {%r0, %r1, %r2, %r3};
ret;
}
"""
STEP = """
wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%r0, %r1, %r2, %r3}, %d1, %d2, %t;
add.s64 %d1, %d1, 2; add.s64 %d2, %d2, 2;
"""


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Path]:
    """Compiles a text with nvcc; skips the test if nvcc or cuobjdump is missing."""
    try:
        nvcc = build_plan.find_nvcc(os.environ)
        kernel_gates.find_tools(os.environ)
    except (build_plan.BuildError, GatesError) as error:
        pytest.skip(str(error))

    def compile(text: str, *flags: str, suffix: str = ".cu") -> Path:
        source, output = tmp_path / f"k{suffix}", tmp_path / "k.o"
        source.write_text(text)
        command = [nvcc.path, *flags, "-std=c++17", str(source), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return output

    return compile


@pytest.mark.compiler
def test_planted_defects_are_found(
    compiled: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = compiled(DEFECTS, "-c", "-arch=sm_80")
    assert kernel_gates.main([str(file), "--json", str(tmp_path / "out.json")]) == 1
    result = json.loads((tmp_path / "out.json").read_text())
    failures = result["failures"]

    def failed(name: str, what: str) -> int:
        return sum(text.startswith(f"{name} on sm_80: ") and what in text for text in failures)

    assert failed("array_in_memory", "128 bytes of stack frame") == 1
    assert failed("array_in_memory", "local memory") == 1
    assert failed("spilled", "local memory") == 1
    assert failed("unbounded", "1024 threads (assumed: it has no launch bounds)") == 1
    assert failed("row_kernel<float, (Producer)0, (QuantizePath)1>", "not 4x128 or more") == 1
    assert failed("unbounded", "local memory") == 0, "255 registers hold its values"
    threads = {item["mangled"]: item["max_threads"] for item in result["kernels"]}
    assert sorted(threads.values()) == [64, 256, 1024, 1024]
    said = capsys.readouterr().out
    assert f"4 compiled kernels, {len(GATES)} gates, {len(failures)} failures." in said


@pytest.mark.compiler
def test_good_kernels_are_green(
    compiled: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = compiled(GOOD, "-c", "-arch=sm_80")
    assert kernel_gates.main([str(file), "--write-table", str(tmp_path / "t.md")]) == 0
    assert "row_kernel<float, (Producer)0, (QuantizePath)1>" in (tmp_path / "t.md").read_text()
    said = capsys.readouterr().out
    assert "4x128" in said and "IGMMA" not in said
    assert kernel_gates.main([str(file), "--only", "gemm"]) == 1
    assert "no compiled kernel whose name matches 'gemm'" in capsys.readouterr().out


PAIR = """asm("mov.b64 %0, {%1, %2};" : "=l"(addend) : "r"(step), "r"(offsets));"""
HIGH = "high = static_cast<uint32_t>(wide >> 32) ^ kSigns;"


@pytest.mark.parametrize(
    ("old", "new", "instructions"),
    [
        ("", "", 48),
        # ptxas then adds the upper half of the step, which is 0
        (PAIR, "addend = uint64_t{offsets} << 32 | step;", 56),
        # a shift besides
        (HIGH, "high = (((word >> 4) & kLow) * step + offsets) ^ kSigns;", 56),
    ],
)
@pytest.mark.compiler
def test_a_fourth_instruction_for_four_weights_is_found(
    compiled: Callable[..., Path], tmp_path: Path, old: str, new: str, instructions: int
) -> None:
    """The kernel of a tile, with a changed copy of the header that unpacks."""
    text = (ROOT / "csrc/gemm/w4/unpack.cuh").read_text()
    assert old in text
    (tmp_path / "gemm/w4").mkdir(parents=True)
    (tmp_path / "gemm/w4/unpack.cuh").write_text(text.replace(old, new) if old else text)
    includes = [f"-I{folder}" for folder in (tmp_path, ROOT / "csrc", ROOT / "csrc/include")]
    flags = ["-cubin", "-arch=sm_80", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr"]
    instance = ROOT / "csrc/gemm/instances/w4_mma_16x64x128_warps_1x4_stages_8_sm80.cu"
    file = compiled(instance.read_text(), *flags, *includes)
    (found,) = kernel_gates.read_kernels(file, os.environ)
    assert found.code.unpacking == (16, instructions)
    failed = [text for text in failures_of([found], whole=False) if "unpack" in text]
    assert bool(failed) == (instructions > 48)


@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.compiler
def test_serial_wgmma_is_found(compiled: Callable[..., Path], serial: bool) -> None:
    step = STEP + ("add.s32 %r0, %r0, 1;" if serial else "")
    file = compiled(WGMMA.replace("STEPS", step * 4), "-cubin", "-arch=sm_90a", suffix=".ptx")
    (found,) = kernel_gates.read_kernels(file, os.environ)
    assert (found.arch, found.code.counts["IGMMA"]) == ("sm_90a", 4)
    assert bool(kernel_gates.wgmma_in_flight(found)) == serial


@pytest.mark.compiler
def test_a_file_without_gpu_code_is_a_failure(
    compiled: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = compiled("int host() { return 1; }", "-c", suffix=".cpp")
    assert kernel_gates.main([str(file)]) == 1
    assert "k.o: it holds no compiled kernel." in capsys.readouterr().out
