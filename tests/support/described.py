"""The module `_kernels` for tests: built without torch and CUDA, or found next to the library that it describes."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tools.build.module import build_module, load_module
from tools.build.plan import MODULE_NAME, ROOT, BuildError


def built(*flags: str, root: Path = ROOT) -> Path:
    """The module's file, built with -DSQK_TUNING=1 or no flags; skips the test if it cannot be built."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = Path("build") / ("module_tuning" if flags else "module")
    try:
        return build_module(folder, os.environ, ["-Wextra", "-Werror", *flags], root)
    except BuildError as error:
        if "failed on" in str(error):
            raise
        pytest.skip(str(error))


def copied(folder: Path, *flags: str, root: Path = ROOT) -> ctypes.CDLL:
    """A copy of the module as a library of C entries, with its own measured choices and excluded rows."""
    source = built(*flags, root=root)
    target = folder / source.name
    shutil.copyfile(source, target)
    return ctypes.CDLL(str(target))


_load = functools.cache(load_module)


def module_of(library: ctypes.CDLL) -> Any:
    """The module next to a library. A module's file is its own library."""
    path = Path(library._name)
    if path.name.startswith(MODULE_NAME):
        return _load(path)
    (beside,) = path.parent.glob(f"{MODULE_NAME}.*so")
    return _load(beside)


def library(library: ctypes.CDLL) -> Any:
    """The module's description of a loaded library; it calls the same entries, so it has the same state."""
    return module_of(library).Library(library._name)
