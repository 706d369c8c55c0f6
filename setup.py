"""Builds the CUDA library and the CPU library if the machine can, otherwise a pure-Python package (CONTRIBUTING.md).

The libraries are loaded with torch.ops.load_library and hold no Python symbols, so one wheel serves
every Python version: it is tagged py3-none-<platform>. The module that describes the CUDA library fits
only the Python that built it; no computation needs it (csrc/python/module.cpp).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup

if tuple(int(part) for part in setuptools.__version__.split(".")[:1]) < (77,):
    # Reached only with --no-build-isolation; older ones stop at the license field with a traceback.
    sys.exit(
        f"setuptools {setuptools.__version__} is too old to build this package; "
        "run: pip install --upgrade 'setuptools>=77'"
    )

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))  # absent under PEP 517

from tools.build import cpu, plan
from tools.build.install import manylinux, place
from tools.build.library import build_library
from tools.build.plan import MODULE_NAME, PACKAGE, ROOT, BuildError
from tools.build.sources import cpu_binding_sources, cpu_sources, module_sources, sources


class BuildKernels(build_ext):
    """Compiles csrc/ and copies the libraries, the module and the facts into the package."""

    cuda: plan.Plan | None
    cpu: cpu.CpuPlan | None

    def run(self) -> None:
        try:
            if self.cuda is not None:
                # Kept between builds, unlike the folder that setuptools gives to an editable install.
                built = build_library(self.cuda, Path("build") / "kernels", os.environ)
                files = {file.name: file for file in (built.library, built.module)}
                place(files, built.facts, plan.BUILD_INFO_NAME, self._target())
            if self.cpu is not None:
                made = cpu.build_cpu_library(self.cpu, os.environ)
                files = {cpu.LIBRARY_NAME: made.library}
                place(files, made.facts, cpu.BUILD_INFO_NAME, self._target())
        except BuildError as error:
            sys.exit(f"smoothquant-kernels: {error}")

    def _target(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return (ROOT if in_place else Path(self.build_lib)) / PACKAGE

    def get_outputs(self) -> list[str]:
        names: list[str] = []
        if self.cuda is not None:
            module = MODULE_NAME + self.cuda.python.suffix
            names += [plan.LIBRARY_NAME, module, plan.BUILD_INFO_NAME]
        if self.cpu is not None:
            names += [cpu.LIBRARY_NAME, cpu.BUILD_INFO_NAME]
        return [str(self._target() / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return sorted({*sources(), *module_sources(), *cpu_sources(), *cpu_binding_sources()})

    def copy_extensions_to_source(self) -> None:
        """Nothing to do: run() writes to the source tree itself when the install is editable."""


class Wheel(bdist_wheel):
    """Tags the wheel for any Python 3, and one that holds the CPU library alone for the manylinux that runs it."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        library = ROOT / cpu.FOLDER / cpu.LIBRARY_NAME
        kernels = self.distribution.cmdclass.get("build_ext", BuildKernels)
        if platform.startswith("linux_") and getattr(kernels, "cuda", None) is None:
            platform = manylinux(library, platform.removeprefix("linux_")) or platform
        return "py3", "none", platform


def main() -> None:
    try:
        cuda_plan, cuda_message = plan.make_plan(os.environ)
        cpu_plan, cpu_message = cpu.make_cpu_plan(os.environ)
    except BuildError as error:
        sys.exit(f"smoothquant-kernels: {error}")
    if any(argument.startswith(("build", "bdist", "editable", "develop")) for argument in sys.argv):
        for message in filter(None, (cuda_message, cpu_message)):
            print(f"smoothquant-kernels: {message}", file=sys.stderr)
    if cuda_plan is None and cpu_plan is None:
        setup(cmdclass={"bdist_wheel": Wheel})
        return
    BuildKernels.cuda, BuildKernels.cpu = cuda_plan, cpu_plan
    setup(
        ext_modules=[Extension(f"{PACKAGE}.kernels", sources=[])],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    )


main()
