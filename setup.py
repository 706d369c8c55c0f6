"""Builds the CUDA library if the machine can, otherwise a pure-Python package (see CONTRIBUTING.md).

The library is loaded with torch.ops.load_library and holds no Python symbols, so one wheel serves
every Python version: it is tagged py3-none-<platform>. The module that describes the library fits
only the Python that built it; no computation needs it (csrc/python/module.cpp).
"""

from __future__ import annotations

import json
import os
import shutil
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

from tools.build.library import build_library
from tools.build.plan import (
    BUILD_INFO_NAME,
    LIBRARY_NAME,
    MODULE_NAME,
    PACKAGE,
    ROOT,
    BuildError,
    Plan,
    make_plan,
)
from tools.build.sources import module_sources, sources


class BuildKernels(build_ext):
    """Compiles csrc/ and copies the library, its module and its facts into the package."""

    plan: Plan

    def run(self) -> None:
        # Kept between builds, unlike the folder that setuptools gives to an editable install.
        build_dir = Path("build") / "kernels"
        try:
            built = build_library(self.plan, build_dir, os.environ)
        except BuildError as error:
            sys.exit(f"smoothquant-kernels: {error}")
        target = self._target()
        target.mkdir(parents=True, exist_ok=True)
        for file in (built.library, built.module):
            # Replaced, not overwritten: a running process may have the old one mapped.
            temporary = target / (file.name + ".new")
            shutil.copyfile(file, temporary)
            temporary.replace(target / file.name)
        (target / BUILD_INFO_NAME).write_text(json.dumps(built.facts, indent=1) + "\n")

    def _target(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return (ROOT if in_place else Path(self.build_lib)) / PACKAGE

    def get_outputs(self) -> list[str]:
        module = MODULE_NAME + self.plan.python.suffix
        return [str(self._target() / name) for name in (LIBRARY_NAME, module, BUILD_INFO_NAME)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return sorted({*sources(), *module_sources()})

    def copy_extensions_to_source(self) -> None:
        """Nothing to do: run() writes to the source tree itself when the install is editable."""


class Wheel(bdist_wheel):
    """Tags the wheel for any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def main() -> None:
    try:
        plan, message = make_plan(os.environ)
    except BuildError as error:
        sys.exit(f"smoothquant-kernels: {error}")
    if any(argument.startswith(("build", "bdist", "editable", "develop")) for argument in sys.argv):
        print(f"smoothquant-kernels: {message}", file=sys.stderr)
    if plan is None:
        setup(cmdclass={"bdist_wheel": Wheel})
        return
    BuildKernels.plan = plan
    setup(
        ext_modules=[Extension(f"{PACKAGE}.kernels", sources=[])],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    )


main()
