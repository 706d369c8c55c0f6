"""What the command line prints, and where: the result on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from smoothquant_kernels.errors import SmoothQuantError

if TYPE_CHECKING:
    from smoothquant_kernels.storage.document import Document

DEFECT, MISMATCH, USER_ERROR, INTERRUPTED = 1, 1, 2, 130
_PACKAGE = str(Path(__file__).parents[1])
_PIPE_WIDTH = 124  # of tables that go into a file or a pipe, where there is no terminal to ask
_VERBOSE = False


class MismatchError(SmoothQuantError):
    """A check that was asked for has failed: exit code 1, as `cmp` and `sha256sum --check` have it."""


def serve(command: str, *, as_json: bool, verbose: bool = False, **arguments: Any) -> None:
    """Runs a command and prints its document.

    Its module has two functions: `work` makes the document from the arguments, and `render` makes what people read
    (text, a renderable) from nothing but the document.

    Args:
        command: the name of the command and of its module, which is imported here, so that help is quick.
        as_json: prints the document as JSON.
        verbose: shows the libraries' warnings, progress bars and tracebacks.
        arguments: what `work` takes.

    Raises:
        typer.Exit: after one sentence. 2: a SmoothQuantError, no memory, or a file or disk that fails. 1: a
            MismatchError, or an exception of a model's own code or of another package. 130: Ctrl-C.
    """
    global _VERBOSE
    _VERBOSE = verbose
    try:
        # A library that prints to stdout would spoil the JSON document.
        with contextlib.redirect_stdout(sys.stderr), _quiet_libraries(verbose):
            module = import_module(f"smoothquant_kernels.cli.{command}")
            document = module.work(**arguments)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        text, code = _told(error)
        if verbose and not isinstance(error, SmoothQuantError):
            traceback.print_exc()
        # Here and below imports are late where help needs nothing of them.
        from smoothquant_kernels.cli.wording import for_command_line

        # The sentence may quote a library's message with line breaks.
        print(f"Error: {for_command_line(' '.join(text.split()))}", file=sys.stderr)
        raise typer.Exit(code) from None
    try:
        _show(document, None if as_json else module.render)
    except BrokenPipeError:
        raise  # typer ends quietly
    except OSError as error:
        print(f"Error: {_os_sentence(error)}", file=sys.stderr)
        raise typer.Exit(USER_ERROR) from None


def _told(error: Exception) -> tuple[str, int]:
    """What to say of an exception, and the exit code; raises it again if it is a defect of this package.

    An exception that comes out of another package's code (a model's own, a library) is told in one sentence: it may as
    well be the model or the data.
    """
    if isinstance(error, SmoothQuantError):
        return str(error), MISMATCH if isinstance(error, MismatchError) else USER_ERROR
    words = " ".join(str(error).split())
    memory = isinstance(error, MemoryError | _out_of_memory()) or "can't allocate memory" in words
    if memory:
        return (
            f"out of memory ({words[:200] or type(error).__name__}): free some, use fewer tokens, or quantize with "
            "--stream, which reads one block at a time."
        ), USER_ERROR
    if isinstance(error, OSError) and error.strerror:
        return _os_sentence(error), USER_ERROR
    raised = traceback.extract_tb(error.__traceback__)[-1]
    if raised.filename.startswith(_PACKAGE) or isinstance(error, AssertionError):
        raise error
    place = "/".join(Path(raised.filename).parts[-3:])
    return (
        f"{type(error).__name__} in {place}, line {raised.lineno}, which is not code of this package: "
        f"{words[:400].rstrip('.') or 'no message'}. The same command with --verbose shows the traceback."
    ), DEFECT


def _out_of_memory() -> type[Exception]:
    torch: Any = sys.modules.get("torch")
    return MemoryError if torch is None else torch.OutOfMemoryError


def _os_sentence(error: OSError) -> str:
    place = error.filename if error.filename is not None else "the output"
    return f"{place}: {error.strerror}; give another place, or mend that one."


def _show(document: Document, render: Any) -> None:
    if render is None:
        from smoothquant_kernels.storage.document import json_text

        print(json_text(document), flush=True)
        return
    shown = render(document)
    if isinstance(shown, str):
        print(shown)
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    # markup=False: layer patterns and paths may hold brackets.
    Console(width=width, highlight=False, markup=False).print(shown)


def show_progress() -> bool:
    """Whether progress bars make sense: they are for people who look at a terminal."""
    return sys.stderr.isatty()


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


def general_name(text: str) -> str:
    """The text with layer numbers as `*`, so that the same remark about many layers is counted.

    A figure such as 0.52% is no layer's number.
    """
    return re.sub(r"(?<=\.)\d+\b(?!%)", "*", text)
