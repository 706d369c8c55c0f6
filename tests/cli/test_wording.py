"""Errors on the command line name its options. The tests read every message in the package's sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import smoothquant_kernels
from smoothquant_kernels import config
from smoothquant_kernels.cli import options, wording
from smoothquant_kernels.cli.loading import choose_dtype
from smoothquant_kernels.cli.wording import for_command_line
from smoothquant_kernels.streaming.source import IN_MEMORY

PACKAGE = Path(smoothquant_kernels.__file__).parent
FUNCTIONS = "|".join(n for n in smoothquant_kernels.__all__ if n.islower() and n != "ops")
API = re.compile(rf"\b\w+=(?!=)|\b({FUNCTIONS}|load_model|from_pretrained)\b|\b[Pp]ass |torch\.\w")
# Messages of functions that no command calls, or about arguments that the commands always pass.
PYTHON_ONLY = (
    "modeling/batches.py: ",  # about batches that users make
    "smoothing/entries.py: ",
    "nn/float_types.py: ",  # the command line chooses the type itself
    "fusion/deferred.py: ",  # the command line does not compile
    "fusion/forwards.py: ",  # it neither trains nor loads states
    "fusion/merged.py: ",
    "adapters/",  # no command reads adapters
    "checkpoint/hf_quantizer.py: ",
    "checkpoint/hf_loading.py: ",
    "checkpoint/tensor_parallel.py: ",
    "checkpoint/vllm/",
    "nn/parallel/",
    "checkpoint/compressed_tensors/hook.py: ",
    "smoothing/ranks.py: all_reduce",
    "checkpoint/transformers_hook.py: ",
    "smoothing/calibrate.py: ",  # about data that users make
    "checkpoint/save.py: max_shard_bytes",
    "search/plan_search.py: give one of max_bytes",
    "checkpoint/save.py: the model has no quantized layer",
    "checkpoint/save.py: tokenizer must",
    "smoothing/convert.py: layer ... was smoothed as a part",
    "smoothing/outliers.py: ",  # the command calibrates for them
    "smoothing/convert.py: weight_rounding='gptq' needs",
    "smoothing/smooth.py: the statistics were collected without",
    "smoothing/statistics.py: the statistics have no squares",
    "evaluation/models.py: dtype must be",
    "modeling/run.py: a batch",
    "kv_cache/cache.py: Int8KVCache: calibration must be",
    "kv_cache/cache.py: Int8KVCache: static scales",  # it chooses neither rotation nor alpha
    "kv_cache/cache.py: Int8KVCache: ... needs a calibration",
    "kv_cache/tokens.py: Int8KVCache: rotation",
    "kv_cache/attention.py: ",  # the command line chooses the attention itself
    "smoothing/kv_cache.py: ",  # about data that users make
    "evaluation/kv_cache.py: ",  # the command line reads one token at a time
    "modeling/view.py: the model is itself",
    "report/report.py: to evaluate on text",
)


def literal(node: ast.expr) -> str:
    """The text of a string expression, with `...` for inserted values."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(literal(v) for v in values)
        case ast.FormattedValue(value=ast.Name(id="IN_MEMORY")):
            return IN_MEMORY
        case ast.BinOp(left=left, right=right):
            return literal(left) + literal(right)
        case ast.IfExp(body=body, orelse=other):
            return literal(body) + literal(other)
    return "..."


def messages() -> Iterator[str]:
    for file in sorted(PACKAGE.glob("**/*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                if node.func.id in ("SmoothQuantError", "MismatchError"):
                    yield f"{file.relative_to(PACKAGE).as_posix()}: {literal(node.args[0])}"


def test_messages_do_not_name_the_api() -> None:
    found = [m for m in messages() if not m.startswith(PYTHON_ONLY)]
    assert len(found) > 100
    # A sentence with "in Python, " may use words of the API.
    wrong = [
        m
        for m in found
        if API.search(for_command_line(m)) and "in Python, " not in for_command_line(m)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_has_no_unused_words() -> None:
    said = "\n".join(messages())
    assert not [words for words, _ in wording._TABLE if words not in said]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (f"no blocks: {IN_MEMORY}.", "no blocks: leave out --stream."),
        (
            "x exists already: pass overwrite=True to replace it, or",
            "x exists already: add --force to replace it, or",
        ),
        ("alpha must be a number; got 2", "--alpha must be a number; got 2"),
        ("c.json: alpha must be a number; got 2", "c.json: alpha must be a number; got 2"),
        ("smooth must be true or false", "smooth must be true or false"),
    ],
)
def test_options_replace_arguments(said: str, expected: str) -> None:
    assert for_command_line(said) == expected


def test_help_lists_the_choices_of_the_configuration() -> None:
    for option, name, choices in (
        (options.Scheme, "activation_scheme", config.ACTIVATION_SCHEMES),
        (options.WeightGranularity, "weight_granularity", config.WEIGHT_GRANULARITIES),
        (options.WeightRounding, "weight_rounding", config.WEIGHT_ROUNDINGS),
        (options.SmoothRounding, "smooth_rounding", config.ROUNDINGS),
    ):
        (shown,) = option.__metadata__
        assert f"{', '.join(choices[:-1])} or {choices[-1]}" in shown.help
        assert shown.show_default == getattr(config.SmoothQuantConfig(), name)
    (rotation,) = options.Rotation.__metadata__
    assert config.ROTATIONS in rotation.help
    assert rotation.show_default == config.SmoothQuantConfig().rotation
    (alpha,) = options.Alpha.__metadata__
    assert set(config.ROTATED_ALPHA.values()) == {float(alpha.show_default.split(";")[0])}
    for scheme, default in config.PLAIN_ALPHA.items():
        assert f"{default} {scheme}" in alpha.show_default
    (dtype,) = options.Dtype.__metadata__
    assert "float32, bfloat16 or float16" in dtype.help
    assert [choose_dtype(name) for name in options.DTYPES] == [
        torch.float32, torch.bfloat16, torch.float16,
    ]  # fmt: skip


def test_the_named_options_exist() -> None:
    program = (PACKAGE / "cli" / "app.py").read_text("utf-8")
    known = {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", program, re.M)}
    assert set(wording.OPTIONS.values()) <= known
    for _, instead in wording._TABLE:
        for option in re.findall(r"--[a-z][a-z-]*", instead):
            assert option in known or f'"{option}"' in program
