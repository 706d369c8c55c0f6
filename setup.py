"""Builds the CUDA library when the machine can, else a pure-Python package (see CONTRIBUTING.md).

The library is loaded with torch.ops.load_library and holds no Python symbols, so one wheel serves
every Python version: it is tagged py3-none-<platform>.
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

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))  # absent under PEP 517

from build_commands import build_library, sources
from build_support import BUILD_INFO_NAME, LIBRARY_NAME, PACKAGE, ROOT, BuildError, Plan, make_plan


class BuildKernels(build_ext):
    """Compiles csrc/ and puts the library and its facts into the package."""

    plan: Plan

    def run(self) -> None:
        # Kept between builds, unlike the folder that setuptools gives to an editable install.
        build_dir = Path("build") / "kernels"
        try:
            library, facts = build_library(self.plan, build_dir, os.environ)
        except BuildError as error:
            sys.exit(f"smoothquant-kernels: {error}")
        target = self._target()
        target.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process may have the old library mapped.
        temporary = target / (LIBRARY_NAME + ".new")
        shutil.copyfile(ROOT / library, temporary)
        temporary.replace(target / LIBRARY_NAME)
        (target / BUILD_INFO_NAME).write_text(json.dumps(facts, indent=1) + "\n")

    def _target(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return (ROOT if in_place else Path(self.build_lib)) / PACKAGE

    def get_outputs(self) -> list[str]:
        return [str(self._target() / name) for name in (LIBRARY_NAME, BUILD_INFO_NAME)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return sources()

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
