"""The CUDA library, with the module that describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.build import ninja
from tools.build.commands import cuda_command, cxx_command, link_command
from tools.build.facts import build_info
from tools.build.module import module_steps
from tools.build.plan import (
    LIBRARY_NAME,
    ROOT,
    TORCH_TARGET,
    Plan,
    archs_of_source,
    version_text,
)
from tools.build.sources import sources, units


@dataclass(frozen=True)
class Built:
    """The result of a build.

    Attributes:
        library, module: their paths.
        facts: shipped next to them as `_build_info.json`.
    """

    library: Path
    module: Path
    facts: dict[str, object]


def _macros(plan: Plan) -> list[str]:
    hopper = [arch.code == "90a" for arch in plan.archs]
    return [
        f"-DSQK_WITH_SM80={int(not all(hopper))}",
        f"-DSQK_WITH_SM90={int(any(hopper))}",
        f"-DSQK_ARCHS={'/'.join(map(str, plan.archs))}",  # nvcc splits at commas
        *(["-DSQK_TUNING=1"] if plan.tuning else []),
    ]


def compile_steps(plan: Plan, folder: Path) -> list[ninja.Step]:
    """One step for each source or unit that is compiled for some architecture of the plan."""
    macros, steps = _macros(plan), []
    for source in units(sources(tuning=plan.tuning), folder):
        output = str(folder / (flat(source, folder) + ".o"))
        if source.endswith(".cpp"):
            include, flags = plan.torch.include, ["-DUSE_CUDA", *macros]
            command = cxx_command(source, output, include, flags)
        else:
            gencodes = [arch.gencode for arch in archs_of_source(source, plan.archs)]
            if not gencodes:
                continue
            command = cuda_command(plan.nvcc.path, source, output, plan.cutlass, gencodes, macros)
        steps.append(ninja.Step(output, tuple(command), (source,)))
    return steps


def flat(source: str, folder: Path) -> str:
    """A file name without folders, such as csrc.gemm.launch.cu; a unit keeps its name."""
    return source.removeprefix(f"{folder.as_posix()}/").replace("/", ".")


def _link_step(plan: Plan, objects: Sequence[str], folder: Path) -> ninja.Step:
    library = str(folder / LIBRARY_NAME)
    command = link_command(plan.nvcc.path, objects, library, plan.torch.root / "lib")
    return ninja.Step(library, tuple(command), tuple(objects), compiles=False)


def _built_with(plan: Plan) -> list[str]:
    """Macros for the module only, so that a newer CUTLASS does not recompile the library's C++."""
    return [
        f"-DSQK_CUTLASS_VERSION={plan.cutlass.version}",
        f"-DSQK_CUDA_VERSION={plan.nvcc.version}",
        f"-DSQK_TORCH_TARGET={version_text(TORCH_TARGET)}",
    ]


def build_library(plan: Plan, folder: Path, env: Mapping[str, str]) -> Built:
    """Compiles and links in `folder`, which is relative to the root.

    Raises:
        BuildError: a command failed.
    """
    steps = compile_steps(plan, folder)
    link = _link_step(plan, [step.output for step in steps], folder)
    module = module_steps(folder, plan.python, [*_macros(plan), *_built_with(plan)])
    said = ninja.run([*steps, link, *module], folder, env)
    return Built(ROOT / link.output, ROOT / module[-1].output, build_info(plan, said))
