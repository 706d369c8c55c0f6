"""Continuous integration calls only what exists: steps of `.ci/run`, targets and variables of the Makefile."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tools.build.plan import ROOT

yaml = pytest.importorskip("yaml")

WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
RUN = (ROOT / ".ci" / "run").read_text()
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.MULTILINE))
STEPS = set(re.findall(r"^step_(\w+)\(\)", RUN, re.MULTILINE))
COMMANDS = [
    step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step
]


def test_every_command_of_the_workflow_is_one_of_ours() -> None:
    assert len(COMMANDS) >= len(WORKFLOW["jobs"])
    for command in COMMANDS:
        program, *words = command.split()
        assert program in (".ci/run", "make"), command
        known = STEPS if program == ".ci/run" else TARGETS
        assert words and set(words) <= known, command


def test_the_workflow_sets_variables_that_the_makefile_reads() -> None:
    names = {name for job in WORKFLOW["jobs"].values() for name in job.get("env", {})}
    assert names == {"TORCH", "TRANSFORMERS", "SHARE"}
    for name in names:
        assert re.search(rf"^{name} \?=", MAKEFILE, re.MULTILINE), name


def test_every_step_calls_targets_that_exist() -> None:
    called = re.findall(r"^\s+run_make ([\w-]+)", RUN, re.MULTILINE)
    assert len(called) == len(STEPS)
    assert set(called) <= TARGETS


def test_the_list_of_steps_names_steps() -> None:
    listed = re.search(r"^STEPS=\((.*)\)$", RUN, re.MULTILINE)
    assert listed is not None and set(listed[1].split()) <= STEPS
    # Those left out are parts of others, or build on them.
    assert STEPS - set(listed[1].split()) == {"quick", "wheel_cuda"}


def test_an_unknown_step_is_refused_before_anything_runs() -> None:
    done = subprocess.run([ROOT / ".ci/run", "lint", "lnit"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("unknown step 'lnit'; the steps are: lint ")


@pytest.mark.parametrize("share", [None, "0/1"])
def test_a_commit_or_the_caller_chooses_the_share(tmp_path: Path, share: str | None) -> None:
    stub = tmp_path / "make"
    stub.write_text('#!/bin/sh\necho "make got $SHARE"\n')
    stub.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "SHARE"}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    environment |= {"SHARE": share} if share else {}
    command = [str(ROOT / ".ci/run"), "lint"]
    shares: set[str] = set()
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        shares |= set(re.findall(r"(?:series of tests:|make got) (\S+)", done.stdout))
    assert len(shares) == 1  # the same commit, the same share
    (chosen,) = shares
    assert chosen == share if share else re.fullmatch("[0-5]/6", chosen)


def test_make_knows_every_target_that_its_head_lists() -> None:
    listed = re.findall(r"^#   make ([\w-]+)", MAKEFILE, re.MULTILINE)
    assert len(listed) > 10 and set(listed) <= TARGETS
    done = subprocess.run(
        ["make", "-n", *sorted(set(listed) - {"clean"})], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.xdist_group("kept")
def test_the_groups_of_the_workers_are_kept(request: pytest.FixtureRequest) -> None:
    """Without them each worker builds all planted defects and loads all models."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("run without pytest-xdist's --dist loadgroup")
    assert request.node.nodeid.endswith("@kept")
