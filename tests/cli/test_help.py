"""What `--help` says, and that a command's module takes what its options give."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import typer

from smoothquant_kernels.cli import app as _app
from tests.support.command_line import Result

HANDLED = {"as_json", "verbose"}  # by `serve`
COMMANDS: Any = typer.main.get_command(_app.app)


def words(text: str) -> str:
    return " ".join(text.split())


def test_help_names_each_command_with_its_whole_first_sentence() -> None:
    said = words(Result("--help").out)
    for name, function in _app._COMMANDS.items():
        assert f"{name} {words(inspect.getdoc(function).partition(chr(10) * 2)[0])}" in said


@pytest.mark.parametrize("name", _app._COMMANDS)
def test_help_of_a_command_says_all_of_its_options(name: str) -> None:
    said = words(Result(name, "--help").out)
    for parameter in COMMANDS.get_command(None, name).params:
        shown = [
            name for name in parameter.opts if name.startswith("-")
        ]  # an argument has a metavar
        assert words(parameter.help) in said and all(option in said for option in shown)


@pytest.mark.parametrize("name", _app._COMMANDS)
def test_the_module_of_a_command_takes_its_options(name: str) -> None:
    module = import_module(f"smoothquant_kernels.cli.{name}")
    options = inspect.signature(_app._COMMANDS[name]).parameters.keys() - HANDLED
    given = dict.fromkeys(options, None)
    bound = inspect.signature(module.work).bind(**given)
    more = bound.arguments.get("options")
    if more is not None:
        from smoothquant_kernels.cli.loading import changed_settings
        from smoothquant_kernels.config import SmoothQuantConfig

        inspect.signature(changed_settings).bind(**more)
        changed = changed_settings(**dict.fromkeys(more, 1) | {"skip": ["a"]})
        assert len(changed) == len(more)
        assert changed.keys() <= SmoothQuantConfig().to_dict().keys()
    assert list(inspect.signature(module.render).parameters) == ["document"]


def test_no_arguments_are_help_on_stdout() -> None:
    asked, alone = Result("--help"), Result()
    assert (asked.code, alone.code) == (0, 2)
    assert alone.out == asked.out and not alone.err
