"""Programmatic dependent launch: chains of kernels on a simulated H100 whose kernels start as early as they can.

Before each dependent launch the simulator gives back the bytes that the kernel before it wrote, and runs the new kernel
until it waits (tools/ptxsim/README.md). So a kernel that reads results too early computes wrong values, and one that
writes too early is stopped. Defects are planted in copies of the kernels, and all of them show.
"""

from __future__ import annotations

import dataclasses
import re

import pytest

from tests.csrc.test_planted_gemm import ONE_TYPE, STREAM
from tests.support import mutants, simulator
from tests.support.mutants import WRONG_VALUES, Mutant

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

#: Chains: a quantizer with one or two launches and a GEMM in one call, ops that follow each other, GEMMs that follow
#: each other with tickets (stream-K), and weights that the kernel before has just written.
CHAINS = {
    "test_gemm_c_entry.py": "layer or need_not_be_cleared",
    "test_gemm_w4_stream.py": "smoke or chain or edge_rows or longest or several_tiles",
    "test_linear_op.py": "smoke or every_number_of_tokens or long_rows",
    "test_chains.py": "",
    "test_gemm_w4_wgmma.py": "chain",
    "test_grouped_stream.py": "smoke or chain",
    "test_grouped_wgmma.py": "chain",
    "test_norms.py": "smoke",
    "test_kv_append.py": "smoke",
    "test_decode_attention.py": "smoke or again",
}


@pytest.mark.in_turn
@pytest.mark.parametrize("suite", CHAINS)
def test_chains_may_overlap(suite: str) -> None:
    simulator.require()
    selected = ("-k", CHAINS[suite]) if CHAINS[suite] else ()
    done = simulator.kernel_tests(
        simulator.library(),
        f"tests/kernels/{suite}",
        *selected,
        arch="sm_90",
        environment=simulator.OVERLAP,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 2, done.stdout[-2000:]


WAIT = "  wait_for_previous_kernel();\n  allow_next_kernel();\n"
TOO_EARLY = r"(before|without) griddepcontrol\.wait"
START = "  if (p.weights_first) ring.start();\n"
ROWS = """  } else if (p.weights_first) {
    load_rows<kW4>(p, activations);
  } else {"""


ENTRY, CHAIN = "test_gemm_c_entry.py", "test_chains.py"


def stream(name: str, old: str, new: str, symptom: str, *cuts: tuple[str, str, str]) -> Mutant:
    """A mutant of the GEMM for few tokens, run after a norm."""
    file = "gemm/stream/kernel.cuh"
    defect = Mutant(name, file, old, new, STREAM, ENTRY, "after_a_norm", symptom, arch="sm_90")
    return dataclasses.replace(defect, overlap=True, cuts=(*ONE_TYPE, *cuts))


MUTANTS = (
    stream("the GEMM for few tokens never waits", WAIT, "", TOO_EARLY),
    stream(
        "activations are loaded before the wait",
        START,
        f"{START}  if (!kQuantizes && p.weights_first) load_rows<kW4>(p, activations);\n",
        WRONG_VALUES,
        ("gemm/stream/kernel.cuh", ROWS, ROWS.replace("    load_rows<kW4>(p, activations);\n", "")),
    ),
    Mutant(
        "weights are requested early although nobody promised that they are there",
        "gemm/launch.cu",
        "plan->weights_first = plan->overlap && params.w_constant;",
        "plan->weights_first = plan->overlap;",
        "csrc/gemm/launch.cu",
        CHAIN,
        "just_written",
        WRONG_VALUES,
        arch="sm_90",
        overlap=True,
    ),
    Mutant(
        "the writer of a cache never waits",
        "attention/append.cuh",
        WAIT,
        "",
        "csrc/attention/append.cu",
        CHAIN,
        "keys_and_values",
        TOO_EARLY,
        arch="sm_90",
        overlap=True,
    ),
    Mutant(
        "the attention never waits",
        "attention/decode.cuh",
        WAIT,
        "",
        "csrc/attention/instances/decode_64.cu",
        "test_decode_attention.py",
        "smoke",
        TOO_EARLY,
        arch="sm_90",
        overlap=True,
    ),
    Mutant(
        "nothing is wrong",
        "gemm/launch.cu",
        "params.w_constant;",
        "params.w_constant != 0;",
        "csrc/gemm/launch.cu",
        CHAIN,
        "just_written or chain",
        None,
        arch="sm_90",
        overlap=True,
    ),
)


@pytest.mark.in_turn
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, planted_runs: mutants.Runs) -> None:
    mutants.assert_caught(mutant, planted_runs)
