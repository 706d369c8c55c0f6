"""`quantize --search` and `quantize --stream` give the same results as the library functions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from smoothquant_kernels import load_quantized
from tests.support.command_line import QUANTIZE, Result, refused


def test_search_writes_a_checkpoint_with_the_found_settings(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    options = tmp_path / "settings.json"
    options.write_text(json.dumps({"calibration_window": 32, "calibration_tokens": 256}))
    arguments = ("quantize", tiny, "--search", "--calibration", text, "--config", options)
    done = Result(*arguments, "-o", tmp_path / "q", "--device", "cpu", "--json").json
    kept = json.loads((tmp_path / "q.search.json").read_text())
    config = done["config"]
    assert config["alphas"] or config["alpha"] is not None or config["clips"]
    assert json.dumps(config["alphas"]) in json.dumps(kept)  # the log ends with the result
    assert Result("inspect", tmp_path / "q", "--json").json["config"] == config
    again = Result(*arguments, "-o", tmp_path / "q", "--force", "--device", "cpu", "--json").json
    assert again["config"] == config
    assert json.loads((tmp_path / "q.search.json").read_text()) == kept


def test_streaming_writes_the_same_model(
    tiny: Path, text: Path, checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "q"
    common = ("--calibration", text, *QUANTIZE)
    done = Result("quantize", tiny, "-o", output, "--stream", *common, "--json").json
    seen, whole = (Result("inspect", path, "--json").json for path in (output, checkpoint))
    for key in ("quantized", "smoothing", "groups", "skipped", "config"):
        assert seen[key] == done[key] == whole[key], key
    sizes = [layer["out_features"] * layer["in_features"] for layer in seen["layers"]]
    assert done["bytes"]["linears_before"] == 4 * sum(sizes)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        a, b = (load_quantized(path)(input_ids=ids).logits for path in (output, checkpoint))
    assert torch.equal(a, b)
    shown = Result("quantize", tiny, "-o", tmp_path / "r", "--stream", *common)
    assert shown.code == 0 and "saved" in shown.out, shown.err


def test_the_output_head(tiny: Path, text: Path, checkpoint: Path, tmp_path: Path) -> None:
    common = ("quantize", tiny, "--quantize-head", "--scheme", "static", "--calibration", text)
    done = Result(*common, "-o", tmp_path / "q", *QUANTIZE, "--json").json
    assert done["config"]["quantize_head"] and done["quantized"] == 15 and not done["skipped"]
    head = done["groups"][-1]
    assert (head["layers"], head["activation_scheme"]) == ("lm_head", "per_token")
    streamed = Result(*common, "-o", tmp_path / "s", "--stream", *QUANTIZE, "--json").json
    for key in ("quantized", "smoothing", "groups", "skipped", "config"):
        assert streamed[key] == done[key], key
    seen = Result("inspect", tmp_path / "q", "--json").json
    layer = next(layer for layer in seen["layers"] if layer["name"] == "lm_head")
    n, k = layer["out_features"], layer["in_features"]
    assert layer["bytes"] == n * k + 4 * (n + k) and seen["groups"] == done["groups"]
    assert done["bytes"]["linears_after"] == seen["bytes"]["quantized_layers"]
    whole = Result("inspect", checkpoint, "--json").json["bytes"]
    assert seen["bytes"]["float_tensors"] == whole["float_tensors"] - 4 * n * k
    shown = Result("inspect", tmp_path / "q")
    assert "output head too" in shown.out and "0 left in float" in shown.out


def test_a_model_without_a_head(tmp_path: Path, tiny: Path, text: Path) -> None:
    folder = tmp_path / "classifier"
    shutil.copytree(tiny, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["architectures"] = ["LlamaModel"]
    (folder / "config.json").write_text(json.dumps(settings))
    said = refused(
        "quantize",
        folder,
        "-o",
        tmp_path / "q",
        "--stream",
        "--quantize-head",
        *QUANTIZE,
        "--calibration",
        text,
    )
    assert "--quantize-head: LlamaModel has no output head" in said and "leave it out" in said
    named = tmp_path / "settings.json"
    named.write_text(json.dumps({"schemes": {"lm_head": "static"}}))
    said = refused(
        "quantize",
        tiny,
        "-o",
        tmp_path / "q",
        "--quantize-head",
        "--config",
        named,
        "--calibration",
        text,
        *QUANTIZE,
    )
    assert "an int8 output head always has a scale per token" in said
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--search", "--stream"), "--search needs the whole model in memory"),
        (("--search", "--no-smooth"), "nothing to search without smoothing"),
        (("--restart",), "give both"),
    ],
)
def test_conflicting_options_are_refused(
    tiny: Path, tmp_path: Path, flags: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refused("quantize", tiny, "-o", tmp_path / "q", *flags)
    assert not (tmp_path / "q").exists()
