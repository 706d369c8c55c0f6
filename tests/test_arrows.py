"""The rooms of the package: which folder may import which, and how much one holds."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import smoothquant_kernels

PACKAGE = Path(smoothquant_kernels.__file__).parent
MOST_FILES = 15
ROOT_FILES = {"errors", "schemes", "config", "reference"}
COMPILED = {"_kernels"}  # of csrc/python, where the CUDA library was built

#: This folder, or file of the root, may import these. Lower rooms come first; no arrow points down the list.
MAY_IMPORT = {
    "errors": "",
    "schemes": "",
    "_kernels": "",
    "reference": "",
    "config": "errors schemes",
    "storage": "errors",
    "ops": "reference",
    "backends": "errors reference ops _kernels",
    "nn": "errors schemes reference config ops",
    "modeling": "errors reference nn",
    "checkpoint": "errors config storage nn modeling",
    "smoothing": "errors reference config storage nn modeling checkpoint",
    "evaluation": "errors storage modeling checkpoint",
    "search": "errors reference config storage ops nn modeling smoothing evaluation",
    "streaming": "errors config storage nn modeling checkpoint smoothing",
    "report": "errors config storage nn modeling smoothing evaluation",
    "cli": "errors schemes config storage ops backends nn modeling checkpoint smoothing evaluation search "
    "streaming report",
}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(file: Path) -> Iterator[str]:
    """The rooms that a file imports from, at its top or inside of a function."""
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


def arrows() -> dict[str, dict[str, str]]:
    """room -> room that it imports -> the first file that does."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for file in sorted(PACKAGE.rglob("*.py")):
        room = room_of(file)
        if room.startswith("__"):
            continue
        for other in imported_rooms(file):
            if other != room:
                found[room].setdefault(other, file.relative_to(PACKAGE).as_posix())
    return found


def test_every_room_is_in_the_table() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders | ROOT_FILES | COMPILED == MAY_IMPORT.keys()


def test_imports_follow_the_arrows() -> None:
    wrong = [
        f"{room} imports {other}, in {file}"
        for room, others in arrows().items()
        for other, file in others.items()
        if other not in MAY_IMPORT[room].split()
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_has_no_arrow_that_is_not_used() -> None:
    found = arrows()
    idle = [
        f"{room} -> {other}"
        for room, others in MAY_IMPORT.items()
        for other in others.split()
        if other not in found[room]
    ]
    assert not idle


def test_no_arrow_points_down() -> None:
    order = list(MAY_IMPORT)
    for room, others in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(room) for other in others.split()), room


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in PACKAGE.rglob("*.py")}), ids=lambda p: p.name
)
def test_a_room_holds_few_files(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.suffix in {".py", ".html", ".css"}]
    assert len(files) <= MOST_FILES


def test_the_root_holds_what_everything_stands_on() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_FILES | {"__init__", "__main__"}
