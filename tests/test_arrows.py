"""Which part of the package may import which other part, and how many files a folder may hold."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import smoothquant_kernels

PACKAGE = Path(smoothquant_kernels.__file__).parent
MOST_FILES = 15
ROOT_FILES = {"errors", "schemes", "config", "plan"}
COMPILED = {"_kernels"}  # of csrc/python, where the CUDA library was built

#: Part (a folder, or a file of the root) -> the parts that it may import. A part imports only from parts above it.
MAY_IMPORT = {
    "errors": "",
    "schemes": "",
    "_kernels": "",
    "reference": "schemes",
    "config": "errors schemes",
    "plan": "errors config",
    "storage": "errors",
    "ops": "reference",
    "backends": "errors reference ops _kernels",
    "nn": "errors schemes reference config ops",
    "modeling": "errors reference nn",
    "adapters": "errors nn modeling",
    "kv_cache": "errors schemes reference ops",
    "fusion": "errors reference ops nn modeling",
    "checkpoint": "errors config storage ops nn modeling kv_cache fusion",
    "smoothing": "errors reference config storage ops nn modeling kv_cache fusion checkpoint",
    "evaluation": "errors storage modeling checkpoint",
    "search": "errors reference config plan storage ops nn modeling smoothing evaluation",
    "streaming": "errors config storage nn modeling checkpoint smoothing",
    "report": "errors config storage ops nn modeling kv_cache smoothing evaluation",
    "cli": "errors schemes config plan storage ops backends nn modeling kv_cache fusion checkpoint smoothing "
    "evaluation search streaming report",
}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(file: Path) -> Iterator[str]:
    """The parts that a file imports from, at module level or inside a function."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute"
            names = [node.module or ""]
            if node.module == PACKAGE.name:
                names = [f"{PACKAGE.name}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE.name:
                yield rest.split(".")[0]


def imports() -> dict[str, dict[str, str]]:
    """part -> imported part -> the first file that imports it."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for file in sorted(PACKAGE.rglob("*.py")):
        part = part_of(file)
        if part.startswith("__"):
            continue
        for other in imported_parts(file):
            if other != part:
                found[part].setdefault(other, file.relative_to(PACKAGE).as_posix())
    return found


def test_every_part_is_in_the_table() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders | ROOT_FILES | COMPILED == MAY_IMPORT.keys()


def test_imports_follow_the_table() -> None:
    wrong = [
        f"{part} imports {other}, in {file}"
        for part, others in imports().items()
        for other, file in others.items()
        if other not in MAY_IMPORT[part].split()
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_allows_nothing_unused() -> None:
    found = imports()
    unused = [
        f"{part} -> {other}"
        for part, others in MAY_IMPORT.items()
        for other in others.split()
        if other not in found[part]
    ]
    assert not unused


def test_no_part_imports_from_below() -> None:
    order = list(MAY_IMPORT)
    for part, others in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(part) for other in others.split()), part


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in PACKAGE.rglob("*.py")}), ids=lambda p: p.name
)
def test_a_folder_holds_at_most_15_files(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.suffix in {".py", ".html", ".css"}]
    assert len(files) <= MOST_FILES


def test_the_root_holds_only_the_base_modules() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_FILES | {"__init__", "__main__"}
