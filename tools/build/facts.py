"""The facts about a build, for `_build_info.json`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tools.build.commands import CUDA_FLAGS, CXX_FLAGS, torch_target_macro
from tools.build.plan import TORCH_TARGET, Plan, version_text


@dataclass(frozen=True)
class KernelUse:
    """What ptxas reports about one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    stack: int
    spills: int


def parse_ptxas(text: str) -> list[KernelUse]:
    """Reads the output of ``ptxas -v``."""
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\S+)' for '(?P<arch>\S+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.S,
    )
    return [
        KernelUse(
            found["kernel"],
            found["arch"],
            int(found["registers"]),
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
        )
        for found in pattern.finditer(text)
    ]


def warnings(text: str) -> list[str]:
    """The warnings of nvcc about our sources and those of ptxas, such as C7510: it made a wgmma kernel serial.

    Some versions of ptxas print C7510 as "info", with the words that the pattern holds.
    """
    wanted = re.compile(
        r"ptxas warning|ptxas info *: .*Potential Performance Loss|csrc/\S+: warning"
    )
    return sorted({line for line in text.splitlines() if wanted.match(line)})


def build_info(plan: Plan, said: str) -> dict[str, object]:
    """Facts about the build, without dates and paths, so that the same sources give the same file."""
    kernels = parse_ptxas(said)
    return {
        "archs": [str(arch) for arch in plan.archs],
        "cutlass_version": plan.cutlass.version,
        "cuda_version": plan.nvcc.version,
        "tuning": plan.tuning,
        "torch_target": version_text(TORCH_TARGET),
        "torch_built_with": plan.torch.version,
        "cuda_flags": list(CUDA_FLAGS),
        "cxx_flags": [*CXX_FLAGS, torch_target_macro()],
        "kernels": [vars(use) for use in sorted(kernels, key=lambda use: (use.kernel, use.arch))],
        "warnings": warnings(said),
    }
