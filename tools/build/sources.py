"""Finds the sources of csrc by their suffixes, and groups some of them into units."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tools.build.plan import ROOT

#: The module's own sources, those that need torch, and the kernels that have a library of their own.
MODULE_FOLDER = "csrc/python/"
TORCH_FOLDER = "csrc/torch/"
CPU_FOLDER = "csrc/cpu/"
#: The binding of ops that have a compiled CPU kernel.
CPU_BINDING = ("quantize", "gemm", "gated", "linear", "kv_cache", "attention")
#: CUTLASS's headers take 30 of the 40 seconds that a wgmma kernel takes to compile, so some files share them. The
#: number is fixed: if it depended on the number of processors, two machines would build different libraries. Kernels
#: for weights of 4 bits and for experts need few of these headers.
FILES_OF_A_UNIT = 4
_SHARES_HEADERS = re.compile(r"csrc/gemm/instances/(?!w4_|grouped_)\w+_sm90\.cu")


def _found(root: Path, *suffixes: str) -> list[str]:
    """Paths relative to the root, sorted so that builds are reproducible."""
    found = (path for path in (root / "csrc").rglob("*") if path.suffix in suffixes)
    return sorted(path.relative_to(root).as_posix() for path in found)


def sources(root: Path = ROOT, *, tuning: bool = False) -> list[str]:
    """The CUDA library's sources: kernels and binding.

    Args:
        root: the checkout.
        tuning: includes `tuning_*.cu`, the tiles that only a tuning build has.
    """
    return [
        name
        for name in _found(root, ".cu", ".cpp")
        if not name.startswith((MODULE_FOLDER, CPU_FOLDER))
        and (tuning or not Path(name).name.startswith("tuning_"))
    ]


def module_sources(root: Path = ROOT) -> list[str]:
    """The module's sources: its own, and all of csrc that needs neither torch nor nvcc."""
    others = (TORCH_FOLDER, CPU_FOLDER)
    return [name for name in _found(root, ".cpp") if not name.startswith(others)]


def cpu_sources(root: Path = ROOT) -> list[str]:
    """The CPU kernels."""
    return [name for name in _found(root, ".cpp") if name.startswith(CPU_FOLDER)]


def cpu_binding_sources() -> list[str]:
    """The binding's sources that are compiled again, for the CPU kernels."""
    return [f"{TORCH_FOLDER}{name}.cpp" for name in CPU_BINDING]


def units(names: Sequence[str], folder: Path, root: Path = ROOT) -> list[str]:
    """The files to compile for these sources: the sources themselves, or units in `folder` that include them.

    A unit holds at most FILES_OF_A_UNIT wgmma instances that begin with the same macros.
    """
    kept = []
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in names:
        if _SHARES_HEADERS.fullmatch(name):
            macros = re.findall(r"^#define .*", (root / name).read_text(), re.M)
            alike[tuple(macros)].append(name)
        else:
            kept.append(name)
    for number, together in enumerate(alike.values()):
        count = -(-len(together) // FILES_OF_A_UNIT)
        for part in range(count):
            unit = folder / f"unit_{number}_{part}_sm90.cu"
            included = (name.removeprefix("csrc/") for name in together[part::count])
            _write(root / unit, "".join(f'#include "{name}"\n' for name in included))
            kept.append(unit.as_posix())
    return kept


def _write(path: Path, text: str) -> None:
    """Writes a file, unless it holds that text already: rewriting would compile it again."""
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
