"""Plans: the settings of layers as one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smoothquant_kernels import SmoothQuantConfig, SmoothQuantError, apply_plan, read_plan
from smoothquant_kernels.plan import SETTINGS

PLAN: dict[str, dict[str, Any]] = {
    "a.q": {"format": "float"},
    "*.down": {
        "format": "w8a8",
        "scheme": "static",
        "clip": 0.5,
        "outliers": "static",
        "rotation": "none",
        "alpha": 0.25,
    },
    "*": {"format": "w4a8", "rotation": 128},
}


def test_each_setting_reaches_its_layers() -> None:
    base = SmoothQuantConfig(alpha=0.75, schemes={"*.up": "per_tensor", "*.down": "per_token"})
    config = apply_plan(base, PLAN)
    names = ("a.q", "b.q", "b.down", "b.up")
    assert [config.format_of(n) for n in names] == ["float", "w4a8", "w8a8", "w4a8"]
    assert [config.rotation_of(256, n) for n in names] == [128, 128, 0, 128]
    assert [config.alpha_of(None, n) for n in names] == [0.75, 0.75, 0.25, 0.75]
    assert [config.scheme_of(None, n) for n in names] == [
        "per_token", "per_token", "static", "per_tensor",
    ]  # fmt: skip
    assert [config.clip_of(n) for n in names] == [1.0, 1.0, 0.5, 1.0]
    assert [config.outliers_of(n) for n in names] == ["none", "none", "static", "none"]
    assert config.float_pattern("a.q") == "a.q" and config.float_pattern("b.q") is None
    assert SmoothQuantConfig.from_json(config.to_json()) == config


def test_the_plan_counts_before_the_configuration() -> None:
    base = SmoothQuantConfig(formats={"*.q": "float", "a.q": "w4a8"}, alphas={"c": 1.0})
    config = apply_plan(base, {"a.*": {"format": "w8a8"}, "*.q": {"format": "w4a8"}})
    # A full name counts before any pattern, also one of the configuration.
    assert [config.format_of(n) for n in ("a.q", "a.k", "b.q")] == ["w4a8", "w8a8", "w4a8"]
    assert config.alphas == {"c": 1.0}
    assert apply_plan(base, {}) == base


def test_every_setting_is_a_field() -> None:
    config = SmoothQuantConfig()
    assert all(getattr(config, field) == {} for field in SETTINGS.values())


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ([], "a plan must map layers to settings; got list"),
        ({"a": "w4a8"}, "must map names or patterns of layers to objects of settings; got 'a': 'w4a8'"),
        ({1: {}}, "must map names or patterns of layers to objects of settings; got 1: {}"),
        ({"a": {"bits": 4}}, "gives 'a' an unknown setting 'bits'; known are format, scheme, rotation"),
        ({"a": {"format": "int4"}}, "formats must be a mapping .* float, w8a8, w4a8; got"),
        ({"a": {"rotation": 3}}, "rotations must be a mapping"),
        ({"a": {"outliers": 6.0}}, "outlier_layers must be a mapping"),
    ],
)  # fmt: skip
def test_refusals(plan: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(SmoothQuantError, match=sentence):
        apply_plan(SmoothQuantConfig(), plan)
    if all(isinstance(name, str) for name in plan):
        file = tmp_path / "plan.json"
        file.write_text(json.dumps(plan))
        with pytest.raises(SmoothQuantError, match=f"plan.json: .*{sentence}"):
            read_plan(file)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(PLAN))
    assert read_plan(file) == PLAN
    file.write_text('{"a": {"format": "float"}, "a": {"format": "w8a8"}}')
    with pytest.raises(SmoothQuantError, match="not the JSON of a plan: 'a' stands there twice"):
        read_plan(file)
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(SmoothQuantError, match="is not the JSON of a plan"):
        read_plan(file)
    with pytest.raises(SmoothQuantError, match="cannot be read: No such file"):
        read_plan(tmp_path / "none.json")
