"""`--help` describes each command completely, and each command's module accepts its options."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import typer

from smoothquant_kernels.cli import app
from tests.support.command_line import Result

HANDLED = {"as_json", "verbose"}  # `serve` handles these
COMMANDS: Any = typer.main.get_command(app.app)


def words(text: str) -> str:
    return " ".join(text.split())


def test_help_names_each_command_with_its_whole_first_sentence() -> None:
    said = words(Result("--help").out)
    for name, function in app._COMMANDS.items():
        assert f"{name} {words(inspect.getdoc(function).partition(chr(10) * 2)[0])}" in said


@pytest.mark.parametrize("name", app._COMMANDS)
def test_help_describes_all_options_of_a_command(name: str) -> None:
    said = words(Result(name, "--help").out)
    for parameter in COMMANDS.get_command(None, name).params:
        # Of an argument, help shows the metavar instead of the name.
        shown = [name for name in parameter.opts if name.startswith("-")]
        assert words(parameter.help) in said and all(option in said for option in shown)


@pytest.mark.parametrize("name", app._COMMANDS)
def test_a_commands_module_accepts_its_options(name: str) -> None:
    module = import_module(f"smoothquant_kernels.cli.{name}")
    options = inspect.signature(app._COMMANDS[name]).parameters.keys() - HANDLED
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


def test_without_arguments_help_goes_to_stdout() -> None:
    asked, alone = Result("--help"), Result()
    assert (asked.code, alone.code) == (0, 2)
    assert alone.out == asked.out and not alone.err
