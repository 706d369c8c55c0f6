"""The output of the command line: the result goes to stdout, everything else to stderr."""

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
_PIPE_WIDTH = 124  # of tables in a file or a pipe, which have no terminal width
_VERBOSE = False


class MismatchError(SmoothQuantError):
    """A requested check has failed: exit code 1, as for `cmp` and `sha256sum --check`."""


def serve(command: str, *, as_json: bool, verbose: bool = False, **arguments: Any) -> None:
    """Runs a command and prints its document.

    Its module has two functions: `work` makes the document from the arguments, and `render` makes the text or
    renderable that people read from the document alone.

    Args:
        command: the name of the command and of its module. The module is imported here, so that help is quick.
        as_json: prints the document as JSON.
        verbose: shows the libraries' warnings, progress bars and tracebacks.
        arguments: what `work` takes.

    Raises:
        typer.Exit: after printing one sentence. 2: a SmoothQuantError, no memory, or a file or disk that fails. 1: a
            MismatchError, or an exception from a model's own code or another package. 130: Ctrl-C.
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
        # Here and below, imports that help does not need are late.
        from smoothquant_kernels.cli.wording import for_command_line

        # The sentence may quote a library's message with line breaks.
        print(f"Error: {for_command_line(' '.join(text.split()))}", file=sys.stderr)
        raise typer.Exit(code) from None
    try:
        _show(document, None if as_json else module.render)
    except BrokenPipeError:
        raise  # typer exits quietly
    except OSError as error:
        print(f"Error: {_os_sentence(error)}", file=sys.stderr)
        raise typer.Exit(USER_ERROR) from None


def _told(error: Exception) -> tuple[str, int]:
    """The sentence for an exception, and the exit code; re-raises a defect of this package.

    An exception from another package's code (a model's own, a library) becomes one sentence, because the model or the
    data may be its cause.
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
    """Whether to show progress bars: only if stderr is a terminal."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def _quiet_libraries(verbose: bool) -> Iterator[None]:
    """Sends rich's bars to stderr and, unless `verbose`, silences warnings and download bars."""
    import rich

    rich.reconfigure(stderr=True)  # progress bars use this console by default
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
    """Drops what libraries write to stderr in the block. Exceptions pass.

    Loading GGUF shows bars that no option turns off.
    """
    if _VERBOSE:
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def general_name(text: str) -> str:
    """The text with layer numbers as `*`, so that the same remark about many layers can be counted.

    A figure such as 0.52% is not a layer number.
    """
    return re.sub(r"(?<=\.)\d+\b(?!%)", "*", text)
