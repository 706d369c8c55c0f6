"""Defects planted in a copy of the CUDA kernels are caught by tests/kernels in the simulator, or by its checks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import simulator
from build_support import ROOT, jobs

# One worker of pytest-xdist for all: they share what `runs` builds side by side.
pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

INSTANCES = "csrc/quantize/instances"
QUANTIZE, RMS_NORM = f"{INSTANCES}/quantize.cu", f"{INSTANCES}/rms_norm.cu"
CLUSTER, LAUNCH = f"{INSTANCES}/cluster_sm90.cu", "csrc/quantize/launch.cu"

# What a failure looks like.
WRONG_VALUES = r"\d elements differ, first at \("
NOT_WITHIN_THE_BOUND = r"int8 values are not within the bound|: scales .* not in "
OUT_OF_BOUNDS = r"out-of-bounds global"
UNINITIALISED = r"uninitiali[sz]ed"
RACE = r"shared-memory race"


@dataclass(frozen=True)
class Mutant:
    """One defect.

    Attributes:
        name: what is wrong.
        file: of csrc/quantize.
        old: text that occurs in it exactly once.
        new: what stands there instead.
        source: what is compiled with it.
        suite: of tests/kernels.
        tests: of the suite, for pytest's -k; they take some seconds at most.
        symptom: a pattern of the output; None: the tests pass.
        arch: the GPU to simulate.
        types: of x, as C++ names them; the copy has no kernels for others.
    """

    name: str
    file: str
    old: str
    new: str
    source: str
    suite: str
    tests: str
    symptom: str | None
    arch: str = "sm_80"
    types: tuple[str, ...] = ("float", "__half")


MUTANTS = (
    Mutant(
        "a vector behind the row's end",
        "row_slice.cuh",
        "has(int i) const { return at(i, 0) < end; }",
        "has(int i) const { return at(i, 0) <= end; }",
        QUANTIZE,
        "test_quantize.py",
        "smoke_quantize",
        OUT_OF_BOUNDS,
    ),
    Mutant(
        "the maximum forgets each vector's last element",
        "row_slice.cuh",
        "if (Traits::kVectors || has(i, e)) largest.add(v[e]);",
        "if (e < kV - 1 && (Traits::kVectors || has(i, e))) largest.add(v[e]);",
        QUANTIZE,
        "test_quantize.py",
        "test_edge_rows and 64",
        WRONG_VALUES,
    ),
    Mutant(
        "-128 is not clamped",
        "vector.cuh",
        "max.NaN.f32 %0, %1, 0fC2FE0000;",
        "mov.f32 %0, %1;",
        QUANTIZE,
        "test_quantize.py",
        "smoke_quantize",
        WRONG_VALUES + r".*: -128 .* != -127 ",
    ),
    Mutant(
        "the maximum drops a NaN",
        "reduce.cuh",
        "max.NaN.f32",
        "max.f32",
        QUANTIZE,
        "test_quantize.py",
        "test_edge_rows and 64",
        WRONG_VALUES,
    ),
    Mutant(
        "x * (1 / scale) * inv_smooth, not x * inv_smooth * (1 / scale)",
        "row_slice.cuh",
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
    Mutant(
        "a static scale hides a broken row",
        "row_kernel.cuh",
        "scale = is_finite_bits(bits) ? given : __uint_as_float(kNanBits);",
        "scale = given;",
        QUANTIZE,
        "test_quantize.py",
        "test_static_scales",
        WRONG_VALUES + r".*!= nan \(",
    ),
    Mutant(
        "what does not fit in registers is not kept",
        "row_slice.cuh",
        "if (i - kRegisters < slots) put(i - kRegisters, w);",
        "",
        QUANTIZE,
        "test_quantize.py",
        "test_long_rows and 49160 and float16",
        UNINITIALISED,
    ),
    Mutant(
        "the last maximum of the workspace is not read",
        "launch.cu",
        "row.maxima_count = per_tensor ? plan.workspace_bytes / 4 : plan.splits;",
        "row.maxima_count = (per_tensor ? plan.workspace_bytes / 4 : plan.splits) - 1;",
        LAUNCH,
        "test_quantize.py",
        "smoke_quantize",
        WRONG_VALUES,
    ),
    Mutant(
        "the residual's sum is not rounded",
        "row_slice.cuh",
        "v[e] = to_float(total.element[e]);",
        "v[e] = __fadd_rn(v[e], to_float(b.element[e]));",
        RMS_NORM,
        "test_norms.py",
        "smoke_norms and rms_norm",
        NOT_WITHIN_THE_BOUND,
        types=("__half",),
    ),
    Mutant(
        "epsilon is added to the root",
        "producer.cuh",
        "__fsqrt_rn(__fadd_rn(variance, eps))",
        "__fadd_rn(__fsqrt_rn(variance), eps)",
        RMS_NORM,
        "test_norms.py",
        "test_edge_rows and rms_norm and 64",
        NOT_WITHIN_THE_BOUND,
        types=("__half",),
    ),
    Mutant(
        "the reductions use one buffer",
        "reduce.cuh",
        "turn_ ^= 1;",
        "",
        RMS_NORM,
        "test_norms.py",
        "smoke_norms and rms_norm",
        RACE,
        types=("__half",),
    ),
    Mutant(
        "no barrier in the cluster's exchange",
        "reduce.cuh",
        "    Cluster::wait();\n    return lane",
        "    return lane",
        CLUSTER,
        "test_quantize.py",
        "test_long_rows and 8200",
        UNINITIALISED,  # a block reads the others' maxima before they have written any
        arch="sm_90",
    ),
    # The same tests with the sources as they are: what fails above fails because of the defect.
    Mutant(
        "nothing is wrong: quantize",
        "reduce.cuh",
        "turn_ ^= 1;",
        "turn_ ^= 1;",
        QUANTIZE,
        "test_quantize.py",
        "smoke or static_scales or (edge_rows and 64) or (49160 and float16) or order_of",
        None,
    ),
    Mutant(
        "nothing is wrong: rms_norm",
        "reduce.cuh",
        "turn_ ^= 1;",
        "turn_ ^= 1;",
        RMS_NORM,
        "test_norms.py",
        "rms_norm and (smoke or (edge_rows and 64))",
        None,
        types=("__half",),
    ),
    Mutant(
        "nothing is wrong: clusters",
        "reduce.cuh",
        "turn_ ^= 1;",
        "turn_ ^= 1;",
        CLUSTER,
        "test_quantize.py",
        "test_long_rows and 8200",
        None,
        arch="sm_90",
    ),
)


def build_and_test(mutant: Mutant, root: Path) -> subprocess.CompletedProcess[str]:
    """Runs the mutant's tests with a library that has the defect."""
    shutil.copytree(ROOT / "csrc", root / "csrc")
    file = root / "csrc" / "quantize" / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} does not have this once: {mutant.old}"
    file.write_text(text.replace(mutant.old, mutant.new))
    # Only the types that the tests need: each copy compiles in a fraction of the time.
    kernels = root / "csrc" / "quantize" / "kernels.h"
    text = kernels.read_text()
    for element in {"float", "__half", "__nv_bfloat16"} - set(mutant.types):
        kernel = f"row_kernel<{element}, kProducer, kPath, kLaunches>"
        assert text.count(kernel) == 1, f"kernels.h does not have this once: {kernel}"
        text = text.replace(kernel, "nullptr")
    kernels.write_text(text)
    library = simulator.library_with(root, [mutant.source])
    suite, tests = f"tests/kernels/{mutant.suite}", f"({mutant.tests}) and not bfloat16"
    tests += "" if "float" in mutant.types else " and float16"
    return simulator.kernel_tests(library, suite, "-x", "-k", tests, arch=mutant.arch)


Runs = dict[str, "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    """What the selected mutants' tests said, name by name; they are built and run side by side."""
    simulator.require()
    simulator.library()
    wanted = {
        item.callspec.params["mutant"]
        for item in request.session.items
        if item.fspath == request.fspath
    }
    with ThreadPoolExecutor(jobs(os.environ)) as pool:
        yield {
            mutant.name: pool.submit(build_and_test, mutant, tmp_path_factory.mktemp("mutant"))
            for mutant in MUTANTS
            if mutant in wanted
        }


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, runs: Runs) -> None:
    done = runs[mutant.name].result()
    said = done.stdout + done.stderr
    if mutant.symptom is None:
        assert done.returncode == 0, said
        assert re.search(r"\d passed", said) and "skipped" not in said, said
        return
    assert done.returncode == 1, f"no test failed (exit {done.returncode}): {said}"
    assert re.search(mutant.symptom, said), f"not {mutant.symptom!r}, but: {said[-6000:]}"
