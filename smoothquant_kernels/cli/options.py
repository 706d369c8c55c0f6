"""Options that several commands share, with their help."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from smoothquant_kernels.config import (
    OUTLIERS,
    PLAIN_ALPHA,
    ROTATED_ALPHA,
    ROTATIONS,
    ROUNDINGS,
    WEIGHT_ROUNDINGS,
)
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES, WEIGHT_GRANULARITIES


class Command(typer.core.TyperCommand):
    """A command whose error about an option's value quotes that value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)  # parsing empties args
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            for name in getattr(error.param, "opts", ()):
                if values := [b for a, b in itertools.pairwise(given) if a == name]:
                    error.message += f"; got {values[-1]!r}"  # the last one counts
            raise


TEXT_HELP = (
    'a text file, a .csv, .tsv, .jsonl, .json or .parquet file with a column "text" (another: FILE:COLUMN), a folder '
    "of .txt files, topics:calibration, "
    "topics:evaluation (Python's own documentation, in two halves), or a data set on the hub "
    "as name[:config[:split]]"
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Show the libraries' warnings and progress bars, and their tracebacks.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda, cuda:1, ... or auto, which takes a GPU if the CUDA kernels can run.",
    ),
]
DTYPES = ("float32", "bfloat16", "float16")  # torch's names


def _choices(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _by_scheme(values: Mapping[str, float]) -> str:
    """The value of each scheme, or the one that all have."""
    if len(set(values.values())) == 1:
        return str(next(iter(values.values())))
    return ", ".join(f"{value} {name}" for name, value in values.items())


Dtype = Annotated[
    str, typer.Option(metavar="TYPE", help=f"Type of the float weights: {_choices(DTYPES)}.")
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A hub name, a folder, a folder with one GGUF file, or a GGUF file: a causal language model, a text "
        "encoder, or a vision model.",
    ),
]
AnyModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_CHECKPOINT",
        help="A causal language model as for quantize, or a folder that quantize wrote.",
    ),
]
Optimize = Annotated[
    bool,
    typer.Option(
        "--optimize",
        help="Run whole blocks of a quantized model in fused ops: the same numbers, up to rounding.",
    ),
]
KV_CACHES = ("int8", "int8-static")
KVCache = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Keep keys and values in int8: int8, with a scale per token and head, or int8-static, with the scales "
        "that quantize --kv-cache int8-static has stored.",
        show_default="float",
    ),
]
Window = Annotated[int, typer.Option(min=2, help="Tokens that the model reads at a time.")]

# --- how a model is smoothed and quantized --------------------------------------------------------

Alpha = Annotated[
    float | None,
    typer.Option(
        help="Migration strength in [0, 1].",
        show_default=f"{_by_scheme(ROTATED_ALPHA)}; without rotation {_by_scheme(PLAIN_ALPHA)}",
    ),
]
Rotation = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help=f"Input channels that are rotated together, after smoothing: {ROTATIONS}.",
        show_default="auto",
    ),
]
Scheme = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Activation scales, dynamic or calibrated: {_choices(ACTIVATION_SCHEMES)}.",
        show_default="per_token",
    ),
]
WeightGranularity = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Weight scales, one for each: {_choices(WEIGHT_GRANULARITIES)}.",
        show_default="channel",
    ),
]
WeightRounding = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Rounding of weights: {_choices(WEIGHT_ROUNDINGS)}; gptq fits it to the calibration text, in minutes; "
        "auto is gptq for W4A8 layers and nearest for others.",
        show_default="auto",
    ),
]
SmoothRounding = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Rounding of smoothing factors: {_choices(ROUNDINGS)}; powers of two fold without changing a bit, auto "
        "takes them for half precision.",
        show_default="auto",
    ),
]
WBit = Annotated[
    int | None,
    typer.Option(
        help="Bits of the weights: 8, or 4 in groups of 128 (W4A8).", show_default="8", metavar="N"
    ),
]
Outliers = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Outlier columns in float beside int8: {_choices(OUTLIERS)}.",
        show_default="none",
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE.json",
        help="Format, scheme, rotation and outliers of each layer or pattern (docs/guides/plan.md).",
    ),
]
MaxBytes = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Search the plan of least error whose quantized layers take N bytes; kept in OUTPUT.plan.json.",
    ),
]
MaxKL = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        min=0.0,
        metavar="X",
        help="Search the smallest plan whose layers cost a KL divergence of X; kept in OUTPUT.plan.json.",
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="Layers that stay in float, e.g. '*.o_proj'; may be repeated."
    ),
]
Format = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="native, with everything, or compressed-tensors, which vLLM, SGLang and transformers load without this "
        "package: smoothing is folded or left out, nothing is rotated.",
    ),
]
QuantizeHead = Annotated[
    bool,
    typer.Option(
        "--quantize-head",
        help="The output head in int8 too, with a scale per token: for small models, where it takes much of the time.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.json",
        help="Settings, any of docs/reference/cli.md, also those without an option; the options override them.",
    ),
]
Calibration = Annotated[
    str,
    typer.Option(
        metavar="SOURCE",
        help=f"Text to calibrate on: {TEXT_HELP}. For a vision model a folder of images.",
    ),
]
CalibrationTokens = Annotated[
    int | None, typer.Option(help="Tokens of it to use.", show_default="16384", metavar="N")
]
