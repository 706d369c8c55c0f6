"""`SmoothQuantConfig`: JSON round trip, refused values, and the settings of single layers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from smoothquant_kernels import SmoothQuantConfig, SmoothQuantError
from smoothquant_kernels.config import (
    AUTO_ROTATION,
    FOLDINGS,
    FORMATS,
    MASSIVE_CHOICES,
    MASSIVE_PEAK,
    NORMS,
    OUTLIERS,
    PLAIN_ALPHA,
    ROTATED_ALPHA,
    ROTATED_NORMS,
    ROUNDINGS,
    WEIGHT_ROUNDINGS,
)
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES, MAX_ROTATION, WEIGHT_GRANULARITIES

ROTATIONS = st.sampled_from(["auto", "none", 2, 16, 256, 512])

configs = st.builds(
    SmoothQuantConfig,
    alpha=st.none() | st.floats(0, 1) | st.sampled_from([0, 1]),
    smooth=st.booleans(),
    rotation=ROTATIONS,
    activation_norm=st.sampled_from(NORMS),
    weight_norm=st.sampled_from(NORMS),
    weight_rounding=st.sampled_from(WEIGHT_ROUNDINGS),
    rotations=st.dictionaries(st.text(max_size=8), ROTATIONS, max_size=3),
    activation_scheme=st.sampled_from(ACTIVATION_SCHEMES),
    alphas=st.dictionaries(st.text(max_size=8), st.floats(0, 1), max_size=3),
    schemes=st.dictionaries(st.text(max_size=8), st.sampled_from(ACTIVATION_SCHEMES), max_size=3),
    clips=st.dictionaries(st.text(max_size=8), st.floats(0, 1, exclude_min=True), max_size=3),
    massive_activations=st.sampled_from(MASSIVE_CHOICES),
    weight_granularity=st.sampled_from(WEIGHT_GRANULARITIES),
    smooth_rounding=st.sampled_from(ROUNDINGS),
    folding=st.sampled_from(FOLDINGS),
    only_where_better=st.booleans(),
    verify_tolerance=st.none() | st.floats(0, 1, exclude_max=True),
    skip=st.lists(st.text(max_size=8), max_size=3),
    quantize_head=st.booleans(),
    w_bit=st.sampled_from([4, 8]),
    formats=st.dictionaries(st.text(max_size=8), st.sampled_from(FORMATS), max_size=3),
    awq=st.booleans(),
    outliers=st.sampled_from(OUTLIERS),
    outlier_threshold=st.floats(0, 1e9, exclude_min=True),
    outlier_layers=st.dictionaries(st.text(max_size=8), st.sampled_from(OUTLIERS), max_size=3),
    calibration_tokens=st.integers(1, 2**60),
    calibration_window=st.integers(1, 2**20),
)


def test_the_strategy_covers_every_setting() -> None:
    """A new setting must be added to `configs` and to REFUSED."""
    fields = {f.name for f in dataclasses.fields(SmoothQuantConfig)}
    assert fields == {name for name, _, _ in REFUSED}


@settings(max_examples=100, deadline=None)
@given(configs)
def test_json_round_trip(config: SmoothQuantConfig) -> None:
    text = config.to_json()
    assert SmoothQuantConfig.from_json(text) == config
    assert SmoothQuantConfig.from_json(text).to_json() == text
    assert SmoothQuantConfig.from_dict(config.to_dict()) == config
    assert hash(SmoothQuantConfig.from_json(text)) == hash(config)
    assert json.loads(text).keys() == {f.name for f in dataclasses.fields(config)}


REFUSED: list[tuple[str, Any, str]] = [
    *[("alpha", v, "alpha must be a number in [0, 1]") for v in (-0.1, 1.1, math.nan, math.inf)],
    *[("alpha", v, "alpha must be a number in [0, 1]") for v in ("0.5", True, [0.5])],
    *[
        (name, v, f"{name} must be true or false")
        for name in ("smooth", "only_where_better", "quantize_head", "awq")
        for v in ("yes", None, 1)
    ],
    *[
        ("activation_scheme", v, "must be one of per_token, per_tensor, static")
        for v in ("token", "", None, 1, ["per_token"])
    ],
    *[
        ("alphas", v, "alphas must be a mapping of layer names or patterns to numbers in [0, 1]")
        for v in (0.5, [("a", 0.5)], {"a": 1.5}, {"a": "0.5"}, {"a": None}, {1: 0.5})
    ],
    *[
        ("schemes", v, "schemes must be a mapping of layer names or patterns to one of per_token,")
        for v in ("static", {"a": "token"}, {"a": None}, {None: "static"})
    ],
    *[
        ("clips", v, "clips must be a mapping of layer names or patterns to numbers in (0, 1]")
        for v in (0.9, {"a": 0}, {"a": 1.1}, {"a": math.nan}, {"a": True})
    ],
    *[
        ("rotation", v, "rotation must be auto, none or a power of two from 2 to 512")
        for v in ("256", "", None, True, 0, 1, 3, -2, 1024, 16.0)
    ],
    *[
        ("rotations", v, "rotations must be a mapping of layer names or patterns to auto, none or")
        for v in (256, {"a": 24}, {"a": None}, {"a": False}, {1: 16})
    ],
    *[
        (name, v, f"{name} must be one of auto, max, rms")
        for name in ("activation_norm", "weight_norm")
        for v in ("mean", None, 2, ["max"])
    ],
    *[("massive_activations", v, "must be one of per_token, keep") for v in ("static", None)],
    *[("weight_granularity", v, "must be one of channel, tensor") for v in ("row", None)],
    *[("weight_rounding", v, "must be one of auto, nearest, gptq") for v in ("GPTQ", None, True)],
    *[("smooth_rounding", v, f"must be one of {', '.join(ROUNDINGS)}") for v in ("nearest", None)],
    *[("folding", v, f"must be one of {', '.join(FOLDINGS)}") for v in ("always", None, False)],
    *[("w_bit", v, "w_bit must be 4 or 8") for v in (2, 16, "8", 8.0, True, None)],
    *[("a_bit", v, "a_bit must be 8 (activations are int8") for v in (4, 16, "8", 8.0, None)],
    *[
        ("formats", v, "formats must be a mapping of layer names or patterns to one of float, w8a8")
        for v in ("w4a8", {"a": "int4"}, {"a": None}, {1: "float"})
    ],
    *[("outliers", v, "must be one of none, static, dynamic") for v in ("auto", None, True)],
    *[
        ("outlier_threshold", v, "outlier_threshold must be a number above 0")
        for v in (0, -1.0, math.inf, math.nan, "6", True, None)
    ],
    *[
        ("outlier_layers", v, "outlier_layers must be a mapping of layer names or patterns to one")
        for v in ("static", {"a": "6.0"}, {"a": None}, {1: "none"})
    ],
    *[
        ("verify_tolerance", v, "verify_tolerance must be a number in [0, 1)")
        for v in (-1e-9, 1.0, math.nan, "small", False)
    ],
    *[
        ("skip", v, "skip must be a list or tuple of module-name patterns")
        for v in ("lm_head", None, 5, [5], ["a", None], {"a": 1})
    ],
    *[
        (name, v, f"{name} must be a whole number >= 1")
        for name in ("calibration_tokens", "calibration_window")
        for v in (0, -1, 1.0, "8", None, True)
    ],
]


@pytest.mark.parametrize(("name", "value", "sentence"), REFUSED)
def test_refusals(name: str, value: Any, sentence: str) -> None:
    expected = f"{re.escape(sentence)}.*; got {re.escape(repr(value))}"
    with pytest.raises(SmoothQuantError, match=expected):
        SmoothQuantConfig(**{name: value})
    with pytest.raises(SmoothQuantError, match=expected):
        SmoothQuantConfig.from_dict({name: value})
    with pytest.raises(SmoothQuantError, match=expected):
        SmoothQuantConfig().replace(**{name: value})
    if not isinstance(value, dict) or all(isinstance(key, str) for key in value):
        with pytest.raises(SmoothQuantError, match=re.escape(sentence)):
            SmoothQuantConfig.from_json(json.dumps({name: value}))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the configuration is not valid JSON"),
        ("{alpha: 1}", "the configuration is not valid JSON"),
        ("[]", "the configuration must be a JSON object, got list."),
        ("null", "the configuration must be a JSON object, got NoneType."),
        ('{"aplha": 1, "beta": 2}', "unknown setting aplha, beta; known are a_bit,"),
    ],
)
def test_invalid_text_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(SmoothQuantError, match=re.escape(sentence)):
        SmoothQuantConfig.from_json(text)


def test_frozen_hashable_and_replaceable() -> None:
    config = SmoothQuantConfig(skip=["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 0.1  # type: ignore[misc]
    assert config.skip == ("a", "b")
    changed = config.replace(alpha=0.25)
    assert changed.alpha == 0.25 and changed.skip == ("a", "b") and config.alpha != 0.25
    assert {config: 1}[SmoothQuantConfig(skip=("a", "b"))] == 1
    assert changed != config
    with pytest.raises(TypeError, match="beta"):
        config.replace(beta=1)


def test_missing_settings_take_their_defaults() -> None:
    assert SmoothQuantConfig.from_json("{}") == SmoothQuantConfig()
    assert SmoothQuantConfig.from_json('{"skip": ["x*"]}').skip == ("x*",)


def test_alpha_depends_on_the_scheme_unless_it_is_given() -> None:
    for rotated, defaults in ((True, ROTATED_ALPHA), (False, PLAIN_ALPHA)):
        assert defaults.keys() == set(ACTIVATION_SCHEMES)
        for scheme, alpha in defaults.items():
            config = SmoothQuantConfig(activation_scheme=scheme)
            assert config.alpha_of(10.0, rotated=rotated) == alpha
            assert config.replace(alpha=0).alpha_of(10.0, rotated=rotated) == 0


def test_norms_depend_on_the_scheme_and_the_rotation_unless_they_are_given() -> None:
    assert ROTATED_NORMS.keys() == set(ACTIVATION_SCHEMES)
    for scheme, norms in ROTATED_NORMS.items():
        config = SmoothQuantConfig()
        assert config.norms_of(scheme, rotated=True) == norms
        assert config.norms_of(scheme, rotated=False) == ("max", "max")
        for rotated, auto in ((True, norms), (False, ("max", "max"))):
            one = config.replace(activation_norm="rms").norms_of(scheme, rotated=rotated)
            assert one == ("rms", auto[1])
            other = config.replace(weight_norm="max").norms_of(scheme, rotated=rotated)
            assert other == (auto[0], "max")


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        # K: 4096, 576, 24, 12, 9
        ("auto", (AUTO_ROTATION, 64, 8, 0, 0)),
        ("none", (0, 0, 0, 0, 0)),
        (MAX_ROTATION, (512, 64, 8, 4, 0)),
        (16, (16, 16, 8, 4, 0)),
        (2, (2, 2, 2, 2, 0)),
    ],
)
def test_the_rotation_of_a_layer_fits_its_channels(asked: Any, sizes: tuple[int, ...]) -> None:
    config = SmoothQuantConfig(rotation=asked)
    assert tuple(config.rotation_of(k, "x") for k in (4096, 576, 24, 12, 9)) == sizes
    own = config.replace(rotation="none", rotations={"x": asked, "*": 2})
    assert tuple(own.rotation_of(k, "x") for k in (4096, 576, 24, 12, 9)) == sizes
    assert own.rotation_of(4096, "y") == 2
    naive = config.replace(smooth=False)
    assert naive.rotation_of(4096) == (0 if asked == "auto" else sizes[0])


@pytest.mark.parametrize("scheme", ["per_token", "per_tensor", "static"])
def test_massive_activations_are_quantized_per_token(scheme: str) -> None:
    config = SmoothQuantConfig(activation_scheme=scheme)
    assert config.scheme_of(MASSIVE_PEAK - 0.1) == config.scheme_of(None) == scheme
    assert config.scheme_of(MASSIVE_PEAK) == "per_token"
    assert config.alpha_of(MASSIVE_PEAK) == ROTATED_ALPHA["per_token"]
    for kept in (config.replace(massive_activations="keep"), config.replace(smooth=False)):
        assert kept.scheme_of(1e6) == scheme


def test_settings_of_single_layers() -> None:
    """A full name wins over patterns, and an earlier pattern over a later one. Other layers keep their settings."""
    config = SmoothQuantConfig(
        alphas={"*.down_proj": 0.3, "a.*": 0.4, "a.down_proj": 0.5},
        schemes={"*.down_proj": "static", "a.*": "per_tensor"},
        clips={"b.*": 0.9},
    )
    assert config.alpha_of(1.0, "a.down_proj") == 0.5
    assert config.alpha_of(1.0, "b.down_proj") == 0.3
    assert config.alpha_of(1.0, "a.up_proj") == 0.4
    assert config.alpha_of(1.0, "b.up_proj") == ROTATED_ALPHA["per_token"]
    assert config.replace(alpha=0.1).alpha_of(1.0, "b.up_proj") == 0.1
    assert config.scheme_of(1.0, "a.down_proj") == "static"
    assert config.scheme_of(1.0, "a.up_proj") == "per_tensor"
    assert config.scheme_of(1.0, "b.up_proj") == "per_token"
    assert config.clip_of("b.down_proj") == 0.9 and config.clip_of("a.down_proj") == 1.0
    # The default alpha follows the layer's own scheme. An explicit scheme holds for massive activations too.
    assert config.alpha_of(1.0, "c.down_proj") == 0.3
    assert SmoothQuantConfig(schemes={"x": "static"}).alpha_of(1.0, "x") == ROTATED_ALPHA["static"]
    assert config.scheme_of(1e6, "a.down_proj") == "static"


def test_equal_configurations_have_equal_hashes() -> None:
    pairs = [("a", 0.0), ("b", 1.0)]
    one = SmoothQuantConfig(alpha=1, alphas=dict(pairs))
    assert hash(one) == hash(SmoothQuantConfig(alpha=1.0, alphas=dict(reversed(pairs))))


def test_formats_of_layers() -> None:
    """A full name counts before patterns; `skip` counts before `formats`; outliers are a part of W8A8."""
    config = SmoothQuantConfig(
        w_bit=4,
        skip=("*.v",),
        formats={"*.q": "w8a8", "a.q": "float", "*.v": "w8a8", "b.*": "float"},
        outliers="static",
        outlier_layers={"c.q": "dynamic"},
    )
    assert [config.format_of(n) for n in ("a.q", "b.q", "a.k")] == ["float", "w8a8", "w4a8"]
    patterns = [config.float_pattern(n) for n in ("a.q", "b.q", "a.v", "b.k", "a.k")]
    assert patterns == ["a.q", None, "*.v", "b.*", None]
    outliers = [config.outliers_of(n) for n in ("b.q", "c.q", "a.k", "a.q")]
    assert outliers == ["static", "dynamic", "none", "none"]
    head = config.for_head("b.k")
    assert (head.format_of("b.k"), head.outliers_of("b.k")) == ("w8a8", "none")
    own = config.replace(formats={"b.k": "w4a8"}).for_head("b.k")
    assert own.format_of("b.k") == "w4a8"


def test_rounding_of_layers() -> None:
    """GPTQ by default where weights have 4 bits, and nowhere else; other values hold for every layer."""
    config = SmoothQuantConfig(formats={"*.q": "w4a8", "*.v": "float"})
    assert config.weight_rounding == "auto" and not SmoothQuantConfig().rounds_by_gptq
    assert [config.rounding_of(n) for n in ("a.q", "a.k", "a.v")] == ["gptq", "nearest", "nearest"]
    four = SmoothQuantConfig(w_bit=4, formats={"*.k": "w8a8"})
    assert [four.rounding_of(n) for n in ("a.q", "a.k")] == ["gptq", "nearest"]
    assert config.rounds_by_gptq and four.rounds_by_gptq
    for rounding in ("nearest", "gptq"):
        own = config.replace(weight_rounding=rounding)
        assert {own.rounding_of(n) for n in ("a.q", "a.k")} == {rounding}
        assert own.rounds_by_gptq == (rounding == "gptq")
    head = four.for_head("lm_head")
    assert head.rounding_of("lm_head") == "nearest" and head.rounding_of("a.q") == "gptq"


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_configurations_from_before_auto_load(rounding: str) -> None:
    values = SmoothQuantConfig(weight_rounding=rounding, w_bit=4).to_dict()
    assert SmoothQuantConfig.from_dict(values).rounding_of("a") == rounding
