"""Copies of this process side by side, each with a time limit: a copy that hangs is killed with its children.

A copy has imported what takes seconds. Nothing may have started CUDA or threads in this process.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

#: Between two looks at the processes.
PAUSE = 0.02
#: A killed process may still be busy in the driver; after this time it is given up.
KILLED_SECONDS = 5.0

Work = Callable[[], Any]
_groups: set[int] = set()


@dataclass(frozen=True)
class Ended:
    """How a process ended. code: its exit status; None: it was killed at its limit."""

    code: int | None
    out: str
    err: str
    seconds: float


class _Copy:
    """A forked process in a group of its own; the value of `work` is its exit status."""

    def __init__(
        self, place: int, work: Work, environment: Mapping[str, str], limit: float
    ) -> None:
        self.place, self.begin, self.limit = place, time.monotonic(), limit
        self.code: int | None = None
        # Files, not pipes: a child of a killed process may hold a pipe open.
        self.files = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _work_and_exit(work, environment, self.files)
        _groups.add(self.pid)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def ended(self) -> Ended | None:
        seconds = time.monotonic() - self.begin
        code = self.poll()
        if code is None and seconds < self.limit:
            return None
        kill_group(self.pid)  # also the children that it has left running
        wait_until = time.monotonic() + KILLED_SECONDS
        while self.poll() is None and time.monotonic() < wait_until:
            time.sleep(PAUSE)
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Ended(code, *texts, seconds)


def _work_and_exit(work: Work, environment: Mapping[str, str], files: Sequence[IO[str]]) -> None:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for fd, file in enumerate(files, start=1):
            os.dup2(file.fileno(), fd)
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
        os.environ.update(environment)
        code = int(work() or 0)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            os.write(2, error.code.encode())
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(BaseException):
                stream.flush()
        os._exit(code)


def watch(group: int) -> None:
    """Has the group killed when this process is told to end."""
    _groups.add(group)


def kill_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    _groups.discard(group)


def stop_with_children(*_: object) -> None:
    """A handler of SIGTERM: the children have groups of their own, and would live on."""
    for group in list(_groups):
        kill_group(group)
    os._exit(128 + signal.SIGTERM)


def run_all(
    works: Sequence[Work],
    limit: float,
    *,
    at_a_time: int,
    seconds: float,
    on_end: Callable[[int, Ended], None],
    least: float = PAUSE,
    environment: Mapping[str, str] | None = None,
) -> list[int]:
    """Runs each function in a copy of this process, in their order.

    Args:
        limit: of each, in seconds.
        at_a_time: how many run side by side.
        seconds: for all of them: none starts with less than `least` left, and none runs longer.
        on_end: is called with the place of each that has ended.

    Returns: the places of those that were not started.
    """
    deadline = time.monotonic() + seconds
    waiting, running = list(range(len(works))), list[_Copy]()
    while running or (waiting and deadline - time.monotonic() >= least):
        left = deadline - time.monotonic()
        while waiting and len(running) < max(1, at_a_time) and left >= least:
            place = waiting.pop(0)
            running.append(_Copy(place, works[place], environment or {}, min(limit, left)))
        for one in list(running):
            if (ended := one.ended()) is not None:
                running.remove(one)
                on_end(one.place, ended)
        time.sleep(PAUSE)
    return waiting


def last_words(code: int, err: str) -> str:
    """Why a process ended: its signal, or the last line that names an error."""
    if code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line and not line.startswith("File ")]
    return (errors or lines or [f"exit status {code}"])[-1][:200]
