"""Many processes side by side, each with a limit of its own: what hangs is killed with all that it has started.

One thread and no torch. A process is started afresh (`spawned`), or is a copy of this one (`forked`), which has
imported already what takes seconds; nothing may have started CUDA here before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Protocol

#: Between two looks at the processes.
PAUSE = 0.02
#: A killed process may still be busy in the driver; nobody waits longer for it.
KILLED_SECONDS = 5.0


class Process(Protocol):
    pid: int

    def poll(self) -> int | None: ...


#: Starts a process that leads a group of its own and writes into the two files.
Start = Callable[[IO[str], IO[str]], Process]


def spawned(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Start:
    """A new process; the variables are set beside those that are there."""

    def start(out: IO[str], err: IO[str]) -> Process:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            env={**os.environ, **(environment or {})}, start_new_session=True,
        )  # fmt: skip

    return start


@dataclass
class _Fork:
    pid: int
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code


def forked(function: Callable[[], Any], environment: Mapping[str, str] | None = None) -> Start:
    """A copy of this process that calls the function; its value is the exit status."""

    def start(out: IO[str], err: IO[str]) -> Process:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return _Fork(pid)
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
            os.environ.update(environment or {})
            code = int(function() or 0)
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

    return start


@dataclass(frozen=True)
class Ended:
    """How a process ended. code: its exit status; None: it was killed at its limit."""

    code: int | None
    out: str
    err: str
    seconds: float


@dataclass
class _Running:
    place: int
    process: Process | None
    out: IO[str]
    err: IO[str]
    begin: float
    limit: float

    def ended(self, now: float) -> Ended | None:
        if self.process is None:
            code: int | None = 127
        else:
            code = self.process.poll()
            if code is None and now < self.begin + self.limit:
                return None
            kill_group(self.process.pid)  # also what it has left running
            wait_until = time.monotonic() + KILLED_SECONDS
            while self.process.poll() is None and time.monotonic() < wait_until:
                time.sleep(PAUSE)
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Ended(code, *texts, now - self.begin)


_groups: set[int] = set()


def watch(group: int) -> None:
    """Has the group killed when this process is told to end."""
    _groups.add(group)


def kill_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    _groups.discard(group)


def stop_with_children(*_: object) -> None:
    """A handler of SIGTERM: the groups of the children are not this one's, and would live on."""
    for group in list(_groups):
        kill_group(group)
    os._exit(128 + signal.SIGTERM)


def run_all(
    starts: Sequence[Start],
    limit: float,
    *,
    at_a_time: int,
    seconds: float,
    on_end: Callable[[int, Ended], None],
    least: float = 0.0,
) -> list[int]:
    """Runs the processes in their order, and calls `on_end` with the place of each that has ended.

    Args:
        limit: of each, in seconds.
        at_a_time: how many run side by side.
        seconds: for all of them: none starts with less than `least` left, and none runs longer.

    Returns: the places of those that were not started.
    """
    deadline = time.monotonic() + seconds
    waiting, running = list(range(len(starts))), list[_Running]()
    while waiting or running:
        now = time.monotonic()
        if deadline - now < max(least, PAUSE) and not running:
            break
        while waiting and len(running) < max(1, at_a_time) and deadline - now >= max(least, PAUSE):
            running.append(_start(waiting.pop(0), starts, min(limit, deadline - now)))
        for one in list(running):
            if (ended := one.ended(now)) is not None:
                running.remove(one)
                on_end(one.place, ended)
        time.sleep(PAUSE)
    return waiting


def _start(place: int, starts: Sequence[Start], limit: float) -> _Running:
    # Files, not pipes: what a killed process has started may hold a pipe open.
    out, err = (tempfile.TemporaryFile("w+", errors="replace") for _ in range(2))
    process: Process | None = None
    try:
        process = starts[place](out, err)
        watch(process.pid)
    except OSError as error:
        err.write(str(error))
    return _Running(place, process, out, err, time.monotonic(), limit)


def last_words(code: int, err: str) -> str:
    """Why a process ended: its signal, or the last line that names an error."""
    if code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line and not line.startswith("File ")]
    return (errors or lines or [f"exit status {code}"])[-1][:200]
