"""The launcher builds the simulator once, also when several processes need it at the same time."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

LAUNCHER = Path(__file__).parents[1] / "bin" / "ptxsim"

#: Takes the place of make: takes its time, and notes each call.
MAKE = """#!/bin/sh
echo built >> "$BUILDS"
sleep 0.5
for word; do case $word in OUT=*) mkdir -p "${word#OUT=}/lib" ;; esac; done
exit "${FAILS:-0}"
"""


def start(folder: Path, count: int, **environment: str) -> list[subprocess.Popen[str]]:
    make = folder / "make"
    make.write_text(MAKE)
    make.chmod(0o755)
    variables = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PTXSIM_CACHE": str(folder / "cache"),
        "BUILDS": str(folder / "builds"),
        **environment,
    }
    command = [str(LAUNCHER), "--libdir"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=variables, **pipes) for _ in range(count)]


def test_several_processes_build_once(tmp_path: Path) -> None:
    said = [process.communicate() for process in start(tmp_path, 4)]
    assert (tmp_path / "builds").read_text() == "built\n"
    (folder,) = {out for out, _ in said}
    assert Path(folder.strip()).is_dir()
    assert sum("building into" in error for _, error in said) == 1
    assert [process.wait() for process in start(tmp_path, 2)] == [0, 0]
    assert (tmp_path / "builds").read_text() == "built\n"


def test_after_a_failed_build_the_next_process_tries_again(tmp_path: Path) -> None:
    processes = start(tmp_path, 2, FAILS="3")
    assert all("build failed" in process.communicate()[1] for process in processes)
    assert [process.returncode for process in processes] == [1, 1]
    assert (tmp_path / "builds").read_text() == "built\nbuilt\n"
