"""Kinds of quantized layers: a toy kind works with the whole package, which itself names no kind."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smoothquant_kernels
from smoothquant_kernels import (
    OutlierLinear,
    SmoothQuantConfig,
    SmoothQuantError,
    W4A8Linear,
    W8A8Experts,
    W8A8Linear,
    load_quantized,
    make_report,
    quantize_model,
    quantize_streamed,
    save_quantized,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.checkpoint.size import checkpoint_bytes
from smoothquant_kernels.checkpoint.skeleton import make_module
from smoothquant_kernels.modeling.float_layers import _own_methods
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn import kinds
from smoothquant_kernels.nn.attached import keeps_float
from smoothquant_kernels.report.measure import Plan, half_stand_in, stand_in
from tests.support.checkpoints import assert_same_bits, logits, manifest_of, refusal, rewrite
from tests.support.command_line import Result
from tests.support.half_linear import HalfKind, HalfLinear
from tests.support.models import layers_of, make_model, token_batches

PACKAGE = Path(smoothquant_kernels.__file__).parent
#: The folders whose code must work with every kind.
ABOVE = (
    "modeling",
    "checkpoint",
    "smoothing",
    "search",
    "streaming",
    "evaluation",
    "report",
    "cli",
)
BATCHES = token_batches(3)
CONFIG = SmoothQuantConfig(activation_scheme="static")
HALF = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
ARGUMENTS = {
    "class": "HalfLinear",
    "in_features": 32,
    "out_features": 32,
    "bias": False,
    "activation_scheme": "none",
}

pytestmark = pytest.mark.filterwarnings("ignore:the calibration data ended")


@pytest.fixture
def half() -> Iterator[HalfKind]:
    before = list(kinds.KINDS)
    kind = HalfKind()
    kinds.register(kind)
    yield kind
    kinds.KINDS[:] = before


@pytest.fixture
def quantized(half: HalfKind) -> Any:
    return smooth_and_quantize(make_model("llama_gqa"), BATCHES, CONFIG, progress=False)


@pytest.fixture
def folder(quantized: nn.Module, tmp_path: Path) -> Path:
    return save_quantized(quantized, tmp_path / "saved")


def halves(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, HalfLinear)]


def test_each_kind_replaces_its_layers(quantized: Any) -> None:
    assert halves(quantized) == HALF
    assert sum(isinstance(m, W8A8Linear) for m in quantized.modules()) == 12
    layers = layers_of(quantized)
    assert len(layers) == 14
    assert {n for n, la in layers.items() if la["activation_scheme"] == "none"} == set(HALF)
    assert {layers[n]["smoothing"] for n in HALF} == {"runtime"}


def test_quantize_model_chooses_the_same_kinds(half: HalfKind, quantized: Any) -> None:
    smoothed = smooth_lm(make_model("llama_gqa"), BATCHES, config=CONFIG, progress=False)
    assert_same_bits(logits(quantize_model(smoothed)), logits(quantized))
    assert halves(quantize_model(make_model("llama_gqa"))) == HALF


def test_a_loaded_model_equals_the_saved_one(quantized: Any, folder: Path) -> None:
    manifest = manifest_of(folder)
    assert {n: m for n, m in manifest["modules"].items() if n in HALF} == dict.fromkeys(
        HALF, ARGUMENTS
    )
    loaded = load_quantized(folder, model=make_model("llama_gqa"))
    assert halves(loaded) == HALF
    assert_same_bits(logits(loaded), logits(quantized))


def test_wrong_scales_and_arguments_are_refused(quantized: Any, folder: Path) -> None:
    rewrite(folder, lambda m: m["modules"][HALF[0]].update(activation_scheme="static"))
    assert f"arguments of {HALF[0]} are not understood" in refusal(lambda: load_quantized(folder))
    quantized.get_submodule(HALF[1]).peak.fill_(math.nan)
    said = refusal(lambda: save_quantized(quantized, folder, overwrite=True))
    assert said.startswith(f"{HALF[1]}.peak has a value that is NaN")


@pytest.mark.parametrize(
    "change",
    [{"bias": 0}, {"class": "FullLinear"}, {"class": ["HalfLinear"]}, {"dtype": "float32"}],
    ids=str,
)
def test_arguments_of_other_names_and_types_are_refused(half: HalfKind, change: Any) -> None:
    assert isinstance(make_module("a", ARGUMENTS), HalfLinear)
    assert "not understood" in refusal(lambda: make_module("a", {**ARGUMENTS, **change}))


def test_inspect_shows_the_kinds(folder: Path) -> None:
    seen = Result("inspect", folder, "--json").json
    layers = {layer["name"]: layer for layer in seen["layers"]}
    for name in HALF:
        assert ARGUMENTS.items() <= layers[name].items()
        assert layers[name]["bytes"] == 2 * 32 * 32 + 4
    assert seen["quantized"] == 14
    assert [g["count"] for g in seen["groups"] if g["activation_scheme"] == "none"] == [2]
    text = Result("inspect", folder).out
    assert re.search(r"o_proj +. +2 . +32 x 32 . none +. +none . runtime", text), text
    assert re.search(r"weights per channel, rotated by 8 and 32, alpha 0\.5 *\n", text), text


def test_the_report_measures_the_kinds(half: HalfKind, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = make_report(
        make_model("llama_gqa"), BATCHES, tmp_path / "report", CONFIG, held=BATCHES[:1]
    )
    noise = {layer["name"]: layer["sqnr"] for layer in document["layers"]}
    # float16 rounds by up to 2**-11 of a value, so its error is about 66 dB below the products. int8 gives about 40 dB.
    assert all((value > 60) == (name in HALF) for name, value in noise.items()), noise


def test_the_report_rounds_inputs_only_if_the_kind_does(half: HalfKind) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 16), torch.randn(5, 24)
    whole = stand_in(Plan(None, "per_token", None), HALF[0], CONFIG)
    assert_same_bits(half_stand_in(whole, weights=True)(linear)(x), whole(linear)(x))
    assert_same_bits(half_stand_in(whole, weights=False)(linear)(x), linear(x))


def test_a_streamed_model_has_the_same_kinds(
    quantized: Any, half: HalfKind, tmp_path: Path
) -> None:
    source = tmp_path / "float"
    make_model("llama_gqa").save_pretrained(source)
    streamed = quantize_streamed(source, tmp_path / "streamed", BATCHES, CONFIG, progress=False)
    loaded = load_quantized(streamed)
    assert halves(loaded) == HALF
    saved = save_quantized(quantized, tmp_path / "saved")
    assert manifest_of(streamed)["modules"] == manifest_of(saved)["modules"]
    assert_same_bits(logits(loaded), logits(quantized))


def test_checkpoint_bytes_count_each_kind(half: HalfKind) -> None:
    model = make_model("llama_gqa")
    linears = ModelView(model).linears
    mixed = checkpoint_bytes(model, linears, CONFIG)
    kinds.KINDS.remove(half)
    plain = checkpoint_bytes(model, linears, CONFIG)
    assert mixed - plain == 2 * ((2 * 32 * 32 + 4) - (32 * 32 + 4 * (32 + 32)))


def test_refusals_count_the_layers_of_each_kind(quantized: Any) -> None:
    assert "(12 W8A8Linear, 2 HalfLinear)" in refusal(
        lambda: smooth_lm(quantized, BATCHES, progress=False)
    )
    alone = nn.Sequential(*filter(kinds.is_quantized, quantized.modules()))
    assert "(12 W8A8Linear, 2 HalfLinear)" in refusal(lambda: quantize_model(alone))


def test_attributes_that_any_kind_uses_keep_a_layer_in_float(half: HalfKind) -> None:
    linear: Any = nn.Linear(4, 4)
    linear.mine = 3
    assert keeps_float(linear) is None
    linear.rounded = 3
    assert str(keeps_float(linear)).startswith("its attribute rounded means something else")
    kinds.KINDS.remove(half)
    assert keeps_float(linear) is None


def test_methods_that_any_kind_lacks_are_watched(half: HalfKind) -> None:
    class Own(nn.Linear):
        def dequantized_weight(self) -> Any:
            """`W8A8Linear` has this method, the toy kind does not."""

    assert "dequantized_weight" in _own_methods(Own)
    kinds.KINDS.remove(half)
    assert "dequantized_weight" not in _own_methods(Own)


def test_the_kind_registered_last_is_asked_first(half: HalfKind) -> None:
    later, fallback = HalfKind(), HalfKind()
    kinds.register(later)
    kinds.register(fallback, fallback=True)
    linear = nn.Linear(4, 4)
    assert kinds.choose("o_proj", linear, CONFIG) is later
    kinds.KINDS.remove(later)
    assert kinds.choose("o_proj", linear, CONFIG) is half
    assert kinds.choose("q_proj", linear, CONFIG).layer is W8A8Linear
    kinds.KINDS.remove(half)
    assert kinds.choose("o_proj", linear, CONFIG).layer is W8A8Linear


def test_without_other_kinds_every_layer_is_w8a8() -> None:
    assert [k.layer for k in kinds.KINDS] == [W8A8Linear, W8A8Experts, OutlierLinear, W4A8Linear]
    model = quantize_model(make_model("llama_gqa"))
    assert kinds.count_quantized(model) == "14 W8A8Linear"
    assert kinds.count_quantized(make_model("llama_gqa")) == ""
    with pytest.raises(SmoothQuantError, match=r"quantized already \(14 W8A8Linear\)"):
        quantize_model(model)


def names_of_kinds(code: str) -> set[str]:
    """The names of kinds in code, without those in docstrings and sentences."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    own = {kind.layer.__name__ for kind in kinds.KINDS}
    files = (".nn.linear", ".nn.w4a8_linear")
    return {n for n in found if n.rpartition(".")[2] in own or any(f in n for f in files)}


#: Others' formats of W8A8 layers: what they read and write is this kind and no other.
OF_W8A8 = ("checkpoint/compressed_tensors/", "checkpoint/vllm/")


def test_the_package_names_no_kind() -> None:
    for code in (
        "isinstance(m, W8A8Linear)",
        "isinstance(m, linear.W8A8Linear)",
        "from smoothquant_kernels.nn.linear import MARKER",
        "import smoothquant_kernels.nn.linear as l",
        "kind == 'W8A8Linear'",
        "isinstance(m, W4A8Linear)",
        "from smoothquant_kernels.nn.w4a8_linear import W4A8Linear",
    ):
        assert names_of_kinds(code), code
    assert not names_of_kinds('"""A `W8A8Linear`."""\nraise ValueError("or use W8A8Linear.f(x).")')
    files = [path for folder in ABOVE for path in (PACKAGE / folder).rglob("*.py")]
    assert len(files) > 50
    found = {p.relative_to(PACKAGE).as_posix(): names_of_kinds(p.read_text("utf-8")) for p in files}
    found = {name: names for name, names in found.items() if not name.startswith(OF_W8A8)}
    assert not {name: names for name, names in found.items() if names}
