"""Checks compiled kernels without a GPU: stack frames, spills, wide loads, tensor cores, launches.

    python -m tools.gates                            # the library of this checkout
    python -m tools.gates build/kernels/*.o --only row_kernel

The gates are the rows of GATES. Exit code: 0 green, 1 a gate failed, 2 nothing could be checked.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tools.build.plan import BUILD_INFO_NAME, LIBRARY_NAME, PACKAGE, ROOT
from tools.gates.checks import (
    at_most,
    fresh_loads,
    launchable,
    loads,
    no_loads,
    no_local,
    no_stack,
    undivided_stores,
    unpacks,
    uses,
    waits_first,
    wgmma_in_flight,
)
from tools.gates.gate import Gate
from tools.gates.kernel_tables import markdown, print_table
from tools.gates.row_gates import APPEND, HALVES, ROW_KERNEL, append_gates, combine_gates, row_gates
from tools.gates.sass import Kernel, kernels_in

TOOLS_PYPI = "nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37"


class GatesError(Exception):
    """Nothing could be checked; the message is one sentence for the user."""


# ------------------------------------------------------------------------------------------- gates


# The attention to an int8 cache: decode_attention_kernel<channels, columns>.
DECODE = "decode_attention_kernel"

# CUTLASS's GemmUniversal, mma_gemm_kernel, and those that use mma.sync on every architecture:
# stream_gemm_kernel, which streams the weights through it, and two kernels of the GEMMs by experts.
GEMM = r"(?i)gemm"
STREAM = "stream_gemm_kernel"
GROUPED = "grouped_mma_gemm_kernel"

GATES = (
    Gate(
        "stack",
        no_stack,
        "allowed: none. A call, or an array indexed at run time, lives there: inline or unroll it.",
    ),
    Gate(
        "local memory",
        no_local,
        "allowed: none. Either registers are spilled (fewer values, or other launch bounds) or an "
        "array is not in registers.",
    ),
    *row_gates(),
    *append_gates(),
    *combine_gates(),
    *(
        Gate(
            "16-byte copies",
            loads(128, dim // 16),
            "a warp copies 16 tokens of keys and of values, 16 bytes a lane: csrc/attention/ring.cuh.",
            kernels=rf"\b{DECODE}<{dim}, ",
        )
        for dim in (64, 128, 256)
    ),
    Gate(
        "16-byte copies",
        loads(128, 8),
        "a lane copies four pieces of a stage of weights, whole ones or the last of a row: csrc/gemm/stream/ring.cuh.",
        kernels=STREAM,
    ),
    Gate(
        "no 2-byte loads",
        no_loads(16),
        "allowed: none. The name promises that rows are read 16 bytes at a time.",
        kernels=f"{ROW_KERNEL.format(HALVES, '0-6', '0-35')}|{APPEND.format(HALVES)}",
    ),
    Gate(
        "tensor cores of Hopper",
        uses("IGMMA"),
        "wanted: int8 wgmma. The tile's schedule or its data types chose other instructions.",
        kernels=GEMM,
        but=rf"{STREAM}|{GROUPED}",
        archs=r"sm_90a",
    ),
    Gate(
        "wgmma in flight",
        wgmma_in_flight,
        "wanted: several per wait. ptxas made wgmma serial (it says why: C7510 to C7518); kernels "
        "are compiled with -DNDEBUG, and nothing may touch accumulators between two wgmma.",
        kernels=GEMM,
        but=rf"{STREAM}|{GROUPED}",
        archs=r"sm_90a",
    ),
    Gate(
        "waits for the kernel before",
        waits_first(),
        "allowed: none. The kernel is launched to overlap: csrc/common/memory_order.cuh.",
        kernels=rf"\b((grouped_)?wgmma_gemm_kernel|grouped_{STREAM}|row_kernel|kv_append_kernel|{DECODE})<"
        r"|\bgather_rows_kernel\b",
        archs=r"sm_90a",
    ),
    *(
        Gate(
            "weights before the wait",
            waits_first(copy),
            f"wanted: copies of weights before the wait, and nothing else (csrc/gemm/{file}).",
            kernels=rf"\b{kernel}<",
            archs=r"sm_90a",
        )
        for copy, kernel, file in (
            ("LDGSTS", rf"(?:w4_)?{STREAM}", "stream/kernel.cuh"),
            ("UTMALDG", "w4_wgmma_gemm_kernel", "w4/wgmma_load.cuh"),
        )
    ),
    Gate(
        "results of the kernel before",
        fresh_loads,
        "wanted: load_fresh (csrc/common/memory_order.cuh) for what another kernel or block has just written.",
        kernels=rf"\b((?:w4_|grouped_)?wgmma_gemm_kernel|grouped_{STREAM}|{DECODE})<|\bgather_rows_kernel\b",
        archs=r"sm_90a",
    ),
    Gate(
        "size of the code",
        at_most(288),
        "allowed: 288 KiB, what the epilogue of 128 accumulators a thread takes today in all its types; wanted: 64. A "
        "plain 16-bit y runs through a small part of it.",
        kernels=GEMM,
    ),
    Gate(
        "tensor cores of Ampere and Ada",
        uses("IMMA"),
        "wanted: int8 mma.sync.",
        kernels=GEMM,
        archs=r"sm_8\d",
    ),
    Gate(
        "whole stores",
        undivided_stores,
        "allowed: one more, the reset of a ticket. nvcc splits the 16-byte stores of a 16-bit y: "
        "csrc/gemm/epilogue/tokens.cuh.",
        kernels=r"\b(w4_|grouped_)?mma_gemm_kernel<",
    ),
    Gate(
        "unpacking of 4 bits",
        unpacks(3),
        "allowed: 3 for 4 weights, a mask, a multiply-add and a change of signs (csrc/gemm/w4/unpack.cuh).",
        kernels=r"\bw4_(mma|stream|wgmma)_gemm_kernel<",
    ),
    Gate("tensor cores for few tokens", uses("IMMA"), "wanted: int8 mma.sync.", kernels=STREAM),
    Gate("tensor cores for experts", uses("IMMA"), "wanted: int8 mma.sync.", kernels=GROUPED),
    *(
        Gate("tensor cores of attention", uses(name), "wanted: mma.sync.", kernels=rf"\b{DECODE}<")
        for name in ("IMMA", "HMMA")
    ),
    Gate(
        "launch",
        launchable,
        "so a launch can fail: declare __launch_bounds__, or use fewer registers.",
    ),
)


def failures_of(
    kernels: Sequence[Kernel], only: str = "", whole: bool = True, gates: Sequence[Gate] = GATES
) -> list[str]:
    """One sentence for each gate that a kernel fails.

    Args:
        kernels: all of the library.
        only: a regex on the demangled name: kernels that are checked.
        whole: False when the kernels are a part of a library, in which a gate may guard nothing.
        gates: the table.
    """
    failures = []
    for gate in gates:
        guarded = [kernel for kernel in kernels if gate.guards(kernel)]
        applies = any(re.search(gate.archs, kernel.arch) for kernel in kernels)
        if whole and applies and not guarded and not gate.optional:
            failures.append(
                f"gate '{gate.name}' guards nothing: no kernel's name matches '{gate.kernels}'"
                + (f" on '{gate.archs}'" if gate.archs else "")
                + "; correct its row in tools/gates/kernel_gates.py."
            )
        for kernel in guarded:
            found = gate.check(kernel) if re.search(only, kernel.name) else None
            if found:
                failures.append(f"{kernel.short} on {kernel.arch}: {found}; {gate.allowed}")
    return failures


def build_warnings(library: Path) -> list[str]:
    """The warnings of ptxas when the library was built, from the facts next to it."""
    facts = library.parent / BUILD_INFO_NAME
    if not facts.is_file():
        return []
    said = json.loads(facts.read_text()).get("warnings", [])
    return [f"ptxas said while building {library.name}: {line}" for line in said]


# ------------------------------------------------------------------------------------------- tools


def _of_package(package: str, program: str) -> str | None:
    """An executable that a PyPI package installed in this environment."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.parts[-2:] == ("bin", program):
            return shutil.which(str(file.locate()))
    return None


def find_program(program: str, env: Mapping[str, str]) -> str | None:
    """Searches the PyPI package, CUDA_HOME and PATH, in this order."""
    home = env.get("CUDA_HOME")
    return (
        _of_package(f"nvidia-cuda-{program}", program)
        or (shutil.which(str(Path(home) / "bin" / program)) if home else None)
        or shutil.which(program, path=env.get("PATH"))
    )


def find_tools(env: Mapping[str, str]) -> tuple[str, str]:
    """cuobjdump, and nvdisasm, which it calls."""
    cuobjdump, nvdisasm = (find_program(name, env) for name in ("cuobjdump", "nvdisasm"))
    if cuobjdump is None or nvdisasm is None:
        missing = "nvdisasm" if cuobjdump else "cuobjdump"
        raise GatesError(
            f"{missing} was not found; run: pip install --no-deps {TOOLS_PYPI}\n"
            "or set CUDA_HOME to a CUDA toolkit that has it."
        )
    return cuobjdump, nvdisasm


def demangle(names: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """Demangles with cu++filt or c++filt. Without either, names stay mangled."""
    filt = find_program("cu++filt", env) or find_program("c++filt", env)
    if filt is None or not names:
        return {}
    text = "\n".join(names) + "\n"
    done = subprocess.run([filt], input=text, capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def read_kernels(path: Path, env: Mapping[str, str]) -> list[Kernel]:
    """Every kernel of a library, object or cubin, for each architecture; empty if the file has no GPU code."""
    cuobjdump, nvdisasm = find_tools(env)
    places = os.pathsep.join([str(Path(nvdisasm).parent), env.get("PATH", os.defpath)])

    def dump(option: str) -> str | None:
        done = subprocess.run(
            [cuobjdump, option, str(path)],
            env={**env, "PATH": places},
            capture_output=True,
            text=True,
            check=False,
        )
        if "does not contain device code" in done.stderr + done.stdout:
            return None
        if done.returncode:
            raise GatesError(f"cuobjdump {option} failed on {path.name}: {done.stderr.strip()}")
        return done.stdout

    options = ("--dump-resource-usage", "--dump-elf", "--dump-sass")
    with ThreadPoolExecutor(len(options)) as pool:
        resources, elf, sass = pool.map(dump, options)
    if resources is None or elf is None or sass is None:
        return []
    mangled = sorted(set(re.findall(r"^ Function (\S+):$", resources, re.M)))
    return kernels_in(resources, elf, sass, demangle(mangled, env))


# --------------------------------------------------------------------------------------------- run


def run(arguments: argparse.Namespace, env: Mapping[str, str]) -> int:
    files = arguments.files or [ROOT / PACKAGE / LIBRARY_NAME]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise GatesError(
            f"{', '.join(missing)} does not exist; build the kernels (see CONTRIBUTING.md) or name "
            "a library."
        )
    kernels = [kernel for path in files for kernel in read_kernels(path, env)]
    kernels.sort(key=lambda kernel: (kernel.short, kernel.mangled, kernel.arch))
    libraries = [path for path in files if ".so" in path.suffixes]
    failures = failures_of(kernels, arguments.only, whole=bool(libraries))
    shown = [kernel for kernel in kernels if re.search(arguments.only, kernel.name)]
    if not shown:
        called = f" whose name matches '{arguments.only}'" if kernels else ""
        names = ", ".join(path.name for path in files)
        failures.append(f"{names}: it holds no compiled kernel{called}.")
    failures += [line for path in libraries for line in build_warnings(path)]
    print_table(shown)
    if arguments.json:
        result = {"kernels": [asdict(kernel) for kernel in shown], "failures": failures}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.write_table:
        arguments.write_table.write_text(markdown(shown))
    print(f"\n{len(shown)} compiled kernels, {len(GATES)} gates, {len(failures)} failures.")
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gates", description="Checks compiled kernels without a GPU."
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="LIBRARY.so|OBJECT.o")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that was found")
    parser.add_argument("--only", default="", metavar="REGEX", help="on the demangled name")
    parser.add_argument("--write-table", type=Path, metavar="FILE.md", help="registers, occupancy")
    try:
        return run(parser.parse_args(words), os.environ)
    except GatesError as error:
        print(f"kernel_gates: {error}", file=sys.stderr)
        return 2
