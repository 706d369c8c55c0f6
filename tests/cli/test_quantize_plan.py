"""`quantize --plan`, `--max-bytes` and `--max-kl`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints import WEIGHTS
from tests.support.command_line import QUANTIZE, Result, refused


def test_a_plan_by_hand(tiny: Path, text: Path, tmp_path: Path) -> None:
    plan = {
        "*.down_proj": {"format": "float"},
        "*.q_proj": {"scheme": "static", "rotation": "none"},
    }
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    options = ("--plan", file, "--calibration", text, *QUANTIZE)
    refusal = refused("quantize", tiny, *options, "-o", tmp_path / "q")
    assert "rotation" in refusal  # layers that read one tensor must agree
    plan["*.[qkv]_proj"] = plan.pop("*.q_proj")
    file.write_text(json.dumps(plan))
    done = Result("quantize", tiny, *options, "-o", tmp_path / "q", "--json").json
    seen = Result("inspect", tmp_path / "q", "--json").json
    assert done["groups"] == seen["groups"]
    schemes = {g["layers"].split(".")[-1]: g["activation_scheme"] for g in seen["groups"]}
    assert (schemes["q_proj"], schemes["o_proj"]) == ("static", "per_token")
    assert "down_proj" not in schemes
    reasons = {s["layers"].split(".")[-1]: s["reason"] for s in seen["skipped"]}
    assert "*.down_proj" in reasons["down_proj"]


def test_a_searched_plan(tiny: Path, text: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"calibration_window": 32}))
    common = ("quantize", tiny, "--calibration", text, "--config", settings, *QUANTIZE)
    done = Result(*common, "-o", tmp_path / "q", "--max-kl", "0", "--json")
    assert done.code == 2 and "no linear layer to quantize" in done.err  # all of them in float
    kept = json.loads((tmp_path / "q.plan.json").read_text())
    assert {entry["format"] for entry in kept.values()} == {"float"}
    large = Result(*common, "-o", tmp_path / "r", "--max-kl", "1000", "--json").json
    plan = json.loads((tmp_path / "r.plan.json").read_text())
    again = ("--plan", tmp_path / "r.plan.json", "-o", tmp_path / "s")
    by_hand = Result(*common, *again, "--json").json
    assert by_hand["config"] == large["config"] and by_hand["groups"] == large["groups"]
    assert len(plan) == large["quantized"]
    assert "fits into 7 bytes" in refused(*common, "-o", tmp_path / "t", "--max-bytes", "7")


def test_four_bits_are_calibrated_for(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Without smoothing as well: by default they are rounded by GPTQ."""
    weights = {}
    for name in ("default", "gptq", "nearest"):
        options = () if name == "default" else ("--weight-rounding", name)
        common = ("quantize", tiny, "--calibration", text, *QUANTIZE, "--w-bit", "4", "--no-smooth")
        Result(*common, *options, "-o", tmp_path / name)
        layers = load_file(tmp_path / name / WEIGHTS)
        weights[name] = torch.cat([v.flatten() for k, v in layers.items() if k.endswith("w_q4")])
        shown = " ".join(Result("inspect", tmp_path / name).out.split())
        assert ("by GPTQ" in shown) == (name != "nearest")
    assert torch.equal(weights["default"], weights["gptq"])
    assert not torch.equal(weights["default"], weights["nearest"])


def test_formats_by_options(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Static columns are calibrated for without smoothing, too."""
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"outlier_threshold": 1e-3}))
    common = ("quantize", tiny, "--calibration", text, "--config", settings, *QUANTIZE)
    made = Result(*common, "-o", tmp_path / "q", "--w-bit", "4", "--json").json
    assert {g["format"] for g in made["groups"]} == {"w4a8"}
    assert "those of 4 bits by GPTQ" in " ".join(Result("inspect", tmp_path / "q").out.split())
    columns = ("--outliers", "static", "--no-smooth")
    made = Result(*common, *columns, "-o", tmp_path / "r", "--json").json
    assert {g["format"] for g in made["groups"]} == {"w8a8, static outliers"}
    every = sum(g["count"] * g["in_features"] for g in made["groups"])
    assert sum(g["outlier_columns"] for g in made["groups"]) == every
    shown = " ".join(Result("inspect", tmp_path / "r").out.split())
    assert "static outliers" in shown


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--max-bytes", "1", "--max-kl", "1"), "--max-bytes searches a plan, which excludes --max-kl"),
        (("--max-kl", "1", "--search"), "--max-kl searches a plan, which excludes --search"),
        (("--max-kl", "1", "--stream"), "excludes --stream: search first, then give the plan"),
        (("--max-kl", "1", "--no-smooth"), "--max-kl measures smoothed layers"),
        (("--plan", "absent.json"), "absent.json cannot be read"),
        (("--w-bit", "3"), "--w-bit must be 4 or 8; got 3"),
        (("--outliers", "6.0"), "--outliers must be one of none, static, dynamic; got '6.0'"),
        (
            ("--w-bit", "4", "--format", "compressed-tensors"),
            "the settings ask for W4A8 (w_bit=4): leave out --w-bit, or --format.",
        ),
        (("--outliers", "static", "--format", "compressed-tensors"), "leave out --outliers, or --format."),
    ],
)  # fmt: skip
def test_refusals(tiny: Path, tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    said = " ".join(refused("quantize", tiny, "-o", tmp_path / "q", *options).split())
    assert sentence in said
    assert not list(tmp_path.iterdir())
