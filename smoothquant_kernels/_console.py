"""What the command line prints, and where: the result on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer

from smoothquant_kernels._wording import for_command_line
from smoothquant_kernels.errors import SmoothQuantError

Document = dict[str, Any]

MISMATCH, USER_ERROR, INTERRUPTED = 1, 2, 130
_PIPE_WIDTH = 124  # of tables that go into a file or a pipe, where there is no terminal to ask
_VERBOSE = False


class MismatchError(SmoothQuantError):
    """A check that was asked for has failed: exit code 1, as `cmp` and `sha256sum --check` have it."""


def serve(
    work: Callable[[], Document],
    render: Callable[[Document], Any],
    *,
    as_json: bool,
    verbose: bool = False,
) -> None:
    """Runs a command and prints its document: as JSON, or as `render` has it (text, a renderable).

    Raises:
        typer.Exit: 2 after a SmoothQuantError, whose sentence is printed, 1 if it is a MismatchError; 130 after Ctrl-C.
    """
    global _VERBOSE
    _VERBOSE = verbose
    try:
        # A library that prints to stdout would spoil the JSON document.
        with contextlib.redirect_stdout(sys.stderr), _quiet_libraries(verbose):
            document = work()
    except SmoothQuantError as error:
        # The sentence may quote a library's message with line breaks.
        text = for_command_line(" ".join(str(error).split()))
        print(f"Error: {text}", file=sys.stderr)
        raise typer.Exit(MISMATCH if isinstance(error, MismatchError) else USER_ERROR) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print(json_text(document))
        return
    shown = render(document)
    if isinstance(shown, str):
        print(shown)
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    # markup=False: layer patterns and paths may hold brackets.
    Console(width=width, highlight=False, markup=False).print(shown)


def note(text: str) -> None:
    """Says on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


def show_progress() -> bool:
    """Whether progress bars make sense: they are for people who look at a terminal."""
    return sys.stderr.isatty()


def json_text(document: Mapping[str, Any]) -> str:
    """JSON that every parser reads: NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_plain(document), indent=2, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


@contextlib.contextmanager
def _quiet_libraries(verbose: bool) -> Iterator[None]:
    """Sends rich's bars to stderr and, unless `verbose`, silences warnings and downloads' bars."""
    import rich

    rich.reconfigure(stderr=True)  # the console that bars take when nobody names one
    if verbose:
        yield
        return
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    if (transformers := sys.modules.get("transformers")) is not None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drops what libraries write to stderr in the block: loading GGUF shows bars that no option
    turns off. Exceptions pass."""
    if _VERBOSE:
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def readable_size(size: float) -> str:
    """A size for people."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_:
            return f"{size / bytes_:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def general_name(text: str) -> str:
    """The text with layer numbers as `*`, so that the same remark about many layers is counted."""
    return re.sub(r"(?<=\.)\d+(?=\.|\b)", "*", text)
