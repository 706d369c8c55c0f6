"""build.ninja: what is compiled again, which compiler messages are kept, and what a failure reports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.build import ninja
from tools.build.ninja import Step
from tools.build.plan import BuildError

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


class Build:
    """Two sources, one of which includes a header, and a library of both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "a.h").write_text("inline int a() { return 1; }\n")
        (folder / "a.cpp").write_text('#include "a.h"\nint f() { int unused; return a(); }\n')
        (folder / "b.cpp").write_text("int g() { return 2; }\n")
        self.flags: tuple[str, ...] = ("-fPIC", "-Wall")

    def steps(self) -> list[Step]:
        steps = []
        for name in ("a", "b"):
            source, output = str(self.folder / f"{name}.cpp"), str(self.folder / f"{name}.o")
            depends = ("-MD", "-MF", f"{output}.d")
            command = ("g++", "-c", source, "-o", output, *depends, *self.flags)
            steps.append(Step(output, command, (source,)))
        objects = tuple(step.output for step in steps)
        library = str(self.folder / "l.so")
        link = Step(library, ("g++", "-shared", "-o", library, *objects), objects, compiles=False)
        return [*steps, link]

    def run(self) -> tuple[set[str], str]:
        """(the outputs that were made, the messages of all commands)."""
        outputs = [Path(step.output) for step in self.steps()]
        before = {file: file.stat().st_mtime_ns for file in outputs if file.exists()}
        said = ninja.run(self.steps(), self.folder, os.environ)
        made = {file.name for file in outputs if file.stat().st_mtime_ns != before.get(file)}
        return made, said


@pytest.fixture
def build(tmp_path: Path) -> Build:
    pytest.importorskip("ninja", reason="the package ninja is missing")
    return Build(tmp_path)


def test_only_changed_files_are_compiled_again(build: Build) -> None:
    assert build.run()[0] == {"a.o", "b.o", "l.so"}
    assert build.run()[0] == set()
    (build.folder / "a.h").write_text("inline int a() { return 11; }\n")
    assert build.run()[0] == {"a.o", "l.so"}
    (build.folder / "b.cpp").write_text("int g() { return 22; }\n")
    assert build.run()[0] == {"b.o", "l.so"}
    build.flags = (*build.flags, "-DX")
    assert build.run()[0] == {"a.o", "b.o", "l.so"}
    (build.folder / "a.o").unlink()
    assert "a.o" in build.run()[0]
    assert build.run()[0] == set()


def test_compiler_messages_are_kept_for_later_builds(build: Build) -> None:
    _, said = build.run()
    assert "unused variable" in said
    made, again = build.run()
    assert made == set() and again == said
    (build.folder / "a.o.log").unlink()  # the compiler then runs again
    assert build.run()[1] == said


def test_a_failure_names_the_file_and_quotes_the_compiler(build: Build) -> None:
    build.run()
    (build.folder / "a.cpp").write_text("syntax error\n")
    with pytest.raises(BuildError, match=r"g\+\+ failed on .*a\.o:\n.*a\.cpp:1:1: error") as failed:
        build.run()
    assert "b.o" not in str(failed.value) and "build stopped" not in str(failed.value)
    with pytest.raises(BuildError, match=r"failed on .*a\.o"):
        build.run()
    (build.folder / "a.cpp").write_text("int f() { return 1; }\n")
    assert "a.o" in build.run()[0]


def test_a_missing_source_is_named(build: Build) -> None:
    (build.folder / "b.cpp").unlink()
    with pytest.raises(BuildError, match=r"ninja failed:\n.*b\.cpp.* missing"):
        build.run()


def test_two_builds_of_one_folder_wait_for_each_other(build: Build) -> None:
    """Each runs in its own process. ninja by itself would compile everything twice and corrupt its records."""
    program = f"""
import os
from pathlib import Path
from tests.tools.test_ninja import Build
from tools.build import ninja
build = Build.__new__(Build)
build.folder, build.flags = Path({str(build.folder)!r}), {build.flags!r}
ninja.run(build.steps(), build.folder, os.environ)
"""
    children = [
        subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert sorted("no work to do" in text for text in said) == [False, True], said


def test_names_with_blanks_and_dollars(tmp_path: Path) -> None:
    pytest.importorskip("ninja", reason="the package ninja is missing")
    folder = tmp_path / "a $b c"
    folder.mkdir()
    build = Build(folder)
    assert build.run()[0] == {"a.o", "b.o", "l.so"}
    (folder / "a.h").write_text("inline int a() { return 3; }\n")
    assert build.run()[0] == {"a.o", "l.so"}


def test_without_the_package_the_build_says_how_to_get_it(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"ninja was not found; run: pip install 'ninja>="):
        ninja.run([], build.folder, os.environ)
