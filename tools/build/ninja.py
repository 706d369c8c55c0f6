"""Runs compilers through ninja: writes `build.ninja`, and keeps each command's messages next to its output."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.build.plan import ROOT, BuildError, check_ninja, jobs


@dataclass(frozen=True)
class Step:
    """One command. It runs again if the command or a file that it reads has changed.

    Attributes:
        output: the file that it makes, relative to the root; `output`.log holds its messages.
        command: compiler and arguments, run from the root.
        inputs: a source, or the objects of a link.
        compiles: True for a compilation: it lists the headers that it reads in `output`.d, and may use ccache.
    """

    output: str
    command: tuple[str, ...]
    inputs: tuple[str, ...]
    compiles: bool = True

    @property
    def log(self) -> str:
        return f"{self.output}.log"


def ninja_file(steps: Sequence[Step], folder: Path, launcher: str = "") -> str:
    """The text of a build.ninja; ninja keeps its own records in `folder`."""
    from ninja import ninja_syntax

    text = io.StringIO()
    writer = ninja_syntax.Writer(text, width=10**9)
    escape = ninja_syntax.escape
    writer.variable("builddir", escape(str(folder)))
    # ninja prints a command's messages but does not keep them, and _build_info.json needs them in
    # later builds too. The variable is not called "command", because an edge's "command" would
    # replace the rule's.
    keeping_log = "$run > $log 2>&1 || { cat $log; exit 1; }"
    launched = f"{escape(shlex.quote(launcher))} {keeping_log}" if launcher else keeping_log
    writer.rule("compile", launched, description="compile $out", depfile="$out.d", deps="gcc")
    writer.rule("link", keeping_log, description="link $out")
    for step in steps:
        writer.build(
            escape(step.output),  # the writer escapes blanks, not dollars
            "compile" if step.compiles else "link",
            [escape(name) for name in step.inputs],
            implicit_outputs=[escape(step.log)],
            variables={
                "run": escape(shlex.join(step.command)),
                "log": escape(shlex.quote(step.log)),
            },
        )
    return text.getvalue()


def run(steps: Sequence[Step], folder: Path, env: Mapping[str, str], root: Path = ROOT) -> str:
    """Runs the steps that are out of date, MAX_JOBS at a time, and returns the messages of every step's last run.

    Args:
        steps: in any order.
        folder: where build.ninja and ninja's records are kept; relative to the root.
        env: for MAX_JOBS and PATH; ccache is used if it is on the PATH.
        root: where the commands run, the checkout or a copy of it.

    Raises:
        BuildError: the package ninja is missing, or a command failed; the message then holds its name and output.
    """
    check_ninja()
    from ninja import BIN_DIR

    launcher = shutil.which("ccache", path=env.get("PATH")) or ""
    # ccache takes paths relative to the root, so another checkout of the same sources finds these
    # objects.
    cache = {"CCACHE_BASEDIR": str(root), "CCACHE_NOHASHDIR": "1"} if launcher else {}
    file = root / folder / "build.ninja"
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [os.path.join(BIN_DIR, "ninja"), "-f", str(file), "-j", str(jobs(env))]
    with _alone(file.with_name("lock")):
        file.write_text(ninja_file(steps, folder, launcher))
        with subprocess.Popen(
            command, cwd=root, env={**os.environ, **cache}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                print(line, end="", file=sys.stderr, flush=True)
        if process.returncode:
            raise BuildError(_why(steps, "".join(said)))
        return "".join((root / step.log).read_text() for step in steps)


def _why(steps: Sequence[Step], said: str) -> str:
    """The messages of failed commands, taken from ninja's output, because ninja removes the log of a failed command."""
    reasons = []
    for step in steps:
        # ninja prints the outputs, the command in one line, and then what it said.
        pattern = rf"^FAILED: (?:\[code=\d+\] )?{re.escape(step.output)} [^\n]*\n[^\n]*\n"
        if found := re.search(
            pattern + r"(.*?)(?=^\[\d+/\d+\] |^ninja: |^FAILED: |\Z)", said, re.M | re.S
        ):
            reasons.append(f"{Path(step.command[0]).name} failed on {step.output}:\n{found[1]}")
    return "\n".join(reasons) or f"ninja failed:\n{said}"


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Holds a lock, so that two processes that build in the same folder take turns."""
    import fcntl  # not on Windows, where nothing is compiled

    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
