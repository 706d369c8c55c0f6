"""Builds the module `_kernels`, which describes the kernels to Python, from csrc/python and the GPU-free part of csrc.

It links neither torch nor CUDA, so tests and benchmarks build it on any machine with a C++ compiler.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.build import ninja
from tools.build.commands import link_module_command, module_command
from tools.build.plan import MODULE_NAME, PACKAGE, ROOT, Python, find_python
from tools.build.sources import module_sources


def module_steps(
    folder: Path, python: Python, flags: Sequence[str], root: Path = ROOT
) -> list[ninja.Step]:
    """The commands that build the module in a folder relative to the root. The last one links it."""
    steps = []
    for source in module_sources(root):
        output = str(folder / "module" / (source.replace("/", ".") + ".o"))
        command = module_command(source, output, python, flags)
        steps.append(ninja.Step(output, tuple(command), (source,)))
    objects = tuple(step.output for step in steps)
    target = str(folder / (MODULE_NAME + python.suffix))
    link = link_module_command(objects, target)
    return [*steps, ninja.Step(target, tuple(link), objects, compiles=False)]


def build_module(
    folder: Path, env: Mapping[str, str], flags: Sequence[str] = (), root: Path = ROOT
) -> Path:
    """Builds the module alone, for tests and benchmarks, and returns its path.

    Args:
        folder: relative to the root, such as build/module.
        env: as for `ninja.run`.
        flags: such as -DSQK_TUNING=1, with which the tables hold the tuner's candidates.
        root: the checkout or a copy of it.

    Raises:
        BuildError: something is missing, or the compiler failed.
    """
    steps = module_steps(folder, find_python(), flags, root)
    ninja.run(steps, folder, env, root)
    return root / steps[-1].output


def load_module(path: Path) -> Any:
    """Loads the module from that file, even if the package has one of its own or another file is loaded already."""
    # pybind11 returns the first module of the same full name, whatever file is asked for. Python looks for
    # PyInit_ and the last part of the name, so only the part before it can differ.
    name = f"{PACKAGE}@{path.resolve()}.{MODULE_NAME}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a module of this Python.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
