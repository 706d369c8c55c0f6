"""Defects planted in a copy of the quantizers: tests/kernels in the simulator, or its checks, catch each one."""

from __future__ import annotations

import pytest

from tests.support import mutants
from tests.support.mutants import (
    NOT_WITHIN_THE_BOUND,
    OUT_OF_BOUNDS,
    RACE,
    UNINITIALIZED,
    WRONG_VALUES,
    Mutant,
)

# All run in one worker of pytest-xdist, because they share the builds of `runs`.
pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

INSTANCES = "csrc/quantize/instances"
QUANTIZE, RMS_NORM = f"{INSTANCES}/quantize.cu", f"{INSTANCES}/rms_norm.cu"
ROTATION = "test_rotation.py"
CLUSTER, LAUNCH = f"{INSTANCES}/cluster_sm90.cu", "csrc/quantize/launch.cu"


def quantizer(
    name: str,
    file: str,
    old: str,
    new: str,
    source: str,
    suite: str,
    tests: str,
    symptom: str | None,
    arch: str = "sm_80",
    types: tuple[str, ...] = ("kFloat32", "kFloat16"),
) -> Mutant:
    """A mutant of the row kernels. The copy has no kernels for other types of x, and their tests are left out."""
    wanted = "is_float(decltype(type)::value)"
    others = sorted({"kFloat32", "kFloat16", "kBFloat16"} - set(types))
    left = "".join(f" && type != DType::{other}" for other in others)
    cuts = (("quantize/kernels.h", wanted, wanted + left),)
    tests = f"({tests}) and not bfloat16" + ("" if "kFloat32" in types else " and float16")
    return Mutant(name, file, old, new, source, suite, tests, symptom, arch, cuts=cuts)


MUTANTS = (
    quantizer(
        "a vector past the row's end",
        "quantize/row_slice.cuh",
        "has(int i) const { return at(i, 0) < end; }",
        "has(int i) const { return at(i, 0) <= end; }",
        QUANTIZE,
        "test_quantize.py",
        "smoke_quantize",
        OUT_OF_BOUNDS,
    ),
    quantizer(
        "the maximum forgets each vector's last element",
        "quantize/row_slice.cuh",
        "if (Traits::kVectors || has(i, e)) largest.add(v[e]);",
        "if (e < kV - 1 && (Traits::kVectors || has(i, e))) largest.add(v[e]);",
        QUANTIZE,
        "test_quantize.py",
        "test_edge_rows and 64",
        WRONG_VALUES,
    ),
    quantizer(
        "-128 is not clamped",
        "common/dtype.cuh",
        "max.NaN.f32 %0, %1, 0fC2FE0000;",
        "mov.f32 %0, %1;",
        QUANTIZE,
        "test_quantize.py",
        "smoke_quantize",
        WRONG_VALUES + r".*: -128 .* != -127 ",
    ),
    quantizer(
        "the maximum drops a NaN",
        "common/reduce.cuh",
        "max.NaN.f32",
        "max.f32",
        QUANTIZE,
        "test_quantize.py",
        "test_edge_rows and 64",
        WRONG_VALUES,
    ),
    quantizer(
        "x * (1 / scale) * inv_smooth, not x * inv_smooth * (1 / scale)",
        "quantize/row_slice.cuh",
        "void store(int i, const float (&v)[kV], float inverse) const {",
        """void store(int i, const float (&kept)[kV], float by) const {
    float v[kV];
    const float inverse = q.inv_smooth != nullptr ? 1.0f : by;
    for (int e = 0; e < kV; ++e) {
      v[e] = kept[e];
      if (q.inv_smooth == nullptr || !has(i, e)) continue;
      v[e] = __fmul_rn(__fmul_rn(to_float(x[at(i, e)]), by), q.inv_smooth[at(i, e)]);
    }""",
        QUANTIZE,
        "test_quantize.py",
        "order_of_the_multiplications",
        WRONG_VALUES,
    ),
    quantizer(
        "a static scale hides a row that is not finite",
        "common/scale.cuh",
        "return is_finite_bits(absmax_bits) ? given : __uint_as_float(kNanBits);",
        "return given;",
        QUANTIZE,
        "test_quantize.py",
        "test_static_scales",
        WRONG_VALUES + r".*!= nan \(",
    ),
    quantizer(
        "values that do not fit in registers are not kept",
        "quantize/row_slice.cuh",
        "if (first - kRegisters < slots) put(first - kRegisters, w);",
        "",
        QUANTIZE,
        "test_quantize.py",
        "test_long_rows and 49160 and float16",
        UNINITIALIZED,
    ),
    quantizer(
        "the last maximum of the workspace is not read",
        "quantize/launch.cu",
        "row.maxima_count = per_tensor ? plan.workspace_bytes / 4 : plan.splits;",
        "row.maxima_count = (per_tensor ? plan.workspace_bytes / 4 : plan.splits) - 1;",
        LAUNCH,
        "test_quantize.py",
        "smoke_quantize",
        WRONG_VALUES,
    ),
    quantizer(
        "the residual's sum is not rounded",
        "quantize/row_slice.cuh",
        "v[e] = to_float(total.element[e]);",
        "v[e] = __fadd_rn(v[e], to_float(b.element[e]));",
        RMS_NORM,
        "test_norms.py",
        "smoke_norms and rms_norm",
        NOT_WITHIN_THE_BOUND,
        types=("kFloat16",),
    ),
    quantizer(
        "epsilon is added to the root",
        "quantize/producer.cuh",
        "__fsqrt_rn(__fadd_rn(variance, eps))",
        "__fadd_rn(__fsqrt_rn(variance), eps)",
        RMS_NORM,
        "test_norms.py",
        "test_edge_rows and rms_norm and 64",
        NOT_WITHIN_THE_BOUND,
        types=("kFloat16",),
    ),
    quantizer(
        "the reductions use one buffer",
        "common/reduce.cuh",
        "turn_ ^= 1;",
        "",
        RMS_NORM,
        "test_norms.py",
        "smoke_norms and rms_norm",
        RACE,
        types=("kFloat16",),
    ),
    quantizer(
        "no barrier in the cluster's exchange",
        "common/reduce.cuh",
        "    Cluster::wait();\n    return lane",
        "    return lane",
        CLUSTER,
        "test_quantize.py",
        "test_long_rows and 8200",
        UNINITIALIZED,  # a block reads the others' maxima before they have written any
        arch="sm_90",
    ),
    quantizer(
        "a rotation subtracts the wrong way in the upper lane",
        "common/rotate.cuh",
        "(threadIdx.x & bit) != 0 ? -1.0f : 1.0f",
        "(threadIdx.x & bit) == 0 ? -1.0f : 1.0f",
        QUANTIZE,
        ROTATION,
        "smoke_rotation",
        WRONG_VALUES,
    ),
    quantizer(
        "a rotation adds where it must subtract",
        "common/rotate.cuh",
        "high = __fsub_rn(low, high);",
        "high = __fadd_rn(low, high);",
        QUANTIZE,
        ROTATION,
        "smoke_rotation",
        WRONG_VALUES,
    ),
    quantizer(
        "the last stage between lanes is missing",
        "common/rotate.cuh",
        "const int lanes = min(32, group / distance);",
        "const int lanes = min(32, group / distance) / 2;",
        QUANTIZE,
        ROTATION,
        "smoke_rotation",
        WRONG_VALUES,
    ),
    quantizer(
        "a stage crosses the border of a group",
        "common/rotate.cuh",
        "const int lanes = min(32, group / distance);",
        "const int lanes = min(32, 2 * group / distance);",
        QUANTIZE,
        ROTATION,
        "test_every_group and 17-16",
        WRONG_VALUES,
    ),
    quantizer(
        "the stages between lanes come first",
        "common/rotate.cuh",
        """    group < kV ? rotate_elements(v, group) : rotate_elements(v, kV);
    rotate_lanes<kUnroll>(v, group, kV);
""",
        """    rotate_lanes<kUnroll>(v, group, kV);
    rotate_elements(v, kV);
""",
        QUANTIZE,
        ROTATION,
        "test_the_order_of_the_stages",
        WRONG_VALUES,
    ),
    quantizer(
        "the maximum is that before the rotation",
        "quantize/row_kernel.cuh",
        """      s.rotate(v);
      each(first, v, [&](int i, float (&of)[kV]) { s.measure(i, of, absmax); });
""",
        """      each(first, v, [&](int i, float (&of)[kV]) { s.measure(i, of, absmax); });
      s.rotate(v);
""",
        QUANTIZE,
        ROTATION,
        "smoke_rotation",
        WRONG_VALUES,
    ),
    quantizer(
        "what was not kept is not rotated again",
        "quantize/row_kernel.cuh",
        """          finish(first, v);
          s.rotate(v);
""",
        """          finish(first, v);
""",
        QUANTIZE,
        ROTATION,
        "test_long_rows and 66048 and float16",
        WRONG_VALUES,
    ),
    quantizer(
        "a slice ends within a group",
        "quantize/plan.cpp",
        "std::max(256, p.rotation)",
        "256",
        "csrc/quantize/plan.cpp",
        "test_rotation_paths.py",
        "few_long_rows_are_split and 512",
        WRONG_VALUES,
    ),
    quantizer(
        "the fused quantizer measures its first pass without the rotation",
        "gemm/stream/rows.cuh",
        "if (p_.rotation != 0) rotate",
        "if (p_.rotation != 0 && i >= steps_ - 1) rotate",
        "csrc/gemm/instances/stream_8x16.cu",
        ROTATION,
        "test_linear and 5-torch",
        WRONG_VALUES,
    ),
    # The same tests with unchanged sources must pass, so the failures above are due to the defects.
    quantizer(
        "nothing is wrong: quantize",
        "common/reduce.cuh",
        "turn_ ^= 1;",
        "turn_ ^= 1;",
        QUANTIZE,
        "test_quantize.py",
        "smoke or static_scales or (edge_rows and 64) or (49160 and float16) or order_of",
        None,
    ),
    quantizer(
        "nothing is wrong: rotations",
        "common/reduce.cuh",
        "turn_ ^= 1;",
        "turn_ ^= 1;",
        QUANTIZE,
        ROTATION,
        "smoke_rotation or order_of_the_stages or (long_rows and 66048 and float16) or (every_group and 17-16)",
        None,
    ),
    quantizer(
        "nothing is wrong: rms_norm",
        "common/reduce.cuh",
        "turn_ ^= 1;",
        "turn_ ^= 1;",
        RMS_NORM,
        "test_norms.py",
        "rms_norm and (smoke or (edge_rows and 64))",
        None,
        types=("kFloat16",),
    ),
    quantizer(
        "nothing is wrong: clusters",
        "common/reduce.cuh",
        "turn_ ^= 1;",
        "turn_ ^= 1;",
        CLUSTER,
        "test_quantize.py",
        "test_long_rows and 8200",
        None,
        arch="sm_90",
    ),
)


@pytest.mark.in_turn
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, planted_runs: mutants.Runs) -> None:
    mutants.assert_caught(mutant, planted_runs)
