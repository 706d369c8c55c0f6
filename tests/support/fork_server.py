"""Runs pytest in forks of a process that has imported what the tests import: `python -m tests.support.fork_server`.

A run of a few tests in the simulator takes two seconds, the imports before it take five. Each line of the standard
input is a run, as JSON: "arguments" of pytest, "environment" to add, "stdout" and "stderr", the files to write. The
answer is a line with the exit status. The process ends with its input.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.build.plan import ROOT


class ForkServer:
    """The side that asks. One run at a time; each thread has its own server (`of_thread`)."""

    _of_thread = threading.local()

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the process: `command` starts Python."""
        self._process = subprocess.Popen(
            [*command, "-m", "tests.support.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            cwd=ROOT,
            text=True,
        )

    @classmethod
    def of_thread(cls, command: Sequence[str], environment: Mapping[str, str]) -> ForkServer:
        """The thread's server, which is started at its first use and ends with the thread."""
        if not hasattr(cls._of_thread, "server"):
            cls._of_thread.server = cls(command, environment)
        server: ForkServer = cls._of_thread.server
        return server

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Runs pytest with `environment` added to the server's."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with TemporaryDirectory() as folder:
            stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
            request = {"arguments": list(arguments), "environment": dict(environment)}
            request |= {"stdout": str(stdout), "stderr": str(stderr)}
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            status = self._process.stdout.readline()
            assert status, f"the server ended with {self._process.wait()}"
            return subprocess.CompletedProcess(
                arguments, int(status), stdout.read_text(), stderr.read_text()
            )


def _serve() -> None:
    import hypothesis  # noqa: F401
    import pytest
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import smoothquant_kernels.backends.cuda
    import smoothquant_kernels.nn  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request["environment"])
        # The imports made tensors, with which the simulator read its environment.
        ctypes.CDLL("libcudart.so.13").ptxsim_read_environment()
        status = pytest.main(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
