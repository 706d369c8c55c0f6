"""`--kv-cache` of quantize, evaluate and generate, and what inspect says of a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoothquant_kernels import load_quantized
from smoothquant_kernels.checkpoint.kv_calibration import KV_FILE, read_calibration
from smoothquant_kernels.cli import evaluate as command
from smoothquant_kernels.kv_cache.calibration import calibration_of
from tests.support.command_line import QUANTIZE, Result, refused


@pytest.fixture(scope="module")
def calibrated(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a calibrated cache."""
    folder = tmp_path_factory.mktemp("kv") / "w8a8"
    found = Result(
        "quantize", tiny, "-o", folder, "--calibration", text, *QUANTIZE, "--kv-cache", "int8-static",
        "--json",
    ).json  # fmt: skip
    assert found["kv_cache"] == {"layers": 2, "tokens": 200}
    assert found["calibration"]["tokens"] == 200
    return folder


def test_quantize_stores_the_calibration(calibrated: Path) -> None:
    found = calibration_of(load_quantized(calibrated))
    assert found is not None
    assert (found.tokens, list(found.layers)) == (200, [0, 1])


def test_quantize_calibrates_a_cache_even_if_nothing_else(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    found = Result(
        "quantize", tiny, "-o", tmp_path / "plain", "--calibration", text, *QUANTIZE, "--no-smooth",
        "--kv-cache", "int8-static",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert "2 layers calibrated on 200 tokens" in found.out
    assert read_calibration(tmp_path / "plain").tokens == 200


def test_without_the_option_nothing_is_stored(checkpoint: Path) -> None:
    assert not (checkpoint / KV_FILE).exists()


@pytest.mark.parametrize("name", ["int8", "int8-static"])
def test_generate(name: str, calibrated: Path) -> None:
    arguments = ("generate", calibrated, "-p", "the cat sat", "--device", "cpu", "--json")
    arguments += ("--max-new-tokens", "12")
    plain, cached = Result(*arguments).json, Result(*arguments, "--kv-cache", name).json
    assert (plain["kv_cache"], plain["cache_bytes"]) == (None, None)
    assert cached["kv_cache"] == name and cached["cache_bytes"] > 0
    assert cached["new_tokens"] == plain["new_tokens"]


@pytest.mark.parametrize("name", ["int8", "int8-static"])
def test_evaluate_measures_the_error_of_the_cache(name: str, calibrated: Path, text: Path) -> None:
    arguments = ("evaluate", calibrated, "--text", text, "--max-tokens", "100", "--window", "50")
    found = Result(*arguments, "--device", "cpu", "--kv-cache", name, "--json").json
    cache, result = found["kv_cache"], found["result"]
    assert cache["name"] == name
    assert cache["tokens"] == result["tokens"] == 99
    # The float cache scores what whole windows do.
    assert cache["float_perplexity"] == pytest.approx(result["perplexity"], rel=1e-4)
    assert 0 < cache["mean_kl"] < 0.01
    assert cache["cache_tokens"] == 49
    assert cache["cache_bytes"] < cache["float_cache_bytes"]
    shown = command.render(found)
    cells = [str(cell) for column in shown.columns for cell in column.cells]
    assert f"perplexity, {name} cache" in cells
    assert "bytes of 49 tokens" in cells


def test_evaluate_without_the_option_is_as_before(checkpoint: Path, text: Path) -> None:
    found = Result("evaluate", checkpoint, "--text", text, "--max-tokens", "50", "--json").json
    assert found["kv_cache"] is None
    assert len(command.render(found).rows) == 4


def test_inspect_shows_what_a_cache_costs(calibrated: Path, checkpoint: Path) -> None:
    found, without = Result("inspect", calibrated, "--json").json, Result("inspect", checkpoint)
    cache = found["kv_cache"]
    assert cache["calibrated"] is True
    config: Any = load_quantized(calibrated).config
    heads = config.num_hidden_layers * config.num_key_value_heads * 2
    dim, padded = config.head_dim, -(-config.head_dim // 16) * 16
    assert cache["bytes_per_token"] == {
        "float16": heads * dim * 2, "int8": heads * (padded + 4), "int8-static": heads * padded,
    }  # fmt: skip
    assert cache["bytes"]["4096"]["int8"] == 4096 * heads * (padded + 4)
    assert list(cache["bytes"]) == ["4096", "32768"]
    shown = Result("inspect", calibrated).out
    assert "cache of 32,768 tokens" in shown
    assert "calibrated for int8-static" in shown
    assert "calibrated for int8-static" not in without.out


def test_refusals(tiny: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    remedy = (
        "run `smoothquant-kernels quantize MODEL --output DIR --kv-cache int8-static` and give DIR, or give "
        "--kv-cache int8."
    )
    for name in ("generate", "evaluate"):
        more = ("-p", "the cat") if name == "generate" else ("--text", text)
        assert refused(name, checkpoint, *more, "--kv-cache", "int8-static") == (
            f"{checkpoint} was quantized without the calibration that static scales come from: {remedy}"
        )
        assert refused(name, tiny, *more, "--kv-cache", "int8-static") == (
            f"{tiny} is a float model, without the calibration that static scales come from: {remedy}"
        )
        said = refused(name, checkpoint, *more, "--kv-cache", "int4")
        assert said == "--kv-cache must be int8 or int8-static; got 'int4'."
    quantize = ("quantize", tiny, "-o", tmp_path / "out", "--calibration", text, *QUANTIZE)
    assert "needs no calibration" in refused(*quantize, "--kv-cache", "int8")
    said = refused(*quantize, "--kv-cache", "fp8")
    assert said == "--kv-cache must be int8-static here; got 'fp8'."
    said = refused(*quantize, "--kv-cache", "int8-static", "--stream")
    assert "which --stream never has in memory" in said
    assert not (tmp_path / "out").exists()


def test_a_float_model_has_an_int8_cache(tiny: Path) -> None:
    found = Result("generate", tiny, "-p", "the cat", "--kv-cache", "int8", "--device", "cpu")
    assert found.code == 0, found.err
    assert found.out.startswith("the cat")
