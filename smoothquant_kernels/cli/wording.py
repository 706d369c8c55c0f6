"""Rewrites errors, which name arguments of the Python API, in terms of command-line options."""

from __future__ import annotations

import re

#: Settings and arguments -> the options that set them.
OPTIONS = {
    "activation_scheme": "--scheme",
    "alpha": "--alpha",
    "rotation": "--rotation",
    "calibration_tokens": "--calibration-tokens",
    "max_tokens": "--max-tokens",
    "quantize_head": "--quantize-head",
    "outliers": "--outliers",
    "skip": "--skip",
    "smooth_rounding": "--smooth-rounding",
    "w_bit": "--w-bit",
    "weight_granularity": "--weight-granularity",
    "weight_rounding": "--weight-rounding",
    "window": "--window",
}

# Applied in this order. A test checks that every other sentence is free of words of the API.
_TABLE = (
    ("load the model and use smooth_and_quantize instead", "leave out --stream"),
    ("pass overwrite=True to replace it", "add --force to replace it"),
    ("pass resume=False to drop it and start anew", "add --restart to drop it and start anew"),
    ("pass resume=False to start anew", "add --restart to start anew"),
    (", or pass verify=False if you changed it on purpose", ""),
    ("pass dtype=torch.float32", "give --dtype float32"),
    (
        "use load_quantized for what save_quantized wrote and from_pretrained after register_transformers() for what "
        "save_pretrained wrote, or give the original model",
        "give the original model",
    ),
    (
        "load it by from_pretrained of transformers, after smoothquant_kernels.register_transformers()",
        "in Python, from_pretrained loads it after register_transformers()",
    ),
    (
        "use from_pretrained after register_transformers(compressed_tensors=True)",
        "in Python, from_pretrained loads it after register_transformers(compressed_tensors=True)",
    ),
    ("a folder that save_quantized wrote", "a folder that quantize wrote"),
    (", or pass model= with a model of that class", ""),
    (
        "pass model= with a float model of that architecture",
        "in Python, load_quantized takes such a model",
    ),
    (
        "pass a model of the same class and configuration",
        "quantize the model again with the installed transformers",
    ),
    (
        "pass a model whose buffers have data",
        "quantize the model again with the installed transformers",
    ),
    (
        "run smooth_lm on calibration data first (smooth=False only measures), or skip them",
        "calibrate on more text, or leave them in float with --skip",
    ),
    (
        "use smoothquant_kernels.quantize_streamed, which reads one block at a time",
        "add --stream, which reads one block at a time",
    ),
    ("calibrate again, or pass rotation='none'", "calibrate again, or give --rotation none"),
    ("pass the same `rotation` to smooth_lm and quantize_model", "give the same --rotation"),
    (": pass what its forward takes", ""),
    ("; to pass a text itself, pass [text]", ""),
    ("; pass a text itself as [text]", ""),
    (", or call quantize_model to go on with these", ""),
    (
        "pass `sample`, a dict of its arguments, to optimize_for_inference (load or quantize without optimize=True)",
        "leave out --optimize or --fusion; in Python, optimize_for_inference takes a sample",
    ),
    (
        "quantize it first (quantize_model, smooth_and_quantize) or load a quantized checkpoint (load_quantized)",
        "leave out --optimize or --fusion",
    ),
    ("optimize_for_inference would change", "fusing would change"),
    ("pass rotation='none', or save the native format", "leave out --rotation, or --format"),
    ("which folding='required' forbids", "which --strict forbids"),
    (
        "pass folding='only', or name these layers in skip",
        "leave out --strict, or leave these layers in float with --skip",
    ),
    ("pass w_bit=8, or save the native format", "leave out --w-bit, or --format"),
    ("pass outliers='none', or save the native format", "leave out --outliers, or --format"),
    ("pass weight_granularity='channel', not", "give --weight-granularity channel, not"),
    (
        "choose per_token or static, or save the native format",
        "give --scheme per_token or static, or leave out --format",
    ),
    (
        "name it in skip, or save the native format",
        "leave it in float with --skip, or leave out --format",
    ),
    (
        "quantize without quantize_head, or save the native format",
        "leave out --quantize-head, or --format",
    ),
    (
        "leave out quantize_head, or save the native format",
        "leave out --quantize-head, or --format",
    ),
)
_SETTING = re.compile(rf"^({'|'.join(OPTIONS)})(?= must be |: )")


def for_command_line(sentence: str) -> str:
    """The sentence of an error with options in place of arguments."""
    for words, instead in _TABLE:
        sentence = sentence.replace(words, instead)
    # Only at the start: an error about a settings file starts with its path, and its own names stay.
    return _SETTING.sub(lambda found: OPTIONS[found[0]], sentence)
