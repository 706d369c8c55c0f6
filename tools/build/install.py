"""Puts built files into the package, and says which platform a wheel with them runs on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

#: glibc of a manylinux platform -> the newest symbol versions of the compiler's libraries there, as auditwheel says.
_POLICIES: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {
    (2, 17): {"GLIBCXX": (3, 4, 19), "CXXABI": (1, 3, 7), "GCC": (4, 8, 0)},
    (2, 28): {"GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)},
    (2, 31): {"GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12), "GCC": (7, 0, 0)},
    (2, 34): {"GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)},
    (2, 35): {"GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)},
    (2, 39): {"GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0, 0)},
}
#: What such a library may need. The package depends on torch, which has loaded its own libraries by then.
_ALLOWED = re.compile(r"lib(c|m|dl|pthread|gcc_s|stdc\+\+|torch_cpu)\.so.*|ld-linux.*")


def place(
    files: Mapping[str, Path], facts: Mapping[str, object], facts_name: str, target: Path
) -> None:
    """Copies files to `target` under the given names, and writes the facts beside them."""
    target.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        # Replaced, not overwritten: a running process may have the old one mapped.
        temporary = target / f"{name}.new"
        shutil.copyfile(file, temporary)
        temporary.replace(target / name)
    (target / facts_name).write_text(json.dumps(facts, indent=1) + "\n")


def manylinux(library: Path, machine: str) -> str | None:
    """The oldest manylinux platform that has all that a library needs, or None if that cannot be said."""
    command = ["readelf", "--wide", "--dynamic", "--version-info", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout)
    versions = [
        (name, tuple(map(int, number.split("."))))
        for name, number in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", done.stdout)
    ]
    if done.returncode or not needed or not all(map(_ALLOWED.fullmatch, needed)):
        return None
    for glibc, newest in _POLICIES.items():
        limits = {**newest, "GLIBC": glibc}
        if all(number <= limits[name] for name, number in versions):
            return f"manylinux_{glibc[0]}_{glibc[1]}_{machine}"
    return None
