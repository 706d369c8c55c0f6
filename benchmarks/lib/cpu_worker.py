"""One process for each thing that is timed on a CPU, and turns between them: A B C A B C ...

Peers need other versions of the same packages, and a restriction of instructions holds for a whole process. So each
variant of cpu_peers.py has a process under a Python of its own, which answers requests, a line of JSON each. The parent
asks one at a time and they time themselves, so that clocks and neighbors hit all alike and no pipe is in a time.

A turn calls a layer on several weights, one after the other: more than the L2 cache holds, as in a model, where the
other layers come in between.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib import cpu_isa, cpu_peers
from benchmarks.lib.cpu_peers import VARIANTS, Call, Floats, Made, Setup

ROOT = Path(__file__).resolve().parents[2]
Reply = dict[str, Any]
#: Weights take this many times the L2 cache in int8, in at most so many copies.
L2_TIMES, MOST_COPIES = 2, 8
#: Rows of a result that are compared: a tail at either end shows.
ROWS = 8
#: Compiling the chain of a peer takes seconds; more than this is a process that hangs.
PATIENCE = 600.0


class PeerFailed(Exception):
    """A process ended, or hangs."""


def copies_of(n: int, k: int, l2_bytes: int) -> int:
    return max(1, min(MOST_COPIES, math.ceil(L2_TIMES * l2_bytes / (n * k))))


def operands(n: int, k: int, m: int, copy: int) -> tuple[Floats, Floats]:
    """The same in every process. Weights as wide as a model's: results of the size of the inputs."""
    generator = np.random.default_rng([n, k, copy])
    w = generator.standard_normal((n, k), dtype=np.float32)
    w *= np.float32(k**-0.5)
    return w, generator.standard_normal((m, k), dtype=np.float32)


# --- in the process ---------------------------------------------------------------------------------------------------


class Served:
    """A variant that answers."""

    def __init__(self, name: str, made: Made, clock: Callable[[], float] | None = None) -> None:
        self.variant, self.made, self.clock = VARIANTS[name], made, clock
        self.calls: list[Call] = []

    def load(self, n: int, k: int, m: int, copies: int) -> Reply:
        """Makes the layers and compares each: the largest relative error, or "wrong" and why."""
        self.calls, worst = [], 0.0
        for copy in range(copies):
            w, x = operands(n, k, m, copy)
            call = self.made.layer(w, x)
            with self.made.around():
                y = self.made.floats(call())
            rows = sorted({*range(min(m, ROWS)), *range(max(0, m - ROWS), m)})
            error = (
                cpu_peers.relative_error(y[rows], x[rows] @ w.T) if y.shape == (m, n) else math.nan
            )
            if not error <= self.variant.most_error:  # NaN too
                return {
                    "wrong": f"relative error {error:.3g}, at most {self.variant.most_error} is explained"
                }
            if self.made.exact is not None and not np.array_equal(
                y[rows], self.made.exact(w, x, rows)
            ):
                return {"wrong": "the result is not the specification's"}
            worst = max(worst, error)
            self.calls.append(call)
        return {"error": worst}  # fmt: skip

    def turn(self) -> Reply:
        """Microseconds of one call, the mean over the copies. The first call of a turn wakes the process: untimed."""
        with self.made.around():
            self.calls[-1]()
            start = time.perf_counter_ns()
            for call in self.calls:
                call()
            spent = time.perf_counter_ns() - start
        return {"us": spent / 1e3 / len(self.calls)} | ({"ghz": self.clock()} if self.clock else {})


def serve(arguments: Sequence[str] | None = None) -> None:
    """Answers lines of standard input until it ends. What libraries print goes to standard error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(VARIANTS))
    parser.add_argument("--setup", type=json.loads, default={})
    parser.add_argument("--clock", type=Path)
    args = parser.parse_args(arguments)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(answer: Reply) -> None:
        replies.write(json.dumps(answer) + "\n")

    setup = Setup(**args.setup)
    try:
        if setup.isa != "native":
            cpu_isa.refuse_amx()
        variant = VARIANTS[args.name]
        made = variant.make(setup)
    except ImportError as error:
        reply({"missing": f"{error.name or error} is not installed"})
        return
    except Exception as error:  # a build for other versions may raise anything
        reply({"missing": f"cannot be used: {type(error).__name__}: {error}"[:300]})
        return
    served = Served(args.name, made, cpu_isa.Clock(args.clock) if args.clock else None)
    reply({"versions": cpu_peers.versions(variant), "level": made.level})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply(served.load(**request) if request else served.turn())
        except Exception as error:  # one shape must not end the process
            reply({"failed": f"{type(error).__name__}: {error}"[:300]})


# --- in the parent ----------------------------------------------------------------------------------------------------


class Worker:
    """A variant's process. Use it as a context."""

    def __init__(
        self, name: str, python: str, setup: Setup, environment: Mapping[str, str], clock: Path | None
    ) -> None:  # fmt: skip
        self.name = name
        self.log = tempfile.TemporaryFile("w+")
        threads = str(setup.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [
            python,
            "-m",
            "benchmarks.lib.cpu_worker",
            name,
            "--setup",
            json.dumps(vars(setup)),
        ]
        command += ["--clock", str(clock)] if clock else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=ROOT,
            env={**os.environ, **dict.fromkeys(names, threads), "PYTHONPATH": os.pathsep.join(paths),
                 "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "ERROR", **environment},
        )  # fmt: skip

    def send(self, **request: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `receive` says why

    def receive(self, patience: float = PATIENCE) -> Reply:
        """The answer to the oldest request, or at first what the process is."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], patience)[0]:
            raise PeerFailed(f"{self.name} did not answer within {patience:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["it printed nothing"])[-1]
            raise PeerFailed(f"{self.name} ended with {self.process.returncode}: {last[:300]}")
        answer: Reply = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a process that has crashed
                pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def interleaved(
    workers: Sequence[Worker], seconds: float, least: int = 5, most: int = 200
) -> dict[str, list[Reply]]:
    """The turns of all, for about so many seconds, in rounds; whoever fails in a turn is left out of the result.

    Every other round goes backward, so that nobody always follows the same neighbor.
    """
    found: dict[str, list[Reply]] = {worker.name: [] for worker in workers}

    def one_round(order: Sequence[Worker]) -> dict[str, Reply]:
        answers = {}
        for worker in order:
            worker.send()
            answers[worker.name] = worker.receive()
        return answers

    one_round(workers)  # allocations, packing, the choice of kernels
    start = time.perf_counter()
    one_round(workers)
    once = time.perf_counter() - start
    for turn in range(max(least, min(most, int(seconds / max(once, 1e-9))))):
        for name, answer in one_round(workers[:: -1 if turn % 2 else 1]).items():
            found[name].append(answer)
    return {name: turns for name, turns in found.items() if all("us" in turn for turn in turns)}


if __name__ == "__main__":
    serve()
